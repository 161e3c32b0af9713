"""Time to accuracy of DS-Sync beside its peers, on emulated hosts: `python -m benchmarks.accuracy --stop-at-target`.

Each run is a real `Trainer.fit` of the digits WideResNet on every host. Arms of one seed begin with the same weights
and see the same images in the same order, so that what differs is how workers synchronize.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from benchmarks import curves
from benchmarks.arms import DSSYNC_ARMS, PEERS, check_arm, dssync_options
from benchmarks.cluster import SETTINGS, Cluster, ClusterError, RankError, check_machine, exit_on_sigterm
from benchmarks.curves import Run
from benchmarks.learning import Learned, Training, learn, reached
from benchmarks.step_time import ProcessorTime
from recipes.images import Digits

DEFAULT_SETTINGS = ("homogeneous", "oversubscribed", "straggler")
DEFAULT_ARMS = ("ddp", "ddp-bf16", "ddp-hierarchical", "post-local-sgd", "dssync-topology")


@dataclass(frozen=True)
class Slow:
    """A link that is slow for a while.

    Attributes:
        rank: Whose it is.
        share: Of its rate that it has meanwhile.
        start: Seconds after the first step begins.
        seconds: How long.
    """

    rank: int
    share: float
    start: float
    seconds: float

    @classmethod
    def parse(cls, text: str, hosts: int) -> Slow:
        """From RANK:SHARE:START:SECONDS. Raises ValueError.

        >>> Slow.parse("5:0.25:6:60", hosts=8)
        Slow(rank=5, share=0.25, start=6.0, seconds=60.0)
        """
        try:
            rank, *others = text.split(":")
            slow = cls(int(rank), *map(float, others))
        except (ValueError, TypeError):
            raise ValueError(f"--slow is {text!r}, but must be RANK:SHARE:START:SECONDS. HINT: 5:0.25:6:60") from None
        if not 0 <= slow.rank < hosts:
            raise ValueError(f"--slow has rank {slow.rank}, but {hosts} hosts have ranks 0 to {hosts - 1}")
        if not 0 < slow.share <= 1:
            raise ValueError(f"--slow has a share of {slow.share:g}, but it must be above 0 and at most 1")
        if not (0 <= slow.start < math.inf and 0 < slow.seconds < math.inf):
            raise ValueError(
                f"--slow starts after {slow.start:g} s for {slow.seconds:g} s, but must start after 0 s or more and"
                " last longer than that"
            )
        return slow


@contextmanager
def slowing(cluster: Cluster, slow: Slow | None, begun: Event) -> Iterator[list[float]]:
    """Slows a link while the block runs; yields a list that gets the moments when it began and ended."""
    moments: list[float] = []
    over = threading.Event()

    def run(slow: Slow) -> None:
        while not begun.wait(0.05):
            if over.is_set():
                return
        if over.wait(slow.start):
            return
        cluster.slow(slow.rank, slow.share)
        moments.append(time.monotonic())
        over.wait(slow.seconds)
        cluster.slow(slow.rank, 1)
        moments.append(time.monotonic())

    if slow is None:
        yield moments
        return
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, slow)
        try:
            yield moments
        finally:
            over.set()
        done.result()


def run_arm(cluster: Cluster, setting: str, arm: str, seed: int, args: argparse.Namespace) -> Run:
    """One training run on all hosts."""
    processors = ProcessorTime()
    begun = multiprocessing.get_context("fork").Event()
    topology = cluster.description() if SETTINGS[setting].shaped else None
    with slowing(cluster, args.slow, begun) as moments:
        # Ranks wait for each other a little shorter than we for them, so that theirs is the error that is seen.
        ranks: list[Learned] = cluster.call(
            learn,
            *(arm, args.training, seed, cluster.hosts, topology, 0.9 * args.timeout, begun),
            timeout=args.timeout,
            seed=seed,
        )
    steal, others = processors.shares()
    first = ranks[0]
    slowed = (first.clock(moments[0]), min(first.clock(moments[1]), first.ends[-1])) if moments else None
    return Run(setting, arm, seed, first.curve, first.ends, slowed, steal, others)


def run_all(args: argparse.Namespace, runs: list[Run], titles: dict[str, str]) -> None:
    """Every setting, seed by seed, with the arms one after the other; adds to the runs, and to the settings' titles."""
    for setting in args.settings:
        titles[setting] = _title(args, setting)
        print(f"\n{titles[setting]}", flush=True)
        with Cluster(args.hosts, args.rate, SETTINGS[setting]) as cluster:
            for seed in range(args.seeds):
                for arm in args.arms:
                    run = run_arm(cluster, setting, arm, seed, args)
                    runs.append(run)
                    print(f"  {_line(run, args.target)}", flush=True)


