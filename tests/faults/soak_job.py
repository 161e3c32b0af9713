"""The job that the soak trains on an emulated host per rank, and what each rank writes down while it does.

A diary is a file of lines, each written in one call, so that a kill leaves the lines before it whole:
``ready`` (the process groups exist), ``begin STEP``, ``step STEP LOSS``, ``saving STEP FILE`` and ``saved STEP FILE``,
``memory STEP RSS TENSORS BLOCKS FILES`` and, as the last, ``done DIGEST``, ``stopped`` or ``failed MESSAGE``.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cluster import Cluster, _enter
from ds_lightning import DSSyncStrategy
from ds_lightning.checkpoint import AtomicCheckpointIO
from recipes.data import ResumableLoader, Shuffle
from tests.faults.soak_checks import SAVE_EVERY

BATCH, EPOCH = 16, 50  # samples and batches of a rank


class Diary:
    """What a rank writes down."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, line: str) -> None:
        os.write(self._file, (" ".join(line.split()) + "\n").encode())


class Net(pl.LightningModule):
    """BatchNorm, momentum and a learning rate of its own at every step: whatever is not restored shows in the loss."""

    def __init__(self, pace: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128)]
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(128, 10))
        self.pace = pace

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(self.pace)  # as a GPU computes, the processor free
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step % 97))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Keep(pl.Callback):
    """Keeps the diary.

    Args:
        diary: To write into.
        measure_every: Steps between measurements of memory; 0: none.
    """

    def __init__(self, diary: Diary, measure_every: int) -> None:
        self.diary, self.measure_every = diary, measure_every

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.diary.write("ready")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.diary.write(f"begin {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.diary.write(f"step {step} {float(outputs['loss']).hex()}")
        if self.measure_every and step % self.measure_every == 0:
            self.diary.write(f"memory {step} {' '.join(map(str, memory()))}")


class KeptIO(AtomicCheckpointIO):
    """Writes into the diary which checkpoints have been saved whole."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        what = f"{checkpoint['global_step']} {Path(path).name}"
        self.diary.write(f"saving {what}")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.diary.write(f"saved {what}")


def memory() -> tuple[int, int, int, int]:
    """Resident bytes, bytes of tensors, blocks of Python's allocator, and open files of this process.

    Of the resident memory what no file backs: libraries' pages come in for long, as code is used for the first time.
    """
    gc.collect()
    resident = 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])
    storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    return resident, tensors, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))


def loaders(rank: int, ranks: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """For training, one that goes on in the middle of an epoch; and for validation."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 10, generator=generator)
    x = torch.randn((EPOCH * ranks + 2) * BATCH, 32, generator=generator)
    y = (x @ teacher).argmax(1)
    split = 2 * BATCH
    train = TensorDataset(x[split:], y[split:])
    return (
        ResumableLoader(train, BATCH, Shuffle(train, ranks, rank, seed=0), 1.0, drop_last=True),
        DataLoader(TensorDataset(x[:split], y[:split]), BATCH),
    )


def fit(
    rank: int, ranks: int, folder: Path, diary: Diary, timeout: float, max_steps: int, pace: float, measure_every: int
) -> str:
    """Trains on from the newest checkpoint in ``folder``; a digest of the model."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=ranks,
        strategy=DSSyncStrategy(timeout=timedelta(seconds=timeout), save_replicas=True),
        max_epochs=-1,
        max_steps=max_steps,
        default_root_dir=folder,
        callbacks=[
            Keep(diary, measure_every),
            # A step that is trained a second time overwrites its file, which else nobody would remove.
            ModelCheckpoint(
                folder / "checkpoints", every_n_train_steps=SAVE_EVERY, save_last=True, enable_version_counter=False
            ),
        ],
        plugins=[KeptIO(diary)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net(pace)
    warnings.simplefilter("ignore", UserWarning)  # there is no checkpoint yet; few loader workers
    trainer.fit(module, *loaders(rank, ranks), ckpt_path="last")
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def rank_main(cluster: Cluster, rank: int, folder: Path, name: str, *options: Any) -> None:
    """What a forked process does: a rank of one attempt to train, on its host."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the driver's handlers are not for this process
        signal.signal(signum, signal.SIG_DFL)
    _enter(cluster.namespaces[rank])
    # torch records the last 2,000 collectives: of fewer it has soon all, and then no growth hides a leak's.
    os.environ.update(cluster.environment(rank), TMPDIR=str(folder / "tmp"), TORCH_FR_BUFFER_SIZE="200")
    tempfile.tempdir = None
    output = os.open(folder / "output" / f"{name}-{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    faulthandler.register(signal.SIGUSR2, file=2)
    torch.set_num_threads(1)
    diary = Diary(folder / "diaries" / f"{name}-{rank}")
    try:
        digest = fit(rank, cluster.hosts, folder / "run", diary, *options)
    except SIGTERMException:
        diary.write("stopped")
        sys.exit(128 + signal.SIGTERM)
    except BaseException as error:
        traceback.print_exc()
        diary.write(f"failed {type(error).__name__}: {error}")
        sys.exit(1)
    diary.write(f"done {digest}")
