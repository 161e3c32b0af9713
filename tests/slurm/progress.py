"""A callback that tells the test how far a job of Slurm's is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Progress(pl.Callback):
    """Appends each step that a rank begins to a file of its own, and takes a little time for it.

    Args:
        folder: Of the files.
        pause: Seconds.
    """

    def __init__(self, folder: str, pause: float) -> None:
        self.folder, self.pause = Path(folder), pause

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(self.pause)
        with (self.folder / f"rank_{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {os.environ.get('SLURM_RESTART_COUNT', 0)}\n")