def _line(run: Run, target: float) -> str:
    hit, last = reached(run.curve, target), run.curve[-1]
    to_target = f"{target:g} after {hit.step:4d} steps, {hit.seconds:6.1f} s" if hit else f"{target:g} not reached"
    end = f"{last.accuracy:.4f} after {last.step:4d} steps, {last.seconds:6.1f} s"
    return (
        f"seed {run.seed} {run.arm:16s} {run.step:.3f} s/step; {to_target}; {end};"
        f" others {run.others:.0%}, steal {run.steal:.0%}"
    )


def _title(args: argparse.Namespace, setting: str) -> str:
    about = SETTINGS[setting]
    links = f"{about.summary}, {args.rate:g} Mbit/s" if about.shaped else about.summary
    title = f"{setting}: {args.hosts} hosts, {links}; {args.parameters / 1e6:.2f} million parameters"
    if args.slow is None:
        return title
    slow: Slow = args.slow
    end = slow.start + slow.seconds
    return f"{title}; link of rank {slow.rank} at {slow.share:g} of its rate from {slow.start:g} s to {end:g} s"


def write(args: argparse.Namespace, folder: Path, runs: list[Run], titles: dict[str, str]) -> None:
    """Table, picture and all curves."""
    rows = curves.summarize(runs, args.target)
    table = curves.markdown(rows, titles)
    print(f"\n{table}")
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *args.command_line])
    versions = {name: version(name) for name in ("torch", "lightning", "ds_lightning")}
    versions["python"] = platform.python_version()
    about = ", ".join(f"{name} {number}" for name, number in versions.items())
    folder.mkdir(parents=True, exist_ok=True)
    text = f"`{command}`\n\n{about}; {os.cpu_count()} cores. Target: {args.target:g}.\n\n{table}"
    (folder / "table.md").write_text(text.rstrip() + "\n")
    record = {
        "command": command,
        "versions": versions,
        "configuration": {name: value for name, value in vars(args).items() if name != "command_line"},
        "titles": titles,
        "rows": [asdict(row) for row in rows],
        "runs": [asdict(run) for run in runs],
    }
    (folder / "runs.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    curves.plot(runs, titles, args.target, folder / "accuracy.png")
    print(f"outputs in {folder}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked: whatever is wrong ends here, before anything is made."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Compares ways to synchronize by the time that training takes to an accuracy, on hosts emulated on"
        " this machine (root). For instance: python -m benchmarks.accuracy --stop-at-target",
        epilog=f"Arms: {', '.join(PEERS)}; {DSSYNC_ARMS}.",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=DEFAULT_SETTINGS,
        metavar="SETTING",
        help=f"of {', '.join(SETTINGS)} (default: {' '.join(DEFAULT_SETTINGS)})",
    )
    parser.add_argument(
        "--arms", nargs="+", default=DEFAULT_ARMS, metavar="ARM", help=f"(default: {' '.join(DEFAULT_ARMS)})"
    )
    parser.add_argument("--hosts", type=int, default=8, help="one worker each (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=150, help="of a link, in Mbit/s (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4, help="of the WideResNet (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=10, help="of the WideResNet (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per worker and step (default: %(default)s)")
    parser.add_argument(
        "--compute",
        type=float,
        metavar="SECONDS",
        help="forward and backward take so long at least, as on an accelerator, and plans are made for that (default:"
        " as long as they take here, which plans do not know)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0.05,
        help="the highest one; it falls along a cosine over --steps (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=120, help="most steps of a run (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=10, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.965, help="test accuracy (default: %(default)s)")
    parser.add_argument(
        "--stop-at-target",
        action="store_true",
        help="a run ends where two evaluations in a row have reached the target",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument(
        "--slow",
        metavar="RANK:SHARE:START:SECONDS",
        help="that rank's link has this share of its rate, from START seconds after the first step on, for SECONDS",
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.command_line = argv

    limits = {"hosts": (2, 64), "width": (1, 64), "batch_size": (1, 10_000), "steps": (1, 100_000), "seeds": (1, 100)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be {low} to {high}")
    for name in ("rate", "lr", "timeout"):
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} is {value}, but must be positive")
    if args.compute is not None and not 0 <= args.compute < math.inf:
        parser.error(f"--compute is {args.compute}, but must be at least 0")
    if not 0 < args.target <= 1:
        parser.error(f"--target is {args.target}, but an accuracy is above 0 and at most 1")
    if args.eval_every < 1 or args.steps % args.eval_every:
        parser.error(
            f"--eval-every is {args.eval_every}, but must divide --steps {args.steps}, so that a run ends with one"
        )
    args.settings = list(dict.fromkeys(args.settings))
    for name in args.settings:
        if name not in SETTINGS:
            parser.error(f"--settings has {name!r}. HINT: {', '.join(SETTINGS)}")
    try:
        args.arms = list(dict.fromkeys(check_arm(arm, args.hosts) for arm in args.arms))
        args.slow = Slow.parse(args.slow, args.hosts) if args.slow is not None else None
        args.training = Training(
            *(args.width, args.depth, args.batch_size, args.lr, args.steps, args.eval_every, args.target),
            *(args.stop_at_target, args.compute),
        )
        with torch.device("meta"):
            args.parameters = sum(p.numel() for p in args.training.net().parameters())
        planned = [arm for arm in args.arms if arm not in PEERS and "schedule" in dssync_options(arm)]
        for name in args.settings:
            Cluster(args.hosts, args.rate, SETTINGS[name])
            if not SETTINGS[name].shaped and (planned or args.slow):
                what = f"--arms has {planned[0]}" if planned else "--slow is given"
                raise ValueError(f"{what}, but ranks of the setting {name} have no links of their own")
            if SETTINGS[name].contended and args.slow:
                raise ValueError(f"--slow is given, but links of the setting {name} change their rates anyway")
            check_machine(SETTINGS[name])
    except (ValueError, ClusterError) as error:
        parser.error(str(error))
    train, _, test = (len(part) for part in Digits(args.batch_size).split(load_digits().target))
    if args.hosts * args.batch_size > train:
        parser.error(
            f"--batch-size {args.batch_size} on {args.hosts} hosts takes {args.hosts * args.batch_size} images a step,"
            f" but there are {train}"
        )
    assert args.hosts <= test
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"{args.output} is a file, but results need a folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs what it asks for, and writes the results."""
    args = parse(sys.argv[1:] if argv is None else argv)
    exit_on_sigterm()
    start, code = time.monotonic(), 0
    runs: list[Run] = []
    titles: dict[str, str] = {}
    try:
        run_all(args, runs, titles)
    except (RankError, ClusterError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:  # a signal's
        code = int(stop.code or 0)
    if runs:  # also of a command that was stopped: they took minutes
        write(args, args.output / "accuracy" / time.strftime("%Y-%m-%d_%H-%M-%S"), runs, titles)
    print(f"took {time.monotonic() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
