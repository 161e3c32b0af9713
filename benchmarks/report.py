"""From runs to what people read: medians and ratios, a table for the console, markdown, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from rich.table import Table

from benchmarks.arms import COMPUTE


@dataclass(frozen=True)
class Run:
    """One run of an arm on all hosts; means over the ranks unless said.

    Attributes:
        case: Setting and model.
        arm: How workers synchronized.
        repetition: Arms of one repetition ran one after the other.
        seconds: Per step: from the first measured step to the last, over their number.
        slowest_seconds: The same of the slowest rank.
        median_seconds: The median of single steps.
        bytes_sent: Per worker and step, by the interfaces' counters.
        most_bytes_sent: The same of the worker that sent most.
        memory: Peak of the measured steps above the process before it made the model, in bytes.
        memory_of_fit: The same with the end of fit.
        parameter_bytes: Of the model.
        steal: Share of the processors' time that the hypervisor gave to others.
        others: Share of it that other processes of this machine took.
        predicted: Seconds per step that the cost model says, if it says something.
    """

    case: str
    arm: str
    repetition: int
    seconds: float
    slowest_seconds: float
    median_seconds: float
    bytes_sent: float
    most_bytes_sent: float
    memory: float
    memory_of_fit: float
    parameter_bytes: int
    steal: float
    others: float
    predicted: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. None: was not measured.

    Attributes:
        case: Setting and model.
        arm: How workers synchronized.
        step: Seconds per step, the median over repetitions.
        median_step: The median of single steps, the median over repetitions.
        spread: Half of what lies between the fastest repetition and the slowest, in seconds.
        ratio: ddp's step time over this arm's, the median of the ratios within each repetition.
        bytes_sent: Per worker and step.
        bytes_ratio: The same in multiples of the parameters' bytes.
        compute: Seconds per step without any communication.
        wire: Seconds per step without compute.
        hidden: `(compute + wire - step) / min(compute, wire)`.
        memory: Peak per worker in bytes.
        predicted: Seconds per step that the cost model says.
    """

    case: str
    arm: str
    step: float
    median_step: float
    spread: float
    ratio: float | None
    bytes_sent: float
    bytes_ratio: float
    compute: float | None
    wire: float | None
    hidden: float | None
    memory: float
    predicted: float | None


def undisturbed(runs: Sequence[Run], limit: float, enough: int = 2) -> tuple[list[Run], list[str]]:
    """Leaves out repetitions of a case in which others took too much of the processors, where enough remain.

    Args:
        runs: All runs.
        limit: Share of the processors' time, the mean over the repetition's runs.
        enough: Repetitions that must remain.

    Returns:
        What remains, and what to tell people.
    """
    kept: list[Run] = []
    messages = []
    for case in dict.fromkeys(run.case for run in runs):
        repetitions: dict[int, list[Run]] = {}
        for run in runs:
            if run.case == case:
                repetitions.setdefault(run.repetition, []).append(run)
        lost = {i: statistics.mean(r.steal + r.others for r in each) for i, each in repetitions.items()}
        noisy = [i for i, share in lost.items() if share > limit]
        if noisy:
            shares = ", ".join(f"{i} ({lost[i]:.0%})" for i in noisy)
            keep = len(repetitions) - len(noisy) < enough
            verdict = "kept, for lack of others: read them with care" if keep else "left out"
            messages.append(f"{case}: others took processor time in repetitions {shares}; {verdict}")
            noisy = [] if keep else noisy
        kept += [run for i, each in repetitions.items() if i not in noisy for run in each]
    return kept, messages


