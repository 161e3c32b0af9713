"""Any recipe under several strategies and seeds, side by side: `python -m recipes.compare recipe=wide_resnet`.

All arms take the same steps on the same data. Each one's learning rate is tuned over the same grid, by the validation
metric on seeds of their own; then the arms are compared by the test metric on other seeds. A report with a table,
learning curves and all that is needed to repeat it goes into one folder. The same command continues in that folder, so
that an interruption costs no finished run.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import t as student

from recipes.train import one_line, train

ROOT = Path(__file__).resolve().parents[1]
FIRST_TUNING_SEED = 1000
GROWTHS = 2  # times that the grid of learning rates may grow
PACKAGES = ("ds_lightning", "torch", "lightning", "torchmetrics", "timm", "transformers", "datasets", "numpy")


class Curve(NamedTuple):
    """A logged metric against optimizer steps."""

    steps: list[int]
    values: list[float]


def configure(folder: Path, overrides: list[str]) -> DictConfig:
    """The configuration that `overrides` describe, with its outputs in `folder`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [f"output_dir='{folder}'", *overrides])


def digest(cfg: DictConfig) -> str:
    """Tells one resolved configuration from another: a recipe may have changed since a run."""
    return hashlib.sha256(OmegaConf.to_yaml(cfg, resolve=True).encode()).hexdigest()[:12]


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains in a process of its own, so that no memory, thread or process group outlives the run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(_train_quietly, cfg).result()


def _train_quietly(cfg: DictConfig) -> dict[str, float]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The number of training batches")  # an epoch has fewer than it is logged
    return train(cfg)


def curve(folder: Path, metric: str) -> Curve:
    """Reads a metric of the fit back from the run's CSV log."""
    rows: list[tuple[int, float]] = []
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row.get(metric):
                rows.append((int(row["step"]) + 1, float(row[metric])))  # Lightning counts steps from 0
    return Curve([step for step, _ in rows], [value for _, value in rows])


def bytes_per_step(cfg: DictConfig, results: dict[str, float]) -> float:
    """Bytes that a worker sends per step: counted by ConsensusMonitor, or computed for DDP.

    DDP's ring sends `2 (N - 1) / N` times the gradients, taken as dense. Of its broadcast of buffers, N - 1 of N
    workers receive a copy, so that the mean worker sends `(N - 1) / N` of them. Unknown (NaN) for other strategies.
    """
    if "dssync/bytes_sent" in results:
        return results["dssync/bytes_sent"]
    if not cfg.strategy._target_.endswith(".DDPStrategy"):
        return math.nan
    workers = results["train/world_size"]
    return float((workers - 1) / workers * (2 * results["model/gradient_bytes"] + results["model/buffer_bytes"]))


class Arm(NamedTuple):
    """One side of a comparison: what it is called and the overrides that make it."""

    name: str
    overrides: list[str]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """`NAME` is the strategy of that name, `NAME=OVERRIDES` whatever the overrides say."""
        name, _, overrides = text.partition("=")
        return cls(name, shlex.split(overrides) or [f"strategy={name}"])

    @property
    def lr(self) -> float | None:
        """The learning rate that the overrides fix, None where it is to be tuned."""
        given = [o.partition("=")[2] for o in self.overrides if o.lstrip("+").startswith("model.optimizer.lr=")]
        return float(given[-1]) if given else None


class Run(NamedTuple):
    """A finished run and where its logs are."""

    results: dict[str, float]
    folder: Path


