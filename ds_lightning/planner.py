"""WHICH schedule suits a network: over its period, groups load no link with more than it carries in that time.

A plan is found by one rule, applied step by step: *those that differ most average next, as far as the links allow*.
What the links allow is a **budget**: the seconds that a step's averages may take on any link. With a budget in which
a trunk carries one model, one pair crosses it, and another one at the next step, because those who crossed last differ
least. A budget below what a slow host needs leaves that host alone; every k-th step has a wider one, in which it takes
part. Wide budgets also allow larger groups. All pairs of a narrow and a wide budget that the links suggest are tried,
each is run through the cost model (cost.py), and the best trade of time and error is kept.

The same partitions may be used in **parts** (schedule.py): as many as there are steps from one wide budget to the next,
so that each step has one part of the model in a wide partition and the others in narrow ones. All steps are alike then,
nobody waits for a wide one, and the error stays what it is.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from statistics import mean
from typing import Any

import numpy as np

from ds_lightning.cost import Floats, Network, Period, Round, ddp_step_seconds, rounds, steady_error, step_seconds
from ds_lightning.flows import followed_step_seconds
from ds_lightning.schedule import CyclicSchedule, Partition, Schedule, make_schedule, schedule_parts
from ds_lightning.topology import Topology

# A schedule may have so many times the steady consensus error of blind pairs, which cost no accuracy.
MOST_ERROR = 2.0
# Times that differ by less are equal: the smaller error decides between them.
SAME_TIME = 1.03
# Members that send to each other directly: 2 (g - 1) messages for each of them.
LARGEST_GROUP = 8
# A rank has a process group for each of the others it meets within a period.
LONGEST_PERIOD = 16
# Up to here ranks are chosen by how far they are apart (the work grows as N^2) and runs are followed event by event;
# beyond they are drawn, and the recurrence tells the time.
_CHOSEN_RANKS = 64
# Lots decide between equals: up to so many ranks they are drawn more than once, the more often the fewer budgets.
_TRIED_RANKS = 16
_MOST_TRIES = 16
# So many steps are chosen before those of a plan: the first ones know of no distances.
_SETTLING = 12
# So many schedules at most are followed event by event: those that the recurrence takes to be the fastest.
_FOLLOWED = 48
# All that is tried is worked out link by link on the way up.
_MOST_LEVELS = 64
# Of a part a member sends this much less at a time, and as many more messages.
_MOST_PARTS = 4


@dataclass(frozen=True)
class Option:
    """A way to synchronize, and what it costs.

    Attributes:
        name: For people.
        seconds: Mean time of a step over all ranks.
        error: Steady consensus error (see cost.py); 0 where all ranks always agree.
        schedule: ``None``: all-reduces.
    """

    name: str
    seconds: float
    error: float
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found for a topology, a size of the model and a time of compute.

    Attributes:
        topology: The network.
        size: Bytes of the model on the wire.
        compute: Seconds of forward and backward; ``None``: not known.
        overlap: Whether averages run during them.
        best: The schedule that was planned.
        alternatives: What else there is, DDP in rank order first.
    """

    topology: Topology
    size: float
    compute: float | None
    overlap: bool
    best: Option
    alternatives: tuple[Option, ...]

    @property
    def schedule(self) -> Schedule:
        """Who averages with whom."""
        assert self.best.schedule is not None
        return self.best.schedule

    @cached_property
    def network(self) -> Network:
        """The topology in arrays."""
        return Network(self.topology)

    @property
    def ddp_is_better(self) -> bool:
        """Whether an all-reduce takes no longer than the plan."""
        return self._all_reduce.seconds <= SAME_TIME * self.best.seconds

    @property
    def _all_reduce(self) -> Option:
        """The fastest one of each step; in rank order, if that is as fast."""
        exact = [option for option in self.alternatives if option.name.startswith("DDP")]
        fastest = min(option.seconds for option in exact)
        return next(option for option in exact if option.seconds <= SAME_TIME * fastest)

    @property
    def verdict(self) -> str:
        """What to do, for people."""
        best, exact, ddp = self.best, self._all_reduce, self.alternatives[0]
        if self.ddp_is_better:
            which = "Plain DDP" if exact is ddp else exact.name
            said = (
                f"{which} is the better choice here: its step takes {exact.seconds:.3g} s, the best plan's"
                f" {best.seconds:.3g} s, and its replicas never differ."
            )
        else:
            said = (
                f"The plan's step takes {best.seconds:.3g} s, {ddp.seconds / best.seconds:.2f} times faster than DDP's"
            )
            if exact is not ddp:
                said += f" ({exact.seconds / best.seconds:.2f} times faster than {exact.name})"
            said += "."
        local = next(option for option in self.alternatives if option.name.startswith("local SGD"))
        if local.seconds < best.seconds / SAME_TIME and local.seconds < exact.seconds / SAME_TIME:
            said += (
                f" {local.name[0].upper()}{local.name[1:]}, takes {local.seconds:.3g} s per step, at an error of"
                f" {local.error:.2f} where the plan's is {best.error:.2f}."
            )
        return said


