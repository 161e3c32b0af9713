"""Step time and bytes of DS-Sync beside its peers, on emulated hosts: `python -m benchmarks.step_time --short`.

Each run is a real `Trainer.fit` on every host; arms are interleaved, so that a ratio compares what ran close in time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.arms import COMPUTE, DSSYNC_ARMS, LAYERS, OPTIMIZERS, PEERS, Job, check_arm, measure, predict
from benchmarks.cluster import (
    SETTINGS,
    Cluster,
    ClusterError,
    RankError,
    Setting,
    check_machine,
    exit_on_sigterm,
)
from benchmarks.report import Run

BALANCED = "balanced"  # a case of the homogeneous setting: compute takes as long as the wire
WIRE = "wire alone"  # and without any
CASES = (*SETTINGS, BALANCED)
ON_DEMAND = ("four-racks", "stragglers")  # by --settings only
DEFAULT_CASES = tuple(case for case in CASES if case not in ON_DEMAND)
ARMS = (
    *PEERS,
    *("dssync", "dssync-bf16", "dssync-int8", "dssync-g4", "dssync-g8", "dssync-g4-bf16", "dssync-g4-int8"),
    "dssync-every4",
)
MOST_LOST = 0.10  # share of the processors that others may take from a repetition
WARMUP = 4  # PowerSGD, post-local SGD and DDP's buckets settle in the first 3
# Under 10 minutes on two cores, start-up included.
SHORT = {
    "hosts": 8,
    "rate": 100.0,
    "parameters_mb": 2.0,
    "compute": 0.02,
    "steps": 12,
    "repetitions": 1,
    "settings": list(DEFAULT_CASES),
    "arms": ["ddp", "ddp-bf16", "ddp-powersgd", "post-local-sgd", "dssync", "dssync-bf16", "dssync-int8"],
}


@dataclass(frozen=True)
class Case:
    """A setting and the model that trains on it."""

    name: str
    setting: str
    model: str
    compute: float
    title: str


class ProcessorTime:
    """Who uses this machine's processors between two moments, by /proc/stat and the times of our own processes."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Total, busy, stolen, and our children's seconds."""
        user, nice, system, idle, iowait, irq, softirq, steal = map(
            float, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        ticks = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system
        total = busy + idle + iowait + irq + softirq + steal
        times = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
        ours = sum(t.ru_utime + t.ru_stime for t in times)
        return total / ticks, busy / ticks, steal / ticks, ours

    def shares(self) -> tuple[float, float]:
        """What the hypervisor took since the start, and what other processes took."""
        total, busy, steal, ours = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return (steal / total, max(0.0, busy - ours) / total) if total else (0.0, 0.0)


def run_arm(cluster: Cluster, case: Case, job: Job, repetition: int, timeout: float) -> Run:
    """One arm once, on all hosts."""
    processors = ProcessorTime()
    # Ranks wait for each other a little shorter than we for them, so that theirs is the error that is seen.
    ranks = cluster.call(measure, job, cluster.hosts, 0.9 * timeout, timeout=timeout, seed=repetition)
    steal, others = processors.shares()
    for rank, measured in enumerate(ranks):
        if measured.table is not None:
            print(f"rank {rank} of {case.name}, {job.arm}, traced into {job.trace}-rank{rank}.json:\n{measured.table}")
    return Run(
        case=case.name,
        arm=job.arm,
        repetition=repetition,
        seconds=statistics.mean(r.seconds for r in ranks),
        slowest_seconds=max(r.seconds for r in ranks),
        median_seconds=statistics.mean(r.median_seconds for r in ranks),
        bytes_sent=statistics.mean(r.bytes_sent for r in ranks),
        most_bytes_sent=max(r.bytes_sent for r in ranks),
        memory=statistics.mean(r.memory for r in ranks),
        memory_of_fit=statistics.mean(r.memory_of_fit for r in ranks),
        parameter_bytes=ranks[0].parameter_bytes,
        steal=steal,
        others=others,
        predicted=predict(job.arm, job.topology, ranks[0].parameter_bytes, job.compute),
    )


def run_case(case: Case, arms: list[str], args: argparse.Namespace) -> list[Run]:
    """All arms, repetition by repetition; afterwards, where asked for, once more with a trace."""
    print(f"\n{case.title}", flush=True)
    runs = []
    with Cluster(args.hosts, args.rate, SETTINGS[case.setting], args.trunk) as cluster:
        job = Job(
            "",
            case.model,
            args.parameters_mb,
            case.compute,
            WARMUP,
            args.steps,
            cluster.interface,
            topology=cluster.description() if SETTINGS[case.setting].shaped else None,
            optimizer=args.optimizer,
        )
        for repetition in range(args.repetitions):
            for arm in arms if case.name == WIRE else [COMPUTE, *arms]:
                run = run_arm(cluster, case, replace(job, arm=arm), repetition, args.timeout)
                runs.append(run)
                disturbed = f"others {run.others:4.0%}, steal {run.steal:4.0%}"
                print(f"  {repetition + 1}/{args.repetitions} {arm:16s} {run.seconds:8.4f} s  {disturbed}", flush=True)
        if args.trace is not None:
            for arm in arms:
                file = str(args.trace / f"{case.name}-{arm}")
                run_arm(cluster, case, replace(job, arm=arm, steps=4, trace=file), 0, args.timeout)
    return runs


def run_all(args: argparse.Namespace) -> tuple[list[Run], dict[str, str], dict[str, str]]:
    """Every case; the runs, the cases' titles, and of cases where it was measured the case of the wire alone."""
    runs: list[Run] = []
    titles: dict[str, str] = {}
    wire_cases = {}

    def run(case: Case) -> list[Run]:
        done = run_case(case, args.arms, args)
        runs.extend(done)
        titles[case.name] = case.title
        return done

    for name in args.settings:
        if name == BALANCED:
            wire = Case(WIRE, "homogeneous", "paced", 0.0, _title(args, "homogeneous", "paced", 0.0, WIRE))
            done = run(wire)
            times = {run.arm: [r.seconds for r in done if r.arm == run.arm] for run in done}
            # As long as the wire of plain DS-Sync (or whatever comes first) takes.
            compute = statistics.median(times.get("dssync", times[args.arms[0]]))
            wire_cases[BALANCED] = wire.name
            run(Case(name, "homogeneous", "paced", compute, _title(args, "homogeneous", "paced", compute, BALANCED)))
        else:
            model = args.model or ("paced" if SETTINGS[name].shaped else "conv")
            run(Case(name, name, model, args.compute, _title(args, name, model, args.compute)))
    return runs, titles, wire_cases


