"""The data sets of the click recipe: doctor visits (embedded), Criteo, and synthetic data in Criteo's format."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from sklearn.model_selection import GroupShuffleSplit
from statsmodels.datasets import randhie
from torch.utils.data import Dataset
from typing_extensions import override

from recipes.criteo import SPLITS, VERSION, metadata, prepare
from recipes.criteo_synthetic import synthesize
from recipes.criteo_text import CATEGORIES, NUMBERS
from recipes.data import RecipeData
from recipes.deepfm import Batch, Fields

Rows = np.ndarray[Any, Any]

# Of the small synthetic data: nothing is planted in rarer categories, and a network soon learns them by heart.
THRESHOLD = 100


def row_type(fields: Fields) -> np.dtype[Any]:
    """One row as it lies in memory or in a file, so that a batch is one gather."""
    return np.dtype(
        [("categories", "<i4", (len(fields.categories),)), ("numbers", "<f4", (fields.numeric,)), ("label", "<f4")]
    )


class RowSet(Dataset[Batch]):
    """Rows of :func:`row_type`, which may be mapped from a file. A loader gets whole batches."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = self.rows[indices]
        return tuple(torch.from_numpy(np.ascontiguousarray(rows[name])) for name in rows.dtype.names)  # type: ignore

    @override
    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])


def as_it_is(batch: Batch) -> Batch:
    """Collates what is a batch already."""
    return batch