def plan(
    topology: Topology,
    size: float,
    compute: float | None = None,
    overlap: bool = True,
    seed: int = 0,
    thorough: bool = True,
    present: Schedule | None = None,
) -> Plan:
    """The schedule with the best trade of step time and consensus error on a network.

    That is the fastest one whose steady consensus error is at most :data:`MOST_ERROR` times that of blind pairs, and
    of those as fast within 3% the one with the smallest; one in parts only if none without is as fast. The same
    arguments give the same plan.

    Args:
        topology: The network and its ranks.
        size: Bytes of the model on the wire: parameters and float buffers in the wire's dtype.
        compute: Seconds of forward and backward of a step. ``None``: not known. All times are then means of
            those without any and those with what the fastest hosts need to swap models, which just hides pairs'.
        overlap: Whether averages run during them.
        seed: Of choices among equals.
        thorough: Whether to take seconds. ``False``, to plan again while training: fewer budgets, lots and
            lengths of a period are tried, and few schedules are followed event by event, for fewer steps. That takes
            below 1 s for 8 ranks and 3 s for 16.
        present: A schedule to compare with: it is among the alternatives, as :data:`PRESENT`.

    Raises:
        ValueError: If a number is out of range.
    """
    _check_number("size", size, 1)
    if compute is not None:
        _check_number("compute", compute, 0)
    if topology.world_size == 1:
        raise ValueError("the topology has one rank, which has nobody to average with. HINT: give it all ranks.")
    if (levels := max(len(topology.way_up(host)) for host in topology.hosts)) > _MOST_LEVELS:
        raise ValueError(
            f"the topology has hosts with {levels} links to the top, but plans are made for at most {_MOST_LEVELS}."
            " HINT: leave out switches with one node below them."
        )
    network = Network(topology)
    search = _Search(network, float(size), compute, overlap, seed, thorough)
    alternatives = (*_alternatives(search), *([] if present is None else [search.option(PRESENT, present)]))
    pairs = next(option for option in alternatives if option.name == BLIND_PAIRS)
    known = [option for option in alternatives if option.schedule is not None]
    most_error = MOST_ERROR * pairs.error + 1e-9
    options = [option for option in (*known, *search.fast(most_error)) if option.error <= most_error]
    fastest = min(option.seconds for option in options)
    best = min((option for option in options if option.seconds <= SAME_TIME * fastest), key=_rank)
    return Plan(topology, float(size), compute, overlap, best, alternatives)


def _rank(option: Option) -> tuple[bool, float, float]:
    """Of those that are as fast, the first in this order is the best: parts have more messages."""
    assert option.schedule is not None
    return schedule_parts(option.schedule) > 1, round(option.error, 6), option.seconds


def _check_number(name: str, value: Any, least: float) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf:
        raise ValueError(f"{name}={value!r} is out of range. HINT: use a number of at least {least}.")


BLIND_PAIRS = "blind pairs"
PRESENT = "the present schedule"
_LOCAL_STEPS = 4


def _alternatives(search: _Search) -> Iterator[Option]:
    network, size = search.network, search.size
    n = network.world_size
    in_rank_order = network.ring_seconds(range(n), size)
    yield Option("DDP, ring in rank order", search.ddp_seconds(in_rank_order), 0.0)
    in_rack_order = network.ring_seconds(network.ordered_ranks(), size)
    yield Option("DDP, ring in rack order", search.ddp_seconds(in_rack_order), 0.0)
    yield Option("DDP, hierarchical", search.ddp_seconds(network.hierarchical_seconds(size)), 0.0)
    # Between two averages replicas take 0, 1, ... steps apart from each other.
    apart = (_LOCAL_STEPS - 1) / 2 * (1 - 1 / n)
    yield Option(f"local SGD, every {_LOCAL_STEPS} steps", mean(search.computes) + in_rank_order / _LOCAL_STEPS, apart)
    yield search.option(BLIND_PAIRS, make_schedule("auto", n, 2))
    topology = network.topology
    racks = [topology.above[host] for host in topology.host_of]
    nodes = racks if len(set(racks)) > 1 else topology.host_of
    yield search.option("grid along the tree", make_schedule("auto", n, "auto", nodes=nodes))