class Study:
    """Runs that a report compares.

    Args:
        folder: gets each run's logs and `runs.json` with the results so far. Runs that it holds are not repeated,
            unless the recipe's configuration has changed.
        overrides: what all runs share.
        total: number of runs that are planned, to show how far it has come.
    """

    def __init__(self, folder: Path, overrides: list[str], total: int) -> None:
        self.folder = folder
        self.overrides = overrides
        self.total = total
        self.done = 0
        self.file = folder / "runs.json"
        self.runs: list[dict[str, Any]] = []
        if self.file.exists():
            try:
                self.runs = json.loads(self.file.read_text())
                {(*entry["overrides"], entry["config"], entry["folder"]) for entry in self.runs}
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.file} is broken. HINT: repair it, delete it (all runs are repeated), or choose --output."
                ) from None

    def train(self, arm: Arm, lr: float, seed: int, monitor_every: int, shown: str) -> Run:
        """Trains one seed of an arm unless that was done before, prints the metric `shown` and returns the run."""
        key = [*self.overrides, *arm.overrides, f"model.optimizer.lr={lr}", f"seed={seed}"]
        config = digest(configure(Path("unused"), key))
        folder = self.folder / f"{arm.name}-lr{lr:g}-seed{seed}-{config}"  # another configuration's logs stay
        found = next((entry for entry in self.runs if (entry["overrides"], entry["config"]) == (key, config)), None)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
            own = ["callbacks.progress=null", "callbacks.checkpoint=null", "callbacks.last=null", "logger=csv"]
            own.append(f"trainer.log_every_n_steps={monitor_every}")
            cfg = configure(folder, [*key, *own])
            if cfg.strategy._target_.startswith("ds_lightning."):
                monitor = {"_target_": "ds_lightning.ConsensusMonitor", "every_n_steps": monitor_every}
                OmegaConf.update(cfg, "callbacks.consensus", monitor, force_add=True)
            start = time.time()
            results = run(cfg)
            results["bytes"] = bytes_per_step(cfg, results)
            if "dssync/bytes_sent" in results and (counted := curve(folder, "dssync/bytes_sent").values):
                results["bytes"] = statistics.mean(counted)  # not all steps need send the same
            found = {"overrides": key, "results": results, "folder": folder.name, "seconds": time.time() - start}
            found |= {"config": config, "versions": versions()}
            self.runs = [entry for entry in self.runs if entry["overrides"] != key] + [found]
            replace(self.file, json.dumps(self.runs, indent=1) + "\n")
        self.done += 1
        value = 100 * found["results"][shown]
        print(
            f"[{self.done:3d}/{self.total}] {arm.name:12s} lr {lr:<8g} seed {seed:<5d} {shown} {value:6.2f}"
            f"  ({found['seconds']:.0f} s)",
            flush=True,
        )
        return Run(found["results"], self.folder / found["folder"])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps others out of it: two comparisons would lose each other's runs."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output is {folder}, which is a file. HINT: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another comparison, or what is left of one, runs in {folder}. HINT: wait for it, or choose --output."
            ) from None
        yield


def replace(path: Path, text: str) -> None:
    """Writes a file so that an interruption leaves the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def versions() -> dict[str, str]:
    """Of Python, of the packages that matter, and the commit of the checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"commit": commit} if commit else {}
    return found


def interval(differences: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's confidence interval of the mean of paired differences; infinite for a single one, NaN if one is not."""
    n, mean = len(differences), statistics.mean(differences)
    if not math.isfinite(mean):
        return math.nan, math.nan
    if n < 2:
        return -math.inf, math.inf
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(differences) / n**0.5
    return mean - half, mean + half


def tune(args: argparse.Namespace, study: Study, metric: str, lrs: list[float]) -> dict[str, dict[float, float]]:
    """The validation metric of every arm at every learning rate, as means over the tuning seeds.

    A grid of our own grows, for all arms alike, while some arm is best at its edge. One that the user gave stays. Arms
    whose learning rate is fixed are left out.
    """
    arms = [arm for arm in args.arms if arm.lr is None]
    tuned: dict[str, dict[float, float]] = {arm.name: {} for arm in arms}
    new = list(lrs) if arms else []
    growths = 0 if args.lrs else GROWTHS
    while new:
        for lr in new:
            for arm in arms:
                tuned[arm.name][lr] = statistics.mean(
                    study.train(arm, lr, seed, args.monitor_every, f"val/{metric}").results[f"val/{metric}"]
                    for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + args.tuning_seeds)
                )
        best = {best_rate(values) for values in tuned.values()}
        tried = tuned[arms[0].name]
        new = [lr for lr, edge in ((min(tried) / 2, min(tried)), (2 * max(tried), max(tried))) if edge in best]
        new, growths = (new, growths - 1) if growths else ([], 0)
        study.total += len(new) * len(arms) * args.tuning_seeds
    return {arm: dict(sorted(values.items())) for arm, values in tuned.items()}


def best_rate(values: dict[float, float]) -> float:
    """The learning rate of the highest metric, NaN being lowest; among equals the nearest to the middle of the grid."""
    middle = statistics.median(map(math.log, values))
    metric = {lr: -math.inf if math.isnan(value) else value for lr, value in values.items()}
    return max(values, key=lambda lr: (metric[lr], -abs(math.log(lr) - middle)))


