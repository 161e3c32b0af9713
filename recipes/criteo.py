"""Prepares Criteo's click logs for training: `python -m recipes.criteo prepare train.txt data/criteo`.

Needs no torch. Files of any size become Parquet files of equal numbers of rows, and `criteo.json` says what they hold.

Each chunk of rows is a task of its own, whose results are files that are renamed into place when complete: the output
depends neither on how many processes share the work, nor on where the input is cut into files, nor on interruptions,
and the same command continues where a killed one was. First the categories of each chunk are counted, each field's
sorted; then the counts are added up range by range, so that no more than a few million are in memory at a time; then
the chunks are written with the numbers of their categories.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress, track

from recipes.criteo_synthetic import synthesize
from recipes.criteo_text import CATEGORIES, NUMBERS, Chunk, Segment, check, cut, identifiers, read

Step = TypeVar("Step")

VERSION = 1
SPLITS = ("train", "val", "test")
# Cumulative shares of the splits: the paper's 90% to train on, the rest in halves.
SHARES = (0.9, 0.95)
# A category's number: 0 where the value is missing, 1 where it is too rare, else from 2 on by value.
MISSING, RARE, FIRST = 0, 1, 2
# No logarithm of 1 + an integer is this.
MISSING_NUMBER = -1.0
# Counts that are added up at a time; 16 bytes each, and a few times that to sort them.
COUNTS_AT_A_TIME = 2_000_000


class Options(NamedTuple):
    """What the output depends on, besides the rows.

    Attributes:
        threshold: a category that fewer training rows have is rare.
        hash_buckets: None numbers categories; a number of buckets per field hashes them instead.
        seed: of the splits.
        rows_per_shard: rows of all splits that a task reads.
    """

    threshold: int = 10
    hash_buckets: int | None = None
    seed: int = 0
    rows_per_shard: int = 100_000


def prepare(
    files: list[Path],
    out: Path,
    processes: int = 1,
    threshold: int = 10,
    hash_buckets: int | None = None,
    seed: int = 0,
    rows_per_shard: int = 100_000,
) -> dict[str, Any]:
    """Writes `files`, which count as one, to the folder `out`.

    Only training rows count for the threshold, so that nothing is known of the others.

    Returns:
        What `criteo.json` says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an option or a row is wrong, or `out` holds something else.
    """
    options = Options(threshold, hash_buckets, seed, rows_per_shard)
    for name, value in {"processes": processes, **options._asdict()}.items():
        least, most = 0 if name == "seed" else 1, 2**31 - 2 if name == "hash_buckets" else sys.maxsize
        if value is not None and not least <= value <= most:
            rule = f"at least {least}" + (f" and at most {most}" if name == "hash_buckets" else "")
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be {rule}")
    out, work = Path(out), Path(out) / "unfinished"
    if (out / "criteo.json").exists():
        found = metadata(out)
        size = sum(path.stat().st_size for path in files if path.is_file())
        if (found["options"], found["bytes"]) != (options._asdict(), size):
            raise ValueError(f"{out} holds other rows or options. HINT: delete it, or choose another folder.")
        shutil.rmtree(work, ignore_errors=True)  # an interruption may have left it
        return found
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file. HINT: name a folder to write.")
    if out.exists() and not (work / "plan.json").exists() and any(path != work for path in out.iterdir()):
        raise ValueError(f"{out} is not empty. HINT: choose another folder, or delete it.")
    for path in files:
        check(path)
    chunks = _plan(files, work, options)
    task = partial(_Task, str(out), options)
    tasks = [task(i, chunk) for i, chunk in enumerate(chunks)]
    vocabulary = out / "vocabulary.npy"
    if hash_buckets is None and not vocabulary.exists():
        _run(_count, [each for each in tasks if not each.counts.exists()], processes, "counting categories")
        keys = _frequent([each.counts for each in tasks], threshold)
        _replace(vocabulary, lambda path: np.save(path, keys))
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
    _run(_encode, [each for each in tasks if not each.shard("train").exists()], processes, "writing Parquet files")

    sizes = [hash_buckets + 1] * len(CATEGORIES) if hash_buckets else [FIRST + len(keys) for keys in _by_field(out)]
    fingerprint = hashlib.sha256(json.dumps([VERSION, options._asdict()]).encode())
    if hash_buckets is None:
        fingerprint.update(vocabulary.read_bytes())
    described: dict[str, Any] = {
        "version": VERSION,
        "options": options._asdict(),
        "bytes": sum(path.stat().st_size for path in files),
        "rows": {split: sum(pq.read_metadata(each.shard(split)).num_rows for each in tasks) for split in SPLITS},
        "categories": sizes,
        "numeric": len(NUMBERS),
        "fingerprint": fingerprint.hexdigest()[:16],
        "shards": [each.shard("train").name for each in tasks],
    }
    _replace(out / "criteo.json", lambda path: path.write_text(json.dumps(described, indent=1) + "\n"))
    shutil.rmtree(work)
    return described


def metadata(root: Path) -> dict[str, Any]:
    """What is in a folder that :func:`prepare` has finished.

    Raises:
        FileNotFoundError: If it has not, or files are gone.
        ValueError: If another version has.
    """
    path = root / "criteo.json"
    if not path.exists():
        if (root / "unfinished").exists():
            raise FileNotFoundError(f"{root.resolve()} is only half prepared. HINT: run the same command again.")
        raise FileNotFoundError(
            f"no prepared data in {root.resolve()}. HINT: point data.root at the folder that "
            "`python -m recipes.criteo prepare train.txt FOLDER` has written."
        )
    described: dict[str, Any] = {}
    try:
        described = json.loads(path.read_text())
        version = described["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is broken. HINT: copy the whole folder again, or prepare anew.") from None
    if version != VERSION:
        raise ValueError(
            f"{root} was prepared by version {version}, but this is version {VERSION}. "
            "HINT: prepare it anew in another folder."
        )
    for split in SPLITS:
        for name in described["shards"]:
            if not (root / split / name).exists():
                raise FileNotFoundError(f"{root / split / name} is gone. HINT: copy the whole folder, or prepare anew.")
    return described


class _Task(NamedTuple):
    out: str
    options: Options
    number: int
    chunk: Chunk

    @property
    def counts(self) -> Path:
        return Path(self.out) / "unfinished" / f"counts-{self.number:05d}.npy"

    def shard(self, split: str) -> Path:
        return Path(self.out) / split / f"{self.number:05d}.parquet"

    def splits(self, rows: int) -> np.ndarray[Any, Any]:
        """For each row the number of its split: a draw that depends on the seed and the row's number only."""
        generator = np.random.PCG64(self.options.seed).advance(self.number * self.options.rows_per_shard)
        return np.searchsorted(SHARES, np.random.Generator(generator).random(rows), side="right")


