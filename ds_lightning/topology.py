"""WHERE the ranks are: the hosts of a cluster, the tree of switches above them, and how fast each link is.

Words beside those of ``schedule.py``:

* **host**: runs one or more ranks; a leaf of the tree. What its ranks exchange with each other crosses no link and is
  taken as free.
* **switch**: has hosts or other switches below it. One of them is the **top**. A rack is a switch, and so is whatever
  else the traffic of several hosts has to share.
* **link**: joins a node (host or switch) to the switch above it; named after the node. Its two directions are
  independent: ``up`` is from the node towards the top, ``down`` is back.

Bandwidths are in Gbit/s, latencies in ms one way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from numbers import Real
from pathlib import Path
from typing import Any

from ds_lightning.schedule import as_int

# Of a host list: [0-99999999] is a slip of the finger, not a cluster.
_MOST_NAMES = 1_000_000
# Of a bandwidth in Gbit/s, and the most of a latency in ms as well.
_LEAST, _MOST = 1e-9, 1e9


class TopologyError(ValueError):
    """No tree of hosts and switches: ``nodes`` break a rule, the first of them to blame."""

    def __init__(self, message: str, *nodes: str) -> None:
        super().__init__(message)
        self.nodes = nodes


@dataclass(frozen=True)
class Link:
    """What joins a node to the switch above it.

    Args:
        up: Gbit/s from the node towards the top.
        down: Gbit/s from the top towards the node.
        latency: Milliseconds that a message takes one way.

    Raises:
        ValueError: If a bandwidth is not between 1e-9 and 1e9, or a latency not between 0 and 1e9.
    """

    up: float
    down: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up", "down", "latency"):
            object.__setattr__(self, name, of_a_link(name, getattr(self, name)))

    def __str__(self) -> str:
        speed = f"{self.up:g}" if self.up == self.down else f"{self.up:g}/{self.down:g}"
        return f"{speed} Gbit/s" + (f", {self.latency:g} ms" if self.latency else "")


@dataclass(frozen=True)
class Topology:
    """Hosts with their ranks, the switches above them, and the links between.

    Usually read from a file (`from_yaml`) or from Slurm (`from_slurm`), then bound to a job's ranks (`with_ranks`).

    Args:
        above: The switch above each node; the top alone has none.
        links: The link of each node to the switch above it.
        ranks: The ranks of each host; over all hosts, each of 0 to N-1 exactly once.

    Raises:
        ValueError: If this is not one tree whose leaves are the hosts, or ranks are missing or named twice.

    Example:
        >>> fast, slow = Link(25, 25), Link(50, 40, latency=0.1)
        >>> topology = Topology(
        ...     above={"n0": "rack0", "n1": "rack0", "n2": "rack1", "rack0": "core", "rack1": "core"},
        ...     links={"n0": fast, "n1": fast, "n2": fast, "rack0": slow, "rack1": slow},
        ...     ranks={"n0": (0, 1), "n1": (2, 3), "n2": (4, 5)},
        ... )
        >>> print(topology)
        core
        ├── rack0  50/40 Gbit/s, 0.1 ms
        │   ├── n0  25 Gbit/s, ranks 0-1
        │   └── n1  25 Gbit/s, ranks 2-3
        └── rack1  50/40 Gbit/s, 0.1 ms
            └── n2  25 Gbit/s, ranks 4-5
        >>> topology.path(3, 4)
        (('n1', 'up'), ('rack0', 'up'), ('rack1', 'down'), ('n2', 'down'))
    """

    above: Mapping[str, str]
    links: Mapping[str, Link]
    ranks: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for field in ("above", "links"):
            object.__setattr__(self, field, dict(getattr(self, field)))
        for name in (*self.above, *self.above.values(), *self.ranks):
            if not (isinstance(name, str) and name.isprintable() and re.fullmatch(r"[^\s,\[\]]{1,255}", name)):
                raise TopologyError(f"{name!r} is no name. HINT: leave out blanks, commas and brackets.", name)
        object.__setattr__(self, "ranks", _check_ranks(self.ranks))
        for node in (*self.above, *self.links):
            if (node in self.above) != (node in self.links):
                has, lacks = ("switch above it", "link to it") if node in self.above else ("link", "switch above it")
                raise TopologyError(f"{node} has a {has} but no {lacks}. HINT: give both to all but the top.", node)
        for node, link in self.links.items():
            if not isinstance(link, Link):
                raise TopologyError(f"the link of {node} is {link!r}. HINT: make it a Link(up, down, latency).", node)
        for node, switch in self.above.items():
            if switch in self.ranks:
                raise TopologyError(f"{node} is below {switch}, a host. HINT: put it below a switch.", switch, node)
        tops = [node for node in self._order if node not in self.above]
        if len(tops) > 1:
            several = f"{tops[1]} and {tops[0]} both have no switch above them"
            raise TopologyError(f"{several}. HINT: put all but one node below a switch.", tops[1], tops[0])
        if tops[0] in self.ranks:
            raise TopologyError(f"host {tops[0]} has no switch above it. HINT: put hosts below a switch.", tops[0])
        for node in sorted(self.above.keys() - set(self.above.values()) - self.ranks.keys()):
            raise TopologyError(f"switch {node} has no hosts below it. HINT: leave it out.", node)

    @property
    def world_size(self) -> int:
        """Number of ranks N."""
        return len(self.host_of)

    @property
    def top(self) -> str:
        """The switch that is above all other nodes."""
        return self._order[0]

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """All hosts, in the order of their first ranks."""
        return tuple(sorted(self.ranks, key=self.ranks.__getitem__))

    @cached_property
    def host_of(self) -> tuple[str, ...]:
        """The host of each rank."""
        host_of = {rank: host for host, ranks in self.ranks.items() for rank in ranks}
        return tuple(host_of[rank] for rank in range(len(host_of)))

    @cached_property
    def children(self) -> dict[str, tuple[str, ...]]:
        """The nodes below each switch, in the order of the smallest ranks below them; the top first."""
        first = {host: ranks[0] for host, ranks in self.ranks.items()}
        below: dict[str, list[str]] = {}
        for node in reversed(self._order[1:]):
            switch = self.above[node]
            first[switch] = min(first[node], first.get(switch, first[node]))
            below.setdefault(switch, []).append(node)
        switches = [self.top]
        for switch in switches:
            below[switch].sort(key=first.__getitem__)
            switches += (node for node in below[switch] if node in below)
        return {switch: tuple(below[switch]) for switch in switches}

    @property
    def switches(self) -> tuple[str, ...]:
        """All switches, from the top down, then in the order of `children`."""
        return tuple(self.children)

    @cached_property
    def _order(self) -> list[str]:
        """All nodes, each after the switch above it."""
        return top_down(self.above, self.ranks)

    def way_up(self, node: str) -> tuple[str, ...]:
        """Nodes whose links lead from ``node`` to the top; none for the top itself."""
        if node not in self.above and node != self.top:
            raise ValueError(f"no host or switch is called {node!r}. HINT: see `hosts` and `switches`.")
        way = []
        while node in self.above:
            way.append(node)
            node = self.above[node]
        return tuple(way)

    def path(self, rank: int, other: int) -> tuple[tuple[str, str], ...]:
        """Links, each with its direction, that data crosses from ``rank`` to ``other``; none on one host."""
        for end in (rank, other):
            if not 0 <= end < self.world_size:
                raise ValueError(
                    f"rank {end} is outside the world. HINT: ranks are the integers 0 to {self.world_size - 1}."
                )
        up, down = self.way_up(self.host_of[rank]), self.way_up(self.host_of[other])
        shared = 0
        while shared < min(len(up), len(down)) and up[-1 - shared] == down[-1 - shared]:
            shared += 1
        return (
            *((node, "up") for node in up[: len(up) - shared]),
            *((node, "down") for node in reversed(down[: len(down) - shared])),
        )

    def with_ranks(self, hosts: Sequence[str]) -> Topology:
        """The same network with the ranks of a job: rank i runs on ``hosts[i]``.

        A host is found by its whole name, or else as the short name of one with a domain: ``n0`` and ``n0.cluster.net``
        are the same, ``n0.cluster.net`` and ``n0.other.net`` are not. Hosts without ranks are left out, and switches
        without hosts.

        Raises:
            ValueError: If the topology does not have one of the hosts.
        """
        shorts: dict[str, list[str]] = {}
        for host in self.hosts:
            shorts.setdefault(host.split(".")[0], []).append(host)
        names: dict[str, str] = {}
        for rank, host in enumerate(hosts):
            if host not in names:
                names[host] = self._find(host, rank, shorts)
        jobs = {name: host for host, name in names.items()}
        for host, name in names.items():
            if jobs[name] != host:
                raise ValueError(
                    f"hosts {host!r} and {jobs[name]!r} of the job would both be {name} of the topology. HINT: name"
                    " its hosts in full."
                )
        ranks = numbered([names[host] for host in hosts])
        above = above_hosts(self.above, ranks)
        return Topology(above, {node: self.links[node] for node in above}, ranks)

    def of_job(self, hosts: Sequence[str]) -> Topology:
        """The same network with the ranks of a job, by `with_ranks`; as it is, if it has none of the job's hosts.

        Raises:
            ValueError: If it has some of the hosts but not all, or none and another number of ranks.
        """
        try:
            return self.with_ranks(hosts)
        except ValueError:
            names = {name for host in self.hosts for name in (host, host.split(".")[0])}
            if any(name in names for host in set(hosts) for name in (host, host.split(".")[0])):
                raise
            if self.world_size == len(hosts):
                return self
            raise ValueError(
                f"the topology has none of the job's hosts ({hosts[0]}, ...), and {self.world_size} ranks of its own"
                f" where the world size is {len(hosts)}. HINT: name hosts as `hostname` does on them."
            ) from None

    def _find(self, host: str, rank: int, shorts: Mapping[str, list[str]]) -> str:
        short = host.split(".")[0]
        found = [host] if host in self.ranks else [short] if short in self.ranks else []
        if not found and host == short:
            found = shorts.get(short, [])
        if len(found) == 1:
            return found[0]
        known = ", ".join((found or self.hosts)[:8]) + (", ..." if len(found or self.hosts) > 8 else "")
        trouble = "more than one host of the topology" if found else "which is not in the topology; its hosts are"
        raise ValueError(
            f"rank {rank} runs on host {host!r}, {trouble}: {known}. HINT: name hosts as `hostname` does on them."
        )

    @classmethod
    def flat(cls, hosts: Sequence[str], bandwidth: float, latency: float = 0.0) -> Topology:
        """All hosts on one switch; rank i runs on ``hosts[i]``.

        Example:
            >>> print(Topology.flat(["a", "a", "b"], bandwidth=10))
            switch
            ├── a  10 Gbit/s, ranks 0-1
            └── b  10 Gbit/s, rank 2
        """
        link = Link(bandwidth, bandwidth, latency)
        ranks = numbered(hosts)
        return cls(dict.fromkeys(ranks, unused("switch", ranks)), dict.fromkeys(ranks, link), ranks)

    @classmethod
    def from_yaml(cls, path: str | Path, *, resolve: bool = False) -> Topology:
        """The topology that a file describes, see `parse`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If something is wrong in the file; the message starts with the place.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no topology {path}. HINT: its path is relative to {Path.cwd()}."
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8 ({error}). HINT: name a YAML file.") from None
        return cls.parse(text, str(path), resolve=resolve)

    @classmethod
    def parse(cls, text: str, name: str = "<text>", *, resolve: bool = False) -> Topology:
        """The topology that a YAML text describes.

        ::

            bandwidth: 25     # Gbit/s of each link, both directions, unless it says otherwise
            latency: 0.05     # ms one way; 0 if left out
            switches:         # the one without `to` is the top; left out: all hosts are on one switch
              core: {}
              rack0: {to: core, bandwidth: 50}
              rack1: {to: core, up: 50, down: 40, latency: 0.1}
            hosts:            # a name, or several as Slurm writes them
              n[0-3]: {to: rack0, ranks: [0, 1, 2, 3]}   # dealt out in order, the same number to each
              slow: {to: rack1, bandwidth: 6, ranks: [4]}

        Where no host has ``ranks``, each has one, in the order of the file.

        Args:
            text: The YAML.
            name: Of the file, for errors.
            resolve: Whether a host whose name cannot be looked up (within 10 s for all) is an error.

        Raises:
            ValueError: If something is wrong; the message starts with ``name`` and the line.
        """
        from ds_lightning.topology_text import read_yaml

        return read_yaml(text, name, resolve)

    def to_yaml(self) -> str:
        """The text from which `parse` makes an equal topology; the same for equal ones."""
        from ds_lightning.topology_text import write_yaml

        return write_yaml(self)

    @classmethod
    def from_slurm(cls, text: str, bandwidth: float, latency: float = 0.0, oversubscription: float = 1.0) -> Topology:
        """The topology that Slurm knows, with one rank on each host: see `with_ranks`.

        Slurm knows no bandwidths: its ``LinkSpeed`` has no unit and is not used. Switches with nothing below them are
        left out, several tops are joined by a switch ``network``.

        Args:
            text: What ``scontrol show topology`` prints, or a ``topology.conf``. Or, for the hosts of a job alone, what
                ``srun printenv SLURM_TOPOLOGY_ADDR`` prints in it: the switches above each host and its name, with dots
                between them.
            bandwidth: Gbit/s of the link of each host, both directions.
            latency: Milliseconds one way of each link.
            oversubscription: How many times the links below a switch, added up, exceed its own link.

        Raises:
            ValueError: If the text is something else, or no tree; the message has the line.

        Example:
            >>> printed = '''
            ... SwitchName=s0 Level=0 LinkSpeed=1 Nodes=n[0-1]
            ... SwitchName=s1 Level=0 LinkSpeed=1 Nodes=n[2-3]
            ... SwitchName=top Level=1 LinkSpeed=1 Nodes=n[0-3] Switches=s[0-1]
            ... '''
            >>> print(Topology.from_slurm(printed, bandwidth=25, oversubscription=4))
            top
            ├── s0  12.5 Gbit/s
            │   ├── n0  25 Gbit/s, rank 0
            │   └── n1  25 Gbit/s, rank 1
            └── s1  12.5 Gbit/s
                ├── n2  25 Gbit/s, rank 2
                └── n3  25 Gbit/s, rank 3
            >>> print(Topology.from_slurm("top.s0.n0 top.s0.n1 top.s1.n2", bandwidth=25))
            top
            ├── s0  50 Gbit/s
            │   ├── n0  25 Gbit/s, rank 0
            │   └── n1  25 Gbit/s, rank 1
            └── s1  25 Gbit/s
                └── n2  25 Gbit/s, rank 2
        """
        from ds_lightning.topology_text import read_slurm

        return read_slurm(text, bandwidth, latency, oversubscription)

    def __str__(self) -> str:
        from ds_lightning.topology_text import draw

        return draw(self)


