"""Measures the network among the hosts of a job, and describes it as a topology: racks with their trunks, slow hosts.

One rank of each host, the lowest, takes part. Rank 0 leads: through the key-value store it tells what is next, and goes
on when all have answered. It asks for rounds of flows (:mod:`ds_lightning.bottlenecks` says which) that run at the same
time, each host sending to and receiving from others by plain TCP for a short window, and infers the tree from the rates
that receivers saw. Traffic of others counts as if it were always there, and switches above racks are not found.

Limits. A round's window takes ``seconds``, or three times as long where the rate itself counts; a host puts at most
``most_bytes / MOST_ROUNDS`` into it and gets no more: on fast links it ends when these have been sent. There are at
most MOST_ROUNDS rounds (40), among 8 hosts about 20, which take 12 s.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from statistics import median
from typing import Any, Protocol, TypeVar

from ds_lightning.bottlenecks import MOST_ROUNDS, Findings, Flow, Sending, find_bottlenecks
from ds_lightning.cost import FRAMES
from ds_lightning.station import Station
from ds_lightning.topology import Link, Topology, numbered, unused

T = TypeVar("T")

SECONDS = 0.35
MOST_BYTES = 2 * 2**30
# Seconds until a host is given up, once all have been there; an answer takes milliseconds.
_PATIENCE = 10.0
_GRACE = 2.0
# Figures that are so close are one: noise is not to look like structure.
_ALIKE = 1.08
_ALIKE_TRUNKS = 1.2
_ALIKE_MS = 0.1


class Store(Protocol):
    """What is needed of ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None: ...  # noqa: D102
    def get(self, key: str, /) -> bytes: ...  # noqa: D102
    def add(self, key: str, amount: int, /) -> int: ...  # noqa: D102
    def check(self, keys: list[str], /) -> bool: ...  # noqa: D102
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Survey:
    """What a probe found, and what it took.

    Attributes:
        topology: The network, with the ranks of the job.
        seconds: From the first word to the last.
        sent: Bytes that the host that sent the most has sent to others.
        rounds: How many windows there were.
    """

    topology: Topology
    seconds: float
    sent: int
    rounds: int


def probe(
    store: Store,
    rank: int,
    hosts: Sequence[str],
    *,
    timeout: timedelta,
    seconds: float = SECONDS,
    most_bytes: int = MOST_BYTES,
) -> Survey:
    """Measure the network. Collective over all ranks, and the same on all.

    Args:
        store: Of torch.distributed, with keys that nobody else uses, and where nobody else waits for an answer.
        rank: Of this process.
        hosts: The host of each rank.
        timeout: For all of it.
        seconds: Of a window.
        most_bytes: What a host sends, and what it gets, in all windows together.

    Raises:
        RuntimeError: On all ranks, if a host does not answer or measuring fails on one; names the hosts.
    """
    names = list(dict.fromkeys(hosts))
    talk = _Talk(store, names, time.monotonic() + timeout.total_seconds())
    me = names.index(hosts[rank]) if hosts.index(hosts[rank]) == rank else None
    station = None
    try:
        if rank == 0:
            conclusion = _lead(talk, names, hosts, seconds, most_bytes)
            talk.put("conclusion", conclusion)
        elif me is not None and len(names) > 1:
            station = Station(me, lambda: talk.left)
            _follow(talk, me, station)
        conclusion = talk.get("conclusion")
    finally:
        if station is not None:
            station.close()
    talk.leave(rank, len(hosts), _GRACE if "error" in conclusion else _PATIENCE)
    if "error" in conclusion:
        raise RuntimeError(conclusion["error"])
    topology = Topology.parse(conclusion["topology"], "the network as probed")
    return Survey(topology, conclusion["seconds"], conclusion["sent"], conclusion["rounds"])


# ---- rank 0 and the others ------------------------------------------------------------------------------------------


