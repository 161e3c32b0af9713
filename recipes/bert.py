"""The question-answering recipe: a BERT that marks where the answer is, and how its answer is read off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.text import SQuAD
from typing_extensions import override

from recipes.squad import QuestionData, from_hub, load_tokenizer, vocabulary_of
from recipes.task import Task

Batch = dict[str, Any]
Array = np.ndarray[Any, Any]


def pretrained(name: str = "bert-large-uncased-whole-word-masking") -> nn.Module:
    """A pretrained model with a head that marks answers, from a hub name or a local folder."""
    from transformers import AutoModelForQuestionAnswering

    net = from_hub("model", AutoModelForQuestionAnswering.from_pretrained, name)
    # Loaded for use: in evaluation mode, without dropout, and perhaps in half precision.
    module: nn.Module = net.float().train()
    return module


def vocabulary_of_model(name: str) -> str | None:
    """The digest of the vocabulary of a pretrained model's own tokenizer, None where it was saved without one."""
    try:
        return vocabulary_of(load_tokenizer(name))
    except FileNotFoundError:
        return None


def tiny(
    vocab_size: int, hidden_size: int = 64, layers: int = 2, heads: int = 4, max_length: int = 128, dropout: float = 0.1
) -> nn.Module:
    """A small BERT with fresh weights, which a laptop trains in a minute."""
    from transformers import BertConfig, BertForQuestionAnswering

    if hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size is {hidden_size}, but must be a multiple of twice the {heads} heads. HINT: 64, 128"
        )
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        # BERT's 0.02 goes with 768 units; narrower layers need larger weights for outputs of the same size.
        initializer_range=0.02 * (768 / hidden_size) ** 0.5,
    )
    net: nn.Module = BertForQuestionAnswering(config)
    # Positions start as sinusoids of the usual size, so that neighbours are alike and the next token is learnt sooner.
    angles = torch.arange(max_length)[:, None] * torch.exp(
        -math.log(1e4) * torch.arange(0, hidden_size, 2) / hidden_size
    )
    waves = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    net.get_parameter("bert.embeddings.position_embeddings.weight").data = waves * config.initializer_range * 2**0.5
    return net


def best_span(starts: Array, ends: Array, offsets: Array, n_best: int, longest: int) -> tuple[float, tuple[int, int]]:
    """The span of the context with the largest sum of logits over all windows of one question.

    Args:
        starts: logits of an answer's first token, one row per window.
        ends: logits of its last token.
        offsets: first and last + 1 character of each token, equal for those that are not of the context.
        n_best: tokens considered as first and as last token, of each window; all, if these make no span. As in SQuAD's
            own code the question's are among them, but make no span.
        longest: tokens of an answer.

    Returns:
        Sum of logits, and first and last + 1 character; minus infinity where no window has a context.
    """
    best, span = float("-inf"), (0, 0)
    for start, end, where in zip(starts, ends, offsets, strict=True):
        context = where[:, 1] > where[:, 0]
        window = context.nonzero()[0].max(initial=-1) + 2  # with [SEP], and without what pads it
        first, last = (np.argsort(-logits[:window], kind="stable")[:n_best] for logits in (start, end))
        first, last = first[context[first]], last[context[last]]
        length = last[None, :] - first[:, None] + 1
        score = np.where((length >= 1) & (length <= longest), start[first][:, None] + end[last][None, :], -np.inf)
        if score.size and score.max() > best:
            i, j = np.unravel_index(score.argmax(), score.shape)
            best, span = float(score[i, j]), (int(where[first[i], 0]), int(where[last[j], 1]))
    if best == float("-inf") and n_best < starts.shape[1]:
        return best_span(starts, ends, offsets, starts.shape[1], longest)
    return best, span


