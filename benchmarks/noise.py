"""Adam at BSP's own learning rate: `python -m benchmarks.noise` compares noise correction, plain DS-Sync and BSP.

On scikit-learn's digits, with N virtual workers in this process (:mod:`ds_lightning.learning`): every number of
workers, groups of 2 and of about sqrt(N), both orders, learning rates around BSP's best. Prints a table at BSP's best
rate and writes all runs (noise.csv) and a picture (noise.png) below `--output`.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ds_lightning.command import Parser, Progress, dated_folder, require
from ds_lightning.digits import digits
from ds_lightning.learning import Experiment, run
from ds_lightning.schedule import auto_group_size, positive_int

KINDS = ("bsp", "plain", "corrected")


@dataclass(frozen=True)
class Case:
    """What is run for every learning rate and seed.

    Attributes:
        world_size: Workers.
        group_size: Of DS-Sync; of BSP the same number of workers.
        overlap: Whether overlapped; else in the paper's order.
        kind: One of :data:`KINDS`.
    """

    world_size: int
    group_size: int
    overlap: bool
    kind: str

    def __str__(self) -> str:
        if self.kind == "bsp":
            return f"{self.world_size} workers, BSP"
        order = "overlapped" if self.overlap else "paper's order"
        return f"{self.world_size} workers, groups of {self.group_size}, {order}, {self.kind}"

    def experiment(self, lr: float, seed: int, steps: int, partition: str) -> Experiment:
        """One run of it."""
        return Experiment(
            world_size=self.world_size,
            schedule="bsp" if self.kind == "bsp" else "grid",
            group_size=self.group_size,
            overlap=self.overlap,
            noise_correction=self.kind == "corrected",
            optimizer="adam",
            lr=lr,
            steps=steps,
            seed=seed,
            partition=partition,
        )


Finals = dict[tuple[Case, float], list[tuple[float, float]]]
"""Test accuracy and train loss of the mean model at the end, one pair per seed."""


def cases(world_sizes: Sequence[int]) -> list[Case]:
    """All that are compared: for each number of workers BSP first."""
    found = []
    for n in world_sizes:
        found.append(Case(n, n, False, "bsp"))
        for group_size in sorted({2, max(2, auto_group_size(n) if n > 8 else 2)}):
            for overlap in (False, True):
                found += [Case(n, group_size, overlap, kind) for kind in KINDS[1:]]
    return found


def final(experiment: Experiment) -> tuple[float, float]:
    """Test accuracy and train loss of the mean model."""
    torch.set_num_threads(1)
    point = run(experiment, digits(), points=1).final
    return point.accuracy, point.train_loss


def best_rate(finals: Finals, world_size: int) -> float:
    """BSP's, by its mean test accuracy; among equals the one of less train loss."""
    means = {
        lr: of_seeds(runs) for (case, lr), runs in finals.items() if case == Case(world_size, world_size, False, "bsp")
    }
    return max(means, key=lambda lr: (means[lr][0], -means[lr][1]))


