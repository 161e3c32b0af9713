"""DDP against DS-Sync on this machine's processor: `python -m recipes.demo`, and with `--parity` over seeds.

With `--wires` it is DS-Sync at one wire dtype against another. All train the wide_resnet recipe on digits: same seed,
model, data, steps and learning rate. Only the strategy, or its wire dtype, differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from recipes.images import Digits
from recipes.train import train

STRATEGIES = ("ddp", "dssync")
WIRES = {"fp32": "null", "bf16": "bf16", "int8": "int8"}  # what each arm of `--wires` sets strategy.wire_dtype to
CONF = Path(__file__).resolve().parents[1] / "conf"
LEARNING_RATE = 0.1
LEARNING_RATES = (0.05, 0.1, 0.2)
TUNING_SEEDS = (100, 101)
# Of `--wires`: twice the workers take half the batch each, so that steps and learning rate suit any number of them.
GLOBAL_BATCH = 64
STEPS_PER_EPOCH = 18  # of the digits at that global batch


class Curve(NamedTuple):
    """A logged metric against optimizer steps."""

    steps: list[int]
    values: list[float]


def configure(strategy: str, folder: Path, overrides: list[str]) -> DictConfig:
    """The recipe's configuration under `strategy`, with its outputs in `folder`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "config",
            ["recipe=wide_resnet", f"strategy={strategy}", f"output_dir='{folder}'", *overrides],
        )


def settings(workers: int, epochs: int, lr: float, seed: int) -> list[str]:
    """The overrides that every run here sets."""
    return [
        f"trainer.devices={workers}",
        f"trainer.max_epochs={epochs}",
        f"model.optimizer.lr={lr}",
        f"seed={seed}",
        "callbacks.checkpoint=null",
    ]


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains in a process of its own, so that no memory, thread or process group outlives the run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(_train_quietly, cfg).result()


def _train_quietly(cfg: DictConfig) -> dict[str, float]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return train(cfg)


def curve(folder: Path, metric: str) -> Curve:
    """Reads a metric of the fit back from the run's CSV log."""
    rows: list[tuple[int, float]] = []
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row.get(metric):
                rows.append((int(row["step"]) + 1, float(row[metric])))  # Lightning counts steps from 0
    return Curve([step for step, _ in rows], [value for _, value in rows])


def ddp_bytes_per_step(cfg: DictConfig) -> float:
    """Bytes a DDP worker sends per step, computed: a ring all-reduce of the gradients and a broadcast of the buffers.

    A ring sends `2 (N - 1) / N` times the gradients. Of the broadcast, N - 1 of N workers receive a copy, so that
    the mean worker sends `(N - 1) / N` of the buffers.
    """
    with torch.device("meta"):
        net = instantiate(cfg.model.net)
    gradients = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in net.buffers())
    share = (cfg.trainer.devices - 1) / cfg.trainer.devices
    return float(share * (2 * gradients + buffers))


def demo(args: argparse.Namespace) -> None:
    """Trains under both strategies, prints the comparison and draws the learning curves."""
    console = Console()
    (workers,) = args.workers
    overrides = settings(workers, args.epochs, args.lr, args.seed)
    results, folders = {}, {}
    for strategy in STRATEGIES:
        folders[strategy] = args.output / "demo" / f"{strategy}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        monitor = ["callbacks=consensus", "callbacks.consensus.every_n_steps=20"] if strategy == "dssync" else []
        cfg = configure(strategy, folders[strategy], [*overrides, *monitor])
        console.rule(f"{strategy}: {workers} CPU workers, {args.epochs} epochs")
        results[strategy] = run(cfg)
        if strategy == "ddp":
            results[strategy]["bytes"], results[strategy]["distance"] = ddp_bytes_per_step(cfg), 0.0
        else:
            results[strategy]["bytes"] = results[strategy]["dssync/bytes_sent"]
            results[strategy]["distance"] = results[strategy]["dssync/consensus_distance"]
    table = Table(title="The same WideResNet on digits")
    table.add_column("")
    for strategy in STRATEGIES:
        table.add_column(strategy, justify="right")

    def add(label: str, text: dict[str, str]) -> None:
        table.add_row(label, *(text[strategy] for strategy in STRATEGIES))

    add("test accuracy", {s: f"{r['test/accuracy']:.4f}" for s, r in results.items()})
    add("steps", {s: f"{curve(folders[s], 'val/accuracy').steps[-1]}" for s in results})
    add("bytes sent per worker per step", {s: f"{r['bytes']:,.0f}" for s, r in results.items()})
    add("wall time of training (s)", {s: f"{r['train/seconds']:.1f}" for s, r in results.items()})
    add("consensus distance", {s: f"{r['distance']:.4f}" for s, r in results.items()})
    console.print(table)
    print(
        "Bytes: ddp's are computed (ring all-reduce of gradients, broadcast of buffers),\n"
        "dssync's are counted; what validation and monitoring add is in neither.\n"
        "Consensus distance: ddp's is 0 by construction, dssync's the last of training.\n"
        "Wall time: the workers share this machine; it says nothing about a network.\n"
    )
    picture = args.output / "demo.png"
    plot(folders, picture)
    print(f"learning curves: {picture.resolve()}")


