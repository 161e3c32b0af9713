"""From training runs to what people read: times to a target accuracy in a table, and learning curves in a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.learning import Point, reached

SETTLING = 4  # first steps that are left out of the mean step, in which DDP's buckets settle
# Of Okabe and Ito, which people of any colour vision tell apart; yellow is too faint for a line.
COLOURS = {
    "ddp": "#000000",
    "ddp-bf16": "#E69F00",
    "ddp-hierarchical": "#009E73",
    "post-local-sgd": "#CC79A7",
    "dssync-topology": "#0072B2",
    "dssync-topology-fixed": "#D55E00",
    "dssync": "#56B4E9",
}
# An arm that is not among these takes one of the colours that are left, and a dashed line.
OTHERS = ("#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#0072B2", "#000000")


@dataclass(frozen=True)
class Run:
    """One training run of an arm on all hosts, as rank 0 saw it.

    Attributes:
        setting: Of the cluster.
        arm: How workers synchronized.
        seed: Of weights and data.
        curve: Evaluations.
        ends: Seconds at the end of each step, on the clock of the curve.
        slowed: When a link was slowed, on the same clock: from, to.
        steal: Share of the processors' time that the hypervisor gave to others.
        others: Share of it that other processes of this machine took.
    """

    setting: str
    arm: str
    seed: int
    curve: list[Point]
    ends: list[float]
    slowed: tuple[float, float] | None = None
    steal: float = 0.0
    others: float = 0.0

    @property
    def step(self) -> float:
        """Seconds per step, the mean of those that did not come right after an evaluation, nor first of all."""
        evaluated = {point.step for point in self.curve}
        steps = [
            end - before
            for i, (before, end) in enumerate(zip(self.ends, self.ends[1:], strict=False), start=1)
            if i not in evaluated
        ]
        return statistics.mean(steps[SETTLING:] or steps or self.ends)

    @property
    def consensus(self) -> float:
        """Seconds between the end of a step and the evaluation that follows it, the mean."""
        return statistics.mean(point.seconds - self.ends[point.step - 1] for point in self.curve)


@dataclass(frozen=True)
class Row:
    """One line of the table, over all seeds; None: not every seed reached the target.

    Attributes:
        setting: Of the cluster.
        arm: How workers synchronized.
        step: Seconds per step.
        consensus: Seconds that an evaluation adds to the clock.
        seeds: How many.
        hits: Of them, how many reached the target.
        steps: Until the target.
        seconds: Until it, on the clock.
        ratio: ddp's seconds over this arm's, the mean over seeds in which both reached it.
        run: Seconds of the whole run, on the clock.
        accuracy: At the end.
        spread: Standard deviation of it over seeds, 0 of a single one.
    """

    setting: str
    arm: str
    step: float
    consensus: float
    seeds: int
    hits: int
    steps: float | None
    seconds: float | None
    ratio: float | None
    run: float
    accuracy: float
    spread: float


def summarize(runs: Sequence[Run], target: float) -> list[Row]:
    """One row per setting and arm, in the order of the runs."""

    def hits(setting: str, arm: str) -> dict[int, Point]:
        of = {run.seed: reached(run.curve, target) for run in runs if (run.setting, run.arm) == (setting, arm)}
        return {seed: point for seed, point in of.items() if point is not None}

    rows = []
    for setting, arm in dict.fromkeys((run.setting, run.arm) for run in runs):
        mine = [run for run in runs if (run.setting, run.arm) == (setting, arm)]
        got, ddp = hits(setting, arm), hits(setting, "ddp")
        everywhere = len(got) == len(mine)
        final = [run.curve[-1].accuracy for run in mine]
        ratios = [ddp[seed].seconds / point.seconds for seed, point in got.items() if seed in ddp]
        rows.append(
            Row(
                setting=setting,
                arm=arm,
                step=statistics.mean(run.step for run in mine),
                consensus=statistics.mean(run.consensus for run in mine),
                seeds=len(mine),
                hits=len(got),
                steps=statistics.mean(point.step for point in got.values()) if everywhere else None,
                seconds=statistics.mean(point.seconds for point in got.values()) if everywhere else None,
                ratio=statistics.mean(ratios) if ratios and everywhere else None,
                run=statistics.mean(run.curve[-1].seconds for run in mine),
                accuracy=statistics.mean(final),
                spread=statistics.stdev(final) if len(final) > 1 else 0.0,
            )
        )
    return rows


_COLUMNS = (
    "arm",
    "step (s)",
    "consensus (s)",
    "steps to target",
    "seconds to target",
    "ddp / arm",
    "run (s)",
    "final accuracy",
)
LEGEND = """\
step: seconds per step. consensus: seconds that an evaluation adds for making replicas one. To target: until the first
of two evaluations in a row that reach the target, the mean over seeds; seconds are those of the clock, which runs from
the first step, also during the consensus, but not while the model is evaluated. ddp / arm: ddp's seconds to the target
over this arm's, taken within each seed, then the mean; above 1 the arm is faster than ddp. run: the clock at the last
evaluation, the mean. final accuracy: of the test split there, mean and standard deviation over seeds.
"""


def _cells(row: Row) -> list[str]:
    missed = "not reached" if row.hits == 0 else f"not reached by {row.seeds - row.hits} of {row.seeds} seeds"
    return [
        row.arm,
        f"{row.step:.3f}",
        f"{row.consensus:.3f}",
        missed if row.steps is None else f"{row.steps:.0f}",
        missed if row.seconds is None else f"{row.seconds:.1f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        f"{row.run:.1f}",
        f"{row.accuracy:.4f}" + (f" ± {row.spread:.4f}" if row.seeds > 1 else ""),
    ]


def markdown(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Tables, one per setting.

    Args:
        rows: Of all settings.
        titles: Of each setting.
    """
    parts = []
    for setting in dict.fromkeys(row.setting for row in rows):
        lines = [f"### {titles.get(setting, setting)}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row.setting == setting]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND])


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of seconds and accuracy over curves at the steps that all of them have."""
    together = zip(*curves, strict=False)
    return [
        Point(
            points[0].step,
            statistics.mean(point.seconds for point in points),
            statistics.mean(point.accuracy for point in points),
        )
        for points in together
    ]


def looks(arms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each arm; those of known arms are always the same."""
    arms = list(dict.fromkeys(arms))
    taken = {COLOURS[arm] for arm in arms if arm in COLOURS}
    left = [colour for colour in OTHERS if colour not in taken] or list(OTHERS)
    unknown = [arm for arm in arms if arm not in COLOURS]
    styles = {arm: (left[i % len(left)], "--") for i, arm in enumerate(unknown)}
    return {arm: styles.get(arm) or (COLOURS[arm], "-") for arm in arms}


def plot(runs: Sequence[Run], titles: dict[str, str], target: float, path: Path) -> None:
    """A panel per setting: accuracy against seconds, a curve per arm, a dot when it had reached the target."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys(run.setting for run in runs))
    styles = looks(run.arm for run in runs)
    figure, axes = plt.subplots(
        len(settings), 1, figsize=(9, 0.6 + 3.1 * len(settings)), squeeze=False, layout="constrained"
    )
    lowest = min(point.accuracy for run in runs for point in run.curve[1:] or run.curve)
    for setting, axis in zip(settings, axes[:, 0], strict=True):
        here = [run for run in runs if run.setting == setting]
        slowed = [run.slowed for run in here if run.slowed is not None]
        if slowed:
            begin, end = (statistics.mean(times) for times in zip(*slowed, strict=True))
            axis.axvspan(begin, end, color="0.9", zorder=0, label="slow link")
        axis.axhline(target, color="0.35", linestyle=(0, (4, 3)), linewidth=1, label=f"target {target:g}")
        for arm in dict.fromkeys(run.arm for run in here):
            colour, style = styles[arm]
            curves = [run.curve for run in here if run.arm == arm]
            for curve in curves if len(curves) > 1 else []:
                axis.plot(*_xy(curve), color=colour, linestyle=style, linewidth=0.8, alpha=0.3)
            mean = mean_curve(curves)
            axis.plot(*_xy(mean), color=colour, linestyle=style, linewidth=1.8, label=arm)
            hits = [reached(curve, target) for curve in curves]
            points = [point for point in hits if point is not None]
            if len(points) == len(curves):
                seconds = statistics.mean(point.seconds for point in points)
                axis.plot(seconds, target, "o", color=colour, markeredgecolor="white", markersize=8, zorder=4)
        axis.set_xlim(0, 1.02 * max(run.curve[-1].seconds for run in here))
        axis.set_ylim(max(0.0, lowest - 0.03), 1.01)
        axis.set_ylabel("test accuracy", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.93", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(titles.get(setting, setting), loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("seconds of training (dot: when the target was reached)", fontsize=8)
    handles: dict[str, Any] = {}
    for axis in axes[:, 0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    arms_first = sorted(handles, key=lambda label: label not in styles)
    figure.legend(
        [handles[label] for label in arms_first],
        arms_first,
        loc="outside upper left",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _xy(curve: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.seconds for point in curve], [point.accuracy for point in curve]
