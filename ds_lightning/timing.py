"""HOW LONG steps take on a cluster, step by step: for 8 to 100,000 ranks, while links and computing vary.

What a step costs is cost.py's; what this adds is time. Few ranks are followed event by event (flows.py). For many the
recurrence of cost.py is computed, all ranks at once: a group begins when its last member is ready, with the bandwidths
that links have when the groups of that step begin, on average.

All schedules meet the same cluster: which links are slow at a time (contention) and how long each rank computes at each
step (jitter) depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ds_lightning.clusters import check_seed, check_share
from ds_lightning.cost import FORWARD, Floats, Network, Period, averaged, ddp_step_seconds, rounds
from ds_lightning.flows import Contention, Run
from ds_lightning.planner import plan
from ds_lightning.schedule import Schedule, make_schedule, positive_int
from ds_lightning.topology import Topology, amount

# Up to so many ranks schedules are followed event by event, unless said.
EVENT_RANKS = 32
# Beyond, planning takes minutes.
PLAN_RANKS = 20_000
_SHORTEST_PERIOD = 1e-3  # seconds, of contention
NAMES = ("ddp", "hierarchical", "local", "pairs", "grid", "shuffle", "topology")

# When each rank ends a step, shape (N,), and the seconds that each link was busy for it, shape (nodes,).
_Step = tuple[Floats, Floats]


@dataclass(frozen=True)
class Setting:
    """What all schedules meet.

    Args:
        topology: The cluster.
        size: Bytes of the model on the wire.
        compute: Mean seconds of forward and backward.
        overlap: Whether the averages of schedules run during them. DDP's all-reduces overlap with backward anyway.
        jitter: Of the computing of each rank and step: standard deviation of its logarithm.
        contention: Share of links that others slow down at a time, to between a quarter and all of their bandwidth.
        contention_period: Seconds after which others are.
        local_steps: Between averages of local SGD.
        seed: Of jitter, contention, and schedules that are drawn.
        event_ranks: Up to so many ranks schedules are followed event by event.

    Raises:
        ValueError: If a number is out of range.
    """

    topology: Topology
    size: float
    compute: float = 0.0
    overlap: bool = True
    jitter: float = 0.0
    contention: float = 0.0
    contention_period: float = 10.0
    local_steps: int = 4
    seed: int = 0
    event_ranks: int = EVENT_RANKS

    def __post_init__(self) -> None:
        if self.topology.world_size < 2:
            raise ValueError("one rank alone has nothing to average. HINT: use 2 or more.")
        amount("size", self.size)
        amount("compute", self.compute, zero=True)
        amount("jitter", self.jitter, zero=True)
        check_share("contention", self.contention)
        if amount("contention_period", self.contention_period) < _SHORTEST_PERIOD:
            raise ValueError(
                f"contention_period={self.contention_period:g} is below {_SHORTEST_PERIOD:g} s, and each is followed."
                " HINT: use more seconds."
            )
        positive_int("local_steps", self.local_steps)
        check_seed(self.seed)

    @cached_property
    def network(self) -> Network:
        """The topology in arrays, as fast as it is without others."""
        return Network(self.topology)

    @cached_property
    def others(self) -> Contention | None:
        """What slows links down."""
        links, share = len(self.network.nodes), self.contention
        return Contention(links, share, self.contention_period, seed=_seed(self.seed, 1)) if share else None

    def period_at(self, time: float) -> int:
        """Of the contention; always 0 without."""
        return int(time // self.contention_period) if self.others else 0

    def network_in(self, period: int) -> Network:
        """The network as it is in a period of the contention."""
        return self.network.with_shares(self.others.shares(period)) if self.others else self.network

    def computing(self, step: int) -> Floats:
        """Seconds of forward and backward of each rank at a step, shape (N,)."""
        seconds = np.full(self.topology.world_size, self.compute)
        if self.jitter:
            noise = np.random.default_rng((self.seed, 2, step)).standard_normal(len(seconds))
            seconds *= np.exp(self.jitter * noise - self.jitter**2 / 2)
        return seconds


def _seed(seed: int, which: int) -> int:
    """Another seed, for another purpose."""
    return int(np.random.SeedSequence((seed, which)).generate_state(1)[0])


@dataclass
class Timing:
    """How long the steps of a schedule take.

    Attributes:
        name: Of the schedule.
        ends: Mean, earliest and latest end of each step over the ranks, in seconds from the start, shape (steps, 3).
        spread: What each step takes single ranks: its 0th, 1st, ... 100th percentile, shape (steps, 101).
        waiting: Share of each rank's time in which it does not compute, shape (N,).
        slowest: The rank that ends last.
        busy: Seconds per step that each link is busy, shape (nodes,).
    """

    name: str
    ends: Floats
    spread: Floats
    waiting: Floats
    slowest: int
    busy: Floats

    @property
    def steps(self) -> Floats:
        """What each step takes on average over ranks, in seconds, shape (steps,)."""
        return np.diff(self.ends[:, 0], prepend=0.0)

    @property
    def mean(self) -> float:
        """Seconds per step on average over steps and ranks, from the start."""
        return float(self.ends[-1, 0]) / len(self.ends)


@dataclass
class Clock:
    """Sums up steps as they come."""

    name: str
    setting: Setting
    _rows: list[tuple[float, float, float]] = field(default_factory=list)
    _spread: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = self.setting.topology.world_size
        self._last, self._computed = np.zeros(n), np.zeros(n)
        self._busy = np.zeros(len(self.setting.network.nodes))

    def add(self, ends: Floats, busy: Floats) -> tuple[float, float, float]:
        """The next step; its mean, earliest and latest end."""
        row = float(ends.mean()), float(ends.min()), float(ends.max())
        self._computed += self.setting.computing(len(self._rows))
        self._rows.append(row)
        self._spread.append(np.percentile(ends - self._last, np.arange(101)))
        self._last, self._busy = ends, self._busy + busy
        return row

    def timing(self) -> Timing:
        """Of the steps so far."""
        waiting = 1 - self._computed / np.maximum(self._last, 1e-300)
        slowest = int(self._last.argmax())
        ends, spread = np.array(self._rows), np.array(self._spread)
        return Timing(self.name, ends, spread, waiting, slowest, self._busy / len(ends))


def run(setting: Setting, name: str, steps: int, on_step: Callable[[int, Floats], None] | None = None) -> Timing:
    """How long the steps of a schedule take.

    Args:
        setting: Where.
        name: One of :data:`NAMES`.
        steps: How many.
        on_step: Called after each step with its number and its mean, earliest and latest end.
    """
    clock = Clock(name, setting)
    for t, (ends, busy) in enumerate(walk(setting, name, steps)):
        row = clock.add(ends, busy)
        if on_step is not None:
            on_step(t, np.array(row))
    return clock.timing()


def walk(setting: Setting, name: str, steps: int) -> Iterator[_Step]:
    """When each rank ends each step, and how long that kept each link busy."""
    positive_int("steps", steps)
    if name in ("ddp", "hierarchical"):
        return _all_reduces(setting, steps, hierarchical=name == "hierarchical")
    if name == "local":
        return _local(setting, steps)
    period = rounds(schedule(setting, name))
    if setting.topology.world_size <= setting.event_ranks:
        return _events(setting, period, steps)
    return _recurrence(setting, period, steps)


def schedule(setting: Setting, name: str) -> Schedule:
    """Who averages with whom; pairs and the grid are those of the planner's alternatives."""
    topology = setting.topology
    n = topology.world_size
    if name == "topology":
        return plan(topology, setting.size, setting.compute, setting.overlap, setting.seed).schedule
    if name == "pairs":
        return make_schedule("auto", n, 2)
    if name == "grid":
        racks = [topology.above[host] for host in topology.host_of]
        return make_schedule("grid", n, nodes=racks if len(set(racks)) > 1 else topology.host_of)
    if name == "shuffle":
        return make_schedule("shuffle", n, seed=setting.seed)
    raise ValueError(f"schedule={name!r} is unknown. HINT: use one of {', '.join(map(repr, NAMES))}.")


