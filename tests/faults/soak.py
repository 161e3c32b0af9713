"""Trains for a set time while hosts fail at random: `python -m tests.faults.soak --minutes 15 --seed 0`.

Hosts of an emulated cluster are killed, stopped, cut off and slowed, and the job is restarted as a cluster manager
would, from the newest checkpoint. In the end the run must have been, step by step and bit for bit, the undisturbed one;
every fault must have ended all ranks in time and by name, or cost no restart; and nothing may be left over or grow.
"""

from __future__ import annotations

import argparse
import collections
import gc
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from benchmarks import cluster as clusters
from benchmarks.cluster import SETTINGS, Cluster, ClusterError, exit_on_sigterm
from tests.faults.soak_checks import (
    BOUNDS,
    SAVE_EVERY,
    Attempt,
    Record,
    check_end,
    check_files,
    check_final,
    check_losses,
    check_memory,
    check_resumes,
    growth,
    read,
)

TIMEOUT = 6.0  # of the strategy
GRACE = 5.0  # seconds beyond it until all have ended
PACE = 0.05  # seconds that a step computes, during the faults alone: they change no number
STEADY = 2000  # steps over which memory is measured, at least
MEASURE_EVERY = 50


class Fault(NamedTuple):
    """What a kind of fault must lead to."""

    ends: bool  # the job
    stops: bool = False  # ... by a stop that ranks agree on
    may_stop: bool = False


FAULTS = {
    "kill": Fault(ends=True),
    "kill in a save": Fault(ends=True),
    "kill all": Fault(ends=True),
    "power off": Fault(ends=True),  # no connection is told
    "stop": Fault(ends=True),  # SIGSTOP: connections stay open
    "cut": Fault(ends=True),  # for good
    "SIGTERM": Fault(ends=True, stops=True),
    "SIGUSR1": Fault(ends=True, stops=True),
    "SIGTERM and kill": Fault(ends=True, may_stop=True),
    "short cut": Fault(ends=False),
    "short stop": Fault(ends=False),
    "slow link": Fault(ends=False),
}