def _count(task: _Task) -> None:
    """Writes which categories a chunk's training rows have, as field * 2 ** 32 + value in order, and how often."""
    table = read(task.chunk)
    training = task.splits(len(table)) == 0
    keys, counts = [], []
    for field, name in enumerate(CATEGORIES):
        values = identifiers(table[name])[training]
        found, times = np.unique(values[values >= 0], return_counts=True)
        keys.append(found + (field << 32))
        counts.append(times)
    _replace(task.counts, lambda path: np.save(path, np.stack([np.concatenate(keys), np.concatenate(counts)])))


def _frequent(paths: list[Path], threshold: int) -> np.ndarray[Any, Any]:
    """Adds counts up and returns the keys that occur often enough, in order."""
    total = sum(np.load(path, mmap_mode="r").shape[1] for path in paths)
    # Values are hashes, so that ranges of equal width hold about equal numbers of them.
    ranges = 1 + total // len(CATEGORIES) // COUNTS_AT_A_TIME
    bounds = [(i << 32) // ranges for i in range(len(CATEGORIES) * ranges + 1)]
    kept = []
    for low, high in _track(pairwise(bounds), len(bounds) - 1, "adding counts up"):
        parts = []
        for path in paths:
            part = np.load(path, mmap_mode="r")
            start, end = np.searchsorted(part[0], (low, high))
            parts.append(np.array(part[:, start:end]))
        keys, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
        times = np.bincount(place, np.concatenate([part[1] for part in parts]), len(keys))
        kept.append(keys[times >= threshold])
    return np.concatenate(kept)


def _by_field(out: Path) -> list[np.ndarray[Any, Any]]:
    """The frequent values of each field, mapped from the vocabulary's file so that processes share them."""
    keys = np.load(out / "vocabulary.npy", mmap_mode="r")
    return np.split(keys, np.searchsorted(keys, [field << 32 for field in range(1, len(CATEGORIES))]))


def _encode(task: _Task) -> None:
    """Writes a chunk's rows, each to the shard of its split; the training shard comes last and shows that all exist."""
    table = read(task.chunk)
    columns = {"label": table["label"].combine_chunks()}
    for name in NUMBERS:
        values = table[name].to_numpy().astype(np.float64)
        logarithms = np.log1p(np.maximum(values, 0))
        columns[name] = pa.array(np.where(np.isnan(values), MISSING_NUMBER, logarithms).astype(np.float32))
    buckets = task.options.hash_buckets
    vocabulary = None if buckets else _by_field(Path(task.out))
    for field, name in enumerate(CATEGORIES):
        values = identifiers(table[name])
        if vocabulary is None:
            numbers = 1 + values % buckets  # the values are hashes already
        else:
            keys, wanted = vocabulary[field], values + (field << 32)
            place = np.searchsorted(keys, wanted)
            known = np.append(keys, -1)[place] == wanted
            numbers = np.where(known, FIRST + place, RARE)
        columns[name] = pa.array(np.where(values < 0, MISSING, numbers).astype(np.int32))
    encoded, splits = pa.table(columns), task.splits(len(table))
    for number, split in reversed(list(enumerate(SPLITS))):
        part = encoded.filter(pa.array(splits == number))
        _replace(task.shard(split), partial(pq.write_table, part))


def _plan(files: list[Path], work: Path, options: Options) -> list[Chunk]:
    """The chunks of the files, as noted in the folder of unfinished work if it is the same work."""
    inputs = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    work_of = {"version": VERSION, "options": options._asdict(), "inputs": inputs}
    plan = work / "plan.json"
    if plan.exists():
        found = json.loads(plan.read_text())
        if found["of"] == work_of:
            return [[Segment(*segment) for segment in chunk] for chunk in found["chunks"]]
        if _but_for_contents(found["of"]) != _but_for_contents(work_of):
            raise ValueError(
                f"{work.parent} is half prepared from other files or with other options. "
                "HINT: run the command that was begun, delete the folder, or choose another."
            )
        # A row was repaired, and any chunk may hold other rows now. The plan goes last, when the new one is put there.
        for split in SPLITS:
            shutil.rmtree(work.parent / split, ignore_errors=True)
        for path in (work.parent / "vocabulary.npy", *work.iterdir()):
            if path != plan:
                path.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in files)
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("counting rows", total=size)
        chunks = cut(files, options.rows_per_shard, lambda read: progress.advance(bar, read))
    work.mkdir(parents=True, exist_ok=True)
    _replace(plan, lambda path: path.write_text(json.dumps({"of": work_of, "chunks": chunks})))
    return chunks