def decode(
    starts: Array,
    ends: Array,
    offsets: Array,
    context: str,
    null_threshold: float | None = None,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> str:
    """The answer to one question from the logits of all its windows, cut out of the context as it was written.

    With a `null_threshold` it is empty if [CLS] scores higher by more than that, in the window where it scores least.
    """
    score, (first, last) = best_span(starts, ends, offsets, n_best, max_answer_length)
    if null_threshold is not None and (starts[:, 0] + ends[:, 0]).min() - score > null_threshold:
        return ""
    return context[first:last]


class QuestionAnswering(Task):
    """Trains `net` to mark the first and last token of the answer, and logs F1 and exact match as fractions.

    Each rank decodes its own questions completely, so metrics synchronized over ranks are those of the whole split.

    Args:
        net: a transformers model for question answering.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer; see :class:`Task`.
        null_threshold: SQuAD 2.0's: answer nothing if [CLS] scores higher than the best answer by more than this. None
            always answers.
        n_best: tokens considered as the first and as the last of an answer.
        max_answer_length: in tokens.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        null_threshold: float | None = None,
        n_best: int = 20,
        max_answer_length: int = 30,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.net = net
        self.decoding: dict[str, Any] = {
            "null_threshold": null_threshold,
            "n_best": n_best,
            "max_answer_length": max_answer_length,
        }
        self.val_metric, self.test_metric = SQuAD(), SQuAD()

    @override
    def setup(self, stage: str) -> None:
        data, config = self._data, cast(Any, self.net.config)
        rows, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
        if data.vocab_size > rows:
            raise ValueError(
                f"the tokenizer has {data.vocab_size} pieces, but the model's vocabulary {rows}. "
                "HINT: data.tokenizer must be the tokenizer of model.net; a new model needs a larger vocab_size."
            )
        name = getattr(self.net, "name_or_path", "")
        if name and vocabulary_of_model(name) not in (None, data.vocabulary):
            raise ValueError(
                f"data.tokenizer has another vocabulary than the model {name!r}. "
                "HINT: data.tokenizer=${model.net.name}"
            )
        tables = [m for m in self.net.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == positions]
        if any(table.padding_idx for table in tables):
            positions -= config.pad_token_id + 1  # RoBERTa counts positions from there
        if positions and 0 < positions < data.max_length:
            raise ValueError(
                f"data.max_length is {data.max_length}, but the model has {positions} positions. "
                f"HINT: data.max_length={positions} or less."
            )

    @property
    def _data(self) -> QuestionData:
        return cast(Any, self.trainer).datamodule  # type: ignore[no-any-return]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vocabulary"] = self._data.vocabulary

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and checkpoint.get("vocabulary") != self._data.vocabulary:
            raise ValueError(
                "the checkpoint was trained with another vocabulary. HINT: resume with the same data.tokenizer; "
                "the vocabulary that data=docs trains depends on Python's version and data.split_seed."
            )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch["inputs"]).loss
        self.log_train_loss(loss, len(batch["inputs"]["input_ids"]))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metric)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metric)

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._log_metric("val", self.val_metric)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metric("test", self.test_metric)

    def _evaluate(self, batch: Batch, metric: SQuAD) -> None:
        output = self.net(**batch["inputs"])
        starts, ends = (logits.float().cpu().numpy() for logits in (output.start_logits, output.end_logits))
        cuts = np.cumsum(batch["windows"])[:-1]
        by_question = (np.split(array, cuts) for array in (starts, ends, batch["offsets"]))
        answers = [decode(*row, **self.decoding) for row in zip(*by_question, batch["context"], strict=True)]
        metric.update(
            [{"id": id, "prediction_text": answer} for id, answer in zip(batch["id"], answers, strict=True)],
            [{"id": id, "answers": {"text": gold}} for id, gold in zip(batch["id"], batch["answers"], strict=True)],
        )

    def _log_metric(self, split: str, metric: SQuAD) -> None:
        # Computing has synchronized it; sync_dist says so to Lightning.
        values = {f"{split}/{name}": value / 100 for name, value in metric.compute().items()}
        self.log_dict(values, prog_bar=split == "val", sync_dist=True)
        metric.reset()
