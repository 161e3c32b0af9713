"""A run of a schedule, event by event: who sends when, and how links are shared meanwhile.

The recurrence of cost.py takes a step's groups to be on the wire together. In truth ranks that have little to do run
ahead, and what they send crowds a link that ranks of an earlier step are still waiting for. Here two members of a group
begin to send to each other when both are ready (a group's second stage when all are), all that is under way shares the
links fairly (max-min per connection, as TCP does in the mean), and members go on when their group is done; of a
schedule in parts, which are all averaged at once, when the groups of all parts are.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ds_lightning.cost import Floats, Network, Period


@dataclass(frozen=True)
class Contention:
    """What others do on the links: in each period another random share of them is slow.

    The same seed gives the same bandwidths at the same time, whatever is done with them.

    Args:
        links: How many there are.
        share: Of them that are slow at a time, on average.
        period: Seconds after which others are.
        seed: Of the choice.
        lowest: Of a slow link's bandwidth at least this share is left, at most all of it, equally likely.
    """

    links: int
    share: float
    period: float
    seed: int
    lowest: float = 0.25

    def shares(self, period: int) -> Floats:
        """What is left of each link's bandwidth in a period, shape (links,)."""
        random = np.random.default_rng((self.seed, period))
        slow = random.random(self.links) < self.share
        return np.where(slow, random.uniform(self.lowest, 1, self.links), 1.0)


@dataclass
class _Group:
    """An average under way."""

    step: int
    members: list[int]
    latency: float
    ready: list[int] = field(default_factory=list)
    transfers: int = 0  # that are not over


@dataclass
class _Transfer:
    """What two members send to each other: so many bytes each way over the same links."""

    group: _Group
    links: list[int]
    left: float
    rate: float = 0.0