class Randhie(RecipeData):
    """Will a person visit a doctor this year? The RAND health insurance experiment's 20,190 person-years.

    They ship with statsmodels, nothing is downloaded. The years of a person follow each other, with the same
    covariates in all of them, and so do the persons of a household: a split by rows would put years of one person on
    both sides. So whole groups are drawn, and a group ends only where the covariates of both person and household
    change; that keeps a person whose income changes, and sometimes joins two households. About 30% of the groups are
    the test split, 15% validation, the rest training, all fixed by `split_seed`.

    Numeric fields are standardised by the training rows. Categorical fields are the health a person states, the plan
    and its coinsurance, and bins of the numeric ones between the training rows' quantiles.

    Args:
        batch_size: training rows per rank and step.
        num_workers: loader processes per rank; the rows are in memory, so 0 is fastest.
        partition: which training rows a worker sees; see :class:`RecipeData`.
        split_seed: which groups fall into which split, and of the partition.
    """

    HOUSEHOLD = ("lncoins", "idp", "lpi", "fmde")
    PERSON = ("physlm", "disea", "hlthg", "hlthf", "hlthp")
    NUMERIC = ("lncoins", "lpi", "fmde", "physlm", "disea")
    BINNED = ("lpi", "fmde", "physlm", "disea")
    BINS = 10
    # Stated health (excellent, good, fair, poor), deductible plan or not, coinsurance rate, and the bins.
    fields = Fields((4, 2, 5, *[BINS] * len(BINNED)), len(NUMERIC), "randhie-1")

    def __init__(self, batch_size: int, num_workers: int = 0, partition: str = "iid", split_seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, partition, split_seed)
        self.collate = as_it_is

    @override
    def setup(self, stage: str | None = None) -> None:
        frame = randhie.load_pandas().data
        train, val, test = self.split(self.groups(frame))
        rows = np.zeros(len(frame), row_type(self.fields))
        rows["label"] = frame.mdvis > 0
        numbers = frame[list(self.NUMERIC)].to_numpy(float)
        rows["numbers"] = (numbers - numbers[train].mean(0)) / numbers[train].std(0)
        health = frame.hlthg + 2 * frame.hlthf + 3 * frame.hlthp
        coinsurance = pd.factorize(frame.lncoins, sort=True)[0]
        rows["categories"][:, :3] = np.stack([health, frame.idp, coinsurance], axis=1)
        for column, name in enumerate(self.BINNED, start=3):
            # Where many rows have one value several quantiles are equal, and some bins stay empty.
            edges = np.quantile(frame[name].to_numpy()[train], np.arange(1, self.BINS) / self.BINS)
            rows["categories"][:, column] = np.searchsorted(edges, frame[name], side="right")
        self.train_set, self.val_set, self.test_set = (RowSet(rows[part]) for part in (train, val, test))
        self.labels = rows["label"][train]

    @classmethod
    def groups(cls, frame: pd.DataFrame) -> np.ndarray[Any, Any]:
        """For each row the number of its group of persons."""
        changed = frame != frame.shift()
        both = changed[list(cls.HOUSEHOLD)].any(axis=1) & changed[list(cls.PERSON)].any(axis=1)
        return np.cumsum(both.to_numpy())

    def split(self, groups: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Indices of the training, validation and test rows."""
        everyone = np.arange(len(groups))
        outer = GroupShuffleSplit(1, test_size=0.3, random_state=self.split_seed)
        rest, test = next(outer.split(everyone, None, groups))
        inner = GroupShuffleSplit(1, test_size=0.15 / 0.7, random_state=self.split_seed)
        train, val = next(inner.split(rest, None, groups[rest]))
        return rest[train], rest[val], test


class Criteo(RecipeData):
    """What `python -m recipes.criteo prepare` has made of Criteo's files: nine tenths to train on, a tenth held out.

    The paper holds out a tenth and has no validation split. Here that tenth is halved by the seed of the preparation:
    one half is validated on, the other tested.

    Before the first run a split's Parquet files are copied into one file of rows, 160 bytes each (7.3 GB for Kaggle's
    45 million), which ranks map into memory: they share its pages, and the system may drop them at any time. The
    shuffled order takes a rank 4 bytes a training row.

    Args:
        root: the folder that was prepared.
        batch_size: training rows per rank and step.
        num_workers: loader processes per rank.
        partition: which training rows a worker sees; see :class:`RecipeData`.
        split_seed: of the partition; that of the splits was given to the preparation.
    """

    def __init__(
        self, root: str, batch_size: int = 20_480, num_workers: int = 4, partition: str = "iid", split_seed: int = 0
    ) -> None:
        super().__init__(batch_size, num_workers, partition, split_seed)
        self.root = Path(root)
        self.metadata = metadata(self.root)
        self.fields = Fields(tuple(self.metadata["categories"]), len(NUMBERS), self.metadata["fingerprint"])
        self.collate = as_it_is

    @override
    def prepare_data(self) -> None:
        for split in SPLITS:
            if not self._path(split).exists():
                self._unpack(split)

    @override
    def setup(self, stage: str | None = None) -> None:
        self.train_set, self.val_set, self.test_set = (
            RowSet(np.load(self._path(split), mmap_mode="r")) for split in SPLITS
        )
        self.labels = self.train_set.rows["label"]

    def _path(self, split: str) -> Path:
        return self.root / f"{split}-{self.fields.fingerprint}.npy"

    def _unpack(self, split: str) -> None:
        count = self.metadata["rows"][split]
        path = self._path(split)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        rows = np.lib.format.open_memmap(unfinished, "w+", row_type(self.fields), (count,))
        end = 0
        for name in self.metadata["shards"]:
            table = pq.read_table(self.root / split / name)
            start, end = end, end + len(table)
            rows["label"][start:end] = table["label"]
            for kind, columns in (("numbers", NUMBERS), ("categories", CATEGORIES)):
                rows[kind][start:end] = np.stack([table[column].to_numpy() for column in columns], axis=1)
        rows.flush()
        os.replace(unfinished, path)


class SyntheticCriteo(Criteo):
    """Rows in Criteo's format drawn from a planted model, whose AUC no other can beat; see `recipes.criteo_synthetic`.

    Written, prepared and kept in a folder under `root` when first asked for.

    Args:
        root: folder of such folders.
        rows: number of rows.
        hash_buckets: null numbers the categories that occur often enough; a number hashes all into so many per field.
        batch_size: training rows per rank and step.
        num_workers: loader processes per rank.
        partition: which training rows a worker sees; see :class:`RecipeData`.
        split_seed: of the planted model, its rows and their splits, and of the partition.
    """

    def __init__(
        self,
        root: str,
        rows: int = 100_000,
        hash_buckets: int | None = None,
        batch_size: int = 512,
        num_workers: int = 0,
        partition: str = "iid",
        split_seed: int = 0,
    ) -> None:
        name = f"synthetic-criteo-v{VERSION}-{rows}-{hash_buckets or 'vocabulary'}-{split_seed}"
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:  # ranks that torchrun or Slurm started come here all at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "bayes.json").exists():
                text = folder / "rows.txt"
                bayes = synthesize(text, rows, split_seed)
                prepare([text], folder / "prepared", 1, THRESHOLD, hash_buckets, split_seed)
                text.unlink()
                (folder / "bayes.json").write_text(json.dumps(bayes) + "\n")
        super().__init__(str(folder / "prepared"), batch_size, num_workers, partition, split_seed)
        self.bayes: dict[str, float] = json.loads((folder / "bayes.json").read_text())