def _but_for_contents(work: dict[str, Any]) -> list[Any]:
    return [work["version"], work["options"], [path for path, *_ in work["inputs"]]]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name and renames it, so that it is there complete or not at all."""
    root = path.parent if (path.parent / "unfinished").exists() else path.parent.parent
    unfinished = root / "unfinished" / f"{path.parent.name}-{os.getpid()}-{path.name}"
    write(unfinished)
    os.replace(unfinished, path)


def _run(task: Callable[[_Task], None], tasks: list[_Task], processes: int, description: str) -> None:
    with _workers(processes) as map_:
        for _ in _track(map_(task, tasks), len(tasks), description):
            pass


def _track(steps: Iterable[Step], count: int, description: str) -> Iterable[Step]:
    return track(steps, description, count, transient=True, disable=not sys.stdout.isatty())


class _workers:  # noqa: N801
    """`map` over processes, or the built-in one."""

    def __init__(self, processes: int) -> None:
        self.pool = None
        if processes > 1:
            context = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(processes, context, initializer=_end_with_parent)

    def __enter__(self) -> Callable[..., Iterator[None]]:
        return self.pool.map if self.pool else map

    def __exit__(self, *error: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m recipes.criteo", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="write text files as Parquet files to train on")
    preparing.add_argument("files", nargs="+", type=Path, help="Criteo's text files, which count as one, in this order")
    preparing.add_argument("out", type=Path, help="folder to write")
    preparing.add_argument("--processes", type=int, default=1, help="to share the work (default 1)")
    preparing.add_argument("--threshold", type=int, default=10, help="training rows a category must have (default 10)")
    preparing.add_argument("--hash-buckets", type=int, help="hash the categories of a field into so many instead")
    preparing.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    preparing.add_argument("--rows-per-shard", type=int, default=100_000, help="rows per task (default 100000)")
    synthesizing = commands.add_parser("synthesize", help="write rows of a planted model in Criteo's format")
    synthesizing.add_argument("out", type=Path, help="text file to write")
    synthesizing.add_argument("--rows", type=int, default=5_000_000, help="default 5000000")
    synthesizing.add_argument("--seed", type=int, default=0, help="of the model and its rows (default 0)")
    options = vars(parser.parse_args(None if arguments is None else list(arguments)))
    try:
        if options.pop("command") == "prepare":
            made = prepare(**options)
            rows = ", ".join(f"{made['rows'][split]:,} {split}" for split in SPLITS)
            print(f"{rows} rows, {sum(made['categories']):,} categories in {options['out']}")
        else:
            bayes = synthesize(**options)
            print(f"{options['rows']:,} rows in {options['out']}")
            print(f"of the planted probabilities: AUC {bayes['auc']:.4f}, log-loss {bayes['logloss']:.4f}")
    except BrokenProcessPool:
        sys.exit("error: a process was killed. HINT: is memory short? Take fewer --processes, then run it again.")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
