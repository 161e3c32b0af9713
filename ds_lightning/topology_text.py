"""A topology as text: YAML, what Slurm prints, and a tree for people.

Errors in what is read start with the place: ``cluster.yaml:7: ...``.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

from ds_lightning.topology import (
    Link,
    Topology,
    TopologyError,
    above_hosts,
    amount,
    expand,
    numbered,
    of_a_link,
    spans,
    top_down,
    unused,
)

# Seconds until a name that was asked for counts as unknown.
_RESOLVING = 10.0
# A description is nested three deep; more may be meant by no one.
_MOST_NESTED = 100
# The line and the value of each key of a YAML mapping.
_Entry = dict[str, tuple[int, Any]]


def draw(topology: Topology) -> str:
    """The tree for people: a line for each node, but for the many that look like their neighbours."""
    lines = []
    shapes = _shapes(topology)
    rows: list[tuple[str, str, str | None]] = [("", "", topology.top)]  # node last, if it is one
    while rows:
        text, indent, node = rows.pop()
        lines.append(text if node is None else text + _label(topology, node))
        below = [] if node is None else _below(topology, node, shapes)
        for i in reversed(range(len(below))):
            branch, deeper = ("├── ", "│   ") if i < len(below) - 1 else ("└── ", "    ")
            rows.append((indent + branch + below[i][0], indent + deeper, below[i][1]))
    return "\n".join(lines)


def _label(topology: Topology, node: str) -> str:
    about = [str(topology.links[node])] if node in topology.links else []
    if ranks := topology.ranks.get(node):
        about.append(f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)}")
    return f"{node}  {', '.join(about)}" if about else node


def _below(topology: Topology, switch: str, shapes: dict[str, int]) -> list[tuple[str, str | None]]:
    """The rows below ``switch``: nodes, and if they are many, how many more are like the last."""
    nodes = topology.children.get(switch, ())
    rows: list[tuple[str, str | None]] = []
    for _, run in groupby(nodes, key=shapes.__getitem__):
        alike = list(run)
        shown = alike[:2] if len(nodes) > 16 and len(alike) > 3 else alike
        rows += [("", node) for node in shown]
        if len(shown) < len(alike):
            kind = "hosts" if alike[0] in topology.ranks else "switches"
            rows.append((f"... {len(alike) - len(shown)} more {kind}", None))
    return rows


def _shapes(topology: Topology) -> dict[str, int]:
    """A number for each node, the same for two where everything from there down differs in names alone."""
    numbers: dict[object, int] = {}
    shapes: dict[str, int] = {}
    for node in (*topology.hosts, *reversed(topology.switches)):
        below = tuple(shapes[child] for child in topology.children.get(node, ()))
        key = topology.links.get(node), len(topology.ranks.get(node, ())), below
        shapes[node] = numbers.setdefault(key, len(numbers))
    return shapes


def write_yaml(topology: Topology) -> str:
    """See `Topology.to_yaml`."""
    # Without `ranks`, each host has one, in the order of the file.
    one_each = all(topology.ranks[host] == (rank,) for rank, host in enumerate(topology.hosts))
    lines = ["# Bandwidths in Gbit/s, latencies in ms one way."]
    for section, nodes in (("switches", topology.switches), ("hosts", topology.hosts)):
        lines.append(f"{section}:")
        for node in nodes:
            entry = []
            if node in topology.links:
                link = topology.links[node]
                speeds = {"bandwidth": link.up} if link.up == link.down else {"up": link.up, "down": link.down}
                numbers = speeds | ({"latency": link.latency} if link.latency else {})
                entry = [f"to: {_quoted(topology.above[node])}"]
                entry += [f"{key}: {_digits(number)}" for key, number in numbers.items()]
            if section == "hosts" and not one_each:
                entry.append(f"ranks: {list(topology.ranks[node])}")
            lines.append(f"  {_quoted(node)}: {{{', '.join(entry)}}}")
    return "\n".join(lines) + "\n"


def _digits(number: float) -> str:
    return str(int(number)) if number.is_integer() and number < 1e15 else repr(number)


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) else json.dumps(name, ensure_ascii=False)


def read_yaml(text: str, name: str, resolve: bool) -> Topology:
    """See `Topology.parse`."""
    import yaml

    file = _File(name)
    if (line := _nested_too_deep(text)) is not None:  # on which the loader in C would crash
        file.fail(line, f"this is nested more than {_MOST_NESTED} deep. HINT: a topology is nested three deep.")
    try:
        # The loader in C is ten times as fast.
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        file.fail(
            mark.line + 1 if mark else 1, f"this is not YAML: {error.problem}. HINT: look at the lines before, too."
        )
    except yaml.YAMLError as error:
        line = text.encode(errors="replace").count(b"\n", 0, getattr(error, "position", 0)) + 1
        file.fail(line, f"this is not YAML: {str(error).splitlines()[0]}. HINT: write plain text.")
    if root is None:
        file.fail(1, "there is nothing here. HINT: give at least `bandwidth` and `hosts`.")
    return file.topology(root, resolve)


def _nested_too_deep(text: str) -> int | None:
    """The line in which it is."""
    if lists := re.search(rf"([-?][ \t]+){{{_MOST_NESTED}}}", text):
        return text.count("\n", 0, lists.start()) + 1
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        if depth > _MOST_NESTED:
            return text.count("\n", 0, bracket.start()) + 1
    return None


class _File:
    """What the nodes of a YAML file mean; they know their lines."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._defaults: dict[str, float] = {}
        self._lines: dict[str, int] = {}  # where each host and switch is

    def fail(self, line: int, message: str) -> NoReturn:
        raise ValueError(f"{self._name}:{line}: {message}")

    def topology(self, root: Any, resolve: bool) -> Topology:
        top = self._entries("the file", 1, root, ("bandwidth", "latency", "switches", "hosts"))
        self._defaults = {key: self._number(key, *top[key]) for key in ("bandwidth", "latency") if key in top}
        keys = ("to", "bandwidth", "up", "down", "latency")
        switches = self._nodes(top, "switches", keys)
        hosts = self._nodes(top, "hosts", (*keys, "ranks"))
        if not hosts:
            self.fail(top["hosts"][0] if "hosts" in top else 1, "there are no hosts. HINT: list them below `hosts`.")
        known = list(switches or [unused("switch", hosts)])
        nodes = switches | hosts
        above: dict[str, str] = {}
        for name, entry in nodes.items():
            if "to" in entry:
                line, value = entry["to"]
                above[name] = self._scalar(line, "to", value)
                if above[name] not in (switches or known):
                    self.fail(line, f"{above[name]!r} is an unknown switch. HINT: list it below `switches`.")
            elif name in hosts and len(known) > 1:
                self.fail(self._lines[name], f"host {name} is on no switch. HINT: say on which, with `to`.")
            elif name in hosts:
                above[name] = known[0]
            elif entry:
                line = min(line for line, _ in entry.values())
                self.fail(line, f"switch {name} has a link, but to no other switch. HINT: say to which, with `to`.")
        for name in switches.keys() - above.keys() - set(above.values()):
            self.fail(self._lines[name], f"switch {name} has no hosts below it. HINT: leave it out, or give it `to`.")
        links = {name: self._link(name, nodes[name]) for name in above}
        try:
            topology = Topology(above, links, self._ranks(hosts))
        except TopologyError as fault:
            blamed, *others = (self._lines[node] for node in fault.nodes)
            also = "".join(f" See line {line} as well." for line in dict.fromkeys(others) if line != blamed)
            self.fail(blamed, f"{fault}{also}")
        if resolve and (lost := _unresolved(hosts)):
            also = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            self.fail(self._lines[lost[0]], f"host {lost[0]} does not resolve{also}. HINT: check its name.")
        return topology

    def _nodes(self, top: _Entry, section: str, known: tuple[str, ...]) -> dict[str, _Entry]:
        """The entry of each switch or host by its name; those written as one list share it."""
        nodes: dict[str, _Entry] = {}
        if section not in top:
            return nodes
        for text, (line, value) in self._entries(section, *top[section]).items():
            entry = self._entries(text, line, value, known)
            try:
                names = expand(text)
            except ValueError as error:
                self.fail(line, str(error))
            for name in names:
                if name in self._lines:
                    self.fail(line, f"{name} is named twice, first in line {self._lines[name]}. HINT: keep one.")
                self._lines[name] = line
                nodes[name] = entry
        return nodes

    def _entries(self, what: str, line: int, node: Any, known: tuple[str, ...] = ()) -> _Entry:
        """The line and the value of each key of a mapping; an empty value is an empty mapping."""
        if node.tag == "tag:yaml.org,2002:null":
            return {}
        if node.id != "mapping":
            self.fail(line, f"{what} is a {node.id}, not a mapping. HINT: write `key: value` pairs.")
        entries: _Entry = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            text = self._scalar(line, "a key", key)
            if text in entries:
                self.fail(line, f"{text} is named twice, first in line {entries[text][0]}. HINT: keep one.")
            if known and text not in known:
                self.fail(line, f"{what} has an unknown key {text!r}. HINT: use {', '.join(known)}.")
            entries[text] = line, value
        return entries

    def _scalar(self, line: int, what: str, node: Any) -> str:
        if node.id != "scalar":
            self.fail(line, f"{what} is a {node.id}. HINT: write a single value here, and quote a leading bracket.")
        return str(node.value)

    def _number(self, key: str, line: int, node: Any) -> float:
        value: Any = self._scalar(line, key, node)
        if not node.style:
            # Not by the rules of YAML, for which 1e3 is a string and 1:30 is ninety.
            with suppress(ValueError):
                value = float(value)
        try:
            return of_a_link(key, value)
        except ValueError as error:
            self.fail(line, str(error))

    def _link(self, name: str, entry: _Entry) -> Link:
        own = {key: self._number(key, *entry[key]) for key in ("bandwidth", "up", "down", "latency") if key in entry}
        numbers = self._defaults | own
        both = numbers.get("bandwidth")
        up, down = numbers.get("up", both), numbers.get("down", both)
        if up is None or down is None:
            hint = "give it a `bandwidth`, or one at the top of the file for all"
            self.fail(self._lines[name], f"missing bandwidth: the link of {name} has none. HINT: {hint}.")
        return Link(up, down, numbers.get("latency", 0.0))

    def _ranks(self, hosts: dict[str, _Entry]) -> dict[str, tuple[int, ...]]:
        """The ranks of each host: those of an entry are dealt out to its hosts in order."""
        with_ranks = [host for host in hosts if "ranks" in hosts[host]]
        if not with_ranks:
            return numbered(hosts)
        if without := [host for host in hosts if "ranks" not in hosts[host]]:
            hint = f"give all hosts their ranks, as in line {self._lines[with_ranks[0]]}, or none"
            self.fail(self._lines[without[0]], f"host {without[0]} has no `ranks`, but others have. HINT: {hint}.")
        ranks: dict[str, tuple[int, ...]] = {}
        for _, together in groupby(hosts, key=lambda host: id(hosts[host])):
            names = list(together)
            line, node = hosts[names[0]]["ranks"]
            if node.id != "sequence":
                self.fail(line, f"ranks is a {node.id}, not a list. HINT: write [0, 1].")
            dealt = [self._rank(item) for item in node.value]
            if not dealt or len(dealt) % len(names):
                hint = "give each host at least one, and all hosts of a line equally many"
                self.fail(line, f"{len(dealt)} ranks are for {len(names)} hosts. HINT: {hint}.")
            each = len(dealt) // len(names)
            ranks |= {name: tuple(dealt[i * each : (i + 1) * each]) for i, name in enumerate(names)}
        return ranks

    def _rank(self, node: Any) -> int:
        line = node.start_mark.line + 1
        text = self._scalar(line, "a rank", node)
        if node.style or not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            self.fail(line, f"rank {text!r} is no integer. HINT: ranks count from 0.")
        return int(text)


