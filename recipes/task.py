"""What the LightningModules of all recipes share: optimizers, schedules by step or epoch, and the times they log."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import Metric
from typing_extensions import override


class Task(LightningModule):
    """Makes the optimizer and its schedule, and logs the training loss and the seconds of training.

    Args:
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer. One that takes `num_training_steps` as well,
            such as :func:`linear_decay`, gets the optimizer steps of the whole run and is stepped after each of them;
            any other is stepped once per epoch.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.start = self.paused = 0.0

    @override
    def on_train_start(self) -> None:
        self.start = time.perf_counter()

    @override
    def on_validation_start(self) -> None:
        self.paused = time.perf_counter()
        self._count_in_full_precision()

    @override
    def on_test_start(self) -> None:
        self._count_in_full_precision()

    def _count_in_full_precision(self) -> None:
        """`trainer.precision=bf16-true` converts metrics, too, whose sums would then stop growing at 256."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.to(torch.float32)

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            # The time of training at this point of the learning curve.
            self.log("val/seconds", self.paused - self.start, sync_dist=True)

    @override
    def on_validation_end(self) -> None:
        self.start += time.perf_counter() - self.paused  # validation is no training

    @override
    def on_train_epoch_end(self) -> None:
        self.log("train/seconds", time.perf_counter() - self.start, sync_dist=True)
        self.log("train/steps", float(self.trainer.global_step), sync_dist=True)

    def log_train_loss(self, loss: Tensor, samples: int) -> None:
        """One reduction per epoch. A mean over ranks at every step would be the world-wide wait DS-Sync avoids."""
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=samples)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(p for p in self.parameters() if p.requires_grad)
        if self.make_scheduler is None:
            return optimizer
        if "num_training_steps" not in inspect.signature(self.make_scheduler).parameters:
            return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.make_scheduler(optimizer, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def linear_decay(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.1) -> LRScheduler:
    """Linear warm-up over the first `warmup` (a share) of the steps, then linear decay to 0."""
    return LambdaLR(optimizer, lambda step: _shape(step, num_training_steps, warmup, lambda left: left))


def cosine_decay(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.05) -> LRScheduler:
    """Linear warm-up over the first `warmup` (a share) of the steps, then half a cosine to 0."""
    return LambdaLR(
        optimizer,
        lambda step: _shape(step, num_training_steps, warmup, lambda left: 0.5 - 0.5 * math.cos(math.pi * left)),
    )


def _shape(step: int, steps: int, warmup: float, decay: Callable[[float], float]) -> float:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is {warmup}, but is a share of the steps: at least 0 and below 1")
    first = warmup * steps
    return (step + 1) / (first + 1) if step < first else decay(max(0.0, (steps - step) / max(1.0, steps - first)))
