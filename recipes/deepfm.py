"""The click recipe: DeepFM (Guo et al. 2017), and the LightningModule that trains it on click-through data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC
from typing_extensions import override

from recipes.task import Task

Batch = tuple[Tensor, Tensor, Tensor]  # categories (rows, fields), numbers (rows, fields), clicked or not (rows)


class Fields(NamedTuple):
    """What a model must know of its data.

    Attributes:
        categories: for each categorical field the number of its categories.
        numeric: number of numeric fields.
        fingerprint: of the meaning of the category numbers; a checkpoint goes with one fingerprint.
    """

    categories: tuple[int, ...]
    numeric: int
    fingerprint: str = ""


class HasFields(Protocol):
    """Data that know their fields as soon as they are made, before any rank exists."""

    fields: Fields


def fields_of(data: HasFields) -> Fields:
    """The fields of a data module; lets a configuration give a model the fields of `${data}`."""
    return data.fields


class DeepFM(nn.Module):
    """A factorization machine and a deep network over the same embeddings; their outputs add up to the logit.

    A categorical field's vector is its category's embedding, a numeric field's is one learned vector times the value,
    so numeric fields take part in the pairs of the factorization machine too. All categorical fields share one table,
    in which a field's categories begin at its offset.

    Args:
        fields: sizes of the fields.
        embedding_dim: length of a field's vector.
        hidden: widths of the deep network's layers.
        dropout: after each of them.
        sparse: sparse gradients for the tables, which DS-Sync then averages by rows. Needs an optimizer that takes
            them, such as Adagrad, without weight decay.
    """

    offsets: Tensor

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int = 10,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.5,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if not fields.categories or min(fields.categories) < 1 or fields.numeric < 0:
            raise ValueError(
                f"the fields are {tuple(fields)}, but there must be a categorical one, each with a category or more. "
                "HINT: prepare the data anew."
            )
        self.fields = fields
        rows = sum(fields.categories)
        sizes = torch.tensor([0, *fields.categories[:-1]])
        self.register_buffer("offsets", sizes.cumsum(0), persistent=False)
        self.weights = nn.Embedding(rows, 1, sparse=sparse)
        self.vectors = nn.Embedding(rows, embedding_dim, sparse=sparse)
        self.numeric_weights = nn.Linear(fields.numeric, 1)  # its bias is the whole model's
        self.numeric_vectors = nn.Parameter(torch.empty(fields.numeric, embedding_dim))
        for vectors in (self.vectors.weight, self.numeric_vectors):
            nn.init.normal_(vectors, std=0.01)  # products of pairs start near 0
        nn.init.zeros_(self.weights.weight)
        layers: list[nn.Module] = []
        width = (len(fields.categories) + fields.numeric) * embedding_dim
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))

    @override
    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        rows = categories + self.offsets
        vectors = torch.cat([self.vectors(rows), numbers.unsqueeze(2) * self.numeric_vectors], dim=1)
        first = self.weights(rows).sum(dim=(1, 2)) + self.numeric_weights(numbers).squeeze(1)
        logits: Tensor = first + pairwise(vectors) + self.deep(vectors.flatten(1)).squeeze(1)
        return logits


def pairwise(vectors: Tensor) -> Tensor:
    """The sum over all pairs of fields of the products of their vectors, in time linear in the number of fields.

    Args:
        vectors: of shape (rows, fields, length).
    """
    return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)


class ClickTask(Task):
    """Trains `net` with binary cross entropy and logs the loss, the AUC (a fraction) and the log-loss.

    Validation and test metrics are torchmetrics', synchronized over ranks: with the exact shards of `recipes.data`
    they are those of the whole split.

    Args:
        net: maps categories and numbers to logits.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer; see :class:`Task`.
        thresholds: null computes the exact AUC from all scores, 12 bytes a row on every rank; a number of thresholds
            computes it from a histogram of that size.
    """

    def __init__(
        self,
        net: DeepFM,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        thresholds: int | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.net = net
        self.val_auc, self.test_auc = BinaryAUROC(thresholds=thresholds), BinaryAUROC(thresholds=thresholds)
        self.val_logloss, self.test_logloss = MeanMetric(), MeanMetric()

    @override
    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        logits: Tensor = self.net(categories, numbers)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        categories, numbers, labels = batch
        loss = F.binary_cross_entropy_with_logits(self(categories, numbers), labels)
        self.log_train_loss(loss, len(labels))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_auc, self.val_logloss)
        self.log("val/auc", self.val_auc, prog_bar=True)
        self.log("val/logloss", self.val_logloss)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_auc, self.test_logloss)
        self.log("test/auc", self.test_auc)
        self.log("test/logloss", self.test_logloss)

    @override
    def on_test_epoch_end(self) -> None:
        # What no model can beat, where the data are synthetic and know it.
        for name, value in getattr(self.trainer.datamodule, "bayes", {}).items():  # type: ignore[attr-defined]
            self.log(f"test/bayes_{name}", value, sync_dist=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fields"] = tuple(self.net.fields)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        theirs, ours = Fields(*checkpoint.get("fields", self.net.fields)), self.net.fields
        if theirs != ours:
            raise ValueError(
                f"the checkpoint was trained on data with {sum(theirs.categories)} categories in "
                f"{len(theirs.categories)} fields, {theirs.numeric} numeric fields and fingerprint "
                f"{theirs.fingerprint!r}, but these have {sum(ours.categories)}, {len(ours.categories)}, "
                f"{ours.numeric} and {ours.fingerprint!r}. HINT: point data.root at the data it was trained on."
            )

    def _evaluate(self, batch: Batch, auc: BinaryAUROC, logloss: MeanMetric) -> None:
        categories, numbers, labels = batch
        logits = self(categories, numbers)
        logloss.update(F.binary_cross_entropy_with_logits(logits, labels), len(labels))
        # Probabilities: given logits, the metric would judge batch by batch whether they are any. It would rank NaN.
        auc.update(logits.sigmoid().nan_to_num(0.5), labels.int())