def expand(expression: str) -> list[str]:
    """All names of a host list as Slurm writes it.

    Raises:
        ValueError: If it is malformed, or has more than a million names.

    Example:
        >>> expand("n[0-2,7],m1,r[1-2]n[08-10]")
        ['n0', 'n1', 'n2', 'n7', 'm1', 'r1n08', 'r1n09', 'r1n10', 'r2n08', 'r2n09', 'r2n10']
    """
    items = re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", expression)
    names: list[str] = []
    if not items or ",".join(items) != expression:
        raise ValueError(f"{expression!r} is no host list: it has an empty name. HINT: write one like n[0-3],m1.")
    for item in items:
        if not re.fullmatch(r"(?:[^\s\[\]]|\[[0-9,-]+\])+", item):
            raise ValueError(f"{item!r} is no host list. HINT: write one like n[0-3,7].")
        parts = [_numbers(inside) if inside else [text] for inside, text in re.findall(r"\[(.+?)\]|([^\[]+)", item)]
        if len(names) + math.prod(map(len, parts)) > _MOST_NAMES:
            raise ValueError(f"{item!r} are more than {_MOST_NAMES} hosts. HINT: check its numbers.")
        names += map("".join, product(*parts))
    return names


def _numbers(text: str) -> Sequence[str]:
    """The numbers of ``8-10,12``, with the leading zeros that it has."""
    numbers: list[str] = []
    for span in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", span)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise ValueError(f"[{text}] are no numbers of hosts. HINT: write them like [0-3,7].")
        if int(last) - int(first) >= _MOST_NAMES:
            raise ValueError(f"[{text}] are more than {_MOST_NAMES} hosts. HINT: check the numbers.")
        numbers += (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    return numbers


def _check_ranks(ranks: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """``ranks``, sorted, if each of 0 to N-1 is there once."""
    host_of: dict[int, str] = {}
    checked = {}
    for host, own in ranks.items():
        try:
            checked[host] = tuple(sorted(as_int(f"a rank of {host}", rank) for rank in own))
        except ValueError as error:
            raise TopologyError(str(error), host) from None
        if not checked[host]:
            raise TopologyError(f"host {host} has no rank. HINT: give it one, or leave it out.", host)
        for rank in checked[host]:
            if rank < 0:
                raise TopologyError(f"rank {rank} of host {host} is negative. HINT: ranks count from 0.", host)
            if rank in host_of:
                twice = f"rank {rank} is named twice, on host {host_of[rank]} and on host {host}"
                raise TopologyError(f"{twice}. HINT: leave it on one.", host, host_of[rank])
            host_of[rank] = host
    n = len(host_of)
    if unknown := [rank for rank in host_of if rank >= n]:
        missing = [rank for rank in range(n) if rank not in host_of]
        host = host_of[unknown[0]]
        raise TopologyError(
            f"rank {unknown[0]} of host {host} is unknown: {n} ranks are named, so they are 0 to {n - 1}, and "
            f"{spans(missing)} {'are' if len(missing) > 1 else 'is'} missing. HINT: leave no gap.",
            host,
        )
    if not n:
        raise TopologyError("there are no hosts. HINT: give at least one, with a rank.")
    return checked


def top_down(above: Mapping[str, str], others: Iterable[str] = ()) -> list[str]:
    """All nodes, each after the one above it: the tops first."""
    below: dict[str, list[str]] = {}
    for node, switch in above.items():
        below.setdefault(switch, []).append(node)
    order = [node for node in dict.fromkeys((*above.values(), *others)) if node not in above]
    for node in order:
        order += below.get(node, ())
    if len(order) < len(above.keys() | set(above.values()) | set(others)):
        reached = set(order)
        node = next(node for node in above if node not in reached)
        walked: dict[str, int] = {}
        while node not in walked:
            walked[node] = len(walked)
            node = above[node]
        circle = list(walked)[walked[node] :]
        way = " -> ".join([*circle[:8], *(["..."] if len(circle) > 8 else []), node])
        raise TopologyError(f"the way up is a cycle: {way}. HINT: let one switch be the top.", *circle)
    return order


def above_hosts(above: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """What of ``above`` leads up from ``hosts``."""
    kept: dict[str, str] = {}
    for host in hosts:
        node = host
        while node in above and node not in kept:
            kept[node] = above[node]
            node = above[node]
    return kept


def numbered(hosts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The ranks of each host when rank i runs on the i-th."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return {host: tuple(own) for host, own in ranks.items()}


def of_a_link(name: str, value: Any) -> float:
    """An up, down, bandwidth or latency as a float, or a ``ValueError``: beyond its bounds arithmetic would end."""
    number = amount(name, value, zero=name == "latency")
    if number > _MOST or (name != "latency" and number < _LEAST):
        raise ValueError(f"{name}={number:g} is not between {_LEAST:g} and {_MOST:g}. HINT: write Gbit/s, and ms.")
    return number


def unused(name: str, names: Collection[str]) -> str:
    """``name``, or with underscores one that is not among ``names``."""
    while name in names:
        name += "_"
    return name


def amount(name: str, value: Any, zero: bool = False) -> float:
    """``value`` as a finite float above zero (or zero, if that is allowed), or a ``ValueError`` naming it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} is not a number but a {type(value).__name__}. HINT: use one like 25.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name}={number:g} is not {'at least' if zero else 'above'} zero and finite. HINT: check it.")
    return number


def spans(numbers: Iterable[int]) -> str:
    """``0-3, 8`` for sorted numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    more = ", ..." if len(spans) > 8 else ""
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans[:8]) + more