def plot(folders: dict[str, Path], path: Path) -> None:
    """Draws training loss and validation accuracy of each run against optimizer steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    panels = [("train/loss", "training loss (mean of the epoch)"), ("val/accuracy", "validation accuracy")]
    for axis, (metric, label) in zip(axes, panels, strict=True):
        for (strategy, folder), style in zip(folders.items(), ("o-", "s--"), strict=True):
            axis.plot(*curve(folder, metric), style, label=strategy, markersize=4)
        axis.set(xlabel="optimizer steps", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    figure.suptitle("WideResNet on digits: DDP and DS-Sync")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Study:
    """Runs of the recipe, one after the other, that a table compares.

    Args:
        folder: gets each run's logs, `runs.json` with the results of the runs so far, and the table. Runs that its
            `runs.json` holds already are not repeated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "runs.json"
        self.runs: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []

    def train(self, name: str, strategy: str, overrides: list[str], metric: str) -> dict[str, float]:
        """Trains as `overrides` say unless that was done before, prints `metric` and returns the results."""
        key = [f"strategy={strategy}", *overrides]
        results: dict[str, float] | None = next((r["results"] for r in self.runs if r["overrides"] == key), None)
        if results is None:
            folder = self.folder / name.replace(" ", "-")
            results = run(configure(strategy, folder, [*overrides, "callbacks.progress=null"]))
            self.runs.append({"name": name, "overrides": key, "results": results})
            self.file.write_text(json.dumps(self.runs, indent=2) + "\n")
        print(f"{name:32s} {metric} {100 * results[metric]:6.2f}%", flush=True)
        return results

    def report(self, lines: list[str]) -> None:
        """Prints the markdown table and writes it to the folder."""
        table = "\n".join(lines)
        (self.folder / "table.md").write_text(table + "\n")
        print(f"\n{table}\n\noutputs in {self.folder}")