def read_slurm(text: str, bandwidth: float, latency: float, oversubscription: float) -> Topology:
    """See `Topology.from_slurm`."""
    host_link = Link(bandwidth, bandwidth, latency)
    oversubscription = amount("oversubscription", oversubscription)
    words = text.split()
    of_job = bool(words) and not any("=" in word for word in words)
    above, hosts = _addresses(words) if of_job else _slurm_tree(text)
    tops = dict.fromkeys(switch for switch in above.values() if switch not in above)
    if len(tops) > 1:
        above |= dict.fromkeys(tops, unused("network", above.keys() | tops.keys()))
    links = dict.fromkeys(hosts, host_link)
    below = dict.fromkeys(above.values(), 0.0)  # Gbit/s of all links
    for node in reversed(top_down(above)):
        if node in above:
            if node in below:
                links[node] = Link(below[node] / oversubscription, below[node] / oversubscription, latency)
            below[above[node]] += links[node].up
    return Topology(above, links, numbered(hosts))


def _addresses(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The switch above each node, and the hosts in order, of the addresses of a job's tasks."""
    above: dict[str, str] = {}
    hosts: dict[str, None] = {}
    for number, word in enumerate(words, 1):
        *switches, host = names = word.split(".")
        fault = "has an empty name" if "" in names else "has a host alone: this Slurm knows no switches"
        if "" in names or not switches:
            raise ValueError(
                f"SLURM_TOPOLOGY_ADDR:{number}: {word!r} {fault}. HINT: describe the network as YAML, or probe it."
            )
        for upper, lower in pairwise(names):
            if above.setdefault(lower, upper) != upper:
                raise ValueError(
                    f"SLURM_TOPOLOGY_ADDR:{number}: {lower} is below {upper} in {word!r}, but below {above[lower]}"
                    " before. HINT: only trees are understood."
                )
        hosts[host] = None
    return above, list(hosts)


def _slurm_tree(text: str) -> tuple[dict[str, str], list[str]]:
    """The switch above each node, and the hosts in order, of what ``scontrol show topology`` prints."""
    lines: dict[str, int] = {}
    below: dict[str, list[str]] = {}
    hosts: dict[str, list[str]] = {}

    def fail(line: int, message: str) -> NoReturn:
        raise ValueError(f"scontrol show topology:{line}: {message}")

    for line, printed in enumerate(text.splitlines(), 1):
        words = printed.split("#")[0].split()
        if not words:
            continue
        fields = {key.lower(): value for key, _, value in (word.partition("=") for word in words)}
        name = fields.get("switchname")
        if not name or not all(re.match(r"\w+=", word) for word in words):
            hint = "pass what Slurm prints with topology/tree, lines of SwitchName=... Nodes=..."
            fail(line, f"this is no switch: {printed.strip()[:60]!r}. HINT: {hint}.")
        if name in lines:
            fail(line, f"switch {name} is named twice, first in line {lines[name]}. HINT: keep one.")
        lines[name] = line
        for field, lists in (("switches", below), ("nodes", hosts)):
            names = fields.get(field, "")
            try:
                lists[name] = [] if names in ("", "(null)") else expand(names)
            except ValueError as error:
                fail(line, str(error))
    above: dict[str, str] = {}
    for switch, children in below.items():
        for child in children:
            if child not in lines:
                fail(lines[switch], f"switch {child} has no line of its own. HINT: pass all lines.")
            if above.setdefault(child, switch) != switch:
                fail(lines[switch], f"switch {child} is below {above[child]}, too. HINT: only trees are understood.")
    try:
        order = top_down(above, lines)
    except TopologyError as fault:
        fail(lines[fault.nodes[0]], str(fault))
    # Upper switches list the hosts of those below them again: a host is on the lowest switch that lists it.
    for switch in reversed(order):
        for host in hosts[switch]:
            if host in lines:
                fail(lines[switch], f"host {host} is a switch. HINT: list it as Switches={host}.")
            if above.setdefault(host, switch) != switch and not below[switch]:
                fail(lines[switch], f"host {host} is on {above[host]}, too. HINT: only trees are understood.")
    kept = [host for switch in lines for host in dict.fromkeys(hosts[switch]) if above[host] == switch]
    if not kept:
        fail(1, "there are no hosts. HINT: pass what `scontrol show topology` prints.")
    return above_hosts(above, kept), kept


def _unresolved(hosts: Collection[str]) -> list[str]:
    """The hosts whose names have no address, or none that comes in time."""
    names: SimpleQueue[str] = SimpleQueue()
    found: set[str] = set()
    deadline = time.monotonic() + _RESOLVING

    def look_up() -> None:
        with suppress(Empty):
            while time.monotonic() < deadline:
                name = names.get_nowait()
                with suppress(OSError, UnicodeError):
                    socket.getaddrinfo(name, None)
                    found.add(name)

    for host in hosts:
        names.put(host)
    # An executor's threads would hold up the end of the program until their last name server has given up.
    threads = [threading.Thread(target=look_up, daemon=True) for _ in range(min(32, names.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    known = set(found)
    return [host for host in hosts if host not in known]
