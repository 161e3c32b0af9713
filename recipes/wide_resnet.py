"""The vision recipe: wide ResNets from timm's blocks, and the LightningModule that trains a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from recipes.task import Task

Batch = tuple[Tensor, Tensor]

# All widths of the network are multiples of 16.
NORMS = {"batch": BatchNormAct2d, "group": partial(GroupNormAct, group_size=16)}


def wide_resnet(
    depth: int = 26, width: int = 10, num_classes: int = 10, in_channels: int = 3, norm: str = "batch"
) -> nn.Module:
    """A wide ResNet for small images: a 3x3 stem, three stages of pre-activation blocks, no early pooling.

    The stages have `16 * width`, `32 * width` and `64 * width` channels and n blocks each. Two conventions count the
    depth: 6n + 2 (the paper's WRN-26-10) and 6n + 4, which counts the shortcuts' convolutions too (WRN-28-10 of the
    wide ResNet article). Both are taken, so 26 and 28 name the same network.

    WRN-26-10 has 36,479,194 parameters for 10 classes of colour images, 36,536,884 for 100.

    Args:
        depth: 6n + 2 or 6n + 4.
        width: factor on the number of channels.
        num_classes: size of the output.
        in_channels: 1 for grey images, 3 for colour.
        norm: `batch`, or `group`: groups of 16 channels of each image, which other workers' images do not matter to,
            for shards that are not iid.
    """
    blocks, convention = divmod(depth - 2, 6)
    if blocks < 1 or convention not in (0, 2):
        raise ValueError(
            f"depth is {depth}, but a wide ResNet has depth 6n + 2 or 6n + 4 with n >= 1. "
            "HINT: 10, 16, 22, 28, 40 or 14, 20, 26, 32, 38."
        )
    if width < 1:
        raise ValueError(f"width is {width}, but must be at least 1")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, but must be batch or group. HINT: group for shards that are not iid.")
    net = ResNetV2(
        layers=[blocks] * 3,
        channels=(16 * width, 32 * width, 64 * width),
        num_classes=num_classes,
        in_chans=in_channels,
        stem_chs=16,
        basic=True,
        bottle_ratio=1.0,
        norm_layer=NORMS[norm],
        conv_layer=create_conv2d,
    )
    net.stem = create_conv2d(in_channels, 16, 3)  # timm's own stem would shrink a 32x32 image to 8x8 at once
    net.init_weights(zero_init_last=False)
    module: nn.Module = net
    return module


def timm_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A timm model by name, with fresh weights; the ImageNet recipe takes `wide_resnet50_2`."""
    module: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    return module


class ImageClassifier(Task):
    """Trains `net` with cross entropy and logs loss and accuracy.

    Validation and test metrics are torchmetrics', synchronized over ranks: with the exact shards of `recipes.data`
    they are those of the whole split.

    Args:
        net: maps images to logits.
        num_classes: number of logits; from 100 on top-5 accuracy is logged as well.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer; see :class:`Task`.
        label_smoothing: of the training loss: the share of the target that is spread over all classes.
        channels_last: keep images and kernels in the order of memory that tensor cores want.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing is {label_smoothing}, but must be at least 0 and below 1")
        self.order = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.order)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        accuracies: dict[str, Any] = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes >= 100:
            accuracies["top5_accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        accuracy = MetricCollection(accuracies)
        self.val_accuracy, self.test_accuracy = accuracy.clone("val/"), accuracy.clone("test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    @override
    def setup(self, stage: str) -> None:
        classes = getattr(self.trainer.datamodule, "num_classes", self.num_classes)  # type: ignore[attr-defined]
        if classes != self.num_classes:
            raise ValueError(
                f"the data have {classes} classes, but model.num_classes is {self.num_classes}. "
                f"HINT: add model.num_classes={classes}."
            )
        channels = getattr(self.trainer.datamodule, "channels", None)  # type: ignore[attr-defined]
        taken = next((m.in_channels for m in self.net.modules() if isinstance(m, nn.Conv2d)), channels)
        if channels not in (None, taken):
            raise ValueError(
                f"the images have {channels} channels, but the network takes {taken}. "
                f"HINT: add model.net.in_channels={channels}."
            )

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.contiguous(memory_format=self.order))
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log_train_loss(loss, len(labels))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_loss, self.val_accuracy)
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_accuracy, prog_bar=True)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_loss, self.test_accuracy)
        self.log("test/loss", self.test_loss)
        self.log_dict(self.test_accuracy)

    def _evaluate(self, batch: Batch, loss: MeanMetric, accuracy: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        loss.update(F.cross_entropy(logits, labels), len(labels))
        accuracy.update(logits, labels)