def of_seeds(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Means over the seeds."""
    accuracies, losses = zip(*runs, strict=True)
    return statistics.mean(accuracies), statistics.mean(losses)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = Parser("noise", __doc__ or "")
    parser.prog = "python -m benchmarks.noise"
    add = parser.add_argument
    add("--world-sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="numbers of workers")
    add("--lr", type=float, nargs="+", default=[0.004, 0.008, 0.016, 0.032, 0.064], help="learning rates")
    add("--seeds", type=int, default=5, help="runs of each, with seeds 0, 1, ...")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--partition", default="iid", help="iid, by_label or dirichlet:ALPHA")
    add("--processes", type=int, default=2, help="runs at a time")
    add("--output", type=Path, default=Path("outputs"), help="a dated folder is made below it")
    args = parser.parse_args(argv)
    require("matplotlib")
    try:
        if min(args.world_sizes) < 2:
            raise ValueError(f"world_sizes has {min(args.world_sizes)}. HINT: averages take 2 workers or more.")
        compared = cases(list(dict.fromkeys(args.world_sizes)))
        jobs = [
            (case, lr, case.experiment(lr, seed, args.steps, args.partition))
            for case in compared
            for lr in dict.fromkeys(args.lr)
            for seed in range(positive_int("seeds", args.seeds))
        ]
        positive_int("processes", args.processes)
        folder = dated_folder(args.output / "noise")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    finals: Finals = {}
    with (
        (folder / "noise.csv").open("w", newline="") as file,
        ProcessPoolExecutor(args.processes, get_context("forkserver")) as pool,
        Progress(sum(e.steps * e.world_size for _, _, e in jobs)) as progress,
    ):
        table = csv.writer(file)
        table.writerow(["workers", "group_size", "overlap", "kind", "lr", "seed", "accuracy", "train_loss"])
        results = pool.map(final, [e for _, _, e in jobs])
        for (case, lr, e), (accuracy, loss) in zip(jobs, results, strict=True):
            finals.setdefault((case, lr), []).append((accuracy, loss))
            table.writerow([case.world_size, case.group_size, case.overlap, case.kind, lr, e.seed, accuracy, loss])
            file.flush()
            progress.advance(f"{case}, lr {lr:g}, seed {e.seed}", e.steps * e.world_size)
    Console(width=140).print(summary(finals))
    picture(finals, folder / "noise.png", f"Adam, 2 samples per worker, {args.steps} steps, {args.seeds} seeds")
    print(f"outputs in {folder}")
    return 0


def summary(finals: Finals) -> Table:
    """At BSP's best rate of each number of workers: accuracy and train loss of all three."""
    table = Table(
        "workers", "lr", "groups of", "order", "BSP", "plain DS-Sync", "corrected", "points", "loss, times BSP's"
    )
    for case in dict.fromkeys(case for case, _ in finals):
        if case.kind != "plain":
            continue
        n = case.world_size
        lr = best_rate(finals, n)
        bsp = of_seeds(finals[Case(n, n, False, "bsp"), lr])
        plain = of_seeds(finals[case, lr])
        corrected = of_seeds(finals[Case(n, case.group_size, case.overlap, "corrected"), lr])
        shown = [f"{100 * accuracy:.2f} / {loss:.4f}" for accuracy, loss in (bsp, plain, corrected)]
        order = "overlapped" if case.overlap else "paper's"
        points, times = 100 * (corrected[0] - bsp[0]), corrected[1] / bsp[1]
        table.add_row(str(n), f"{lr:g}", str(case.group_size), order, *shown, f"{points:+.2f}", f"{times:.2f}")
    return table


def picture(finals: Finals, path: Path, title: str) -> None:
    """Accuracy and train loss against the learning rate, a column for each number of workers."""
    require("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(case.world_size for case, _ in finals))
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(2 + 2.8 * len(sizes), 7), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    names: dict[str, object] = {}
    for column, n in enumerate(sizes):
        smallest = min(case.group_size for case, _ in finals if case.world_size == n)
        for case in dict.fromkeys(case for case, _ in finals if case.world_size == n):
            means = {lr: of_seeds(runs) for (other, lr), runs in finals.items() if other == case}
            if case.kind == "bsp":
                style, name = {"color": "black", "linewidth": 2.5}, "BSP"
            else:
                color = ("C0", "C1")[case.overlap] if case.group_size == smallest else ("C2", "C3")[case.overlap]
                style = {"color": color, "linestyle": "--" if case.kind == "plain" else "-"}
                size = "pairs" if case.group_size == smallest else "groups of about sqrt(N)"
                name = f"{size}, {'overlapped' if case.overlap else 'in order'}, {case.kind}"
            for row in range(2):
                values = [100 * mean[0] if row == 0 else mean[1] for mean in means.values()]
                names[name] = axes[row, column].plot([*means], values, marker=".", **style)[0]
        axes[0, column].set(title=f"{n} workers", xscale="log")
        axes[0, column].set_xticks(rates := sorted({lr for _, lr in finals}), [f"{lr:g}" for lr in rates], rotation=45)
        axes[0, column].minorticks_off()
        axes[1, column].set(xlabel="learning rate", yscale="log")
        for row in range(2):
            axes[row, column].grid(alpha=0.3)
    best = max(100 * of_seeds(runs)[0] for runs in finals.values())
    axes[0, 0].set(ylabel="test accuracy (%)", ylim=(best - 6, best + 0.5))
    axes[1, 0].set_ylabel("train loss")
    figure.suptitle(title)
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
