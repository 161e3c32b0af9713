"""``python -m ds_lightning plan``: a schedule for a described network as a table, a picture and a file to load."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_lightning.command import Parser, check_output, dated_folder, parameters, require, seconds
from ds_lightning.cost import rounds
from ds_lightning.planner import BLIND_PAIRS, Option, Plan, plan
from ds_lightning.schedule import Partition, schedule_parts, schedule_period
from ds_lightning.topology import Topology
from ds_lightning.wire import WIRE_DTYPES, wire_bytes

if TYPE_CHECKING:
    from rich.table import Table

# Up to so many ranks the groups of each step are listed, and traffic for so many switches.
_LISTED_RANKS = 32
_LISTED_SWITCHES = 16


@dataclass(frozen=True)
class Figures:
    """An option in the table.

    Attributes:
        name: For people.
        seconds: Mean time of a step.
        times_faster: Than DDP's ring in rank order.
        error: Steady consensus error; ``None``: it grows for ever.
        error_to_pairs: Relative to that of blind pairs; ``None`` where theirs is 0 or this one grows for ever.
        busiest_link: The link (of the node of that name) that is busy longest, for schedules.
        busy_seconds: How long it is, on average over the steps of a period.
        is_plan: Whether the plan is this one.
    """

    name: str
    seconds: float
    times_faster: float
    error: float | None
    error_to_pairs: float | None
    busiest_link: str | None
    busy_seconds: float | None
    is_plan: bool


def figures(found: Plan) -> list[Figures]:
    """Those of the plan, if it is none of the alternatives, and of these."""
    options = [*([] if found.best in found.alternatives else [found.best]), *found.alternatives]
    pairs = next(option.error for option in options if option.name == BLIND_PAIRS)
    return [_figures(found, option, pairs) for option in options]


def _figures(found: Plan, option: Option, pairs: float) -> Figures:
    link = busy = None
    if option.schedule is not None:
        period = rounds(option.schedule)
        seconds = found.network.traffic(*period) * found.network.seconds_per_byte * found.size
        link, busy = found.network.nodes[int(seconds.argmax())], float(seconds.max())
    return Figures(
        name=option.name,
        seconds=option.seconds,
        times_faster=found.alternatives[0].seconds / option.seconds,
        error=option.error if math.isfinite(option.error) else None,
        error_to_pairs=option.error / pairs if pairs and math.isfinite(option.error) else None,
        busiest_link=link,
        busy_seconds=busy,
        is_plan=option == found.best,
    )


def main(argv: list[str]) -> int:
    """The command; wrong input ends it, after one line that says what is wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def _run(args: argparse.Namespace) -> None:
    for module in ("matplotlib", "rich"):
        require(module)
    from rich.console import Console

    from ds_lightning.plan_picture import draw

    topology = Topology.from_yaml(args.topology, resolve=args.resolve)
    if len(topology.hosts) < 2:
        raise ValueError(f"{args.topology}: one host alone has no network to plan for. HINT: list all hosts.")
    check_output(args.output, "plan")
    print(topology, flush=True)
    size = max(1.0, wire_bytes(args.parameters, WIRE_DTYPES[args.wire]))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    with console.status("Planning ..."):
        found = plan(topology, size, args.compute, not args.no_overlap, args.seed)
    compute = "unknown compute" if found.compute is None else f"{found.compute:g} s of compute"
    about = (
        f"{topology.world_size:,} ranks on {len(topology.hosts):,} hosts, {size / 1e6:,.4g} MB on the wire "
        f"({args.wire}), {compute}{', overlapped' if found.overlap else ', not overlapped'}"
    )
    table = figures(found)
    print(f"\n{about}")
    console.print(_table(table))
    print(found.verdict)
    for line in _details(found):
        print(line)
    folder = dated_folder(args.output / "plan")
    (folder / "plan.json").write_text(_json(found, table, args), encoding="utf-8")
    with console.status("Drawing ..."):
        draw(found, about, folder / "plan.png")
    print(f"\n{folder / 'plan.json'}\n{folder / 'plan.png'}")


