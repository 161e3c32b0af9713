"""``python -m ds_lightning simulate time``: how long steps take on a cluster; a table, a CSV and a picture."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_lightning import timing
from ds_lightning.clusters import generate
from ds_lightning.command import Parser, Progress, check_output, dated_folder, parameters, require, seconds
from ds_lightning.cost import Floats
from ds_lightning.schedule import positive_int
from ds_lightning.timing import NAMES, PLAN_RANKS, Setting, Timing
from ds_lightning.topology import Topology
from ds_lightning.wire import WIRE_DTYPES, wire_bytes

if TYPE_CHECKING:
    from rich.table import Table

# Options of `generate`, which a described cluster does not take.
_GENERATED = (
    "ranks",
    "hosts_per_rack",
    "ranks_per_host",
    "bandwidth",
    "oversubscription",
    "latency",
    "stragglers",
    "straggler_share",
)
_MOST_STEPS = 100_000
# Okabe and Ito's, for all kinds of colour vision.
_COLOURS = dict(zip(NAMES, ("#000000", "#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00"), strict=True))
# Step times further apart than this are drawn on a log scale.
_FAR_APART = 8.0


def main(argv: list[str]) -> int:
    """The command."""
    args, setting, folder = _parse(argv)
    done: list[Timing] = []
    try:
        with (
            Progress(len(args.schedules) * args.steps) as progress,
            (folder / "timing.csv").open("w", newline="") as file,
        ):
            table = csv.writer(file)
            table.writerow(["schedule", "step", "mean_end", "min_end", "max_end"])
            for name in args.schedules:
                progress.advance(f"{name}, schedule", 0)

                def row(step: int, ends: Floats, name: str = name) -> None:
                    table.writerow([name, step, *(f"{end:.6f}" for end in ends)])
                    progress.advance(f"{name}, step {step + 1}")

                try:
                    done.append(timing.run(setting, name, args.steps, row))
                finally:
                    file.flush()
                progress.line(f"{name}: {done[-1].mean:.3g} s per step")
    finally:  # what is done is told if one ends the rest
        if done:
            _report(args, setting, done, folder)
    return 0


def _report(args: argparse.Namespace, setting: Setting, done: list[Timing], folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    title = _title(args, setting)
    print(title)
    console.print(_table(setting, done))
    picture(done, folder / "timing.png", title)
    print(f"\n{folder / 'timing.csv'}\n{folder / 'timing.png'}")


def _title(args: argparse.Namespace, setting: Setting) -> str:
    topology = setting.topology
    options = [
        f"{topology.world_size:,} ranks on {len(topology.hosts):,} hosts",
        f"{setting.size / 1e6:,.4g} MB on the wire ({args.wire})",
        f"{setting.compute:g} s of compute{'' if setting.overlap else ', not overlapped'}",
    ]
    if setting.jitter:
        options.append(f"jitter {setting.jitter:g}")
    if setting.others:
        options.append(f"contention on {setting.contention:.0%} of links, others every {setting.contention_period:g} s")
    how = "event by event" if topology.world_size <= setting.event_ranks else "by the recurrence"
    return f"{', '.join(options)}\n{args.steps} steps, {how}, seed {setting.seed}"


def _table(setting: Setting, done: list[Timing]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("schedule")
    for column in ("mean s / step", "median", "95%", "x DDP's speed", "slowest waits"):
        table.add_column(column, justify="right")
    table.add_column("busiest link")
    table.add_column("busy s / step", justify="right")
    ddp = next((one.mean for one in done if one.name == "ddp"), None)
    for one in done:
        busiest = int(one.busy.argmax())
        table.add_row(
            one.name,
            f"{one.mean:.3g}",
            *(f"{np.percentile(one.steps, q):.3g}" for q in (50, 95)),
            f"{ddp / one.mean:.2f}" if ddp and one.mean else "",
            f"{max(0.0, one.waiting[one.slowest]):.0%}",
            setting.network.nodes[busiest],
            f"{one.busy[busiest]:.3g}",
        )
    table.caption = (
        "mean, median and 95th percentile over steps, each the mean over ranks, from the start. slowest waits:\n"
        "share of its time in which the rank that ends last does not compute."
    )
    table.caption_justify = "left"
    return table


def picture(done: list[Timing], path: Path, title: str) -> None:
    """Step time by step, a row for each schedule; beside that means, and how step times are distributed."""
    require("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 1.6 + 0.95 * max(4, len(done))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1), wspace=0.03)
    _draw_steps(left, done)
    upper, lower = right.subplots(2, 1)
    places = np.arange(len(done))
    for axis in (upper, lower):
        axis.set_yticks(places, [one.name for one in done])
        axis.set_ylim(len(done) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    means = [one.mean for one in done]
    upper.barh(places, means, color=[_COLOURS[one.name] for one in done], height=0.65)
    for place, mean in zip(places, means, strict=True):
        upper.annotate(f"{mean:.3g}", (mean, place), (4, 0), textcoords="offset points", va="center")
    upper.set_xlim(0, 1.15 * max(means) or 1)
    upper.set_title("mean seconds per step", fontsize="medium", loc="left")
    for place, one in zip(places, done, strict=True):
        least, low, middle, high, most = np.percentile(one.spread, (0, 5, 50, 95, 100))
        line: dict[str, Any] = {"color": _COLOURS[one.name], "solid_capstyle": "butt"}
        lower.plot([least, most], [place, place], linewidth=1.2, **line)
        lower.plot([low, high], [place, place], linewidth=7, **line)
        lower.plot(middle, place, "o", color=_COLOURS[one.name], markersize=9, markeredgecolor="white")
    _scale(lower.xaxis, done)
    lower.set_title("seconds of single steps of single ranks:\nmedian, 5-95%, range", fontsize="medium", loc="left")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_steps(figure: Any, done: list[Timing]) -> None:
    axes = figure.subplots(len(done), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, one in zip(axes, done, strict=True):
        numbers, colour = np.arange(len(one.ends)) + 1, _COLOURS[one.name]
        few = len(numbers) <= 60
        axis.plot(numbers, one.steps, color=colour, marker="." if few else "", linewidth=1.5 if few else 0.8)
        axis.fill_between(numbers, one.spread[:, 5], one.spread[:, 95], color=colour, alpha=0.2, linewidth=0)
        axis.set_ylabel(one.name, rotation=0, ha="right", va="center")
        axis.grid(alpha=0.3)
    _scale(axes[0].yaxis, done)
    axes[0].set_title("seconds of each step: mean over ranks, and 5-95% of them", fontsize="medium", loc="left")
    axes[-1].set_xlabel("step")


def _scale(axis: Any, done: list[Timing]) -> None:
    """Logarithmic where step times are far apart; all schedules share it."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(one.spread.min() for one in done), max(one.spread.max() for one in done)
    limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    if not low > 0 or high < _FAR_APART * low:
        limits(0, 1.1 * high or 1)
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    limits(0.8 * low, 1.25 * high)
    axis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Setting, Path]:
    parser = Parser(
        "simulate time",
        "Computes how long steps take on a described cluster (--topology), or on one of equal racks (--ranks), under"
        " several schedules. Ctrl-C keeps the rows of finished steps in timing.csv.",
    )
    add = parser.add_argument
    given: dict[str, Any] = {"default": argparse.SUPPRESS}  # so that one sees whether it was
    add("--topology", type=Path, metavar="FILE", help="YAML of hosts, switches, links; or else give --ranks")
    add("--ranks", type=int, **given, help="number of ranks of a generated cluster")
    add("--hosts-per-rack", type=int, **given, help="of it (32)")
    add("--ranks-per-host", type=int, **given, help="of it (8)")
    add("--bandwidth", type=float, **given, help="Gbit/s of each host's link (25)")
    add("--oversubscription", type=float, **given, help="links of a rack's hosts, added up, to its trunk (4)")
    add("--latency", type=float, **given, help="ms one way of each link (0)")
    add("--stragglers", type=float, **given, help="share of hosts whose links are slow (0)")
    add("--straggler-share", type=float, **given, help="what these have of the bandwidth (0.25)")
    add("--contention", type=float, default=0.0, help="share of links that others slow down to 1/4 to 1 at a time")
    add("--contention-period", type=seconds, default=10.0, help="seconds after which others are")
    add("--jitter", type=float, default=0.0, help="of compute per rank and step: standard deviation of its logarithm")
    add("--schedules", nargs="+", choices=NAMES, default=[*NAMES], help="which of them")
    add("--local-steps", type=int, default=4, help="steps between averages of local")
    add("--parameters", type=parameters, default="110M", help="of the model, as 110M, 1.5B or 123456")
    add("--wire", choices=WIRE_DTYPES, default="fp32", help="dtype in which models travel")
    add("--compute", type=seconds, default=0.35, help="seconds of forward and backward")
    add("--no-overlap", action="store_true", help="average after the optimizer step, not meanwhile")
    add("--steps", type=int, default=50, help="how many")
    add("--event-ranks", type=int, default=timing.EVENT_RANKS, help="up to so many, event by event (slow beyond 64)")
    add("--seed", type=int, default=0, help="of all that is drawn")
    add("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="a dated folder is made below it")
    args = parser.parse_args(argv)
    for module in ("matplotlib", "rich"):  # rather now than at the end
        require(module)
    try:
        if positive_int("steps", args.steps) > _MOST_STEPS:
            raise ValueError(f"steps={args.steps} is too large. HINT: use at most {_MOST_STEPS:,}.")
        if args.event_ranks < 0:
            raise ValueError(f"event_ranks={args.event_ranks} is negative. HINT: with 0 none are.")
        check_output(args.output, "simulate")
        setting = Setting(
            topology=_topology(args),
            size=max(1.0, wire_bytes(args.parameters, WIRE_DTYPES[args.wire])),
            compute=args.compute,
            overlap=not args.no_overlap,
            jitter=args.jitter,
            contention=args.contention,
            contention_period=args.contention_period,
            local_steps=args.local_steps,
            seed=args.seed,
            event_ranks=args.event_ranks,
        )
        args.schedules = [*dict.fromkeys(args.schedules)]
        if setting.topology.world_size > PLAN_RANKS and "topology" in args.schedules:
            why = f"planning for more than {PLAN_RANKS:,} ranks takes minutes"
            args.schedules.remove("topology")
            if not args.schedules:
                raise ValueError(f"{why}. HINT: use fewer ranks, or other schedules.")
            print(f"topology is left out: {why}", file=sys.stderr)
        return args, setting, dated_folder(args.output / "simulate")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _topology(args: argparse.Namespace) -> Topology:
    generated = {name: value for name, value in vars(args).items() if name in _GENERATED}
    if args.topology is None:
        if "ranks" not in generated:
            raise ValueError("there is no cluster. HINT: give --topology FILE, or --ranks N for one of equal racks.")
        return generate(**generated, seed=args.seed)
    if generated:
        option = "--" + next(iter(generated)).replace("_", "-")
        raise ValueError(f"{option} is for generated clusters. HINT: leave out it or --topology.")
    return Topology.from_yaml(args.topology)
