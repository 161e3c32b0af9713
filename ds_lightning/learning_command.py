"""``python -m ds_lightning simulate learning``: runs by schedule, rate and seed; a table, a CSV and a picture."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ds_lightning.command import Parser, Progress, dated_folder, require
from ds_lightning.digits import digits
from ds_lightning.learning import Experiment, Point, Result, batches, run
from ds_lightning.schedule import positive_int

# Between averages of local SGD, unless said.
_LOCAL_STEPS = 8
_CORRECTIONS: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}

# Of one schedule and one learning rate, a result for each seed.
Runs = dict[tuple[str, float], list[Result]]


def main(argv: list[str]) -> int:
    """The command."""
    args, experiments, folder = _parse(argv)
    data = digits()
    path = folder / "learning.csv"
    runs: Runs = {}
    with Progress(sum(e.steps for e in experiments)) as progress, path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["schedule", "lr", "seed", "step", "accuracy", "loss", "consensus_distance"])
        for e in experiments:
            name = f"{e.schedule}, lr {e.lr:g}, seed {e.seed}"
            result = run(e, data, on_step=lambda step, _, name=name: progress.advance(f"{name}, step {step}"))  # type: ignore[misc]
            runs.setdefault((str(e.schedule), e.lr), []).append(result)
            for p in result.curve:
                table.writerow([e.schedule, e.lr, e.seed, p.step, p.accuracy, p.loss, p.distance])
            file.flush()  # what is done stays if one ends the rest
            progress.line(f"{name}: accuracy {result.final.accuracy:.4f} in {result.seconds:.1f} s")
    title = _title(args, any(e.corrects_noise for e in experiments))
    picture(runs, folder / "learning.png", title)
    print(f"{title}\n\n{summary(runs)}\n\noutputs in {folder}")
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[Experiment], Path]:
    parser = Parser(
        "simulate learning",
        "Trains a small MLP on scikit-learn's digits with N virtual workers in this process, for every schedule,"
        " learning rate and seed. Ctrl-C keeps the rows of finished runs in learning.csv.",
    )
    add = parser.add_argument
    add("--world-size", type=int, default=64, help="number of workers N")
    add("--schedules", nargs="+", default=["grid", "shuffle", "bsp", "local"], help="grid, shuffle, auto, bsp or local")
    add("--group-size", default="auto", help="2 to N, or auto")
    add("--overlap", action=argparse.BooleanOptionalAction, default=True, help="average while gradients are computed")
    add("--sync-every", type=int, help=f"steps between averages; None: 1, and {_LOCAL_STEPS} of local")
    add("--wire-dtype", help="bf16, fp16 or int8; None: as stored")
    add("--average-gradients", action="store_true", help="average gradients in the group as well")
    add("--average-optimizer-state", nargs="+", default=[], metavar="NAME", help="states to average, as exp_avg_sq")
    add("--optimizer-state-every", type=int, default=1, help="in one period of the schedule out of so many")
    add(
        "--noise-correction",
        choices=[*_CORRECTIONS],
        default="false",
        help="make Adam's steps as long as BSP's",
    )
    add("--optimizer", default="sgd", help="sgd (momentum 0.9) or adam")
    add("--lr", type=float, nargs="+", default=[0.1], help="learning rates")
    add("--batch-size", type=int, default=2, help="samples per worker and step")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--partition", default="iid", help="iid, by_label or dirichlet:ALPHA")
    add("--seeds", type=int, default=3, help="runs of each, with seeds 0, 1, ...")
    add("--output", type=Path, default=Path("outputs"), help="a dated folder is made below it")
    args = parser.parse_args(argv)
    if args.group_size != "auto":
        try:
            args.group_size = int(args.group_size)
        except ValueError:
            parser.error(f"group_size={args.group_size!r} is neither an int nor 'auto'. HINT: use auto or 2 to N.")
    for module in ("matplotlib", "sklearn"):  # rather now than after the training
        require(module)
    try:
        experiments = [
            Experiment(
                world_size=args.world_size,
                schedule=schedule,
                group_size=args.group_size,
                overlap=args.overlap,
                sync_every=args.sync_every
                if args.sync_every is not None
                else _LOCAL_STEPS
                if schedule == "local"
                else 1,
                wire_dtype=args.wire_dtype,
                average_gradients=args.average_gradients,
                average_optimizer_state=tuple(args.average_optimizer_state),
                optimizer_state_every=args.optimizer_state_every,
                noise_correction=_CORRECTIONS[args.noise_correction],
                optimizer=args.optimizer,
                lr=lr,
                batch_size=args.batch_size,
                steps=args.steps,
                seed=seed,
                partition=args.partition,
            )
            for schedule in dict.fromkeys(args.schedules)
            for lr in dict.fromkeys(args.lr)
            for seed in range(positive_int("seeds", args.seeds))
        ]
        next(batches(experiments[0], digits().train_labels))  # refuses what has too few samples
        return args, experiments, dated_folder(args.output / "learning")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _title(args: argparse.Namespace, corrected: bool) -> str:
    options = [
        f"{args.world_size} workers",
        f"group size {args.group_size}",
        "overlapped" if args.overlap else "averaged after the step",
        f"{args.optimizer}, {args.batch_size} samples each",
        args.partition,
    ]
    if args.sync_every or "local" in args.schedules:
        options += [
            f"averaged every {args.sync_every} steps" if args.sync_every else f"local every {_LOCAL_STEPS} steps"
        ]
    options += [f"{args.wire_dtype} wire"] if args.wire_dtype else []
    options += ["averaged gradients"] if args.average_gradients else []
    options += [f"averaged {' '.join(args.average_optimizer_state)}"] if args.average_optimizer_state else []
    options += ["corrected for noise"] if corrected else []
    return f"{', '.join(options)}; {args.seeds} seed{'s' * (args.seeds > 1)}"


def summary(runs: Runs) -> str:
    """The table, in markdown."""
    head = ["schedule", "lr", "test accuracy (%)", "train loss", "consensus distance", "seconds"]
    rows = [head, ["---"] * len(head)]
    for (schedule, lr), results in runs.items():
        finals = [r.final for r in results]
        accuracies = [100 * p.accuracy for p in finals]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        rows.append(
            [
                schedule,
                f"{lr:g}",
                f"{statistics.mean(accuracies):.2f}{spread}",
                f"{statistics.mean(p.loss for p in finals):.4f}",
                f"{statistics.mean(p.distance for p in finals):.3g}",
                f"{statistics.mean(r.seconds for r in results):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def best_rates(runs: Runs) -> dict[str, tuple[float, list[Result]]]:
    """Of each schedule the learning rate with the highest mean accuracy at the end, and its results."""
    best: dict[str, tuple[float, list[Result]]] = {}
    for (schedule, lr), results in runs.items():
        if schedule not in best or _accuracy(results) > _accuracy(best[schedule][1]):
            best[schedule] = lr, results
    return best


def _accuracy(results: Sequence[Result]) -> float:
    return statistics.mean(r.final.accuracy for r in results)


def picture(runs: Runs, path: Path, title: str) -> None:
    """Accuracy and consensus distance against the step: each schedule at its best rate, mean and range of seeds."""
    require("matplotlib").use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    best = best_rates(runs)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    panels: list[tuple[str, Callable[[Point], float]]] = [
        ("test accuracy of the mean model (%)", lambda p: 100 * p.accuracy),
        ("consensus distance", lambda p: p.distance),
    ]
    for axis, (label, value) in zip(axes, panels, strict=True):
        for i, (schedule, (lr, results)) in enumerate(best.items()):
            steps = [p.step for p in results[0].curve]
            seeds = [[value(p) for p in r.curve] for r in results]
            low, mean, high = (_over(seeds, f) for f in (min, statistics.mean, max))
            style = {"color": f"C{i}", "linestyle": ("-", "--", "-.", ":")[i % 4]}
            name = f"{schedule}, lr {lr:g}"
            if not any(high):  # has no place on a log scale
                axis.plot([], [], label=f"{name} (always 0)", **style)
                continue
            axis.plot(steps, mean, label=name, **style)
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(xlabel="optimizer steps", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    # The first steps would squeeze all others into a corner.
    late = [p.accuracy for _, results in best.values() for r in results for p in r.curve[len(r.curve) // 5 :]]
    axes[0].set_ylim(bottom=max(0.0, 100 * min(late) - 2))
    if any(0 < p.distance < math.inf for _, results in best.values() for r in results for p in r.curve):
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _over(seeds: Iterable[Sequence[float]], f: Callable[[Iterable[float]], float]) -> list[float]:
    return [f(values) for values in zip(*seeds, strict=True)]
