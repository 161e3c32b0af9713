"""What it costs N ranks to begin: `python -m benchmarks.startup --ranks 4 8 16 32`.

All ranks are processes on the loopback of a network namespace, whose counters tell how many TCP connections were opened
and how many segments sent by each phase of start-up, with gloo. Needs what `benchmarks.cluster` needs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.cluster import PORT, SETTINGS, Cluster, ClusterError
from ds_lightning.consensus import broadcast_from_rank_0
from ds_lightning.groups import Attendance, ScheduledGroups, connect, connecting_later, own_store, require_agreement
from ds_lightning.schedule import make_schedule

PHASES = ("torch's process group", "agreement on options", "connections", "same model", "groups of the schedule")
TIMEOUT = 300


def sent() -> tuple[int, int]:
    """TCP connections opened and segments sent in this namespace so far."""
    names, values = (
        line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    counts = dict(zip(names, values, strict=True))
    return int(counts["ActiveOpens"]), int(counts["OutSegs"])


def begin(rank: int, ranks: int, barrier: Barrier) -> list[tuple[float, int, int, float]]:
    """Seconds, connections, segments and this rank's growth in MB of each of :data:`PHASES`."""
    torch.set_num_threads(1)
    model = nn.Linear(1000, 1000)
    timeout = timedelta(seconds=TIMEOUT)

    def process_group() -> None:
        with connecting_later():
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=ranks, timeout=timeout)

    attendances: list[Attendance] = []

    def agreement() -> None:
        attendances.append(Attendance(own_store("start-up", timeout), timeout))
        require_agreement("the strategy's options", "the same")

    def groups() -> None:
        hosts = attendances[0].hosts
        ScheduledGroups(make_schedule("auto", ranks, nodes=hosts), timeout, hosts)

    phases = (process_group, agreement, lambda: connect(timeout), lambda: broadcast_from_rank_0(model), groups)
    found = []
    for phase in phases:
        barrier.wait(TIMEOUT)
        before, memory, start = sent(), _memory(), time.perf_counter()
        phase()
        barrier.wait(TIMEOUT)
        seconds = time.perf_counter() - start
        opened, segments = (now - then for now, then in zip(sent(), before, strict=True))
        found.append((seconds, opened, segments, _memory() - memory))
        barrier.wait(TIMEOUT)
    return found


def _memory() -> float:
    """Resident set of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main(argv: list[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32], help="(default: %(default)s)")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'phase':26s}{'ranks':>6s}{'seconds':>10s}{'connections':>13s}{'segments':>10s}{'MB per rank':>13s}")
    try:
        rows = []
        for ranks in args.ranks:
            with Cluster(ranks, 100, SETTINGS["loopback"]) as cluster:
                barrier = multiprocessing.get_context("fork").Barrier(ranks)
                rows.append(cluster.call(begin, ranks, barrier, timeout=2 * TIMEOUT))
    except (ValueError, ClusterError) as error:
        parser.error(str(error))
    for i, phase in enumerate(PHASES):
        for ranks, found in zip(args.ranks, rows, strict=True):
            seconds, opened, segments, _ = found[0][i]
            memory = sum(each[i][3] for each in found) / ranks
            print(f"{phase:26s}{ranks:6d}{seconds:10.3f}{opened:13d}{segments:10d}{memory:13.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
