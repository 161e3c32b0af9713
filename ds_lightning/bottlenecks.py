"""Which hosts share a bottleneck, inferred from what they can send to each other at the same time. No network in here.

Whoever measures hands in a function: given flows, and how each is to be sent, it says how many bytes per second each
got while all of them ran. Three phases ask it:

1. **Tournament.** All hosts in pairs at once, both ways, until each has met each other. The most that a host ever sent
   or got is its own link's rate. A pair that stays well below what its own links could do is *lost*: it shares
   something with other pairs of its round, so its hosts are in different racks. Pairs inside a rack keep their rate,
   but so may pairs that cross in a round when few do, and on slow links TCP settles too late to say anything.
2. **Under load.** Each pair that kept its rate, or has a slow host, meets again at the pace of its own links, while
   lost pairs load what they share with many connections each. Whoever crosses it, however slow, gets a small share now;
   who is inside a rack notices nothing. Hosts that keep their rate with each other on the average are a rack.
3. **Trunks.** All hosts of a rack send to the others at once and get from them: together what the trunk carries. Where
   that is what their own links can do, nothing holds them up, and the rack is dissolved.

Not found: switches above racks (the tree is a core, racks and hosts); trunks that carry more than about 0.75 of what
pairs ask of them; racks of one host, which is a host with a slow link; and that a host is faster than all its partners.
Beyond 16 hosts, each meets 15 others only: racks of fewer than about N/10 hosts may come in parts, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, median
from typing import NamedTuple, Protocol

Flow = tuple[int, int]  # from a host to another, by their numbers
Pair = tuple[int, int]  # the smaller number first

MOST_TOURNAMENT, MOST_LOADED, MOST_TRUNKS = 15, 16, 8
MOST_ROUNDS = MOST_TOURNAMENT + 1 + MOST_LOADED + MOST_TRUNKS
KEPT = 0.75  # of what its own links could do: less, and a pair is lost
FREE = 0.85  # of what the hosts of a rack could do together: less, and their trunk is a bottleneck
LOAD = 16  # connections of a pair that loads: what crosses the same link with one gets a 17th, or less
# Of a figure from the tournament that does not say why: a pair kept its rate, or has a slow host.
_UNSURE = 0.02
MANY = 4  # connections of each pair where the rate counts, not only who gets it
LONG = 3  # windows that such a measurement takes


class Sending(NamedTuple):
    """How a flow is to be sent.

    Attributes:
        connections: By how many at once.
        pace: Bytes per second, at most.
    """

    connections: int = 1
    pace: float = inf


class Measure(Protocol):
    """Measures the flows of a window, or of one that is so many times as long."""

    def __call__(self, flows: Mapping[Flow, Sending], windows: int = 1, /) -> dict[Flow, float]:
        """Bytes per second that each flow got."""


@dataclass(frozen=True)
class Findings:
    """What was found, in bytes per second.

    Attributes:
        up: What each host can send.
        down: What each host can get.
        racks: Hosts that share a bottleneck towards all others; hosts in none are directly below the core.
        trunks: What each rack can send and get.
    """

    up: Sequence[float]
    down: Sequence[float]
    racks: Sequence[tuple[int, ...]]
    trunks: Sequence[tuple[float, float]]


def find_bottlenecks(hosts: int, measure: Measure) -> Findings:
    """Asks ``measure`` at most :data:`MOST_ROUNDS` times what flows among so many hosts (two or more) get."""
    rounds = [measure(dict.fromkeys(both_ways(pairs), Sending())) for pairs in tournament(hosts)]
    up, down = _own_rates(hosts, rounds)
    slow = _slow(up, down)
    if any(slow):  # once more, for longer
        pairs = list(zip((h for h in range(hosts) if slow[h]), (h for h in range(hosts) if not slow[h]), strict=False))
        up, down = _own_rates(hosts, [*rounds, measure(dict.fromkeys(both_ways(pairs), Sending(MANY)), LONG)])

    def share(rates: dict[Flow, float], pair: Pair) -> float:
        """What a pair got, of what its own links could do: in the worse direction."""
        return min(1.0, *(rates[a, b] / min(up[a], down[b]) for a, b in both_ways([pair])))

    evidence = _Evidence(_slow(up, down))
    for rates in rounds:
        evidence.met({pair: share(rates, pair) for pair in rates if pair[0] < pair[1]})
    for _ in range(MOST_LOADED):
        tested, loads = evidence.next_test()
        if not tested:
            break
        paced = {(a, b): Sending(pace=min(up[a], down[b])) for a, b in both_ways(tested)}
        rates = measure(paced | dict.fromkeys(both_ways(loads), Sending(LOAD)))
        evidence.tested({pair: share(rates, pair) for pair in tested}, [share(rates, pair) for pair in loads])

    racks, trunks = [], []
    found = evidence.racks()
    for i in range(min(len(found), MOST_TRUNKS)):
        together = found[i::MOST_TRUNKS]
        inside = {host for rack in together for host in rack}
        outside = _in_turns([*found, *([h] for h in range(hosts) if not any(h in rack for rack in found)), []], inside)
        if not outside:
            continue
        meetings = {rack: [(h, outside[k % len(outside)]) for k, h in _dealt(rack, len(outside))] for rack in together}
        flows = both_ways([pair for pairs in meetings.values() for pair in pairs])
        rates = measure(dict.fromkeys(flows, Sending(MANY)), LONG)
        for rack, pairs in meetings.items():
            others = {b for _, b in pairs}
            sent, got = sum(rates[a, b] for a, b in pairs), sum(rates[b, a] for a, b in pairs)
            could_send = min(sum(up[h] for h in rack), sum(down[h] for h in others))
            could_get = min(sum(down[h] for h in rack), sum(up[h] for h in others))
            if sent < FREE * could_send or got < FREE * could_get:
                racks.append(rack)
                trunks.append((sent, got))
    return Findings(up, down, racks, trunks)


def tournament(hosts: int) -> list[list[Pair]]:
    """Rounds of disjoint pairs until all hosts have met once (circle method); if these are more than 15, as many.

    Example:
        >>> tournament(4)
        [[(0, 3), (1, 2)], [(1, 3), (0, 2)], [(2, 3), (0, 1)]]
    """
    last = hosts - 1 + hosts % 2  # it stays while the others turn; of an odd number of hosts it is none: a pause
    count = min(last, MOST_TOURNAMENT)
    rounds = []
    for turn in (i * last // count for i in range(count)):
        pairs = [(turn, last), *(((turn + i) % last, (turn - i) % last) for i in range(1, (last + 1) // 2))]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < hosts])
    return rounds


def both_ways(pairs: Sequence[Pair]) -> list[Flow]:
    """The flows of pairs that send to each other."""
    return [flow for a, b in pairs for flow in ((a, b), (b, a))]


def _own_rates(hosts: int, rounds: Sequence[dict[Flow, float]]) -> tuple[list[float], list[float]]:
    """What the link of each host carries up and down: about the most that was seen, but not one too high."""
    sent: list[list[float]] = [[] for _ in range(hosts)]
    got: list[list[float]] = [[] for _ in range(hosts)]
    for rates in rounds:
        for (a, b), rate in rates.items():
            sent[a].append(rate)
            got[b].append(rate)
    up, down = ([median(rate for rate in seen if rate >= FREE * max(seen)) for seen in both] for both in (sent, got))
    return up, down


def _slow(up: Sequence[float], down: Sequence[float]) -> list[bool]:
    """Which hosts have less than half of what is usual."""
    speed = [min(both) for both in zip(up, down, strict=True)]
    return [rate < median(speed) / 2 for rate in speed]


class _Evidence:
    """Who kept the rate with whom, and how much that says.

    Args:
        slow: Which hosts have a slow link.
    """

    def __init__(self, slow: list[bool]) -> None:
        self._slow = slow
        self._at_once = self._most_loads = max(1, len(slow) // 4)
        self._votes: dict[Pair, tuple[bool, float]] = {}  # whether it kept its rate, and how much that says
        self._open: list[Pair] = []
        self._lost: list[Pair] = []
        self._together = list(range(len(slow)))  # hosts of one number kept their rates under load
        self._apart: set[frozenset[int]] = set()  # pairs of such numbers of which hosts did not

    def met(self, shares: dict[Pair, float]) -> None:
        """What pairs got in a round of the tournament."""
        lost = [pair for pair, share in shares.items() if share < KEPT]
        for pair, share in shares.items():
            # One that is lost alone shares nothing with the others, and may have been held up by chance.
            sure = share < KEPT and len(lost) > 1 and not self._is_slow(pair)
            self._votes[pair] = share >= KEPT, 1.0 if sure else _UNSURE
            if share < KEPT:
                self._lost.append(pair)
            if not sure:
                self._open.append(pair)

    def tested(self, shares: dict[Pair, float], loads: list[float]) -> None:
        """What pairs got under load, and those that load."""
        loaded = fmean(loads) < FREE
        most = len(self._slow) // 2 - 1
        if not loaded and self._most_loads < most:  # then it says nothing: once more, with more
            self._most_loads += 1
            self._open = [*shares, *self._open]
            return
        for pair, share in shares.items():
            self._votes[pair] = share >= KEPT, 1.0 if loaded or share >= KEPT else _UNSURE
            one, other = (self._together[host] for host in pair)
            if share < KEPT:
                self._apart.add(frozenset((one, other)))
            else:
                self._together = [one if number == other else number for number in self._together]
                self._apart = {frozenset(one if number == other else number for number in two) for two in self._apart}

    def next_test(self) -> tuple[list[Pair], list[Pair]]:
        """Pairs to be tested next, and those that load; none of the former if all that can be known is."""
        # First those of which nothing is known by way of others.
        self._open.sort(key=lambda pair: len(two := self._numbers(pair)) == 1 or two in self._apart)
        while self._open:
            first = self._open.pop(0)
            busy = set(first)

            def worth(load: Pair, first: Pair = first) -> tuple[bool, int]:
                """Slow hosts load little; hosts that are perhaps in the rack of those tested load what they cross."""
                near = [self._votes.get((min(a, b), max(a, b)), (False,))[0] for a in load for b in first]
                return not self._is_slow(load), sum(near)

            loads = _disjoint(sorted(self._lost, key=worth, reverse=True), busy, self._most_loads)
            if loads:
                more = _disjoint(self._open, busy, self._at_once - 1)
                self._open = [pair for pair in self._open if pair not in more]
                return [first, *more], loads
        return [], []

    def racks(self) -> list[tuple[int, ...]]:
        """Hosts most of whose pairs keep their rate: one figure that came out wrong changes nothing."""
        clusters = {host: [host] for host in range(len(self._slow))}
        between = {pair: [vote] for pair, vote in self._votes.items()}
        while between:
            one, other = max(between, key=lambda pair: _majority(between[pair]))
            if _majority(between[one, other]) < (0.5, inf):
                break
            clusters[one] += clusters.pop(other)
            del between[one, other]
            for pair in [pair for pair in between if other in pair]:
                third = pair[0] if pair[1] == other else pair[1]
                between.setdefault((min(one, third), max(one, third)), []).extend(between.pop(pair))
        racks = [tuple(sorted(rack)) for rack in clusters.values() if len(rack) > 1]

        def belongs(host: int, rack: Sequence[int]) -> bool:
            pairs = ((min(h, host), max(h, host)) for h in rack)
            own = [self._votes[pair] for pair in pairs if pair in self._votes]
            return bool(own) and _majority(own) > (0.5, inf)

        # A slow host that keeps its rate with two racks, also under load, could be in either. Directly below the core
        # its traffic loads no trunk in a plan. That does no harm as long as its link is slower than its share of the
        # trunk.
        sure = [tuple(h for h in rack if sum(belongs(h, other) for other in racks) < 2) for rack in racks]
        return [rack for rack in sure if len(rack) > 1]

    def _is_slow(self, pair: Pair) -> bool:
        return any(self._slow[host] for host in pair)

    def _numbers(self, pair: Pair) -> frozenset[int]:
        return frozenset(self._together[host] for host in pair)


def _majority(votes: list[tuple[bool, float]]) -> tuple[float, float]:
    """The share of those that kept their rate, and how much that says."""
    total = sum(weight for _, weight in votes)
    return sum(weight for kept, weight in votes if kept) / total, total


def _disjoint(pairs: Sequence[Pair], busy: set[int], most: int) -> list[Pair]:
    """The first pairs of hosts that are not busy; they are then."""
    chosen: list[Pair] = []
    for pair in pairs:
        if len(chosen) < most and busy.isdisjoint(pair):
            chosen.append(pair)
            busy.update(pair)
    return chosen


def _in_turns(groups: Sequence[Sequence[int]], without: set[int]) -> list[int]:
    """One host of each group, then the second of each, and so on."""
    longest = max(map(len, groups))
    return [g[i] for i in range(longest) for g in groups if i < len(g) and g[i] not in without]


def _dealt(rack: Sequence[int], outside: int) -> list[tuple[int, int]]:
    """Numbers from 0 with the hosts of a rack in turn, until all hosts inside and outside have one."""
    return [(k, rack[k % len(rack)]) for k in range(max(len(rack), outside))]