class _Search:
    """Schedules by budgets, and what they cost."""

    def __init__(
        self, network: Network, size: float, compute: float | None, overlap: bool, seed: int, thorough: bool
    ) -> None:
        self.network, self.size, self.overlap, self.seed, self.thorough = network, size, overlap, seed, thorough
        self.links = network.seconds_per_byte * size  # seconds of one model on each node's link
        self._fastest = float(self.links[np.unique(network.above[0])].min())
        self.computes = (0.0, self._fastest) if compute is None else (float(compute),)

    def option(self, name: str, schedule: Schedule) -> Option:
        """A schedule and its figures."""
        period = rounds(schedule)
        return Option(name, self._seconds(period), steady_error(period), schedule)

    def _seconds(self, period: Period, follow: bool = True) -> float:
        network, size, overlap = self.network, self.size, self.overlap
        if not follow or not self._follows:
            return mean(step_seconds(network, period, size, compute, overlap) for compute in self.computes)
        steps = (24, 48) if self.thorough else (12, 24)
        return mean(followed_step_seconds(network, period, size, compute, overlap, steps) for compute in self.computes)

    def ddp_seconds(self, wire: float) -> float:
        """Of a step of DDP whose all-reduce takes so long."""
        return mean(ddp_step_seconds(wire, compute) for compute in self.computes)

    @property
    def _follows(self) -> bool:
        return self.network.world_size <= _CHOSEN_RANKS

    def fast(self, most_error: float) -> Iterator[Option]:
        """The fastest that budgets lead to, among those without a larger error.

        Few ranks are followed event by event: their times are hardly ever shorter than the recurrence's, so that what
        is slower by that than the fastest so far could not be the plan. With many ranks errors are what takes long.
        """
        fastest = math.inf
        most = _FOLLOWED if self.network.world_size <= _TRIED_RANKS else _FOLLOWED // 8
        most = most if self.thorough else min(most, _FOLLOWED // 6)
        for seconds, name, period in sorted(self._candidates(), key=lambda candidate: candidate[0]):
            if seconds > SAME_TIME * fastest or most == 0:
                return
            if (error := steady_error(period)) > most_error:
                continue
            if self._follows:
                seconds, most = self._seconds(period), most - 1
            fastest = min(fastest, seconds)
            schedule = CyclicSchedule([groups.partition() for groups in period], period.parts)
            yield Option(name, seconds, error, schedule)

    def _candidates(self) -> Iterator[tuple[float, str, Period]]:
        """What budgets lead to: seconds per step by the recurrence, a name, and a period."""
        n = self.network.world_size
        budgets = self._budgets()
        drawn = min(3200 // n, 400) if self.thorough else 640 // n
        tries = min(max(1, drawn // len(budgets)), _MOST_TRIES) if n <= _TRIED_RANKS else 1
        # Those chosen by distance depend on what came before, and where the period is cut makes a difference.
        lengths = ((4, 8, 12) if self.thorough else (4, 8)) if n <= _TRIED_RANKS else (8,)
        for (narrow, wide, every), seed in itertools.product(budgets, range(self.seed, self.seed + tries)):
            periods = sorted({-(-length // every) * every for length in lengths})
            settle = -(-_SETTLING // every) * every if self._follows else 0
            for allowed, only_in_parts in self._allowances(narrow, wide, every):
                chooser = _Chooser(self.network, seed)
                partitions = [chooser.partition(allowed[t % every]) for t in range(settle + periods[-1])][settle:]
                each_round = [Round.of(partition) for partition in partitions]
                for period in periods:
                    each = Period(each_round[: len(_shortest(partitions[:period]))])
                    seconds = self._seconds(each, follow=False)
                    if not only_in_parts:
                        yield seconds, "planned" if every == 1 else f"planned, wider every {every} steps", each
                    if 1 < every <= _MOST_PARTS and seconds > SAME_TIME * self._least(each):
                        in_parts = Period(each, every)
                        if seconds > SAME_TIME * (shorter := self._seconds(in_parts, follow=False)):
                            yield shorter, f"planned in {every} parts", in_parts

    def _allowances(self, narrow: float, wide: float, every: int) -> Iterator[tuple[list[Floats], bool]]:
        """What links carry at each step from one wide budget to the next, and whether that is of use in parts alone.

        In parts the time of a step is not that of the wide budget, and links that carry a model within the narrow one
        need no more.
        """
        narrowed, widened = self._allowed(narrow), self._allowed(wide)
        yield [widened, *[narrowed] * (every - 1)], False
        needed = np.where(narrowed >= 1, narrowed, widened)
        if 1 < every <= _MOST_PARTS and (needed > narrowed).any() and (needed < widened).any():
            yield [needed, *[narrowed] * (every - 1)], True

    def _least(self, period: Period) -> float:
        """Seconds per step that no way to go through a period is below: of its busiest link, and of computing."""
        busy = float((self.network.traffic(*period) * self.links).max())
        return mean(max(busy, compute) if self.overlap else busy + compute for compute in self.computes)

    def _allowed(self, budget: float) -> Floats:
        """Models that each node's link carries within a budget."""
        return budget / self.links + 1e-9

    def _budgets(self) -> list[tuple[float, float, int]]:
        """A narrow budget, a wide one, and every how many steps it is that; fewer of them for many ranks."""
        kinds: int
        factors: tuple[float, ...]
        everies: tuple[int, ...]
        if self.network.world_size <= _TRIED_RANKS:
            kinds, factors = 3, (1.0, 1.5, 2.0)  # of pairs, groups of 4, groups of any size
            everies = (2, 3, 4, 8) if self.thorough else (2, 3, 4)
        elif self.network.world_size <= 1024:
            kinds, factors, everies = 3, (1.0, 2.0), (2, 3, 4)
        else:
            kinds, factors, everies = 2, (1.0, 2.0), (2, 4)
        base = sorted({_rounded_up(seconds) for seconds in self.links if seconds >= self._fastest / 1.05})
        if not self.thorough:  # the slowest of those that are nearly as fast stand for all
            base = [b for b, slower in itertools.pairwise([*base, math.inf]) if slower > 1.25 * b]
        if len(base) > kinds:  # measured links are all different
            base = [base[round(i * (len(base) - 1) / (kinds - 1))] for i in range(kinds)]
        narrow = sorted({b * factor for b in base for factor in factors})
        wide = sorted({b * factor for b in base for factor in (1.0, 2.0)})
        if self.overlap and min(self.computes) > narrow[0]:  # less would save no time
            narrow = sorted({min(self.computes), *(b for b in narrow if b > min(self.computes))})
        found = [(budget, budget, 1) for budget in narrow]
        for budget, wider, every in itertools.product((0.0, *narrow), wide, everies):
            if wider > 1.05 * budget:
                found.append((budget, wider, every))
        return found


def _shortest(partitions: list[Partition]) -> list[Partition]:
    """The part that is repeated."""
    n = len(partitions)
    return next(partitions[:p] for p in range(1, n + 1) if n % p == 0 and partitions[:p] * (n // p) == partitions)


def _rounded_up(seconds: float) -> float:
    """To a few digits per power of ten, 5% apart: links that nearly agree are one kind."""
    return float(1.05 ** math.ceil(round(math.log(seconds, 1.05), 6)))


class _Chooser:
    """Partitions, one after the other, that keep within what links carry."""

    def __init__(self, network: Network, seed: int) -> None:
        n = network.world_size
        self.by_distance = n <= _CHOSEN_RANKS
        self._random = random.Random(seed)
        ways = [[int(node) for node in network.above[:, rank] if node >= 0] for rank in range(n)]
        self._alone = [_Group([rank], dict.fromkeys(way, 1), dict.fromkeys(way, 0.0)) for rank, way in enumerate(ways)]
        self._covariance: Floats = np.zeros((n, n) if self.by_distance else (0, 0))
        self._pairs = np.triu_indices(n if self.by_distance else 0, 1)
        self._offered = [0] * n
        self._topology = network.topology
        self._number = {node: i for i, node in enumerate(network.nodes)}

    def partition(self, allowed: Floats) -> Partition:
        """The next one; ``allowed``: models per direction on each node's link."""
        groups = _Groups(self._alone, allowed.tolist())
        if not self.by_distance:
            self._draw(groups, allowed.tolist())
            return groups.partition()
        self._covariance += np.eye(len(self._alone))
        for one, other in self._farthest_first():
            groups.merge(one, other)
        averaged = Round.of(groups.partition())
        self._covariance = averaged.means(averaged.means(self._covariance).T)
        return groups.partition()

    def _farthest_first(self) -> list[tuple[int, int]]:
        one, other = self._pairs
        own = np.diag(self._covariance)
        # Rounded, because sums that should be equal differ in the last digits, and then by lot.
        apart = np.round(own[one] + own[other] - 2 * self._covariance[one, other], 6)
        lots = [self._random.random() for _ in range(len(one))]
        order = np.lexsort((np.array(lots), -apart))
        return list(zip(one[order].tolist(), other[order].tolist(), strict=True))

    def _draw(self, groups: _Groups, allowed: list[float]) -> None:
        """From the top down: each child of a switch offers what its link carries, at most half of its ranks.

        Those come first that were offered least often; what is left over stays for the switches below.
        """
        for switch, children in self._below.items():
            offered: list[tuple[int, str]] = []
            for child, ranks in children.items():
                free = [rank for rank in ranks if groups.is_alone(rank)]
                carries = int(allowed[self._number[child]]) if child in self._number else 1
                free.sort(key=lambda rank: (self._offered[rank], self._random.random()))
                offered += [(rank, child) for rank in free[: min(carries, max(1, len(free) // 2))]]
            self._random.shuffle(offered)
            for (one, child), (other, others) in itertools.pairwise(offered):
                if child != others and groups.merge(one, other) and switch not in self._topology.ranks:
                    self._offered[one] += 1
                    self._offered[other] += 1

    @cached_property
    def _below(self) -> dict[str, dict[str, list[int]]]:
        """From the top down: each switch, its children, and the ranks below them; a rank is a child of its host."""
        topology = self._topology
        below: dict[str, list[int]] = {}
        levels = [[topology.top]]
        while children := [c for node in levels[-1] for c in topology.children.get(node, ())]:
            levels.append(children)
        found: dict[str, dict[str, list[int]]] = {}
        for level in reversed(levels):
            for node in level:
                if node in topology.ranks:
                    parts = {f"{node}/{rank}": [rank] for rank in topology.ranks[node]}
                else:
                    parts = {child: below[child] for child in topology.children[node]}
                below[node] = [rank for ranks in parts.values() for rank in ranks]
                if len(parts) > 1:
                    found[node] = parts
        return dict(reversed(found.items()))


@dataclass(slots=True)
class _Group:
    """Members, how many of them are below each node, and the models on the nodes' links per direction."""

    members: list[int]
    below: dict[int, int]
    traffic: dict[int, float]


class _Groups:
    """Groups that grow as long as no link carries more than it is allowed to."""

    def __init__(self, alone: Sequence[_Group], allowed: Sequence[float]) -> None:
        self._allowed, self._traffic = allowed, [0.0] * len(allowed)
        self._of = [*alone]

    def merge(self, one: int, other: int) -> bool:
        """Make the groups of two ranks one, if the links allow it."""
        mine, theirs = self._of[one], self._of[other]
        size = len(mine.members) + len(theirs.members)
        if mine is theirs or size > LARGEST_GROUP:
            return False
        below = mine.below.copy()
        for node, members in theirs.below.items():
            below[node] = below.get(node, 0) + members
        share = 2 / size if size > 2 else 1.0  # of a model, to each member on the other side, as in cost.py
        own, traffic = {}, {}
        for node, members in below.items():
            models = own[node] = members * (size - members) * share
            present = self._traffic[node]
            changed = present - (mine.traffic.get(node, 0.0) + theirs.traffic.get(node, 0.0)) + models
            if changed > present and changed > self._allowed[node]:
                return False
            traffic[node] = changed
        both = _Group(mine.members + theirs.members, below, own)
        for node, changed in traffic.items():
            self._traffic[node] = changed
        for rank in both.members:
            self._of[rank] = both
        return True

    def is_alone(self, rank: int) -> bool:
        """Whether nothing was merged with a rank yet."""
        return len(self._of[rank].members) == 1

    def partition(self) -> Partition:
        """All groups, in the order of their first ranks."""
        return tuple(sorted({tuple(sorted(group.members)) for group in self._of}))
