"""What torchrun's ranks train in `test_torchrun.py`: `torchrun ... -m tests.faults.elastic FOLDER`."""

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ds_lightning import DSSyncStrategy
from recipes.data import RecipeData

EPOCHS, STEPS, EVERY = 3, 12, 5  # steps of an epoch on four ranks, and between checkpoints


class Noise(RecipeData):
    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        size = STEPS * 4 * self.batch_size
        x, y = torch.randn(size, 10, generator=generator), torch.randint(0, 3, (size,), generator=generator)
        self.train_set, self.val_set = TensorDataset(x, y), TensorDataset(x[:64], y[:64])


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Notes(pl.Callback):
    """One file for each process: who it is, where it began; and at step `fault`, of the first attempt, it stays."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        schedule = trainer.strategy._groups.schedule
        words = trainer.global_rank, trainer.world_size, trainer.global_step, os.getpid(), os.getppid(), schedule
        note = self.folder / f"began-{time.time_ns()}-{trainer.global_rank}"
        note.with_suffix(".tmp").write_text(" ".join(map(str, words)))
        note.with_suffix(".tmp").rename(note)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        fault = self.folder / f"fault-{trainer.global_rank}"
        if fault.exists() and trainer.global_step == int(fault.read_text()):
            fault.unlink()
            (self.folder / "now").touch()
            time.sleep(60)  # until it is killed


def train(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        # What torchrun made of --nproc-per-node and --nnodes at this start.
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        strategy=DSSyncStrategy(timeout=timedelta(seconds=20)),
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=EVERY, save_last=True), Notes(folder)],
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Net()
    trainer.fit(model, Noise(8), ckpt_path="last")
    if trainer.is_global_zero:
        torch.save({"steps": trainer.global_step, "model": model.state_dict()}, folder / "end")


if __name__ == "__main__":
    train(sys.argv[1])