def _title(args: argparse.Namespace, setting: str, model: str, compute: float, name: str = "") -> str:
    about: Setting = SETTINGS[setting]
    links = f"{about.summary}, {args.rate:g} Mbit/s" if about.shaped else about.summary
    paced = f"{args.parameters_mb:g} MB of parameters, {compute:.3g} s of compute"
    return f"{name or setting}: {args.hosts} hosts, {links}; {paced if model == 'paced' else 'conv net'}"


def write(
    args: argparse.Namespace, folder: Path, runs: list[Run], titles: dict[str, str], wires: dict[str, str]
) -> None:
    """Table, picture and all figures."""
    kept, messages = report.undisturbed(runs, args.most_lost)
    rows = report.summarize(kept, wires)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in report.console_tables(rows, titles):
        console.print(table)
    print(report.LEGEND)
    messages += [f"{name}: skipped: {why}" for name, why in args.skipped.items()]
    print("\n".join(messages))
    command = shlex.join(["python", "-m", "benchmarks.step_time", *args.command_line])
    versions = {name: version(name) for name in ("torch", "lightning", "ds_lightning")}
    versions["python"] = platform.python_version()
    about = ", ".join(f"{name} {number}" for name, number in versions.items())
    folder.mkdir(parents=True, exist_ok=True)
    notes = "\n".join(f"- {message}" for message in messages)
    text = f"`{command}`\n\n{about}; {os.cpu_count()} cores.\n\n{report.markdown(rows, titles)}\n{notes}"
    (folder / "table.md").write_text(text.rstrip() + "\n")
    configuration = {name: value for name, value in vars(args).items() if name != "command_line"}
    record = {
        "command": command,
        "versions": versions,
        "configuration": configuration,
        "titles": titles,
        "rows": [asdict(row) for row in rows],
        "runs": [asdict(run) for run in runs],
        "messages": messages,
    }
    (folder / "runs.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    report.plot(rows, titles, folder / "step_time.png")
    print(f"outputs in {folder}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked: whatever is wrong ends here, before anything is made."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description="Compares ways to synchronize by step time and bytes on hosts emulated on this machine (root).",
        epilog=f"Arms: {', '.join(PEERS)}; {DSSYNC_ARMS}.",
    )
    parser.add_argument(
        "--short", action="store_true", help="the default settings in under 10 minutes; other options refine it"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help=f"of {', '.join(CASES)} (default: all but {' and '.join(ON_DEMAND)}); {BALANCED}: the wire "
        "alone, then with compute that takes as long, which shows what is hidden",
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="(default: all that the number of hosts allows)")
    parser.add_argument("--hosts", type=int, default=8, help="one worker each (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100, help="of a link, in Mbit/s (default: %(default)s)")
    parser.add_argument("--trunk", type=float, help="of each link between racks, in Mbit/s (default: the setting's)")
    parser.add_argument("--model", choices=("paced", "conv"), help="(default: conv on the loopback, paced elsewhere)")
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS], default="sgd", help="(default: %(default)s)")
    parser.add_argument("--parameters-mb", type=float, default=13, help="of the paced model (default: %(default)s)")
    parser.add_argument(
        "--compute",
        type=float,
        default=0.05,
        help="seconds of forward and backward of the paced model, slept over its"
        f" {LAYERS} layers (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help="measured steps; a multiple of 12 has whole cycles of every arm (default: %(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--most-lost",
        type=float,
        default=MOST_LOST,
        help="leave out repetitions in which others took more than this "
        "share of the processors, where two remain (default: %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run (default: %(default)s)")
    parser.add_argument(
        "--trace", type=Path, help="folder for torch.profiler traces of ranks 0 and 1, from runs of their own"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="(default: %(default)s)")
    if "--short" in argv:
        parser.set_defaults(**SHORT)
    args = parser.parse_args(argv)
    args.command_line = argv

    limits = {"hosts": (2, 64), "steps": (2, 10_000), "repetitions": (1, 100)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} is {getattr(args, name)}, but must be {low} to {high}")
    for name in ("rate", "trunk", "parameters_mb", "timeout", "most_lost"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be positive")
    if not (args.compute >= 0 and math.isfinite(args.compute)):
        parser.error(f"--compute is {args.compute}, but must be 0 or more seconds")
    args.settings = list(dict.fromkeys(args.settings or DEFAULT_CASES))
    for name in args.settings:
        if name not in CASES:
            parser.error(f"--settings has {name!r}. HINT: {', '.join(CASES)}")
    try:
        if args.arms is None:
            args.arms = [arm for arm in ARMS if not (arm.startswith("dssync-g") and int(arm[8]) > args.hosts)]
        args.arms = list(dict.fromkeys(check_arm(arm, args.hosts) for arm in args.arms))
        for name in args.settings:
            if name in SETTINGS:
                Cluster(args.hosts, args.rate, SETTINGS[name], args.trunk)
        check_machine()
    except (ValueError, ClusterError) as error:
        parser.error(str(error))
    args.skipped = {}
    for name in args.settings:
        try:
            check_machine(SETTINGS.get(name))
        except ClusterError as error:
            args.skipped[name] = str(error)
    args.settings = [name for name in args.settings if name not in args.skipped]
    if not args.settings:
        parser.error("no setting is left: " + "; ".join(args.skipped.values()))
    for folder in (args.output, args.trace):
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"{folder} is a file, but results need a folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs what it asks for, and writes the results."""
    args = parse(sys.argv[1:] if argv is None else argv)
    exit_on_sigterm()
    for name, why in args.skipped.items():
        print(f"{name}: skipped: {why}")
    if args.trace is not None:
        args.trace.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        runs, titles, wires = run_all(args)
    except (RankError, ClusterError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    write(args, args.output / "step_time" / time.strftime("%Y-%m-%d_%H-%M-%S"), runs, titles, wires)
    print(f"took {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
