"""WHAT a step costs on a described network, and how far replicas stay apart: figures for a planner, without any wire.

Time. Members of a group send to each other directly (payload.py): a pair swaps its models of ``M`` bytes, and in a
group of m > 2 every member sends ``2 M / m`` to each other one, in two stages. So a link with k of the m members below
it carries, per direction, ``M`` of a pair that it parts and ``k (m - k) 2 M / m`` of a larger group. A group takes as
long as the busiest of its links needs for all that the step's groups put on it, and the latency of its path once per
stage. Steps are coupled through membership: a rank begins its next step when its group is done, so a slow group delays
those that its members meet next (a max-plus recurrence)::

    overlap:   end_i(t) = max(end_i(t-1) + compute, max_{j in G} end_j(t-1) + seconds(G))
    otherwise: end_i(t) = max_{j in G} end_j(t-1) + compute + seconds(G)

Of a schedule in ``parts`` (schedule.py) the groups of all parts are on the wire at once, each with that share of the
model: a link carries the mean of what the parts' partitions put on it, and a rank waits for the last of its groups.

Error. Every rank's update is its own unit of noise: ``X <- W_t (X + noise)``. The *steady consensus error* is what
``mean_i ||x_i - mean||^2`` settles at per parameter, in units of that noise, averaged over a period. Blind pairs of a
grid have 0.5 at 8 ranks, 0.69 at 16 and 0.89 at 64. Parts change nothing: each goes through the same partitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ds_lightning.schedule import Partition, Schedule, schedule_parts, schedule_period
from ds_lightning.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What Ethernet, IP and TCP add to 1,448 bytes of data: links carry frames, whose bandwidth is what people state.
FRAMES = 1514 / 1448
# Of a step of DDP, forward takes one part in three; it can hide nothing.
FORWARD = 1 / 3
# The reducer's buckets: the last one is ready only when backward ends, and nothing hides it.
BUCKETS = 8
# Up to here errors come from the whole covariance; beyond from so many samples of the noise.
_EXACT_RANKS = 256
_SAMPLES = 48


@dataclass(frozen=True, eq=False)
class Round:
    """A partition in arrays: the group of each rank, shape (N,), and each group's size, shape (groups,)."""

    group_of: Ints
    sizes: Ints

    @classmethod
    def of(cls, partition: Partition) -> Round:
        """That of a partition."""
        sizes = np.array([len(group) for group in partition])
        group_of = np.empty(sizes.sum(), np.int64)
        group_of[np.concatenate([np.array(group) for group in partition])] = np.repeat(np.arange(len(sizes)), sizes)
        return cls(group_of, sizes)

    def partition(self) -> Partition:
        """Back again."""
        order, starts = self._sorted
        return tuple(tuple(group.tolist()) for group in np.split(order, starts[1:]))

    def means(self, values: Floats) -> Floats:
        """Each rank's row (N, ...) replaced by the mean of its group's."""
        order, starts = self._sorted
        sums = np.add.reduceat(values[order], starts, axis=0)
        means: Floats = (sums / self.sizes.reshape(-1, *[1] * (values.ndim - 1)))[self.group_of]
        return means

    def latest(self, times: Floats) -> Floats:
        """The largest of each group's (N,) times, shape (groups,)."""
        order, starts = self._sorted
        latest: Floats = np.maximum.reduceat(times[order], starts)
        return latest

    @cached_property
    def _sorted(self) -> tuple[Ints, Ints]:
        return np.argsort(self.group_of, kind="stable"), np.concatenate([[0], np.cumsum(self.sizes)[:-1]])


class Period(list[Round]):
    """One period of a schedule, and in how many parts of the model it is gone through.

    Args:
        rounds: Its partitions.
        parts: Of which part ``q`` is averaged in round ``t + q`` at step ``t``.
    """

    def __init__(self, rounds: Iterable[Round], parts: int = 1) -> None:
        super().__init__(rounds)
        self.parts = parts

    def step(self, t: int) -> list[Round]:
        """The round of each part at a step."""
        return [self[(t + part) % len(self)] for part in range(self.parts)]


def rounds(schedule: Schedule) -> Period:
    """One period of a schedule, with its parts."""
    partitions = (schedule.partition(t) for t in range(schedule_period(schedule)))
    return Period(map(Round.of, partitions), schedule_parts(schedule))