def _table(rows: list[Figures]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("")
    for column in ("s / step", "x DDP's speed", "error", "error / pairs'"):
        table.add_column(column, justify="right")
    table.add_column("busiest link")
    table.add_column("busy s / step", justify="right")
    for row in rows:
        table.add_row(
            f"> {row.name}" if row.is_plan else f"  {row.name}",
            f"{row.seconds:.3g}",
            f"{row.times_faster:.2f}",
            "grows" if row.error is None else f"{row.error:.2f}",
            "" if row.error_to_pairs is None else f"{row.error_to_pairs:.2f}",
            row.busiest_link or "",
            "" if row.busy_seconds is None else f"{row.busy_seconds:.3g}",
            style="bold" if row.is_plan else None,
        )
    table.caption = ">: the plan. error: steady consensus error in units of a step's own noise; DDP's replicas agree."
    table.caption_justify = "left"
    return table


def _details(found: Plan) -> Iterator[str]:
    """The groups of each step, where there are few ranks, and what crosses the links of switches."""
    network, schedule = found.network, found.schedule
    partitions = [schedule.partition(t) for t in range(schedule_period(schedule))]
    if network.world_size <= _LISTED_RANKS:
        yield f"\nGroups of the {len(partitions)} steps of the period:"
        if (parts := schedule_parts(schedule)) > 1:
            yield f"  of part 0 of {parts}; part q of the model has those of q steps later"
        for t, partition in enumerate(partitions):
            yield f"  step {t}: {_compactly(partition)}"
    switches = set(found.topology.switches)
    shown = [i for i, node in enumerate(network.nodes) if node in switches]
    if not shown:
        return
    period = rounds(schedule)
    traffic = [network.traffic(*period.step(t)) for t in range(len(period))]
    busiest = {i: network.seconds_per_byte[i] * sum(step[i] for step in traffic) for i in shown}
    listed = sorted(shown, key=lambda i: -busiest[i])[:_LISTED_SWITCHES]
    width = max(len(network.nodes[i]) for i in listed)
    yield "\nModels that cross the links of switches at each step, per direction:"
    for i in sorted(listed):
        yield f"  {network.nodes[i]:<{width}} " + "".join(f"{step[i]:7.4g}" for step in traffic)
    if len(listed) < len(shown):
        yield f"  ... {len(shown) - len(listed)} more, no busier"


def _compactly(partition: Partition) -> str:
    together = [f"{{{','.join(map(str, group))}}}" for group in partition if len(group) > 1]
    alone = [str(rank) for group in partition if len(group) == 1 for rank in group]
    return " ".join([*together, *alone, *(["alone"] if alone else [])])


def _json(found: Plan, table: list[Figures], args: argparse.Namespace) -> str:
    content: dict[str, Any] = {
        "topology": found.topology.to_yaml(),
        "parameters": args.parameters,
        "wire": args.wire,
        "size": found.size,
        "compute": found.compute,
        "overlap": found.overlap,
        "seed": args.seed,
        "verdict": found.verdict,
        "ddp_is_better": found.ddp_is_better,
        "options": [asdict(row) for row in table],
        "parts": schedule_parts(found.schedule),
        "partitions": [found.schedule.partition(t) for t in range(schedule_period(found.schedule))],
    }
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) + "\n}\n"


def _parser() -> Parser:
    parser = Parser("plan", "Finds a schedule for a described network: a table, a picture and a file to load.")
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="YAML of hosts, switches, links")
    parser.add_argument(
        "--parameters", type=parameters, required=True, help="of the model, and float buffers: 110M, 1.5B, 25k, 123456"
    )
    parser.add_argument(
        "--compute",
        type=seconds,
        help="seconds of forward and backward; left out: the mean of none and as long as two hosts need to swap models",
    )
    parser.add_argument("--wire", choices=WIRE_DTYPES, default="fp32", help="dtype in which models travel")
    parser.add_argument("--resolve", action="store_true", help="refuse hosts whose names cannot be looked up")
    parser.add_argument("--no-overlap", action="store_true", help="average after the optimizer step, not meanwhile")
    parser.add_argument("--seed", type=int, default=0, help="of choices among equals")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="for files")
    return parser