def compare(args: argparse.Namespace, study: Study, metric: str, lrs: list[float]) -> str:
    """Tunes every arm, compares them over seeds, writes the report and returns its text."""
    tuned = tune(args, study, metric, lrs) if len(lrs) > 1 else {}
    best = {arm.name: arm.lr or lrs[0] for arm in args.arms}
    best |= {name: best_rate(values) for name, values in tuned.items()}
    runs: dict[str, list[Run]] = {arm.name: [] for arm in args.arms}
    for seed in range(args.seeds):  # seed by seed, so that a machine's slow hours meet all arms
        for arm in args.arms:
            runs[arm.name].append(study.train(arm, best[arm.name], seed, args.monitor_every, f"test/{metric}"))
    curves = study.folder / "curves.png"
    plot(runs, metric, curves, " ".join(args.overrides))
    report = "\n".join(
        [
            f"# {' '.join(args.overrides)}",
            "",
            *table(runs, best, metric),
            "",
            *tuning_table(tuned, best, metric, args.tuning_seeds),
            f"![learning curves]({curves.name})",
            "",
            *how_to_repeat(args, study, bool(tuned)),
        ]
    )
    replace(study.folder / "report.md", report + "\n")
    return report


def table(runs: dict[str, list[Run]], best: dict[str, float], metric: str) -> list[str]:
    """The markdown table: a column for each arm and one for its difference to the first."""
    first, *others = runs
    seeds = len(runs[first])
    names = [
        f"test/{metric}",
        *sorted(k for k in runs[first][0].results if k.startswith("test/") and k != f"test/{metric}"),
    ]
    lines = [f"| | {first} | {' | '.join(f'{arm} | {arm} - {first} (95% interval)' for arm in others)} |"]
    lines.append("|---" * (2 + 2 * len(others)) + "|")

    def values(arm: str, name: str) -> list[float]:
        return [each.results.get(name, math.nan) for each in runs[arm]]

    def row(label: str, cells: dict[str, str], differences: dict[str, str] | None = None) -> None:
        rest = [f"{cells[arm]} | {(differences or {}).get(arm, '')}" for arm in others]
        lines.append(f"| {' | '.join([label, cells[first], *rest])} |")

    for name in names:
        scale, digits, unit = (1, 4, "") if name.endswith("loss") else (100, 2, " (%)")
        columns = {arm: [scale * value for value in values(arm, name)] for arm in runs}
        cells, differences = {}, {}
        for arm, column in columns.items():
            spread = statistics.stdev(column) if seeds > 1 and all(map(math.isfinite, column)) else math.nan
            cells[arm] = f"{statistics.mean(column):.{digits}f} ± {spread:.{digits}f}"
            paired = [b - a for a, b in zip(columns[first], column, strict=True)]
            low, high = interval(paired)
            differences[arm] = f"{statistics.mean(paired):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        row(f"{name}{unit}, mean ± sd of {seeds} seeds", cells, differences)
    row("learning rate", {arm: f"{lr:g}" for arm, lr in best.items()})
    steps = {arm: {int(value) for value in values(arm, "train/steps")} for arm in runs}
    row("steps", {arm: " to ".join(map(str, sorted(counts))) for arm, counts in steps.items()})
    seconds = {arm: values(arm, "train/seconds") for arm in runs}
    row(
        "seconds of training, median",
        {arm: f"{statistics.median(column):.1f}" for arm, column in seconds.items()},
        {arm: f"x {statistics.median(seconds[arm]) / statistics.median(seconds[first]):.2f}" for arm in others},
    )
    sent = {arm: statistics.mean(values(arm, "bytes")) for arm in runs}
    row(
        "bytes sent per worker per step",
        {arm: f"{value:,.0f}" for arm, value in sent.items()},
        {arm: f"x {sent[arm] / sent[first]:.2f}" if sent[first] else "" for arm in others},
    )
    distances = {arm: statistics.mean(values(arm, "dssync/consensus_distance")) for arm in runs}
    row("last consensus distance", {arm: "0" if math.isnan(d) else f"{d:.2g}" for arm, d in distances.items()})
    if len(set().union(*steps.values())) > 1:
        lines += ["", "**The arms did not take equal steps.**"]
    return lines


