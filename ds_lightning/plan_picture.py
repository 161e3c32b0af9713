"""A plan in one picture: how busy links are, who meets whom when, and how fast replicas agree. Needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from ds_lightning.cost import Floats, Ints, Network, Round, rounds
from ds_lightning.planner import Option, Plan
from ds_lightning.topology import Topology

_DPI = 110
_MOST_ROWS = 40
# More ranks than this are shown in blocks of neighbours.
_MOST_CELLS = 200
_EXACT_RANKS = 256
_SAMPLES = 24
# Errors below count as none, and are below the axis.
_LOWEST = 1e-5
_MOST_STEPS = 400
# Okabe and Ito's, for all kinds of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def draw(found: Plan, about: str, path: Path) -> None:
    """Write the picture of a plan.

    Args:
        found: The plan.
        about: A line on what it was made for.
        path: Of the PNG.
    """
    figure = Figure(figsize=(14, 9), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{about}\n{found.verdict}", fontsize=11)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.03)
    left, right = halves
    upper, lower = right.subplots(2, 1, height_ratios=(1.15, 1))
    _draw_links(left.subplots(), found)
    _draw_meetings(upper, found)
    _draw_errors(lower, found)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in letters that the font lacks
        figure.savefig(path)


def _draw_links(axis: Any, found: Plan) -> None:
    network, period = found.network, rounds(found.schedule)
    models = np.array([network.traffic(*period.step(t)) for t in range(len(period))])  # (steps, nodes)
    busy = models * network.seconds_per_byte * found.size
    rows = _rows(found.topology, network, busy.mean(axis=0))
    index = [i for i, _ in rows]
    longest = busy.max(axis=1)
    share = busy[:, index] / np.where(longest > 0, longest, 1)[:, None]
    image = axis.pcolormesh(
        np.ma.masked_equal(share.T, 0), cmap="Blues", vmin=0, vmax=1, edgecolors="#cccccc", linewidth=0.4
    )
    axis.set_ylim(max(len(rows), 8), 0)
    axis.set_yticks(np.arange(len(rows)) + 0.5, [label for _, label in rows])
    axis.tick_params(axis="y", length=0)
    for label in axis.get_yticklabels():
        label.set(family="monospace", fontsize=9 if len(rows) <= 24 else 7.5, parse_math=False)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("step of the period, and seconds that its busiest link is busy", fontsize=9)
    numbers = [f"{t}\n{seconds:.2g}" for t, seconds in enumerate(longest)]
    axis.set_xticks(np.arange(len(period)) + 0.5, numbers, fontsize=9 if len(period) <= 12 else 7)
    axis.tick_params(axis="x", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for column, row in np.ndindex(share.shape):
        if count := models[column, index[row]]:
            colour = "white" if share[column, row] > 0.6 else "black"
            fontsize = 8 if len(rows) <= 24 and len(period) <= 12 else 6.5
            axis.text(
                column + 0.5, row + 0.5, f"{count:.3g}", ha="center", va="center", color=colour, fontsize=fontsize
            )
    some = "" if len(rows) == len(network.nodes) else f"{len(rows)} of {len(network.nodes):,} links, "
    first = "switches' first, then the busiest: " if some else ""
    axis.set_title(f"{some}{first}models that cross per direction", fontsize=10, loc="left")
    bar = axis.figure.colorbar(image, ax=axis, orientation="horizontal", shrink=0.6, aspect=40, pad=0.01)
    bar.set_label("time that a link is busy / that of the step's busiest", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _rows(topology: Topology, network: Network, busy: Floats) -> list[tuple[int, str]]:
    """Index and label of the links to show, along the tree."""
    number = {node: i for i, node in enumerate(network.nodes)}
    tree = [(number[node], node, branch) for node, branch in _walk(topology) if node != topology.top]
    if len(tree) > _MOST_ROWS:
        kept = sorted(tree, key=lambda row: (row[1] in topology.ranks, -busy[row[0]]))[:_MOST_ROWS]
        tree = [row for row in tree if row in set(kept)]
    labels = [f"{branch}{_shortened(node)}" for _, node, branch in tree]
    width = max(map(len, labels))
    speeds = [str(topology.links[node]).split(" ")[0] for _, node, _ in tree]
    return [
        (i, f"{label:<{width}} {speed:>6} Gbit/s") for (i, _, _), label, speed in zip(tree, labels, speeds, strict=True)
    ]


def _walk(topology: Topology) -> Iterator[tuple[str, str]]:
    """Each node, before those below it, and the lines of the tree in front of it."""
    waiting = [(topology.top, "", "")]
    while waiting:
        node, branch, indent = waiting.pop()
        yield node, branch
        children = topology.children.get(node, ())
        for child in reversed(children):
            if node == topology.top:
                waiting.append((child, "", ""))
            else:
                last = child == children[-1]
                waiting.append((child, indent + ("└ " if last else "├ "), indent + ("  " if last else "│ ")))


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def _draw_meetings(axis: Any, found: Plan) -> None:
    topology, period = found.topology, rounds(found.schedule)
    order = [rank for node, _ in _walk(topology) for rank in topology.ranks.get(node, ())]
    n = len(order)
    block = -(-n // _MOST_CELLS) if n > _EXACT_RANKS else 1
    place = np.empty(n, np.int64)
    place[order] = np.arange(n) // block
    meet = np.array([_meet(groups, place) for groups in period])  # (steps, blocks, blocks)
    cells = meet.shape[1]
    if block == 1:
        meet[:, np.arange(cells), np.arange(cells)] = False
    draw_meet = _draw_shares if period.parts > 1 else _draw_first_steps
    draw_meet(axis, meet, "ranks" if block == 1 else f"blocks of {block} ranks")
    if cells <= 32:
        ticks = range(0, cells, 1 if cells <= 16 else 2)
        axis.set_xticks(ticks, [order[i] for i in ticks], fontsize=8)
        axis.set_yticks(ticks, [order[i] for i in ticks], fontsize=8)
    else:  # places along the tree
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value * block:,.0f}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * block:,.0f}")
    for edge in _rack_edges(topology, order):
        axis.axhline(edge / block - 0.5, color="black", linewidth=0.8)
        axis.axvline(edge / block - 0.5, color="black", linewidth=0.8)
    axis.set_xlabel(_rank_label(order, cells), fontsize=8)


def _draw_first_steps(axis: Any, meet: Any, who: str) -> None:
    """The step at which each two meet first."""
    steps, cells = meet.shape[:2]
    first = np.ma.masked_array(meet.argmax(axis=0), ~meet.any(axis=0))
    colours = _step_colours(steps)
    norm = BoundaryNorm(np.arange(steps + 1) - 0.5, steps)
    image = axis.imshow(first, cmap=ListedColormap(colours), norm=norm, interpolation="nearest", origin="upper")
    if cells <= 16:
        for one, other in np.argwhere(meet.any(axis=0)):
            when = np.flatnonzero(meet[:, one, other])
            text = ",".join(map(str, when[:3])) + ("…" if len(when) > 3 else "") if cells <= 8 else str(when[0])
            dark = _luminance(colours[when[0]]) < 0.5
            axis.text(other, one, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axis.set_title(f"the step at which {who} first meet", fontsize=10)
    bar = axis.figure.colorbar(image, ax=axis, ticks=range(steps), aspect=25)
    bar.set_label("step (white: never)", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)


def _draw_shares(axis: Any, meet: Any, who: str) -> None:
    """What share of the model each two average together, of a plan in parts: they meet at nearly every step."""
    cells, share = meet.shape[1], 100 * meet.mean(axis=0)
    image = axis.imshow(
        np.ma.masked_equal(share, 0), cmap="Blues", vmin=0, vmax=share.max(), interpolation="nearest", origin="upper"
    )
    if cells <= 16:
        for one, other in np.argwhere(share > 0):
            colour = "white" if share[one, other] > 0.6 * share.max() else "black"
            axis.text(other, one, f"{share[one, other]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(f"how much of the model {who} average together per step", fontsize=10)
    bar = axis.figure.colorbar(image, ax=axis, aspect=25)
    bar.set_label("% of the model (white: never together)", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)


def _rank_label(order: Sequence[int], cells: int) -> str:
    if order == [*range(len(order))]:
        return "rank"
    return "rank, along the tree" if cells <= 32 else "place of the rank along the tree"


def _meet(groups: Round, place: Ints) -> Any:
    """Whether any group has members in both of two blocks, shape (blocks, blocks)."""
    members = np.zeros((place.max() + 1, len(groups.sizes)), np.float32)
    members[place, groups.group_of] = 1
    return members @ members.T > 0


def _step_colours(steps: int) -> list[Any]:
    if steps <= len(_COLOURS):
        return list(_COLOURS[:steps])
    return [matplotlib.colormaps["viridis"](i / (steps - 1)) for i in range(steps)]


def _luminance(colour: Any) -> float:
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return float(0.3 * red + 0.59 * green + 0.11 * blue)


def _rack_edges(topology: Topology, order: Sequence[int]) -> list[int]:
    """Where one switch's hosts end and the next one's begin, unless there are many."""
    racks = [topology.above[topology.host_of[rank]] for rank in order]
    edges = [i for i in range(1, len(racks)) if racks[i] != racks[i - 1]]
    return edges if len(edges) < 32 else []


def _draw_errors(axis: Any, found: Plan) -> None:
    options = [found.best, *(option for option in found.alternatives if option != found.best)]
    curves = [_curve(option, found.network.world_size) for option in options]
    end = max(_time_to(_LOWEST * 100, *curves[0]), 1.3 * options[0].seconds)
    end = 1.08 * max(end, min(found.alternatives[0].seconds, 8 * end))
    colours = ("black", *(_COLOURS[i] for i in (5, 1, 3, 7, 0, 2)), _COLOURS[4])
    styles = ("-", "--", ":", "-.", "--", "-", "-")
    labels: dict[int, str] = {}
    for i, option in enumerate(options):
        same = next((j for j in labels if _coincide(curves[i], curves[j], 0.003 * end)), None)
        if same is None:
            labels[i] = f"{option.name} (the plan)" if option in found.alternatives and i == 0 else option.name
        else:
            far = len(labels[same].splitlines()[-1]) + len(option.name) > 75
            labels[same] += f" ={chr(10) if far else ' '}{option.name}"
    for i, label in labels.items():
        times, errors = curves[i]
        axis.step(
            [*times, end * 2],
            [*errors, errors[-1]],
            where="post",
            color=colours[i],
            linestyle=styles[i % len(styles)],
            linewidth=1.4 if i else 2.4,
            zorder=2 if i else 3,
            label=label,
        )
    axis.set_yscale("log")
    axis.set_ylim(_LOWEST, 2)
    axis.set_xlim(0, end)
    axis.set_xlabel("time (s)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="#dddddd", linewidth=0.5)
    axis.set_title("consensus error of replicas that start with unit variance, without noise", fontsize=10)
    columns = 1 if any(len(label) > 40 for label in labels.values()) else 2
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, fontsize=8, frameon=False)


def _curve(option: Option, n: int) -> tuple[list[float], list[float]]:
    """Times at which steps end and the errors from then on, the first at time 0."""
    if option.schedule is None:
        every = 4 if option.name.startswith("local SGD") else 1
        return [0.0, every * option.seconds], [1.0, _LOWEST / 100]
    period = rounds(option.schedule)
    values = np.eye(n) if n <= _EXACT_RANKS else np.random.default_rng(0).standard_normal((n, _SAMPLES))
    values -= values.mean(axis=0)
    start = float((values**2).sum())
    errors, parts = [1.0], [values] * period.parts
    while len(errors) <= _MOST_STEPS and errors[-1] > _LOWEST / 10:
        step = period.step(len(errors) - 1)
        parts = [groups.means(values) for groups, values in zip(step, parts, strict=True)]
        error = sum(float((values**2).sum()) for values in parts) / period.parts / start
        errors.append(max(error, _LOWEST / 100))
    return [t * option.seconds for t in range(len(errors))], errors


def _coincide(one: tuple[list[float], list[float]], other: tuple[list[float], list[float]], difference: float) -> bool:
    """Whether two curves could not be told apart."""
    return len(one[0]) == len(other[0]) and all(
        abs(t - s) <= difference and abs(d / e - 1) < 0.01
        for t, s, d, e in zip(one[0], other[0], one[1], other[1], strict=True)
    )


def _time_to(error: float, times: Sequence[float], errors: Sequence[float]) -> float:
    return next((t for t, e in zip(times, errors, strict=True) if e <= error), times[-1])
