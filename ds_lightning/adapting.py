"""A plan that follows the network: what averages took is compared with what was planned for, and all change at once.

**Measuring.** A rank knows when the first and when the last bucket of an average arrived: between them nobody waited
for a member to begin, so that only the links decide how long that takes.

**Judging.** Ranks put these times into the key-value store a few times a second, from a thread of their own. Rank 0
compares them with what the cost model says (cost.py) and keeps a *share* for every link: what is left of the bandwidth
that the topology states. A share falls where averages over the link took :data:`MARGIN` times as long as they should,
and the fewest links that explain all slow averages are blamed. It rises again, at most to 1, where averages were
faster than the link could be with it. Where parameters travel in parts, other parts hide that a link has recovered:
now and then one round averages all parts in the same groups, to look.

**Changing.** Rank 0 plans anew (in another thread) when shares or the time of compute changed. The new plan is taken if
a step should be :data:`GAIN` times faster with it, or no slower when all links are again as the topology states. All
ranks change before the same round, without waiting for each other until then: rank 0 allows rounds some seconds ahead,
nobody begins a round that is not allowed yet, and what is changed begins with the first of these.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from statistics import median
from typing import Any

import numpy as np
from torch.distributed.distributed_c10d import Store

from ds_lightning.cost import Floats, Network, rounds
from ds_lightning.groups import name_timeout
from ds_lightning.payload import Arrivals, seconds_per_byte
from ds_lightning.planner import PRESENT, Plan, plan
from ds_lightning.schedule import CyclicSchedule, Schedule, schedule_parts, schedule_period
from ds_lightning.topology import Link, Topology

# Averages so many times slower (or faster) than planned for say that a link has changed: noise is below.
MARGIN = 1.5
# Of a link's latest averages so many are looked at, and all of so many seconds; three in four must agree that it is
# slower (one in four, that it is faster).
LATEST, SECONDS = 4, 1.0
# A new plan's step must be so many times faster, or a change is not worth its while.
GAIN = 1.15
# A change may come only after so many times the seconds that the one before it took: a tenth of the time at most.
PAUSE = 10
# So it is with rounds that look whether a link has recovered, but these are of no use if it has not.
LOOK = 20
# Seconds between looks into the store: for few ranks, and more for each of them.
_PACE, _PACE_OF_A_RANK = 0.1, 0.002
# Rounds are allowed so many of these ahead, at first a fixed number of rounds.
_AHEAD, _FIRST_ROUNDS = 5, 16
# Times are told so many times: rank 0 may look in a little later.
_TOLD = 8
# While a rank waits to be allowed a round.
_HURRY = 0.02


@dataclass(frozen=True)
class Word:
    """What rank 0 says.

    Attributes:
        until: Rounds before this one are allowed.
        version: Of the plan; it counts changes.
        since: The first round of this version.
        look: A round and the partition in which it averages all parts, to see how fast links are; or None.
        slowest: The smallest share of any link.
    """

    until: int
    version: int = 0
    since: int = 0
    look: tuple[int, int] | None = None
    slowest: float = 1.0


@dataclass(frozen=True)
class Change:
    """A plan to change to."""

    schedule: CyclicSchedule
    why: str


class Watch:
    """What is known about the links from the times of averages. On rank 0.

    Args:
        network: The links as the topology states them.
        schedule: Who averages with whom.
        size: Bytes of the model on the wire.
    """

    def __init__(self, network: Network, schedule: Schedule, size: float) -> None:
        self._network, self._size = network, size
        self._seconds = (size * network.seconds_per_byte).tolist()  # of a model on each link
        self.shares: Floats = np.ones(len(network.nodes))
        self.follow(schedule)

    def follow(self, schedule: Schedule) -> None:
        """From here on averages are those of this schedule."""
        self._parts = schedule_parts(schedule)
        self._period = rounds(schedule)
        self._crossed = [self._network.crossed(groups) for groups in self._period]
        # Models on each link: in the step of each round, and in one that looks at it.
        self._step = [self._network.traffic(*self._period.step(t)) for t in range(len(self._period))]
        self._traffic = [self._network.traffic(groups) for groups in self._period]
        self._look: tuple[int, int] | None = None  # a round, and the partition in which it averages all parts
        # Round, part, group: by rank seconds per byte, and whose messages came last.
        self._incomplete: dict[tuple[int, int, int], dict[int, tuple[float, int | None]]] = {}
        self._looked: list[_Average] = []
        self._averages: deque[_Average] = deque(maxlen=4 * LATEST * self._network.world_size)

    def look(self, round_: int, partition: int) -> None:
        """That round averages all parts in this partition."""
        self._look = round_, partition
        self._looked.clear()

    def take(self, now: float, rank: int, round_: int, part: int, took: float, last: int | None = None) -> None:
        """What an average of a part took a rank, per byte of it, and whose messages came last; told at ``now``.

        In a round that looks it is all parts.
        """
        look = self._look if self._look is not None and self._look[0] == round_ else None
        partition = (round_ + part) % len(self._period) if look is None else look[1]
        groups = self._period[partition]
        group = int(groups.group_of[rank])
        came = self._incomplete.setdefault((round_, part, group), {})
        came[rank] = took, last
        if len(came) < groups.sizes[group]:
            return
        del self._incomplete[round_, part, group]
        if links := self._crossed[partition][group]:
            together = self._traffic[partition] if look is not None else self._step[round_ % len(self._period)]
            seconds = max(took for took, _ in came.values()) * self._size / (self._parts if look is None else 1)
            lasts = [late for _, late in came.values() if late is not None]
            average = _Average(now, round_, seconds, {node: float(together[node]) for node in links}, lasts)
            if look is not None:
                self._looked.append(average)
            self._averages.append(average)

    def judge(self) -> bool:
        """Bring the shares up to date; whether any of them changed."""
        before = self.shares.copy()
        newest = max((average.round for average in self._averages), default=0)
        for key in [key for key in self._incomplete if key[0] < newest - 4 * len(self._period)]:
            del self._incomplete[key]  # somebody's word was lost
        latest: dict[int, list[_Average]] = {}
        for average in sorted(self._averages, key=lambda a: -a.round):
            for node in average.traffic:
                of_link = latest.setdefault(node, [])
                if len(of_link) < LATEST or of_link[0].told - of_link[-1].told < SECONDS:
                    of_link.append(average)
        enough = {
            node: averages
            for node, averages in latest.items()
            if len(averages) >= LATEST and averages[0].told - averages[-1].told >= SECONDS
        }
        for node in np.flatnonzero(self.shares < 1).tolist():
            if looked := [average for average in self._looked if node in average.traffic]:
                took = [average.seconds / self._needs(average)[node] for average in looked]
                faster = max(took)
            else:
                took = [average.seconds / self._needs(average)[node] for average in enough.get(node, ())]
                faster = _quarter(took) if took else 1.0
            if faster < 1 / MARGIN:
                self.shares[node] = min(1.0, self.shares[node] / faster)
        while enough:
            suspects = [node for node, averages in enough.items() if _quarter(map(self._slower, averages)) > MARGIN]
            if not suspects:
                break
            blamed = max(suspects, key=self._explains)
            # By how much, those do not say that began before.
            self.shares[blamed] /= median(s for s in map(self._slower, enough.pop(blamed)) if s > MARGIN)
        changed = np.abs(np.log(self.shares / before)) > 1e-9
        if changed.any():
            self._averages.clear()
            self._looked.clear()
        return bool(changed.any())

    def _explains(self, node: int) -> tuple[int, bool, int, int]:
        """How well a link explains what is slow: by the number of slow averages over it, then by who came last there.

        Of links behind each other the one with fewer ranks behind it, if most say that it was one of these.
        """
        slow = [a for a in self._averages if node in a.traffic and self._slower(a) > MARGIN]
        behind = (self._network.above == node).any(axis=0)
        lasts = sum(bool(behind[rank]) for average in slow for rank in average.lasts)
        most = 2 * lasts > sum(len(average.lasts) for average in slow)
        return len(slow), most, -int(behind.sum()) if most else lasts, lasts

    def _needs(self, average: _Average) -> dict[int, float]:
        """Seconds that each link needs for what a step puts on it."""
        return {node: models * self._seconds[node] / self.shares[node] for node, models in average.traffic.items()}

    def _slower(self, average: _Average) -> float:
        """How many times longer it took than its busiest link needs."""
        return average.seconds / max(self._needs(average).values())

    def topology(self) -> Topology:
        """The topology with what is left of its links."""
        full = self._network.topology
        left = dict(zip(self._network.nodes, self.shares.tolist(), strict=True))
        links = {
            node: Link(link.up * left[node], link.down * left[node], link.latency) for node, link in full.links.items()
        }
        return replace(full, links=links)

    def slow(self) -> str:
        """The links that have changed, for people."""
        named = zip(self._network.nodes, self.shares.tolist(), strict=True)
        found = sorted((share, node) for node, share in named if share < 1)
        if not found:
            return "all links carry what the topology says"
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        shown = ", ".join(f"{node} {share:.2f}" for share, node in found[:4])
        return f"links carry less than the topology says: {shown}{more} of it"

    def worth_a_look(self) -> tuple[int, float] | None:
        """The partition that tells most about slow links, if parts hide it, and the seconds that it may take."""
        slow = self.shares < 1 / MARGIN
        if self._parts == 1 or not slow.any():
            return None
        told = [float(((traffic > 0) & slow).sum()) for traffic in self._traffic]
        best = int(np.argmax(told))
        if not told[best]:
            return None
        return best, float((self._traffic[best] * self._seconds / self.shares).max())


@dataclass(frozen=True)
class _Average:
    told: float
    round: int
    seconds: float
    traffic: dict[int, float]  # models that its step puts on each of its links
    lasts: list[int]  # for whom members waited longest, of each that knows it


def _quarter(values: Iterable[float]) -> float:
    """What a quarter of the values lie below."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4]