class Job:
    """One attempt: a process per host, each a fork of this one, which has imported all that it takes.

    Args:
        cluster: That exists.
        folder: Of the whole soak.
        name: Of this attempt.
        max_steps: At which training ends.
        pace: Seconds added to each step.
        measure_every: Steps between measurements of memory; 0: none.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, name: str, max_steps: int, pace: float = 0.0, measure_every: int = 0
    ) -> None:
        from tests.faults.soak_job import rank_main

        self.name, self.folder = name, folder
        self.processes: list[BaseProcess] = []
        options = (folder, name, TIMEOUT, max_steps, pace, measure_every)
        for rank in range(cluster.hosts):
            process = multiprocessing.get_context("fork").Process(target=rank_main, args=(cluster, rank, *options))
            self.processes.append(process)
            process.start()

    def records(self) -> list[Record]:
        """What the ranks have written down so far."""
        return [read(self.folder / "diaries" / f"{self.name}-{rank}") for rank in range(len(self.processes))]

    def running(self) -> list[int]:
        """Ranks that have not ended, stopped ones among them."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def signal(self, rank: int, signum: int) -> None:
        """Sends a signal, if the process is still there."""
        pid = self.processes[rank].pid
        if self.processes[rank].is_alive() and pid is not None:
            os.kill(pid, signum)

    def end(self) -> None:
        """Kills what is left, as a manager does before it starts the job again."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def close(self) -> None:
        """Frees what this process holds of the others."""
        for process in self.processes:
            process.close()


class Soak:
    """The manager of the job, and the misfortune.

    Args:
        cluster: That exists.
        folder: An empty one.
        seed: Of the faults.
        seconds: How long to disturb the job.
    """

    def __init__(self, cluster: Cluster, folder: Path, seed: int, seconds: float) -> None:
        self.cluster, self.folder, self.seconds = cluster, folder, seconds
        self.draw = random.Random(seed)
        self.kinds = self._kinds()
        self.attempts: list[Attempt] = []
        self.problems: list[str] = []
        self.faults: collections.Counter[str] = collections.Counter()
        self.early: collections.Counter[str] = collections.Counter()  # those before a first step
        self.longest: dict[str, float] = {}  # seconds until all ranks had ended, or went on
        self.pids: set[int] = set()
        self.began = time.monotonic()
        for name in ("run", "tmp", "output", "diaries"):
            (folder / name).mkdir()

    def _kinds(self) -> Iterator[str]:
        """Each once, in another order every time."""
        while True:
            yield from self.draw.sample(list(FAULTS), len(FAULTS))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    # ---- with faults ------------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Trains until the time is over and the job was asked to stop."""
        deadline = time.monotonic() + self.seconds
        over = False
        while not over:
            job = self.start(f"{len(self.attempts)}", 10**9, PACE)
            try:
                delay = self.draw.uniform(0, 2) if self.draw.random() < 0.3 else self.draw.uniform(2, 10)
                ended = False
                while not ended:
                    over = time.monotonic() + delay >= deadline
                    time.sleep(max(0.0, min(delay, deadline - time.monotonic())))
                    kind = "SIGTERM" if over else next(self.kinds)
                    victim = self.draw.randrange(self.cluster.hosts)
                    ended = self.strike(job, kind, 0 if kind == "kill in a save" else victim)  # it is rank 0 that saves
                    delay = self.draw.uniform(1, 5)
            finally:
                job.end()
            job.close()

    def strike(self, job: Job, kind: str, victim: int) -> bool:
        """Lets a fault happen, and sees to it that the job ends or goes on as it must; whether it ended."""
        fault = FAULTS[kind]
        if len(job.running()) < self.cluster.hosts:
            self.fail(job, f"ranks ended of themselves before {kind}")
            return True
        before = job.records()
        gone = self.happen(job, kind, victim)
        began = time.monotonic()
        self.faults[kind] += 1
        self.early[kind] += all(not record.losses for record in before)
        if not fault.ends:
            went_on = self.goes_on(job, kind, victim)
        else:
            _wait(lambda: not set(job.running()) - gone, TIMEOUT + GRACE)
        took = time.monotonic() - began
        self.longest[kind] = max(self.longest.get(kind, 0.0), took)
        if not fault.ends:
            self.say(f"{kind}, rank {victim}: went on {took:.1f} s later")
            return not went_on
        self.conclude(job, kind, victim, gone, all(record.ready for record in before))
        steps = [record.reached for record in self.attempts[-1].records]
        self.say(f"{kind}, rank {victim}: all ended {took:.1f} s later, at steps {steps}")
        return True

    def happen(self, job: Job, kind: str, victim: int) -> set[int]:
        """The fault; returns the ranks of which no word is expected any more."""
        gone = {victim}
        if kind == "kill":
            job.signal(victim, signal.SIGKILL)
        elif kind == "kill in a save":
            folder = self.folder / "run" / "checkpoints"
            _wait(lambda: any(folder.glob(".*.tmp")), GRACE, 0.0005)
            job.signal(victim, signal.SIGKILL)
        elif kind == "kill all":
            gone = set(range(self.cluster.hosts))
            for rank in gone:
                job.signal(rank, signal.SIGKILL)
        elif kind == "power off":
            self.cluster.cut(victim)
            job.signal(victim, signal.SIGKILL)
        elif kind == "stop":
            job.signal(victim, signal.SIGSTOP)
        elif kind == "cut":
            self.cluster.cut(victim)
            gone = set()
        elif kind in ("SIGTERM", "SIGUSR1"):
            job.signal(victim, signal.Signals[kind])
            gone = set()
        elif kind == "SIGTERM and kill":
            job.signal(self.draw.randrange(self.cluster.hosts), signal.SIGTERM)
            time.sleep(self.draw.uniform(0, 1.5))
            job.signal(victim, signal.SIGKILL)
        elif kind == "short cut":
            self.cluster.cut(victim)
            time.sleep(self.draw.uniform(0.2, TIMEOUT / 3))  # TCP tries again up to as much later
            self.cluster.mend(victim)
        elif kind == "short stop":
            job.signal(victim, signal.SIGSTOP)
            time.sleep(self.draw.uniform(0.2, TIMEOUT / 3))
            job.signal(victim, signal.SIGCONT)
        elif kind == "slow link":
            self.cluster.slow(victim, self.draw.uniform(0.02, 0.2))
            time.sleep(self.draw.uniform(1, 5))
            self.cluster.slow(victim, 1)
        return gone

    def goes_on(self, job: Job, kind: str, victim: int) -> bool:
        """Whether every rank took a step after a fault that must cost none."""
        before = [len(record.losses) for record in job.records()]

        def stepped() -> bool:
            steps = [len(record.losses) for record in job.records()]
            ended = len(job.running()) < self.cluster.hosts
            return ended or all(now > then for now, then in zip(steps, before, strict=True))

        if _wait(stepped, TIMEOUT + GRACE) and len(job.running()) == self.cluster.hosts:
            return True
        self.fail(job, f"{kind} of rank {victim} was not survived")
        return False

    def conclude(self, job: Job, kind: str, victim: int, gone: set[int], ready: bool) -> None:
        """Ends an attempt, mends what is broken, and checks how the ranks ended."""
        fault = FAULTS[kind]
        late = [rank for rank in job.running() if rank not in gone]
        for rank in late:  # where they hang, into their output
            job.signal(rank, signal.SIGUSR2)
        if late:
            time.sleep(0.5)
        job.end()
        self.cluster.mend(victim)
        codes = {rank: process.exitcode for rank, process in enumerate(job.processes)}
        # A signal before anybody handles it kills, and so may one in the middle of the set-up.
        unheard = {rank for rank, code in codes.items() if not ready and code in (-signal.SIGTERM, -signal.SIGUSR1)}
        attempt = Attempt(
            number=len(self.attempts),
            fault=kind,
            victim=victim,
            gone=gone | unheard,
            stops=fault.stops and ready,
            may_stop=fault.may_stop or (fault.stops and not ready),
            late=late,
            codes=codes,
            records=job.records(),
        )
        self.attempts.append(attempt)
        for problem in check_end(attempt):
            self.problem(problem)

    def fail(self, job: Job, text: str) -> None:
        """An attempt that ended as it must not."""
        time.sleep(TIMEOUT)
        ends = [record.end or "nothing" for record in job.records()]
        job.end()
        codes = {rank: process.exitcode for rank, process in enumerate(job.processes)}
        everyone = set(codes)
        self.attempts.append(Attempt(len(self.attempts), text, 0, everyone, False, False, [], codes, job.records()))
        self.problem(f"attempt {len(self.attempts) - 1}: {text}; exit codes {codes}, last words {ends}")

    def problem(self, text: str) -> None:
        self.say(f"PROBLEM: {text}")
        self.problems.append(text)

    # ---- without ----------------------------------------------------------------------------------------------------

    def start(self, name: str, max_steps: int, pace: float = 0.0, measure_every: int = 0) -> Job:
        job = Job(self.cluster, self.folder, name, max_steps, pace, measure_every)
        self.pids |= {process.pid for process in job.processes if process.pid is not None}
        return job

    def undisturbed(self, name: str, max_steps: int, measure_every: int = 0) -> list[Record]:
        """What ranks write down that train in peace."""
        job = self.start(name, max_steps, 0.0, measure_every)
        try:
            if not _wait(lambda: not job.running(), 60 + 0.2 * max_steps):
                self.problem(f"{name}: ranks {job.running()} did not come to step {max_steps}")
        finally:
            job.end()
        codes = [process.exitcode for process in job.processes]
        job.close()
        if any(codes):
            self.problem(f"{name}: exit codes {codes}")
        return job.records()

    def in_peace(self, name: str, max_steps: int) -> list[Record]:
        """The same run from its beginning on, in a folder of its own."""
        (self.folder / "run").rename(self.folder / f"run of {name}")
        (self.folder / "run").mkdir()
        self.say(f"{name}: {max_steps} steps")
        return self.undisturbed(name, max_steps, MEASURE_EVERY)

    # ---- all of it --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Disturbs, compares, measures; what is wrong is in :attr:`problems`."""
        files = len(os.listdir("/proc/self/fd"))
        self.disturb()
        reached = max(record.reached or 0 for attempt in self.attempts for record in attempt.records)
        final = SAVE_EVERY * math.ceil((reached + 1) / SAVE_EVERY)
        self.say(f"the time is over; training ends at step {final}")
        records = self.undisturbed("last", final)
        codes: dict[int, int | None] = dict.fromkeys(range(self.cluster.hosts), 0)
        last = Attempt(len(self.attempts), "the end", 0, set(), False, False, [], codes, records)
        stops = {name for a in self.attempts for r in a.records for _, name in r.saved if name.startswith("hpc")}
        for problem in check_files(self.folder / "run", self.folder / "tmp", len(stops), final):
            self.problem(problem)

        reference = self.in_peace("reference", final)
        steady = reference if final >= STEADY else self.in_peace("steady", STEADY)
        resumes, lost = check_resumes([*self.attempts, last])
        checks = [
            *resumes,
            *check_losses([*self.attempts, last], reference, final),
            *check_final(records, reference),
            *check_memory(steady),
            *self.leftovers(),
        ]
        if (now := len(os.listdir("/proc/self/fd"))) > files:
            checks.append(f"the driver had {files} open files and then {now}")
        for problem in checks:
            self.problem(problem)
        self.report(final, lost, steady)

    def leftovers(self) -> list[str]:
        """Processes that outlived their attempt, by namespace and by session, and their shared memory."""
        left = [f"/dev/shm/{n}" for n in os.listdir("/dev/shm") if any(str(pid) in n for pid in self.pids)]
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                session = int((process / "stat").read_text().rpartition(")")[2].split()[3])
                if session in self.pids:
                    left.append(f"process {process.name}: {(process / 'cmdline').read_text()[:200]!r}")
        for namespace in self.cluster.namespaces:
            pids = clusters._command("ip", "netns", "pids", namespace).split()
            left += [f"process {pid} in {namespace}" for pid in pids]
        return [f"left over: {what}" for what in left]

    def report(self, final: int, lost: list[int], steady: list[Record]) -> None:
        """Prints what happened."""
        print(f"\n{'fault':18} {'times':>5} {'before a step':>14} {'longest, s':>11}  must")
        for kind, fault in FAULTS.items():
            must = "stop together" if fault.stops else "end" if fault.ends else "go on"
            longest = f"{self.longest.get(kind, 0.0):.1f}"
            print(f"{kind:18} {self.faults[kind]:5} {self.early[kind]:14} {longest:>11}  {must}")
        in_save = sum(len(r.saving) > len(r.saved) for a in self.attempts for r in a.records)
        print(f"{sum(self.faults.values())} faults, {len(self.attempts)} restarts, {in_save} of them amid a save")
        again = f"{sum(lost)} taken again after restarts, at most {max(lost, default=0)} at once"
        print(f"{final} steps, {again}; saved every {SAVE_EVERY}")
        kinds = {what: [growth(record)[what] for record in steady if len(record.memory) > 9] for what in BOUNDS}
        for what, values in kinds.items():
            shown = ", ".join(f"{value:.3f}" for value in values)
            print(f"{what} per 1,000 steps of each rank: {shown} (at most {BOUNDS[what]:g})")
        for rank, record in enumerate(steady):
            if record.memory:
                first, end = record.memory[0], record.memory[-1]
                print(
                    f"rank {rank}: steps {first.step} to {end.step}, RSS {first.resident / 1e6:.1f} to"
                    f" {end.resident / 1e6:.1f} MB, open files {first.files} to {end.files}"
                )