class Run:
    """Ranks that go through a schedule.

    Args:
        network: Where it runs.
        schedule: One period, with its parts.
        size: Bytes of the model on the wire.
        compute: Seconds of forward and backward; of each step and rank, if it has the shape (steps, N).
        overlap: Whether an average runs during them.
        contention: What others do on the links meanwhile.
    """

    def __init__(
        self,
        network: Network,
        schedule: Period,
        size: float,
        compute: float | Floats,
        overlap: bool,
        contention: Contention | None = None,
    ) -> None:
        self._schedule, self._size, self._overlap = schedule, size, overlap
        self._compute, self._contention = compute, contention
        self._capacity = (1 / network.seconds_per_byte).tolist()
        self._ways = [[node for node in way if node >= 0] for way in network.above.T.tolist()]
        self._members = [
            [np.flatnonzero(groups.group_of == group).tolist() for group in range(len(groups.sizes))]
            for groups in schedule
        ]
        self._latency = [network.latency(groups).tolist() for groups in schedule]
        self._groups: dict[tuple[int, int, int], _Group] = {}  # by step, part and number
        self._averaged: dict[tuple[int, int], list[float]] = {}  # by step and rank: when parts were, till all are
        self._under_way: list[_Transfer] = []
        self._shared = False  # whether the links are, among those under way
        self._events: list[tuple[float, int, int]] = []  # time, step, rank: is ready for the step's average

    def ends(self, steps: int) -> Floats:
        """When each rank ends each step, in seconds, shape (steps, N)."""
        n = len(self._ways)
        self._ends, self._begun, self._steps = np.zeros((steps, n)), np.zeros(n), steps
        self._computes = np.broadcast_to(self._compute, (steps, n)).tolist()
        for rank in range(n):
            self._begin(rank, 0, 0.0)
        now, change, capacity = 0.0, 0.0 if self._contention else np.inf, self._capacity
        while self._events or self._under_way:
            if self._contention and now >= change:
                period = int(now // self._contention.period)
                period += (period + 1) * self._contention.period <= now  # rounding
                change = (period + 1) * self._contention.period
                capacity = (np.array(self._capacity) * self._contention.shares(period)).tolist()
                self._shared = False
            while self._events and self._events[0][0] <= now:
                _, step, rank = heapq.heappop(self._events)
                for part in range(self._schedule.parts):
                    self._join(rank, step, part, now)
            if not self._shared:
                _share(self._under_way, capacity)
                self._shared = True
            over = min((now + transfer.left / transfer.rate for transfer in self._under_way), default=np.inf)
            event = self._events[0][0] if self._events else np.inf
            time = min(over, event, change if self._under_way else np.inf)
            for transfer in self._under_way:
                transfer.left -= transfer.rate * (time - now)
            now = time
            if time == over:
                self._end_transfers(now)
        return self._ends

    def _begin(self, rank: int, step: int, time: float) -> None:
        if step < self._steps:
            self._begun[rank] = time
            heapq.heappush(self._events, (time if self._overlap else time + self._computes[step][rank], step, rank))

    def _join(self, rank: int, step: int, part: int, now: float) -> None:
        at = (step + part) % len(self._schedule)
        number = int(self._schedule[at].group_of[rank])
        group = self._groups.get((step, part, number))
        if group is None:
            group = _Group(step, self._members[at][number], self._latency[at][number])
            self._groups[step, part, number] = group
        size, stages = len(group.members), 1 if len(group.members) == 2 else 2
        model = self._size / self._schedule.parts
        each = model * stages / size if size > 2 else model
        for other in group.ready:
            self._send(group, rank, other, each / stages)
        group.ready.append(rank)
        if len(group.ready) == size:
            del self._groups[step, part, number]
            if stages == 2:
                for one, other in itertools.combinations(group.members, 2):
                    self._send(group, one, other, each / stages)
            if group.transfers == 0:
                self._finish(group, now)

    def _send(self, group: _Group, one: int, other: int, size: float) -> None:
        links = sorted(set(self._ways[one]) ^ set(self._ways[other]))
        if links:
            group.transfers += 1
            self._shared = False
            self._under_way.append(_Transfer(group, links, size))

    def _end_transfers(self, now: float) -> None:
        under_way, self._under_way, self._shared = self._under_way, [], False
        over: list[_Transfer] = []
        for transfer in under_way:
            # Late in a run the clock may be too coarse for what rounding left.
            done = transfer.left <= 1e-9 * self._size or now + transfer.left / transfer.rate == now
            (over if done else self._under_way).append(transfer)
        for transfer in over:
            group = transfer.group
            group.transfers -= 1
            if group.transfers == 0 and len(group.ready) == len(group.members):
                self._finish(group, now)

    def _finish(self, group: _Group, now: float) -> None:
        time = now + group.latency
        for rank in group.members:
            times = self._averaged.setdefault((group.step, rank), [])
            times.append(time)
            if len(times) < self._schedule.parts:
                continue
            del self._averaged[group.step, rank]
            end = max(times)
            if self._overlap:
                end = max(end, self._begun[rank] + self._computes[group.step][rank])
            self._ends[group.step, rank] = end
            self._begin(rank, group.step + 1, end)


def followed_step_seconds(
    network: Network,
    schedule: Period,
    size: float,
    compute: float = 0.0,
    overlap: bool = True,
    steps: tuple[int, int] = (24, 48),
) -> float:
    """As :func:`ds_lightning.cost.step_seconds`, from a run that is followed event by event.

    Args:
        network: Where it runs.
        schedule: One period of it, with its parts.
        size: Bytes of the model on the wire.
        compute: Seconds of forward and backward.
        overlap: Whether an average runs during them.
        steps: In which the rhythm settles, and that are measured then; made up to whole periods.
    """
    settling, measured = (-(-number // len(schedule)) * len(schedule) for number in steps)
    ends = Run(network, schedule, size, compute, overlap).ends(settling + measured).mean(axis=1)
    return float(ends[-1] - ends[settling - 1]) / measured


def _share(transfers: Iterable[_Transfer], capacity: Sequence[float]) -> None:
    """Max-min fair rates: the link that has least for each is shared out first."""
    on: dict[int, list[_Transfer]] = {}
    for transfer in transfers:
        transfer.rate = -1.0  # open
        for link in transfer.links:
            on.setdefault(link, []).append(transfer)
    left = {link: capacity[link] for link in on}
    count = {link: len(those) for link, those in on.items()}
    while count:
        rate, tight = min((left[link] / k, link) for link, k in count.items())
        for transfer in on[tight]:
            if transfer.rate >= 0:
                continue
            transfer.rate = rate
            for link in transfer.links:
                left[link] = max(0.0, left[link] - rate)
                count[link] -= 1
                if not count[link]:
                    del count[link]
