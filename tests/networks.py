"""Networks to try, and what groups put on their links, found by walking every path: no arrays, no formulas."""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations

from hypothesis import strategies as st

from ds_lightning.cost import rounds
from ds_lightning.schedule import CyclicSchedule, Partition, schedule_parts
from ds_lightning.topology import Link, Topology

SPEEDS = st.one_of(st.sampled_from([1.0, 2.5, 10.0]), st.floats(0.5, 50))
LINKS = st.builds(Link, SPEEDS, SPEEDS, st.sampled_from([0.0, 0.05, 1.0]))


@st.composite
def trees(draw, least=1, most=14, links=LINKS):
    """Any tree, hosts not all as deep, with ``least`` to ``most`` ranks, some of them on one host."""
    n = draw(st.integers(least, most))
    switches = [f"s{i}" for i in range(draw(st.integers(1, min(n, 5))))]
    above = {switch: switches[draw(st.integers(0, i))] for i, switch in enumerate(switches[1:])}
    empty = [switch for switch in switches if switch not in above.values()]
    hosts = [f"n{i}" for i in range(draw(st.integers(len(empty), n)))]
    for host in hosts:
        above[host] = empty.pop() if empty else draw(st.sampled_from(switches))
    host_of = draw(
        st.permutations(hosts + draw(st.lists(st.sampled_from(hosts), min_size=n, max_size=n))[len(hosts) :])
    )
    ranks = {host: tuple(rank for rank in range(n) if host_of[rank] == host) for host in hosts}
    return Topology(above, {node: draw(links) for node in above}, ranks)


def partitions(n):
    """Any groups of n ranks."""
    return st.lists(st.integers(0, n - 1), min_size=n, max_size=n).map(grouped)


def pairs(n):
    """Any pairs of n ranks, the others alone."""
    return st.permutations(range(n)).flatmap(
        lambda order: st.integers(0, n // 2).map(
            lambda k: grouped([order.index(r) // 2 if order.index(r) < 2 * k else n + r for r in range(n)])
        )
    )


def grouped(labels) -> Partition:
    """Those with the same label together."""
    groups = defaultdict(list)
    for rank, label in enumerate(labels):
        groups[label].append(rank)
    return tuple(map(tuple, groups.values()))


def schedules(n, most_period=4, of=partitions, most_parts=1):
    """Any schedule of n ranks."""
    return st.builds(CyclicSchedule, st.lists(of(n), min_size=1, max_size=most_period), st.integers(1, most_parts))


def racks(*sizes: int, bandwidth: float = 10.0, trunk: float = 10.0, slow: float | None = None) -> Topology:
    """Racks of so many hosts, numbered through; the last host's link is ``slow``."""
    hosts = {f"n{sum(sizes[:i]) + j}": f"rack{i}" for i, size in enumerate(sizes) for j in range(size)}
    links = dict.fromkeys(hosts, Link(bandwidth, bandwidth))
    if slow is not None:
        links[[*hosts][-1]] = Link(slow, slow)
    trunks = {f"rack{i}": Link(trunk, trunk) for i in range(len(sizes))}
    ranks = {host: (rank,) for rank, host in enumerate(hosts)}
    return Topology({**hosts, **dict.fromkeys(trunks, "core")}, {**links, **trunks}, ranks)


def flat(*bandwidths: float, latency: float = 0.0) -> Topology:
    """One switch with a host of each bandwidth."""
    links = {f"n{i}": Link(bandwidth, bandwidth, latency) for i, bandwidth in enumerate(bandwidths)}
    return Topology(dict.fromkeys(links, "switch"), links, {host: (i,) for i, host in enumerate(links)})


def seconds_of(topology: Topology, node: str, way: str, models: float, size: float) -> float:
    """Of so many models on a link in one direction: an Ethernet frame of 1,514 bytes carries 1,448 of data."""
    return models * size * 8 * 1514 / 1448 / (1e9 * float(getattr(topology.links[node], way)))


def latency_of(topology: Topology, rank: int, other: int) -> float:
    """Seconds from one rank to another."""
    return sum(1e-3 * topology.links[node].latency for node, _ in topology.path(rank, other))


def loads(topology: Topology, partition: Partition) -> dict[tuple[str, str], float]:
    """Models on each link and direction: a pair swaps them, m members send each other 2/m of one."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for group in partition:
        for one, other in permutations(group, 2):
            for link in topology.path(one, other):
                found[link] += 1 if len(group) == 2 else 2 / len(group)
    return found


def takes_of(network, schedule, size):
    """What each group of each part takes at each step of a period."""
    period = rounds(schedule)
    return [[s.tolist() for s in network.step_seconds(period.step(t), size)] for t in range(len(period))]


def recurrence(schedule, takes, steps, compute, overlap):
    """When each rank ends each step, if each group of part q at step t takes ``takes[t % period][q][group]``."""
    before, ends = [0.0] * schedule.world_size, []
    for t in range(steps):
        after = [seconds + compute for seconds in before] if overlap else [0.0] * schedule.world_size
        for part in range(schedule_parts(schedule)):
            for group, seconds in zip(schedule.partition(t + part), takes[t % schedule.period][part], strict=True):
                done = max(before[rank] for rank in group) + seconds
                for rank in group:
                    after[rank] = max(after[rank], done if overlap else done + compute)
        ends.append(after)
        before = after
    return ends