def tuning_table(tuned: dict[str, dict[float, float]], best: dict[str, float], metric: str, seeds: int) -> list[str]:
    """How each arm's learning rate was chosen; empty where there was nothing to choose."""
    if not tuned:
        return []
    lrs = list(next(iter(tuned.values())))
    lines = [
        f"| lr (val/{metric}, %, mean of {seeds} other seeds) | {' | '.join(tuned)} |",
        "|---" * (1 + len(tuned)) + "|",
    ]
    for lr in lrs:
        cells = [f"{100 * values[lr]:.2f}{' (taken)' if best[arm] == lr else ''}" for arm, values in tuned.items()]
        lines.append(f"| {lr:g} | {' | '.join(cells)} |")
    edges = [arm for arm in tuned if best[arm] in (min(lrs), max(lrs))]
    if edges:
        lines += ["", f"At the edge of the grid: {', '.join(edges)}. A rate beyond it may be better."]
    return [*lines, ""]


def how_to_repeat(args: argparse.Namespace, study: Study, tuned: bool) -> list[str]:
    """Command, seeds, versions and machine; the resolved configuration of every arm goes into a file of its own."""
    for arm in args.arms:
        cfg = configure(study.folder, [*study.overrides, *arm.overrides])
        OmegaConf.resolve(cfg)
        replace(study.folder / f"config-{arm.name}.yaml", OmegaConf.to_yaml(cfg))
    seen: dict[str, set[str]] = {}
    for entry in study.runs:
        for package, number in entry["versions"].items():
            seen.setdefault(package, set()).add(number)
    numbers = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in seen.items())
    files = ", ".join(f"config-{arm.name}.yaml" for arm in args.arms)
    others = f"tuned on {FIRST_TUNING_SEED} to {FIRST_TUNING_SEED + args.tuning_seeds - 1}"
    return [
        "## To repeat it",
        "",
        f"    {command(args)}",
        "",
        f"- Seeds 0 to {args.seeds - 1}; {others if tuned else 'no learning rate was tuned'}.",
        f"- Versions: {numbers}.",
        f"- Machine: {os.cpu_count()} cores, {platform.machine()}, {platform.system()}.",
        f"- Configurations: {files}; every run: runs.json.",
        "- Bytes: ddp's are computed (a ring's dense gradients and buffers), dssync's counted, without what validation",
        "  and monitoring add. Seconds are of training alone, but of dssync with monitoring; workers that share a",
        "  machine say nothing about a network.",
    ]


def command(args: argparse.Namespace) -> str:
    """The command line that repeats this comparison."""
    arms = [f"{arm.name}={shlex.join(arm.overrides)}" for arm in args.arms]
    options = ["--arms", *arms, "--seeds", str(args.seeds), "--tuning-seeds", str(args.tuning_seeds)]
    options += ["--monitor-every", str(args.monitor_every)]
    if args.lrs:
        options += ["--lrs", *map(str, args.lrs)]
    return shlex.join(["python", "-m", "recipes.compare", *args.overrides, *options])