class Network:
    """A topology in arrays, and what groups cost on it.

    Attributes:
        nodes: Everything that has a link to the switch above it: hosts and switches.
        seconds_per_byte: Of each node's link, in its slower direction: groups send as much up as down.
        above: Index of the node that has each rank below it, per level from the host up, shape (levels, N); -1 beyond
            the top.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.nodes = tuple(topology.links)
        number = {node: i for i, node in enumerate(self.nodes)}
        links = [topology.links[node] for node in self.nodes]
        self.seconds_per_byte: Floats = np.array([8e-9 * FRAMES / min(link.up, link.down) for link in links])
        self._latency = np.array([1e-3 * link.latency for link in links])
        self._siblings = np.array([len(topology.children[topology.above[node]]) for node in self.nodes])
        ways = {host: [number[node] for node in topology.way_up(host)] for host in topology.hosts}
        levels = max(map(len, ways.values()))
        self.above: Ints = np.full((levels, topology.world_size), -1)
        # A round is asked for again and again: at every step, by each part, and of lengths of a period.
        self._known: WeakKeyDictionary[Round, tuple[list[tuple[Ints, Ints, Floats]], Floats]] = WeakKeyDictionary()
        # The same by depth, the deepest first: each node is on one level, also where hosts are not all as deep.
        self._levels: Ints = np.full_like(self.above, -1)
        for host, way in ways.items():
            ranks = list(topology.ranks[host])
            self.above[: len(way), ranks] = self._levels[levels - len(way) :, ranks] = np.array(way)[:, None]

    @property
    def world_size(self) -> int:
        """Number of ranks N."""
        return int(self.above.shape[1])

    def traffic(self, *parts: Round) -> Floats:
        """What a step puts on each node's link per direction, in multiples of a model's bytes; shape (nodes,).

        Args:
            parts: The groups; of a step in parts, those of each of them.
        """
        traffic = np.zeros(len(self.nodes))
        for groups in parts:
            for node, _, crossing in self._crossings(groups):
                np.add.at(traffic, node, crossing)
        return traffic / len(parts)

    def crossed(self, groups: Round) -> list[list[int]]:
        """The nodes whose links each group crosses."""
        found: list[list[int]] = [[] for _ in groups.sizes]
        for nodes, numbers, _ in self._crossings(groups):
            for node, number in zip(nodes.tolist(), numbers.tolist(), strict=True):
                found[number].append(node)
        return found

    def seconds(self, groups: Round, size: float, traffic: Floats | None = None) -> Floats:
        """What each group of a step takes, shape (groups,).

        Args:
            groups: The groups.
            size: Bytes of the model on the wire.
            traffic: Of the whole step, where these are the groups of one of its parts.
        """
        busy = (self.traffic(groups) if traffic is None else traffic) * self.seconds_per_byte * size
        busiest = np.zeros(len(groups.sizes))
        for node, group, _ in self._crossings(groups):
            np.maximum.at(busiest, group, busy[node])
        return busiest + self.latency(groups)

    def step_seconds(self, parts: Sequence[Round], size: float) -> list[Floats]:
        """What each group of each part of a step takes, as in :meth:`seconds`."""
        traffic = self.traffic(*parts)
        return [self.seconds(groups, size, traffic) for groups in parts]

    def latency(self, groups: Round) -> Floats:
        """Seconds that a group's messages take besides, shape (groups,): of its longest path, once per stage."""
        return self._costs(groups)[1]

    def _find_latency(self, groups: Round) -> Floats:
        order, starts = groups._sorted
        some = order[starts][groups.group_of]
        # In a tree, the member farthest from any other one is at an end of the longest path.
        by_distance = np.lexsort((self._path_latency(some), groups.group_of))
        end = by_distance[starts + groups.sizes - 1][groups.group_of]
        return groups.latest(self._path_latency(end)) * np.where(groups.sizes > 2, 2, 1)

    def _path_latency(self, others: Ints) -> Floats:
        """Seconds from each rank to another one, shape (N,)."""
        here, there = self._levels, self._levels[:, others]
        latency = np.append(self._latency, 0.0)  # -1 has none
        seconds: Floats = np.where(here == there, 0.0, latency[here] + latency[there]).sum(axis=0)
        return seconds

    def _crossings(self, groups: Round) -> list[tuple[Ints, Ints, Floats]]:
        """Per level: node, group, and models' bytes of that group that cross the node's link, per direction."""
        return self._costs(groups)[0]

    def _costs(self, groups: Round) -> tuple[list[tuple[Ints, Ints, Floats]], Floats]:
        """Crossings and latency."""
        costs = self._known.get(groups)
        if costs is None:
            costs = self._known[groups] = self._find_crossings(groups), self._find_latency(groups)
        return costs

    def _find_crossings(self, groups: Round) -> list[tuple[Ints, Ints, Floats]]:
        found = []
        for level in self._levels:
            ranks = np.flatnonzero(level >= 0)
            keys, below = np.unique(level[ranks] * len(groups.sizes) + groups.group_of[ranks], return_counts=True)
            node, group = np.divmod(keys, len(groups.sizes))
            size = groups.sizes[group]
            crossing = below * (size - below) * np.where(size > 2, 2 / size, 1.0)
            parted = below < size
            found.append((node[parted], group[parted], crossing[parted]))
        return found

    def with_shares(self, shares: Floats) -> Network:
        """The same network, of whose links only these shares of the bandwidths are left, shape (nodes,)."""
        other = copy(self)
        other.seconds_per_byte = self.seconds_per_byte / shares
        return other

    def ring_seconds(self, order: Sequence[int] | Ints, size: float) -> float:
        """Of an all-reduce along a ring of all ranks: ``2 (N - 1) / N`` models from each rank to the next."""
        if len(order) < 2:
            return 0.0
        here = np.asarray(order)
        longest = float(self._path_latency(np.roll(here, -1)[np.argsort(here)]).max())
        busiest = float((self.ring_traffic(here) * self.seconds_per_byte).max()) * size
        return busiest + 2 * (len(here) - 1) * longest

    def ring_traffic(self, order: Sequence[int] | Ints) -> Floats:
        """What that puts on each node's link per direction, in multiples of a model's bytes; shape (nodes,)."""
        here, following = np.asarray(order), np.roll(order, -1)
        traffic = np.zeros(len(self.nodes))
        for level in self._levels:
            out = (level[here] >= 0) & (level[here] != level[following])
            np.add.at(traffic, level[here][out], 2 * (len(here) - 1) / len(here))
        return traffic

    def ordered_ranks(self) -> list[int]:
        """The ranks along the tree: those of a host, of a rack and so on beside each other."""
        ordered: list[int] = []
        nodes = [self.topology.top]
        while nodes:
            node = nodes.pop()
            ordered += self.topology.ranks.get(node, ())
            nodes += reversed(self.topology.children.get(node, ()))
        return ordered

    def hierarchical_seconds(self, size: float) -> float:
        """Of an all-reduce by levels: shards are reduced below each switch, then among switches, and gathered again.

        Each level is a step of its own. A node among the c below a switch sends ``2 (c - 1) / c`` models, to which each
        rank below it contributes its shard.
        """
        return sum(
            float((traffic * self.seconds_per_byte).max()) * size + latency for traffic, latency in self._hierarchy
        )

    def hierarchical_traffic(self) -> Floats:
        """What that puts on each node's link per direction, in multiples of a model's bytes; shape (nodes,)."""
        total: Floats = np.sum([traffic for traffic, _ in self._hierarchy], axis=0)
        return total

    @cached_property
    def _hierarchy(self) -> list[tuple[Floats, float]]:
        """Per level: traffic and latency of an all-reduce below the switches above it."""
        found, latency = [], np.zeros(self.world_size)
        for depth, level in enumerate(self._levels):
            ranks = np.flatnonzero(level >= 0)
            node = level[ranks]
            latency[ranks] += self._latency[node]  # of the way up so far
            siblings = self._siblings[node]
            sends = 2 * (siblings - 1) / siblings / np.bincount(node)[node]
            traffic = np.zeros(len(self.nodes))
            for lower in self._levels[: depth + 1, ranks]:
                traffic += np.bincount(lower[lower >= 0], sends[lower >= 0], len(self.nodes))
            found.append((traffic, float((4 * (siblings - 1) * latency[ranks]).max())))
        return found


