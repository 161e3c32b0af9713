"""DDP against DS-Sync on this machine's processor: `python -m recipes.demo`.

Both train the wide_resnet recipe on digits: same seed, model, data, steps and learning rate. Only the strategy differs.
`recipes.compare` does it over seeds, for any recipe, with tuned learning rates.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from recipes.compare import bytes_per_step, configure, curve, run

STRATEGIES = ("ddp", "dssync")
LEARNING_RATE = 0.1


def demo(args: argparse.Namespace) -> None:
    """Trains under both strategies, prints the comparison and draws the learning curves."""
    console = Console()
    overrides = [
        "recipe=wide_resnet",
        f"trainer.devices={args.workers}",
        f"trainer.max_epochs={args.epochs}",
        f"model.optimizer.lr={args.lr}",
        f"seed={args.seed}",
        "callbacks.checkpoint=null",
        "callbacks.last=null",
    ]
    results, folders = {}, {}
    for strategy in STRATEGIES:
        folders[strategy] = args.output / "demo" / f"{strategy}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        monitor = ["callbacks=consensus", "callbacks.consensus.every_n_steps=20"] if strategy == "dssync" else []
        cfg = configure(folders[strategy], [*overrides, f"strategy={strategy}", *monitor])
        console.rule(f"{strategy}: {args.workers} CPU workers, {args.epochs} epochs")
        results[strategy] = run(cfg)
        results[strategy]["bytes"] = bytes_per_step(cfg, results[strategy])
    table = Table(title="The same WideResNet on digits")
    table.add_column("")
    for strategy in STRATEGIES:
        table.add_column(strategy, justify="right")

    def add(label: str, text: dict[str, str]) -> None:
        table.add_row(label, *(text[strategy] for strategy in STRATEGIES))

    add("test accuracy", {s: f"{r['test/accuracy']:.4f}" for s, r in results.items()})
    add("steps", {s: f"{r['train/steps']:.0f}" for s, r in results.items()})
    add("bytes sent per worker per step", {s: f"{r['bytes']:,.0f}" for s, r in results.items()})
    add("wall time of training (s)", {s: f"{r['train/seconds']:.1f}" for s, r in results.items()})
    add("consensus distance", {s: f"{r.get('dssync/consensus_distance', 0.0):.4f}" for s, r in results.items()})
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


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo",
        description="Trains a small WideResNet on scikit-learn's digits with several CPU workers under DDP and under "
        "DS-Sync, and compares them. Takes about a minute on two cores.",
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
    demo(args)


if __name__ == "__main__":
    main()