def plot(runs: dict[str, list[Run]], metric: str, path: Path, title: str) -> None:
    """Draws each arm's mean over seeds, and its range, against steps and against seconds of training."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    panels = [
        ("train/loss", "training loss", "optimizer steps"),
        (f"val/{metric}", f"validation {metric} (%)", "optimizer steps"),
        (f"val/{metric}", f"validation {metric} (%)", "seconds of training"),
        ("dssync/consensus_distance", "consensus distance", "optimizer steps"),
    ]
    for axis, (name, label, against) in zip(axes.flat, panels, strict=True):
        for i, (arm, seeds) in enumerate(runs.items()):
            curves = [curve(each.folder, name) for each in seeds]
            if not all(c.steps for c in curves):
                continue
            scale = 100 if name == f"val/{metric}" else 1
            rows = [[scale * value for value in values] for values in zip(*(c.values for c in curves), strict=False)]
            x: list[float] = [*map(float, curves[0].steps)]
            if against == "seconds of training":
                clocks = [curve(each.folder, "val/seconds").values for each in seeds]
                x = [statistics.mean(times) for times in zip(*clocks, strict=False)]
            low, mean, high = [min(r) for r in rows], [statistics.mean(r) for r in rows], [max(r) for r in rows]
            x = x[: len(mean)]
            axis.plot(x, mean, ("o-", "s--", "^:", "d-.")[i % 4], color=f"C{i}", label=arm, markersize=4)
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
        axis.set(xlabel=against, ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
            if not name.startswith("val/"):
                axis.set_yscale("log")
        else:
            axis.text(0.5, 0.5, "0 for every arm", ha="center", transform=axis.transAxes)
    figure.suptitle(f"{title}\nmean and range of {len(next(iter(runs.values())))} seeds")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ends with a message for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.compare",
        description="Trains a recipe under several strategies and seeds, each with its learning rate tuned over the "
        "same grid, and writes a report. The same command continues an interrupted comparison.",
    )
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="OVERRIDE",
        help="what recipes.train takes, for all arms: recipe=bert trainer.devices=8 data.partition=by_label",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        type=Arm.parse,
        default=[Arm.parse("ddp"), Arm.parse("dssync")],
        metavar="NAME[=OVERRIDES]",
        help="what is compared, the first being the reference: a strategy, or a name and its overrides, such as "
        "int8='strategy=dssync strategy.wire_dtype=int8'; one that sets model.optimizer.lr is not tuned (default: "
        "ddp dssync)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 are compared (default: %(default)s)")
    parser.add_argument(
        "--lrs",
        nargs="+",
        type=float,
        metavar="LR",
        help="the grid of learning rates; a single one is not tuned (default: 1/2, 1 and 2 times the recipe's, and "
        "beyond while an arm is best at the edge)",
    )
    parser.add_argument(
        "--tuning-seeds", type=int, default=2, help="seeds that a learning rate is tuned on (default: %(default)s)"
    )
    parser.add_argument(
        "--monitor-every",
        type=int,
        default=20,
        metavar="STEPS",
        help="steps between measurements of the consensus distance (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder of the report (default: a name for these overrides and arms)",
    )
    args = parser.parse_intermixed_args(argv)
    names = [arm.name for arm in args.arms]
    if len(set(names)) < len(names) or len(names) < 2:
        parser.error(f"--arms is {' '.join(names)}, but must be at least two of different names")
    if bad := [name for name in names if not re.fullmatch(r"[\w.+-]+", name)]:
        parser.error(f"--arms has the name {bad[0]!r}, but folders are called by it. HINT: use letters and digits")
    for name in ("seeds", "tuning_seeds", "monitor_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    if args.seeds > FIRST_TUNING_SEED:
        parser.error(f"--seeds is {args.seeds}, but the seeds from {FIRST_TUNING_SEED} on tune")
    for arm in args.arms:
        try:
            fine = arm.lr is None or 0 < arm.lr < math.inf
        except ValueError:
            fine = False
        if not fine:
            parser.error(f"--arms {arm.name} has {arm.overrides}, but a learning rate is a positive number")
    if args.lrs and (min(args.lrs) <= 0 or len(set(args.lrs)) < len(args.lrs)):
        parser.error(f"--lrs is {args.lrs}, but must be different positive numbers")
    if not any(override.startswith("recipe=") for override in args.overrides):
        parser.error("no recipe is chosen. HINT: add recipe=wide_resnet")
    args.overrides = sorted(args.overrides, key=lambda override: not override.startswith("recipe="))
    return args


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, compares and prints the report."""
    args = parse(argv)
    try:
        configs = [configure(Path("unused"), [*args.overrides, *arm.overrides]) for arm in args.arms]
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    metric, lr = configs[0].metric, configs[0].model.optimizer.lr
    lrs = sorted(args.lrs or (lr / 2, lr, 2 * lr))
    if args.output is None:
        # Not of seeds and rates: more of them continue with the runs that are there.
        named = hashlib.sha256(json.dumps([args.overrides, args.arms]).encode()).hexdigest()[:8]
        args.output = Path("outputs") / "compare" / f"{args.overrides[0].removeprefix('recipe=')}-{named}"
    to_tune = sum(arm.lr is None for arm in args.arms) if len(lrs) > 1 else 0
    total = len(args.arms) * args.seeds + to_tune * len(lrs) * args.tuning_seeds
    try:
        with alone(args.output):
            study = Study(args.output, args.overrides, total)
            print(f"{len(args.arms)} arms, {total} runs, in {study.folder}; the same command continues there")
            report = compare(args, study, metric, lrs)
    except Exception as error:
        if message := one_line(error):
            sys.exit(f"error: {message}")
        raise
    Console().print(Markdown(report)) if sys.stdout.isatty() else print(f"\n{report}\n")
    print(f"report: {study.folder.resolve() / 'report.md'}")


if __name__ == "__main__":
    main()