def summarize(runs: Sequence[Run], wire_cases: dict[str, str] | None = None) -> list[Row]:
    """One row per case and arm, in the order of the runs.

    Args:
        runs: Of any number of cases.
        wire_cases: Of a case, the case that ran the same without compute.
    """

    def of(case: str | None, arm: str) -> dict[int, Run]:
        return {run.repetition: run for run in runs if (run.case, run.arm) == (case, arm)}

    def median(each: dict[int, Run]) -> float | None:
        return statistics.median(run.seconds for run in each.values()) if each else None

    rows = []
    for case, arm in dict.fromkeys((run.case, run.arm) for run in runs if run.arm != COMPUTE):
        mine, ddp = of(case, arm), of(case, "ddp")
        seconds = [run.seconds for run in mine.values()]
        step = statistics.median(seconds)
        ratios = [ddp[i].seconds / run.seconds for i, run in mine.items() if i in ddp]
        compute, wire = median(of(case, COMPUTE)), median(of((wire_cases or {}).get(case), arm))
        first = next(iter(mine.values()))
        sent = statistics.median(run.bytes_sent for run in mine.values())
        rows.append(
            Row(
                case=case,
                arm=arm,
                step=step,
                median_step=statistics.median(run.median_seconds for run in mine.values()),
                spread=(max(seconds) - min(seconds)) / 2,
                ratio=statistics.median(ratios) if ratios else None,
                bytes_sent=sent,
                bytes_ratio=sent / first.parameter_bytes,
                compute=compute,
                wire=wire,
                hidden=(compute + wire - step) / min(compute, wire) if compute and wire else None,
                memory=statistics.median(run.memory for run in mine.values()),
                predicted=first.predicted,
            )
        )
    return rows


def _text(form: str) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else format(value, form)


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "arm": lambda row: row.arm,
    "step (s)": lambda row: f"{row.step:.3f} ± {row.spread:.3f}",
    "median step": lambda row: f"{row.median_step:.3f}",
    "model (s)": lambda row: (
        "" if row.predicted is None else f"{row.predicted:.3f} ({row.predicted / row.step - 1:+.0%})"
    ),
    "ddp / arm": lambda row: _text(".2f")(row.ratio),
    "bytes sent": lambda row: f"{row.bytes_sent:,.0f}",
    "x parameters": lambda row: f"{row.bytes_ratio:.3f}",
    "compute (s)": lambda row: _text(".3f")(row.compute),
    "wire (s)": lambda row: _text(".3f")(row.wire),
    "hidden": lambda row: _text(".0%")(row.hidden),
    "memory (MB)": lambda row: f"{row.memory / 1e6:.1f}",
}
LEGEND = """\
step: seconds per step (first measured step to last over their number, mean over workers), median and half the range
over repetitions. median step: of single steps. model: what the cost model of ds_lightning.cost predicts, and how far
that is from the measured step. ddp / arm: ddp's step time over this arm's, taken within each repetition, then the
median; above 1 the arm is faster than ddp, below 1 slower. bytes sent: per worker and step, by the network interfaces'
own counters; x parameters: the same in multiples of the parameters' bytes. compute: step without any communication.
wire: step without compute. hidden: (compute + wire - step) / min(compute, wire). memory: peak per worker during the
measured steps, above what the process held before it made the model.
"""


def _cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {case: [row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)}


def markdown(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Tables, one per case.

    Args:
        rows: Of all cases.
        titles: Of each case.
    """
    parts = []
    for case, mine in _cases(rows).items():
        lines = [f"### {titles.get(case, case)}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(cell(row) for cell in _COLUMNS.values())} |" for row in mine]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND])


def console_tables(rows: Sequence[Row], titles: dict[str, str]) -> list[Table]:
    """The same for a terminal."""
    tables = []
    for case, mine in _cases(rows).items():
        table = Table(title=titles.get(case, case), title_justify="left")
        for i, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if i else "left")
        for row in mine:
            table.add_row(*(cell(row) for cell in _COLUMNS.values()))
        tables.append(table)
    return tables


def plot(rows: Sequence[Row], titles: dict[str, str], path: Path) -> None:
    """Bars per case: step time relative to ddp, and bytes relative to the parameters."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = _cases(rows)
    heights = [len(mine) + 2.5 for mine in cases.values()]
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(11, 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (case, mine), (left, right) in zip(cases.items(), axes, strict=True):
        arms = [row.arm for row in mine]
        relative = all(row.ratio for row in mine)
        panels = [
            (
                left,
                [1 / row.ratio if relative and row.ratio else row.step for row in mine],
                "step time / ddp's (below 1: faster)" if relative else "step time (s)",
            ),
            (right, [row.bytes_ratio for row in mine], "bytes sent per worker and step / parameters' bytes"),
        ]
        for axis, values, label in panels:
            colours = ["tab:blue" if arm.startswith("dssync") else "tab:gray" for arm in arms]
            bars = axis.barh(arms, values, color=colours)
            axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
            axis.set_xlim(0, 1.15 * max(values))
            if axis is right or relative:
                axis.axvline(1, color="black", linestyle=":", linewidth=1)
            axis.invert_yaxis()
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=8)
        right.set_yticklabels([])
        left.set_title(titles.get(case, case), loc="left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
