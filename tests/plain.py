"""A module and its training in plain Lightning: must be importable where ds_lightning is not."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Plain(pl.LightningModule):
    """BatchNorm, a hyper-parameter, an optimizer with state and a scheduler."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        y: Tensor = self.net(x + self.global_rank)
        return y.square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def plain_fit(folder: str, devices: int, strategy: str, epochs: int, ckpt_path: str | None = None) -> pl.Trainer:
    """48 samples in batches of 4 per rank, and a checkpoint ``plain.ckpt`` at the end of every epoch."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        strategy=strategy,
        devices=devices,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, "plain", enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plain(width=5), DataLoader(torch.randn(48, 4), 4), ckpt_path=ckpt_path)
    return trainer
