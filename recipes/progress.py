"""Progress that suits where it is read: rich bars on a terminal, one line per epoch in a pipe or a log file."""

from __future__ import annotations

import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override


def progress(metric: str, leave: bool = False) -> Callback:
    """The progress callback for this process's standard output.

    Args:
        metric: of the validation, to show at its end.
        leave: keep finished bars on the screen.
    """
    return RichProgressBar(leave=leave) if sys.stdout.isatty() else EpochLines(metric)


class EpochLines(Callback):
    """Prints one line per epoch: the step and those metrics of the epoch that are there."""

    def __init__(self, metric: str) -> None:
        self.shown = ("train/loss", "val/loss", f"val/{metric}")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics  # on every rank: computing them is collective
        if trainer.is_global_zero:
            values = "  ".join(f"{name} {float(metrics[name]):.3f}" for name in self.shown if name in metrics)
            epoch = f"epoch {trainer.current_epoch + 1:3d}/{trainer.max_epochs}"
            print(f"{epoch}  step {trainer.global_step:5d}  {values}", flush=True)