def averaged(parts: Sequence[Round], seconds: Sequence[Floats], ready: Floats) -> Floats:
    """When each rank has the last of its groups' averages, if ranks are ready for them at these times, shape (N,)."""
    ends = [(groups.latest(ready) + takes)[groups.group_of] for groups, takes in zip(parts, seconds, strict=True)]
    last: Floats = np.maximum.reduce(ends)
    return last


def step_seconds(network: Network, schedule: Period, size: float, compute: float = 0.0, overlap: bool = True) -> float:
    """Mean seconds per step over all ranks, once the rhythm of a schedule has settled.

    Args:
        network: Where it runs.
        schedule: One period of it, with its parts.
        size: Bytes of the model on the wire.
        compute: Seconds of forward and backward.
        overlap: Whether an average runs during them.
    """
    steps = [schedule.step(t) for t in range(len(schedule))]
    takes = [network.step_seconds(parts, size) for parts in steps]
    ends = np.zeros(network.world_size)
    settling = -(-24 // len(schedule)) * len(schedule)
    measured = -(-48 // len(schedule)) * len(schedule)
    start = 0.0
    for t in range(settling + measured):
        if t == settling:
            start = float(ends.mean())
        done = averaged(steps[t % len(steps)], takes[t % len(steps)], ends)
        ends = np.maximum(ends + compute, done) if overlap else done + compute
    return (float(ends.mean()) - start) / measured


def ddp_step_seconds(wire: float, compute: float) -> float:
    """A step of DDP whose all-reduce takes ``wire`` seconds: backward alone hides it, bucket by bucket."""
    backward = (1 - FORWARD) * compute
    return FORWARD * compute + max(backward + wire / BUCKETS, backward / BUCKETS + wire)


def steady_error(schedule: Sequence[Round]) -> float:
    """The steady consensus error of a schedule (one period of it); infinite if it never connects all ranks.

    In any number of parts it is the same, as the mean over parameters.
    """
    if not _connects(schedule):
        return float("inf")
    n = len(schedule[0].group_of)
    if n == 1:
        return 0.0
    return _exact_error(schedule, n) if n <= _EXACT_RANKS else _sampled_error(schedule, n)


def _exact_error(schedule: Sequence[Round], n: int) -> float:
    noise = np.eye(n) - 1 / n  # what all ranks share parts nobody
    covariance, before = np.zeros((n, n)), -1.0
    while True:
        errors = []
        for groups in schedule:
            covariance = groups.means(groups.means(covariance + noise).T)
            errors.append(float(np.trace(covariance)) / n)
        error = float(np.mean(errors))
        if error - before <= 1e-6 * max(error, 1e-6):  # what should be 0 may be -1e-17
            return error if error > 1e-9 else 0.0
        before = error


def _sampled_error(schedule: Sequence[Round], n: int) -> float:
    """What is left of the noise of a step after 1, 2, ... further ones, added up; the mean over the steps of a period.

    Of what shrinks too slowly to be followed to its end, the rest is a geometric series.
    """
    samples = np.random.default_rng(0).standard_normal((n, _SAMPLES))
    samples -= samples.mean(axis=0)
    total = 0.0
    for start in range(len(schedule)):
        values, left, shrinks = samples, 0.0, 0.0
        while True:
            before, left = left, 0.0  # in a period
            for groups in (*schedule[start:], *schedule[:start]):
                values = groups.means(values)
                left += float((values**2).mean())
            total += left
            sooner, shrinks = shrinks, left / before if before else 0.0
            if left < 1e-4:
                break
            if sooner and abs(shrinks - sooner) < 0.01 * (1 - shrinks):
                total += left * shrinks / (1 - shrinks)
                break
    return total / len(schedule)


def _connects(schedule: Sequence[Round]) -> bool:
    """Whether what one rank knows reaches all others in the end."""
    heard = np.arange(len(schedule[0].group_of), dtype=float)  # from the rank of the highest number so far
    while True:
        before = heard
        for groups in schedule:
            heard = groups.latest(heard)[groups.group_of]
        if (heard == before).all():
            return bool((heard == heard[0]).all())