def header(label: str, arms: Iterable[str]) -> list[str]:
    """The head of a markdown table with a column for each arm and for its difference to the first."""
    first, *others = arms
    columns = [label, first, *others, *(f"{arm} - {first}" for arm in others)]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def paired(label: str, arms: dict[str, list[float]], digits: int, each: bool = False) -> list[str]:
    """Rows under :func:`header`: mean, standard deviation and standard error of arms and of paired differences.

    Args:
        label: what the rows are called.
        arms: for each arm the values of seeds 0, 1 and so on.
        digits: behind the point.
        each: whether every seed gets a row too.
    """
    first, *others = arms.values()
    columns = [(values, "") for values in (first, *others)]
    columns += [([b - a for a, b in zip(first, values, strict=True)], "+") for values in others]
    spreads = [statistics.stdev(values) if len(values) > 1 else math.nan for values, _ in columns]
    rows: dict[str, list[str]] = {}
    for i in range(len(first)) if each else ():
        rows[f"seed {i}"] = [f"{values[i]:{sign}.{digits}f}" for values, sign in columns]
    rows[f"{label}mean ± sd"] = [
        f"{statistics.mean(values):{sign}.{digits}f} ± {spread:.{digits}f}"
        for (values, sign), spread in zip(columns, spreads, strict=True)
    ]
    rows[f"{label}standard error"] = [f"{spread / len(first) ** 0.5:.{digits}f}" for spread in spreads]
    return [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def parity(args: argparse.Namespace, study: Study) -> None:
    """Tunes one learning rate for both strategies, then compares their test accuracies over fresh seeds."""
    (workers,) = args.workers

    def accuracy(strategy: str, lr: float, seed: int, split: str) -> float:
        overrides = settings(workers, args.epochs, lr, seed)
        metric = f"{split}/accuracy"
        return 100 * study.train(f"{strategy} lr {lr:g} seed {seed}", strategy, overrides, metric)[metric]

    print("Tuning on the validation split:")
    tuned = {
        (strategy, lr): statistics.mean(accuracy(strategy, lr, seed, "val") for seed in TUNING_SEEDS)
        for lr in LEARNING_RATES
        for strategy in STRATEGIES
    }
    # One learning rate for both: the best for their sum.
    lr = max(LEARNING_RATES, key=lambda lr: sum(tuned[strategy, lr] for strategy in STRATEGIES))
    print(f"Comparing at lr {lr:g} on the test split:")
    test: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    for seed in range(args.seeds):
        for strategy in STRATEGIES:
            test[strategy].append(accuracy(strategy, lr, seed, "test"))

    lines = [f"| lr (validation accuracy, seeds {', '.join(map(str, TUNING_SEEDS))}) | {' | '.join(STRATEGIES)} |"]
    lines.append("|---|---|---|")
    for rate in LEARNING_RATES:
        means = " | ".join(f"{tuned[strategy, rate]:.2f}" for strategy in STRATEGIES)
        lines.append(f"| {rate:g}{' (taken)' if rate == lr else ''} | {means} |")
    lines += ["", *header(f"test accuracy at lr {lr:g} (%)", STRATEGIES), *paired("", test, 2, each=True)]
    study.report(lines)


def wires(args: argparse.Namespace, study: Study) -> None:
    """Compares DS-Sync's wire dtypes over seeds, with everything else the same, for each number of workers."""
    lines: list[str] = []
    for workers in args.workers:
        arms: dict[str, list[dict[str, float]]] = {wire: [] for wire in WIRES}
        for seed in range(args.seeds):
            for wire, wire_dtype in WIRES.items():
                overrides = [
                    *settings(workers, args.epochs, args.lr, seed),
                    f"strategy.wire_dtype={wire_dtype}",
                    f"data.batch_size={GLOBAL_BATCH // workers}",
                    # A validation makes the replicas equal: one at the end alone forgives a wire's rounding nothing.
                    f"trainer.check_val_every_n_epoch={args.epochs}",
                    "callbacks=consensus",
                    f"callbacks.consensus.every_n_steps={STEPS_PER_EPOCH}",
                ]
                name = f"{workers} workers {wire} lr {args.lr:g} seed {seed}"
                arms[wire].append(study.train(name, "dssync", overrides, "test/accuracy"))
        lines += ["", *wires_table(f"{workers} workers, lr {args.lr:g}, test accuracy (%)", arms)]
    study.report(lines[1:])


def wires_table(label: str, arms: dict[str, list[dict[str, float]]]) -> list[str]:
    """The comparison of wires at one number of workers.

    One of the 360 test images is 0.28 points of accuracy, so finer measures of the same runs stand below it: accuracy
    on all images that were not trained on, and the loss.
    """

    def values(metric: str) -> dict[str, list[float]]:
        return {arm: [results[metric] for results in runs] for arm, runs in arms.items()}

    digits = Digits(GLOBAL_BATCH)
    digits.setup()
    sizes = {"val/accuracy": len(digits.val_set), "test/accuracy": len(digits.test_set)}  # type: ignore[arg-type]
    images = sum(sizes.values())
    unseen = {
        arm: [100 * sum(size * results[metric] for metric, size in sizes.items()) / images for results in runs]
        for arm, runs in arms.items()
    }
    test = {arm: [100 * accuracy for accuracy in column] for arm, column in values("test/accuracy").items()}
    lines = [*header(label, arms), *paired("", test, 2, each=True)]
    lines += paired("validation and test accuracy (%), ", unseen, 2)
    lines += paired("test loss, ", values("test/loss"), 4)
    lines += paired("last consensus distance, ", values("dssync/consensus_distance"), 4)[:1]
    sent = [f"{statistics.mean(column):,.0f}" for column in values("dssync/bytes_sent").values()]
    lines.append(f"| bytes sent per worker per step | {' | '.join(sent)} |" + " |" * (len(arms) - 1))
    return lines


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the demo or a comparison over seeds."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo",
        description="Trains a small WideResNet on scikit-learn's digits with several CPU workers under DDP and under "
        "DS-Sync, and compares them. Takes about a minute on two cores; with --parity about seven, with --wires about "
        "ten.",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--parity",
        action="store_true",
        help=f"tune the learning rate on {len(TUNING_SEEDS)} seeds by validation accuracy, then compare test accuracy "
        "over other seeds (ignores --lr and --seed)",
    )
    kind.add_argument(
        "--wires",
        action="store_true",
        help=f"compare DS-Sync's wire dtypes {', '.join(WIRES)} over seeds, at a global batch of {GLOBAL_BATCH} "
        "(ignores --seed)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        help="CPU workers, at least 2 (default: 4); --wires takes several numbers (default: 4 8)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=10,
        help="epochs of training; the recipe lowers the learning rate after 6 and 8 (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=5, help="--parity and --wires compare seeds 0 to SEEDS - 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="folder of an earlier --parity or --wires: go on there, without repeating what it has finished",
    )
    args = parser.parse_args(argv)
    args.workers = args.workers or ([4, 8] if args.wires else [4])
    if min(args.workers) < 2:
        parser.error(f"--workers is {min(args.workers)}, but comparing ways to synchronize takes at least 2")
    if len(args.workers) > 1 and not args.wires:
        parser.error(f"--workers is {args.workers}, but only --wires takes several numbers")
    if args.wires and any(GLOBAL_BATCH % workers for workers in args.workers):
        parser.error(f"--workers is {args.workers}, but must divide the global batch of {GLOBAL_BATCH}")
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}, but must be at least 1")
    if not args.lr > 0:
        parser.error(f"--lr is {args.lr}, but must be positive")
    if not 1 <= args.seeds <= min(TUNING_SEEDS):
        parser.error(f"--seeds is {args.seeds}, but must be 1 to {min(TUNING_SEEDS)} (the next ones tune)")
    if not (args.parity or args.wires):
        if args.resume:
            parser.error("--resume takes up a comparison over seeds: add --parity or --wires")
        demo(args)
        return
    if args.resume and not args.resume.is_dir():
        parser.error(f"--resume is {args.resume}, but there is no such folder")
    compare = parity if args.parity else wires
    compare(args, Study(args.resume or args.output / compare.__name__ / time.strftime("%Y-%m-%d_%H-%M-%S")))


if __name__ == "__main__":
    main()