class _Talk:
    """Words of rank 0 to all and their answers, through the store; nobody waits longer than until the deadline."""

    def __init__(self, store: Store, names: list[str], deadline: float) -> None:
        self._store, self._names, self._deadline = store, names, deadline
        self._steps = 0

    def put(self, key: str, word: Any) -> None:
        self._within(_GRACE, lambda: self._store.set(key, json.dumps(word)))

    def get(self, key: str) -> Any:
        """A word of rank 0, which gives up before the others do."""
        try:
            return self._read([key], self.left + _GRACE)[0]
        except Exception as error:
            raise RuntimeError(
                f"probing the network ended: {self._names[0]}, the host of rank 0, did not answer in"
                f" time ({error}). HINT: its own log says more."
            ) from error

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return max(0.001, self._deadline - time.monotonic())

    def ask(self, station: Station, word: dict[str, Any]) -> list[Any]:
        """Tell all hosts, do the same here, and return the answers of all in order."""
        step, self._steps = self._steps, self._steps + 1
        self.put(f"word {step}", word)
        self.put(f"answer {step} 0", station.obey(word))
        keys = [f"answer {step} {host}" for host in range(len(self._names))]
        try:
            answers = self._read(keys, min(self.left, _PATIENCE + word.get("seconds", 0)) if step else self.left)
        except Exception as error:
            there: list[bool] = []
            with suppress(Exception):
                self._within(_GRACE, lambda: there.extend(self._store.check([key]) for key in keys))
            silent = [name for name, is_there in zip(self._names, there, strict=False) if not is_there]
            if silent:
                raise RuntimeError(f"no answer from {_some(silent)}") from error
            raise
        wrong = {name: answer["error"] for name, answer in zip(self._names, answers, strict=True) if "error" in answer}
        if wrong:
            raise RuntimeError("; ".join(f"{name}: {error}" for name, error in [*wrong.items()][:4]))
        return answers

    def leave(self, rank: int, ranks: int, patience: float) -> None:
        """Rank 0, whose process may keep the store and end now, waits until all others have read."""
        with suppress(Exception):
            if self._within(_GRACE, lambda: self._store.add("read", 1)) == ranks:
                self.put("all have read", True)
            if rank == 0:
                self._read(["all have read"], patience)

    def _read(self, keys: list[str], seconds: float) -> list[Any]:
        def run() -> list[Any]:
            self._store.wait(keys, timedelta(seconds=seconds))
            return [json.loads(self._store.get(key)) for key in keys]

        return self._within(seconds, run)

    @staticmethod
    def _within(seconds: float, call: Callable[[], T]) -> T:
        from ds_lightning.groups import within

        return within(timedelta(seconds=seconds), call)


def _some(names: Sequence[str]) -> str:
    return f"host{'s' * (len(names) > 1)} {', '.join(names[:8])}" + (" and others" if len(names) > 8 else "")


def _follow(talk: _Talk, me: int, station: Station) -> None:
    """Do what rank 0 says until it ends."""
    step = 0
    while not (word := talk.get(f"word {step}")).get("end"):
        talk.put(f"answer {step} {me}", station.obey(word))
        step += 1