class Leader:
    """What rank 0 decides.

    Args:
        found: The plan that ranks follow at first.
        seed: Of plans.

    Attributes:
        word: What ranks are to know now.
        change: The plan that ``word.version`` names, once it has changed.
    """

    def __init__(self, found: Plan, seed: int) -> None:
        self.found, self._seed = found, seed
        self.word = Word(0)
        self.change: Change | None = None
        self._schedule: Schedule = found.schedule
        self._watch = Watch(found.network, self._schedule, found.size)
        self._compute = found.compute
        self._planning: Future[tuple[Plan, str]] | None = None
        self._rates: deque[tuple[float, int]] = deque(maxlen=16)
        self._heard: dict[int, tuple[int, int]] = {}  # the latest round and part that each rank told of
        self._pause = self._next_look = 0.0
        self._announced = False  # a change that not all ranks have made
        self._stale = False  # whether what is known has changed since the latest plan
        self._full = True  # whether the present plan was made for links as the topology states them

    def begin(self, round_: int, version: int, schedule: Schedule) -> None:
        """A fit begins with this round; what was announced in an earlier one and not followed any more is forgotten."""
        self.word = Word(round_ + _FIRST_ROUNDS, version, round_, None, self.word.slowest)
        self._schedule, self._planning, self._announced = schedule, None, False
        self._rates.clear()
        self._heard.clear()
        self._watch.follow(schedule)

    def hear(self, reports: Sequence[dict[str, Any]], pace: float, now: float) -> None:
        """Take what all ranks report, and make up the next :attr:`word`."""
        for rank, report in enumerate(reports):
            if report["version"] == self.word.version:
                for round_, part, *took in report["samples"]:  # in this order; a report has some of the one before
                    if round_ >= self.word.since and (round_, part) > self._heard.get(rank, (-1, 0)):
                        self._heard[rank] = round_, part
                        self._watch.take(now, rank, round_, part, *took)
        farthest = max(report["round"] for report in reports)
        self._allow(farthest, pace, now)
        if self._announced and all(report["version"] == self.word.version for report in reports):
            self._pause, self._announced = now + PAUSE * max(report["took"] for report in reports), False
        if not self._announced:
            self._decide(reports, now)

    def _allow(self, farthest: int, pace: float, now: float) -> None:
        self._rates.append((now, farthest))
        (earlier, then), lead = self._rates[0], 1
        if now - earlier > 0:
            lead = max(lead, math.ceil((farthest - then) / (now - earlier) * _AHEAD * pace))
        if farthest >= self.word.until - 1:  # ranks are, or soon will be, waiting: they are faster than was thought
            lead = max(lead, 2 * _FIRST_ROUNDS if now - earlier < 1 else lead)
        self.word = replace(self.word, until=max(self.word.until, farthest + 1 + lead))

    def _decide(self, reports: Sequence[dict[str, Any]], now: float) -> None:
        if self._planning is not None:
            if self._planning.done():
                planned, self._planning = self._planning, None
                self._consider(*planned.result())
            return
        computes = [report["compute"] for report in reports if report["compute"] is not None]
        compute = median(computes) if len(computes) == len(reports) else None
        changed = self._watch.judge()
        self.word = replace(self.word, slowest=float(self._watch.shares.min()))
        if compute is not None and (
            self._compute is None or not 1 / MARGIN < compute / max(self._compute, 1e-9) < MARGIN
        ):
            changed, self._compute = True, compute
        if changed:
            self._stale = True
        if self._stale and now >= self._pause and self._compute is not None:
            self._stale = False
            self._plan()
        elif (look := self._watch.worth_a_look()) is not None and now >= self._next_look:
            if self.word.look is not None and min(report["round"] for report in reports) <= self.word.look[0]:
                return  # somebody has not done the one before
            partition, seconds = look
            if self._next_look:
                round_ = self.word.until
                self.word = replace(self.word, look=(round_, partition), until=round_ + 2)
                self._watch.look(round_, partition)
            self._next_look = now + LOOK * seconds

    def _plan(self) -> None:
        self._planning = Future()
        topology, slow, future = self._watch.topology(), self._watch.slow(), self._planning

        def run() -> None:
            try:
                found = plan(
                    topology,
                    self.found.size,
                    self._compute,
                    self.found.overlap,
                    self._seed,
                    thorough=False,
                    present=self._schedule,
                )
                future.set_result((found, slow))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="dssync: planning", daemon=True).start()

    def _consider(self, found: Plan, slow: str) -> None:
        present = next(option for option in found.alternatives if option.name == PRESENT)
        back = bool((self._watch.shares == 1).all())
        worth = present.seconds >= (1.0 if back and not self._full else GAIN) * found.best.seconds
        if found.best is present or not worth:
            return
        self._full = back
        planned = found.schedule
        partitions = [planned.partition(t) for t in range(schedule_period(planned))]
        best = CyclicSchedule(partitions, schedule_parts(planned))
        self.change = Change(
            best,
            f"{slow}. A step should take {found.best.seconds:.3g} s with {found.best.name}, where it would take"
            f" {present.seconds:.3g} s",
        )
        # Of a look that was announced, some ranks may not have heard yet: it stays.
        since = self.word.until
        self.word = replace(self.word, until=since + 2, version=self.word.version + 1, since=since)
        self._schedule = best
        self._watch.follow(best)
        self._announced, self._next_look = True, 0.0


