"""What the data of all recipes share: loaders, exact evaluation shards, and the shards of non-IID training.

Training samples are dealt out anew at every epoch, or with `data.partition` each worker keeps its own. Evaluation
shards are exact: every sample is seen once by one rank, so a metric synchronized over ranks is the metric of the whole
split, whatever the world size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from typing_extensions import override

from ds_lightning.shards import concentration, shards

Samples = Dataset[Any]


def even_batch_size(samples: int, world_size: int, batch_size: int) -> int:
    """The smallest batch size from `batch_size` on that gives all ranks the same number of evaluation batches.

    Shards that repeat no sample differ by one in length, so one rank may get a batch more than another, and DDP's
    broadcast of the buffers at every forward pass would then wait for a rank that has finished.
    """
    if samples < world_size:
        raise ValueError(
            f"an evaluation split of {samples} samples cannot give each of {world_size} ranks one. "
            "HINT: use fewer devices or a larger split."
        )
    while samples % world_size and (samples // world_size) % batch_size == 0:
        batch_size += 1
    return batch_size


class Shuffle(DistributedSampler[Any]):
    """A rank's samples in the random order of `DistributedSampler`, in 4 bytes a sample; that makes lists of 40.

    Lightning keeps a sampler that is distributed already, and tells it the epoch.

    Args:
        dataset: whose samples are shuffled and dealt out; up to `ranks - 1` of them are nobody's in an epoch.
        ranks: that share them.
        rank: this one.
        seed: the same on all of them.
    """

    def __init__(self, dataset: Samples, ranks: int, rank: int, seed: int) -> None:
        super().__init__(dataset, ranks, rank, seed=seed, drop_last=True)
        self.begin = 0  # samples of the next epoch that are left out

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator, dtype=torch.int32)  # type: ignore[arg-type]
        mine = order[self.rank : self.total_size : self.num_replicas][self.begin :].clone()
        self.begin = 0
        del order
        for part in mine.split(10_000):
            yield from part.tolist()


class ResumableLoader(DataLoader[Any]):
    """A loader of a :class:`Shuffle` that begins a resumed epoch where the checkpoint was saved; Lightning asks it.

    Args:
        dataset: as for torch's loader.
        batch_size: as for torch's loader.
        sampler: of the dataset.
        limit: batches that an epoch takes (an integer) or their share, as Lightning's `limit_train_batches`.
    """

    sampler: Shuffle

    def __init__(self, dataset: Samples, batch_size: int, sampler: Shuffle, limit: float, **options: Any) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, **options)
        self.limit = min(len(self), limit) if isinstance(limit, int) else int(len(self) * limit)
        self.batches = 0  # of this epoch that were taken
        self.begin = 0  # batches of the next epoch that are left out

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches, self.begin = self.begin, 0
        self.sampler.begin = self.batches * (self.batch_size or 1)
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """What Lightning saves; the same on all ranks."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next epoch begins there, or at its beginning if all had been taken."""
        self.begin = state["batches"] if state["batches"] < self.limit else 0


class RecipeData(LightningDataModule):
    """What all data sets share. A subclass sets `train_set`, `val_set`, `test_set` and `labels` in `setup`.

    `labels` holds one label per training sample, which a partition goes by.

    Args:
        batch_size: training samples per rank and step; the global batch is `batch_size * world size`.
        num_workers: loader processes per rank; 0 loads in the training process.
        partition: which training samples a worker sees: `iid` (all, shuffled anew at every epoch), or a shard of its
            own, `by_label` or `dirichlet:ALPHA` (see :func:`shards`).
        split_seed: of the partition and of whatever splits a subclass draws.
    """

    train_set: Samples
    val_set: Samples
    test_set: Samples
    labels: np.ndarray[Any, Any]
    # Makes a batch of samples; None: torch's own way.
    collate: Callable[[Any], Any] | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, partition: str = "iid", split_seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}, but must be at least 1")
        if not 0 <= split_seed < 2**32:
            raise ValueError(f"data.split_seed is {split_seed}, but must be at least 0 and below 2**32")
        concentration(partition)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.partition = partition
        self.split_seed = split_seed

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        samples, needed = len(self.train_set), self.batch_size * self.world_size  # type: ignore[arg-type]
        if samples < needed:
            raise ValueError(
                f"data.batch_size={self.batch_size} on {self.world_size} ranks takes {needed} training samples a step, "
                f"but there are {samples}. HINT: choose a smaller data.batch_size."
            )
        mine, ranks, rank = self.train_set, self.world_size, self.rank
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        if self.partition != "iid":
            if ranks == 1:
                warnings.warn(f"data.partition={self.partition} has no effect on a single worker", stacklevel=2)
            indices: Any = shards(self.labels, ranks, self.partition, self.split_seed)[rank]
            mine = Subset(mine, indices)  # an array: a list of Criteo's rows would take gigabytes
            ranks, rank, seed = 1, 0, seed + rank
        sampler = Shuffle(mine, ranks, rank, seed)
        # The last, smaller batch is dropped: a rank's gradient must weigh the same in every mean.
        limit: Any = self.trainer.limit_train_batches if self.trainer else 1.0
        return ResumableLoader(mine, self.batch_size, sampler, limit, drop_last=True, **self._loading())

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader(self.val_set)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader(self.test_set)

    @property
    def world_size(self) -> int:
        """The number of ranks, 1 outside a Trainer."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        """This process's rank, 0 outside a Trainer."""
        return self.trainer.global_rank if self.trainer else 0

    def _evaluation_loader(self, dataset: Samples) -> DataLoader[Any]:
        samples = len(dataset)  # type: ignore[arg-type]
        # Lightning keeps a sampler that is distributed already; its own would pad the shards with repeated samples.
        sampler = UnrepeatedDistributedSampler(dataset, self.world_size, self.rank, shuffle=False)
        batch_size = even_batch_size(samples, self.world_size, self.batch_size)
        return DataLoader(dataset, batch_size, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": self.collate,
        }