def _all_reduces(setting: Setting, steps: int, hierarchical: bool) -> Iterator[_Step]:
    """DDP: all begin a step together, and its all-reduce waits for the slowest."""
    n, now = setting.topology.world_size, 0.0
    order = np.arange(n)
    traffic = setting.network.hierarchical_traffic() if hierarchical else setting.network.ring_traffic(order)
    for t in range(steps):
        slowest = float(setting.computing(t).max())
        network = setting.network_in(setting.period_at(now + FORWARD * slowest))
        wire = network.hierarchical_seconds(setting.size) if hierarchical else network.ring_seconds(order, setting.size)
        now += ddp_step_seconds(wire, slowest)
        yield np.full(n, now), traffic * network.seconds_per_byte * setting.size


def _local(setting: Setting, steps: int) -> Iterator[_Step]:
    """Local SGD: every few steps a ring all-reduce, which overlaps with nothing."""
    ends: Floats = np.zeros(setting.topology.world_size)
    order = np.arange(len(ends))
    traffic = setting.network.ring_traffic(order)
    for t in range(steps):
        ends = ends + setting.computing(t)
        busy = np.zeros(len(traffic))
        if (t + 1) % setting.local_steps == 0:
            latest = float(ends.max())
            network = setting.network_in(setting.period_at(latest))
            ends = np.full(len(ends), latest + network.ring_seconds(order, setting.size))
            busy = traffic * network.seconds_per_byte * setting.size
        yield ends, busy


def _recurrence(setting: Setting, period: Period, steps: int) -> Iterator[_Step]:
    """Max-plus, as :func:`ds_lightning.cost.step_seconds`."""
    ends: Floats = np.zeros(setting.topology.world_size)
    known: dict[int, tuple[list[Floats], Floats]] = {}
    when, network = 0, setting.network_in(0)
    for t in range(steps):
        at, computing = t % len(period), setting.computing(t)
        parts, ready = period.step(t), ends if setting.overlap else ends + computing
        begin = float(np.concatenate([groups.latest(ready) for groups in parts]).mean())
        if (now := setting.period_at(begin)) != when:
            when, network, known = now, setting.network_in(now), {}
        if at not in known:
            busy = network.traffic(*parts) * network.seconds_per_byte * setting.size
            known[at] = network.step_seconds(parts, setting.size), busy
        seconds, busy = known[at]
        done = averaged(parts, seconds, ready)
        ends = np.maximum(ends + computing, done) if setting.overlap else done
        yield ends, busy


def _events(setting: Setting, period: Period, steps: int) -> Iterator[_Step]:
    """Event by event; links are taken to be as fast as at the mean begin of a step, to tell how long they are busy."""
    network, begin = setting.network, 0.0
    computing = np.array([setting.computing(t) for t in range(steps)])
    followed = Run(network, period, setting.size, computing, setting.overlap, setting.others)
    traffic = [network.traffic(*period.step(t)) for t in range(len(period))]
    for t, ends in enumerate(followed.ends(steps)):
        there = setting.network_in(setting.period_at(begin))
        yield ends, traffic[t % len(period)] * there.seconds_per_byte * setting.size
        begin = float(ends.mean())