def _lead(talk: _Talk, names: list[str], hosts: Sequence[str], seconds: float, most_bytes: int) -> dict[str, Any]:
    """What all are to know in the end."""
    start = time.monotonic()
    if len(names) == 1:
        alone = Topology.flat(hosts, bandwidth=1)  # of a link that nobody uses
        return {"topology": alone.to_yaml(), "seconds": 0, "sent": 0, "rounds": 0}
    latencies: dict[Flow, float] = {}
    rounds = sent = 0
    station = Station(0, lambda: talk.left)
    try:

        def measure(flows: Mapping[Flow, Sending], windows: int = 1, /) -> dict[Flow, float]:
            nonlocal rounds, sent
            rounds += 1
            listed = [[*flow, how.connections, min(how.pace, 1e15)] for flow, how in flows.items()]
            for answer in talk.ask(station, {"do": "connect", "flows": listed, "round": rounds}):
                latencies.update({(a, b): value for a, b, value in answer["latencies"] if (a, b) not in latencies})
            ends = [end for flow in flows for end in (("up", flow[0]), ("down", flow[1]))]
            most = most_bytes // MOST_ROUNDS // max(map(ends.count, ends))
            answers = talk.ask(station, {"do": "run", "seconds": windows * seconds, "most": most, "round": rounds})
            sent = max(answer["sent"] for answer in answers)
            return {(a, b): rate for answer in answers for a, b, rate in answer["rates"]}

        listen = {"do": "listen", "token": os.urandom(8).hex()}
        addresses = [answer["address"] for answer in talk.ask(station, listen)]
        far = [address for address, _ in addresses if not ip_address(address).is_loopback]
        if far and ip_address(addresses[0][0]).is_loopback:  # some systems give that to a host's own name
            addresses[0] = station.obey(listen | {"towards": far[0]}).get("address", addresses[0])
        talk.ask(station, {"do": "meet", "addresses": addresses})
        findings = find_bottlenecks(len(names), measure)
        for rates, what in ((findings.up, "sent"), (findings.down, "got")):
            if idle := [name for name, rate in zip(names, rates, strict=True) if not rate > 0]:
                raise RuntimeError(f"{_some(idle)} {what} nothing, though connections could be made")
        text = describe(findings, latencies, hosts).to_yaml()
        conclusion = {"topology": text, "seconds": time.monotonic() - start, "sent": sent, "rounds": rounds}
    except Exception as error:
        hint = "HINT: can all hosts reach each other, on any port, by the interface of GLOO_SOCKET_IFNAME if it is set?"
        conclusion = {"error": f"probing the network failed: {error}. {hint}"}
    finally:
        station.close()
    talk.put(f"word {talk._steps}", {"end": True})
    return conclusion


# ---- the tree -------------------------------------------------------------------------------------------------------


def describe(findings: Findings, latencies: dict[Flow, float], hosts: Sequence[str]) -> Topology:
    """The topology for people and planners.

    Args:
        findings: In bytes per second of what programs send.
        latencies: Seconds one way between hosts by their numbers, as far as they are known.
        hosts: The host of each rank.
    """
    ranks = numbered(hosts)
    names = list(ranks)
    racks = sorted(zip(findings.racks, findings.trunks, strict=True))
    rack_of = {host: rack for rack, (members, _) in enumerate(racks) for host in members}
    speeds = _alike([*findings.up, *findings.down])
    trunks = _alike([rate for _, both in racks for rate in both], _ALIKE_TRUNKS)
    near = [min((v for pair, v in latencies.items() if h in pair), default=0.0) / 2 for h in range(len(names))]
    usual = median(near)
    near = [usual if abs(value - usual) < _ALIKE_MS / 1000 else value for value in near]

    top = unused("core" if racks else "switch", ranks)
    switches = [unused(f"rack{rack}", ranks) for rack in range(len(racks))]
    above = dict.fromkeys(switches, top)
    links = {}
    for rack, (switch, (members, (up, down))) in enumerate(zip(switches, racks, strict=True)):
        apart = [
            value - near[a] - near[b]
            for (a, b), value in latencies.items()
            if (a in members) != (b in members) and rack in (rack_of.get(a), rack_of.get(b))
        ]
        more = median(apart) / 2 if apart else 0.0
        links[switch] = Link(trunks[up], trunks[down], _ms(more if more > _ALIKE_MS / 1000 else 0.0))
    for host, name in enumerate(names):
        above[name] = switches[rack_of[host]] if host in rack_of else top
        links[name] = Link(speeds[findings.up[host]], speeds[findings.down[host]], _ms(near[host]))
    return Topology(above, links, ranks)


def _alike(rates: Sequence[float], closeness: float = _ALIKE) -> dict[float, float]:
    """The Gbit/s on the wire to write for each rate: one number for those that are close to each other."""
    written: dict[float, float] = {}
    group: list[float] = []
    for rate in sorted(rates):
        if group and rate > closeness * group[0]:
            group = []
        group.append(rate)
        written |= dict.fromkeys(group, float(f"{median(group) * 8e-9 * FRAMES:.3g}"))
    return written


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