class Adapting:
    """A rank's part: tells what it measured, and what rank 0 said. Its thread ends with :meth:`stop`.

    Args:
        store: With keys that nobody else uses.
        rank: Of this process.
        ranks: Number of ranks.
        round_: The first one.
        schedule: Who averages with whom at first.
        version: Changes of earlier fits.
        leader: On rank 0.
        timeout: How long to wait for rank 0.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        round_: int,
        schedule: Schedule,
        version: int = 0,
        leader: Leader | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self._store, self._rank, self._ranks, self._leader, self._timeout = store, rank, ranks, leader, timeout
        self._pace = _PACE + _PACE_OF_A_RANK * ranks
        self.version = self._told = version  # told: by rank 0
        self._samples: list[tuple[int, int, float, int | None]] = []  # not told yet
        self._told_samples: deque[list[tuple[int, int, float, int | None]]] = deque(maxlen=_TOLD - 1)
        self._computes: deque[float] = deque(maxlen=16)
        self._last: tuple[int, float, float] | None = None
        self._looks: int | None = None  # the latest round in which all parts went the same way
        self._round, self._took = round_, 0.0
        self._word: Word | None = None
        self._changes: dict[int, Change] = {}
        self._error: BaseException | None = None
        self._over = False
        self._news = threading.Condition()
        self._wake = threading.Event()
        if leader is not None:
            leader.begin(round_, version, schedule)
        self._thread = threading.Thread(target=self._run, name="dssync: adapting", daemon=True)
        self._thread.start()

    def passed(self, round_: int, waited: float, arrivals: deque[tuple[int, int, Arrivals]]) -> None:
        """This rank is about to begin a round.

        Args:
            round_: That round.
            waited: Seconds that it has waited for averages so far.
            arrivals: Of its latest averages; what is known is taken out.
        """
        now = time.perf_counter()
        with self._news:
            if self._last is not None and self._last[0] == round_ - 1:
                self._computes.append(max(0.0, now - self._last[1] - (waited - self._last[2])))
            self._last, self._round = (round_, now, waited), round_
            while arrivals:
                at, part, _ = arrivals[0]
                ways = [came for other, _, came in arrivals if other == at] if at == self._looks else [arrivals[0][2]]
                if (took := seconds_per_byte(ways)) is None:
                    break
                for _ in ways:
                    arrivals.popleft()
                self._samples.append((at, part, float(f"{took:.4g}"), ways[-1].last_member))

    def at(self, round_: int) -> tuple[Change | None, int | None]:
        """The change to make before a round, and the partition that it averages all parts in, if it is to look.

        Raises:
            RuntimeError: If rank 0 does not allow the round within the timeout.
        """
        with self._news:
            deadline = None if self._timeout is None else time.monotonic() + self._timeout.total_seconds()
            while self._word is None or round_ >= self._word.until:
                self._wake.set()
                left = None if deadline is None else deadline - time.monotonic()
                if self._error is not None or (left is not None and left <= 0):
                    raise RuntimeError(
                        f"Rank {self._rank} waited in vain for rank 0 to say whether the schedule changes, within"
                        f" {name_timeout(self._timeout)}: {self._error or 'no answer'}. HINT: rank 0 ended or stopped;"
                        " its own log says more."
                    )
                self._news.wait(left)
            word = self._word
            change = None
            if word.version > self.version and round_ >= word.since:
                change, self.version = self._changes[word.version], word.version
                self._samples.clear()
                self._told_samples.clear()
            if word.look is None or word.look[0] != round_:
                return change, None
            self._looks, look = word.look
            return change, look

    def changed(self, seconds: float) -> None:
        """The change took so long."""
        self._took = seconds
        with self._news:
            self._last = None

    @property
    def slowest(self) -> float:
        """The smallest share of any link, as far as rank 0 knows."""
        return 1.0 if self._word is None else self._word.slowest

    def stop(self) -> None:
        """End the thread."""
        self._over = True
        self._wake.set()
        self._thread.join(5)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._over:
                self._report()
                if self._leader is not None:
                    self._lead(self._leader)
                self._listen()
                with self._news:
                    waiting = self._wake.is_set() and not self._over
                    self._wake.clear()
                if waiting:
                    time.sleep(_HURRY)
                else:
                    self._wake.wait(self._pace)
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def _report(self) -> None:
        with self._news:
            report = {
                "round": self._round,
                "version": self.version,
                "took": self._took,
                "compute": median(self._computes) if len(self._computes) == self._computes.maxlen else None,
                "samples": [*itertools.chain(*self._told_samples, self._samples)],
            }
            self._told_samples.append(self._samples)
            self._samples = []
        self._store.set(str(self._rank), json.dumps(report))

    def _lead(self, leader: Leader) -> None:
        told = self._store.multi_get([str(rank) for rank in range(self._ranks)])
        leader.hear([json.loads(report) for report in told], self._pace, time.monotonic())
        if (change := leader.change) is not None and leader.word.version != self._told:
            self._told = leader.word.version
            partitions = [change.schedule.partition(t) for t in range(change.schedule.period)]
            content = {"partitions": partitions, "parts": change.schedule.parts, "why": change.why}
            self._store.set(f"plan {self._told}", json.dumps(content))
        self._store.set("word", json.dumps(asdict(leader.word)))

    def _listen(self) -> None:
        told = json.loads(self._store.get("word"))
        look = told.pop("look")
        word = Word(**told, look=None if look is None else (look[0], look[1]))
        change = None
        if word.version > self.version and word.version not in self._changes:
            content = json.loads(self._store.get(f"plan {word.version}"))
            change = Change(CyclicSchedule(content["partitions"], content["parts"]), content["why"])
        with self._news:
            if change is not None:
                self._changes = {word.version: change}
            if word != self._word:
                self._word = word
                self._news.notify_all()