def _wait(condition: Callable[[], bool], seconds: float, interval: float = 0.05) -> bool:
    """Until the condition holds; whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, soaks, and says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="of faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of faults (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=4, help="number of hosts (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        clusters.check_machine()
        cluster = Cluster(args.hosts, 100, SETTINGS["homogeneous"])
    except (ValueError, ClusterError) as error:
        parser.error(str(error))
    exit_on_sigterm()
    # Ranks are forked from this process, which must have no threads then; libraries begin theirs at their import.
    os.environ["OMP_NUM_THREADS"] = "1"
    import tests.faults.soak_job  # noqa: F401

    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads"
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {args.seed}, {args.hosts} hosts, {args.minutes:g} minutes, in {folder}", flush=True)
    try:
        with cluster:
            soak = Soak(cluster, folder, args.seed, 60 * args.minutes)
            soak.run()
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(folder)
        raise
    problems = soak.problems
    if left := [name for name in clusters._namespaces() if name.startswith(f"{cluster.name}-")]:
        problems.append(f"namespaces are left over: {left}")
    if problems:
        print(f"\n{len(problems)} problems; what the ranks wrote is in {folder}", *problems, sep="\n")
    else:
        shutil.rmtree(folder)
    print(f"{'FAIL' if problems else 'PASS'}, seed {args.seed}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
