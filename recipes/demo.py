"""DDP against DS-Sync on this machine's processor: `python -m recipes.demo`, and with `--parity` over seeds.

Both train the wide_resnet recipe on digits: same seed, model, data, steps and learning rate. Only `strategy=` differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import multiprocessing
import statistics
import time
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

from recipes.train import train

STRATEGIES = ("ddp", "dssync")
CONF = Path(__file__).resolve().parents[1] / "conf"
LEARNING_RATE = 0.1
LEARNING_RATES = (0.05, 0.1, 0.2)
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)


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
    overrides = [f"trainer.devices={args.workers}", f"trainer.max_epochs={args.epochs}"]
    overrides += [f"model.optimizer.lr={args.lr}", f"seed={args.seed}", "callbacks.checkpoint=null"]
    results, folders = {}, {}
    for strategy in STRATEGIES:
        folders[strategy] = args.output / "demo" / f"{strategy}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        monitor = ["callbacks=consensus", "callbacks.consensus.every_n_steps=20"] if strategy == "dssync" else []
        cfg = configure(strategy, folders[strategy], [*overrides, *monitor])
        console.rule(f"{strategy}: {args.workers} CPU workers, {args.epochs} epochs")
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


def parity(args: argparse.Namespace) -> None:
    """Tunes one learning rate for both strategies, then compares their test accuracies over fresh seeds."""
    common = [f"trainer.devices={args.workers}", f"trainer.max_epochs={args.epochs}"]
    common += ["callbacks.checkpoint=null", "callbacks.progress=null"]
    folder = args.output / "parity" / time.strftime("%Y-%m-%d_%H-%M-%S")
    records: list[dict[str, Any]] = []

    def accuracy(strategy: str, lr: float, seed: int, split: str) -> float:
        cfg = configure(
            strategy, folder / f"{strategy}-lr{lr}-seed{seed}", [*common, f"model.optimizer.lr={lr}", f"seed={seed}"]
        )
        results = run(cfg)
        records.append({"strategy": strategy, "lr": lr, "seed": seed, **results})
        value = 100 * results[f"{split}/accuracy"]
        print(f"{strategy:7s} lr {lr:<5g} seed {seed:<4d} {split} accuracy {value:6.2f}", flush=True)
        return value

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
    for seed in SEEDS:
        for strategy in STRATEGIES:
            test[strategy].append(accuracy(strategy, lr, seed, "test"))

    lines = [f"| lr (seeds {', '.join(map(str, TUNING_SEEDS))}) | " + " | ".join(STRATEGIES) + " |", "|---|---|---|"]
    for rate in LEARNING_RATES:
        means = " | ".join(f"{tuned[strategy, rate]:.2f}" for strategy in STRATEGIES)
        lines.append(f"| {rate:g}{' (taken)' if rate == lr else ''} | {means} |")
    ddp, dssync = (test[strategy] for strategy in STRATEGIES)
    lines += ["", f"| test accuracy at lr {lr:g} (%) | ddp | dssync | dssync - ddp |", "|---|---|---|---|"]
    lines += [
        f"| seed {seed} | {a:.2f} | {b:.2f} | {b - a:+.2f} |" for seed, a, b in zip(SEEDS, ddp, dssync, strict=True)
    ]
    difference = [b - a for a, b in zip(ddp, dssync, strict=True)]
    cells = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in (ddp, dssync)]
    cells.append(f"{statistics.mean(difference):+.2f} ± {statistics.stdev(difference):.2f}")
    lines.append(f"| mean ± sd | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(f"\nMean validation accuracy (%) while tuning, then test accuracy:\n\n{table}\n")
    (folder / "parity.md").write_text(table + "\n")
    (folder / "runs.json").write_text(json.dumps(records, indent=2) + "\n")
    print(f"outputs in {folder}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the demo or the parity comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo",
        description="Trains a small WideResNet on scikit-learn's digits with several CPU workers under DDP and under "
        "DS-Sync, and compares them. Takes about a minute on two cores; with --parity about seven.",
    )
    parser.add_argument(
        "--parity",
        action="store_true",
        help=f"tune the learning rate on {len(TUNING_SEEDS)} seeds by validation accuracy, then compare test accuracy "
        f"over {len(SEEDS)} other seeds (ignores --lr and --seed)",
    )
    parser.add_argument("--workers", type=int, default=4, help="CPU workers, at least 2 (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=10,
        help="epochs of training; the recipe lowers the learning rate after 6 and 8 (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="folder for results (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.workers < 2:
        parser.error(f"--workers is {args.workers}, but comparing ways to synchronize takes at least 2")
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}, but must be at least 1")
    if not args.lr > 0:
        parser.error(f"--lr is {args.lr}, but must be positive")
    (parity if args.parity else demo)(args)


if __name__ == "__main__":
    main()
