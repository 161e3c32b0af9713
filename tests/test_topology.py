"""Descriptions of clusters: any tree, its texts there and back, and each error with its place. No torch, no network."""

import pickle
import random
import re
import socket
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds_lightning import topology_text
from ds_lightning.topology import Link, Topology, expand

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and not re.search(r"[\s,\[\]]", name)
)
SPEEDS = st.floats(1e-9, 1e9)
LINKS = st.one_of(
    st.builds(Link, st.integers(1, 400), st.integers(1, 400), st.sampled_from([0, 0.05])),
    st.builds(Link, SPEEDS, SPEEDS, SPEEDS),
)

CLUSTER = """\
bandwidth: 25
latency: 0.05
switches:
  core: {}
  rack0: {to: core, bandwidth: 50}
  rack1: {to: core, up: 50, down: 40, latency: 0.1}
hosts:
  n[0-1]: {to: rack0, ranks: [0, 1, 2, 3]}
  slow: {to: rack1, bandwidth: 6, ranks: [4]}
"""


@st.composite
def topologies(draw, links=LINKS, names=NAMES, most_switches=6):
    """Any tree: each switch below an earlier one, switches without hosts get one."""
    names = draw(st.lists(names, min_size=2, max_size=18, unique=True))
    n_switches = draw(st.integers(1, min(most_switches, len(names) // 2)))
    switches, hosts = names[:n_switches], names[n_switches:]
    above = {switch: switches[draw(st.integers(0, i))] for i, switch in enumerate(switches[1:])}
    empty = [switch for switch in switches if switch not in above.values()]
    if len(empty) > len(hosts):
        hosts += [f"{name}-host" for name in names]
    for host in hosts:
        above[host] = empty.pop() if empty else draw(st.sampled_from(switches))
    ranks = draw(st.permutations(range(draw(st.integers(len(hosts), 2 * len(hosts))))))
    cuts = sorted(draw(st.permutations(range(1, len(ranks))))[: len(hosts) - 1])
    parts = [tuple(ranks[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ranks)], strict=True)]
    return Topology(above, {node: draw(links) for node in above}, dict(zip(hosts, parts, strict=True)))


def walk(topology, start, goal):
    """Brute force: the links from node to node, by depth-first search over the undirected tree."""
    seen, stack = {start}, [(start, ())]
    while stack:
        node, path = stack.pop()
        if node == goal:
            return path
        steps = [(child, (child, "down")) for child in topology.children.get(node, ())]
        steps += [(topology.above[node], (node, "up"))] if node in topology.above else []
        for reached, link in steps:
            if reached not in seen:
                seen.add(reached)
                stack.append((reached, (*path, link)))
    raise AssertionError("not connected")


def broken(text, message, line, **kwargs):
    with pytest.raises(ValueError, match=message) as caught:
        Topology.parse(text, "cluster.yaml", **kwargs)
    assert str(caught.value).startswith(f"cluster.yaml:{line}: "), caught.value
    assert "HINT: " in str(caught.value)


@given(topologies())
def test_a_tree_knows_its_ranks_hosts_and_switches(topology):
    assert topology.world_size == len(topology.host_of) == sum(map(len, topology.ranks.values()))
    assert all(rank in topology.ranks[host] for rank, host in enumerate(topology.host_of))
    assert list(topology.hosts) == list(dict.fromkeys(topology.host_of))
    assert {*topology.hosts, *topology.switches} == {topology.top, *topology.above}
    assert len(topology.hosts) + len(topology.switches) == len(topology.above) + 1
    assert topology.switches[0] == topology.top
    assert [*topology.children] == [*topology.switches]
    assert {node: s for s, nodes in topology.children.items() for node in nodes} == dict(topology.above)
    for nodes in topology.children.values():
        first = [min(r for r, h in enumerate(topology.host_of) if n in topology.way_up(h)) for n in nodes]
        assert first == sorted(first)


@given(topologies(), st.data())
def test_a_path_is_the_walk_over_the_tree(topology, data):
    ranks = st.integers(0, topology.world_size - 1)
    a, b = data.draw(ranks), data.draw(ranks)
    assert topology.path(a, b) == walk(topology, topology.host_of[a], topology.host_of[b])
    back = {"up": "down", "down": "up"}
    assert topology.path(b, a) == tuple((node, back[way]) for node, way in reversed(topology.path(a, b)))
    assert (topology.path(a, b) == ()) == (topology.host_of[a] == topology.host_of[b])


@given(topologies())
def test_the_way_up_ends_below_the_top(topology):
    assert topology.way_up(topology.top) == ()
    for node in topology.above:
        way = topology.way_up(node)
        assert way[0] == node
        assert topology.above[way[-1]] == topology.top


@given(topologies())
def test_yaml_there_and_back(topology):
    assert Topology.parse(topology.to_yaml()) == topology
    assert pickle.loads(pickle.dumps(topology)) == topology


@given(topologies(), st.randoms(use_true_random=False))
def test_equal_topologies_look_alike(topology, rng):
    def shuffled(mapping):
        return dict(rng.sample([*mapping.items()], len(mapping)))

    twin = Topology(*map(shuffled, (topology.above, topology.links, topology.ranks)))
    assert twin == topology
    assert twin.to_yaml() == topology.to_yaml()
    assert str(twin) == str(topology)
    assert twin.children == topology.children
    assert twin.switches == topology.switches


@given(topologies(), st.data())
def test_ranks_are_bound_by_host(topology, data):
    hosts = data.draw(st.lists(st.sampled_from(topology.hosts), min_size=1, max_size=20))
    bound = topology.with_ranks(hosts)
    assert bound.host_of == tuple(hosts)
    assert bound.top == topology.top
    for node in bound.above:
        assert bound.way_up(node) == topology.way_up(node)
        assert bound.links[node] == topology.links[node]
    assert topology.with_ranks(topology.host_of) == topology


def test_a_host_is_found_by_its_short_name():
    topology = Topology.flat(["n0.a.net", "n1.a.net", "n1.b.net", "n2"], 10)
    assert topology.with_ranks(["n2.a.net", "n0", "n1.b.net"]).host_of == ("n2", "n0.a.net", "n1.b.net")
    with pytest.raises(ValueError, match=r"rank 1 runs on host 'n1', more than one .*: n1.a.net, n1.b.net\. HINT"):
        topology.with_ranks(["n2", "n1"])
    # Numbers have no domain.
    with pytest.raises(ValueError, match=r"rank 0 runs on host '10.0.0.2'"):
        Topology.flat(["10.0.0.1"], 10).with_ranks(["10.0.0.2"])
    with pytest.raises(ValueError, match=r"hosts 'n0.a' and 'n0.b' of the job would both be n0 .*HINT"):
        Topology.flat(["n0", "n1"], 10).with_ranks(["n0.a", "n1", "n0.b"])


def test_an_unknown_host_is_named_beside_eight_known_ones():
    topology = Topology.flat([f"n{i}" for i in range(20)], 10)
    with pytest.raises(ValueError, match=r"rank 1 runs on host 'm0', .*: n0, n1, .*, n7, \.\.\.\. HINT") as caught:
        topology.with_ranks(["n3", "m0"])
    assert "n8" not in str(caught.value)
    with pytest.raises(ValueError, match="there are no hosts"):
        topology.with_ranks([])


def test_one_host_has_no_path():
    topology = Topology.flat(["a", "a"], 10)
    assert topology.path(0, 1) == ()
    with pytest.raises(ValueError, match=r"rank 2 is outside the world. HINT"):
        topology.path(0, 2)
    with pytest.raises(ValueError, match="rank -1 is outside"):
        topology.path(-1, 0)
    with pytest.raises(ValueError, match=r"no host or switch is called 'b'. HINT"):
        topology.way_up("b")


@pytest.mark.parametrize("name", ["up", "down", "latency"])
@pytest.mark.parametrize("value", [-1, 1.1e9, 1e307, float("nan"), float("inf"), True, "25", None, 10**400])
def test_links_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not .*HINT"):
        Link(**{"up": 1, "down": 1, name: value})


def test_a_host_may_be_called_as_the_switch_that_is_not_named():
    topology = Topology.parse("bandwidth: 1\nhosts:\n  switch:\n  b:\n")
    assert topology == Topology.flat(["switch", "b"], 1)
    assert (topology.hosts, topology.top) == (("switch", "b"), "switch_")


def test_no_link_stands_still():
    with pytest.raises(ValueError, match=r"down=1e-10 is not between 1e-09 and 1e[+]09. HINT: write Gbit/s, and ms"):
        Link(1, 1e-10)
    with pytest.raises(ValueError, match="up=0 is not above zero"):
        Link(0, 1)
    assert Link(1, 2, 0) == Link(1.0, 2.0)


LINK = Link(1, 1)


@pytest.mark.parametrize(
    ("above", "ranks", "message"),
    [
        ({}, {}, "there are no hosts"),
        ({}, {"a": (0,)}, "host a has no switch above it"),
        ({"a": "s"}, {"a": ()}, "host a has no rank"),
        ({"a": "s"}, {"a": (0, 0)}, "rank 0 is named twice, on host a and on host a"),
        ({"a": "s", "b": "s"}, {"a": (0, 1), "b": (1,)}, "rank 1 is named twice, on host a and on host b"),
        ({"a": "s", "b": "s"}, {"a": (0, 5), "b": (3,)}, "rank 5 of host a is unknown: .* 0 to 2, and 1-2 are missing"),
        ({"a": "s"}, {"a": (-1,)}, "rank -1 of host a is negative"),
        ({"a": "s"}, {"a": (0.0,)}, "a rank of a=0.0 is not an int"),
        ({"a": "s"}, {"a": (False,)}, "a rank of a=False is not an int"),
        ({"a": "s", "b": "t"}, {"a": (0,), "b": (1,)}, "t and s both have no switch above them"),
        ({"a": "s", "s": "t", "t": "s"}, {"a": (0,)}, "cycle: s -> t -> s"),
        ({"a": "s", "t": "t"}, {"a": (0,)}, "cycle: t -> t"),
        ({"a": "s", "b": "a"}, {"a": (0,), "b": (1,)}, "b is below a, a host"),
        ({"a": "s", "t": "s"}, {"a": (0,)}, "switch t has no hosts below it"),
        ({"a b": "s"}, {"a b": (0,)}, "'a b' is no name"),
        ({"a": ""}, {"a": (0,)}, "'' is no name"),
        ({"a[0]": "s"}, {"a[0]": (0,)}, "is no name"),
        ({1: "s"}, {1: (0,)}, "1 is no name"),
    ],
)
def test_trees_are_checked(above, ranks, message):
    with pytest.raises(ValueError, match=f"{message}.* HINT: "):
        Topology(above, dict.fromkeys(above, LINK), ranks)


def test_each_node_but_the_top_has_a_link():
    with pytest.raises(ValueError, match=r"a has a switch above it but no link to it. HINT"):
        Topology({"a": "s"}, {}, {"a": (0,)})
    with pytest.raises(ValueError, match=r"s has a link but no switch above it. HINT"):
        Topology({"a": "s"}, {"a": LINK, "s": LINK}, {"a": (0,)})
    with pytest.raises(ValueError, match=r"the link of a is 25. HINT"):
        Topology({"a": "s"}, {"a": 25}, {"a": (0,)})  # type: ignore[dict-item]


def test_the_format():
    topology = Topology.parse(CLUSTER)
    assert topology.top == "core"
    assert topology.children == {"core": ("rack0", "rack1"), "rack0": ("n0", "n1"), "rack1": ("slow",)}
    assert topology.ranks == {"n0": (0, 1), "n1": (2, 3), "slow": (4,)}
    assert topology.links == {
        "rack0": Link(50, 50, 0.05),
        "rack1": Link(50, 40, 0.1),
        "n0": Link(25, 25, 0.05),
        "n1": Link(25, 25, 0.05),
        "slow": Link(6, 6, 0.05),
    }


def test_yaml_without_its_library_in_c(monkeypatch):
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert Topology.parse(CLUSTER).to_yaml() == Topology.parse(Topology.parse(CLUSTER).to_yaml()).to_yaml()
    broken(CLUSTER.replace("bandwidth: 6", "bandwidth: '6'"), "bandwidth='6' is not a number", 9)
    broken(CLUSTER + "# \x00", "this is not YAML", 10)


def test_short_files():
    assert Topology.parse("bandwidth: 10\nhosts:\n  b:\n  a:\n") == Topology.flat(["b", "a"], 10)
    assert Topology.parse("hosts: {a: {bandwidth: 1e3}}\nswitches:\n") == Topology.flat(["a"], 1000)
    text = "bandwidth: 10\nswitches: {core: }\nhosts: {a: {up: 5}, b: {to: core}}"
    assert Topology.parse(text).links == {"a": Link(5, 10), "b": Link(10, 10)}


def edited(before, after):
    assert before in CLUSTER
    return CLUSTER.replace(before, after)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        # Ranks.
        (edited("ranks: [4]", "ranks: [7]"), "rank 7 of host slow is unknown: 5 ranks .* 0 to 4, and 4 is missing", 9),
        (edited("ranks: [4]", "ranks: [3]"), "rank 3 is named twice, on host n1 and on host slow.* See line 8", 9),
        (edited("[0, 1, 2, 3]", "[0, 1, 2, 2]"), "rank 2 is named twice", 8),
        (edited("[0, 1, 2, 3]", "[0, 1, 2]"), "3 ranks are for 2 hosts", 8),
        (edited("[4]", "[]"), "0 ranks are for 1 hosts", 9),
        (edited("[4]", "4"), "ranks is a scalar, not a list", 9),
        (edited("[4]", "[-4]"), "rank -4 of host slow is negative", 9),
        (edited("[4]", "\n    [4.0]"), "rank '4.0' is no integer", 10),
        (edited("[4]", "[true]"), "rank 'true' is no integer", 9),
        (edited("[4]", "['4']"), "rank '4' is no integer", 9),
        (edited("[4]", "[[4]]"), "a rank is a sequence", 9),
        (edited(", ranks: [4]", ""), "host slow has no `ranks`, but others have. HINT: .* in line 8", 9),
        # Numbers.
        (edited("bandwidth: 25\n", ""), "missing bandwidth: the link of n0 has none", 7),
        ("hosts:\n  a: {bandwidth: 1}\n  b: {up: 1}\n", "missing bandwidth: the link of b", 3),
        ("switches:\n  s:\n  t: {to: s}\nhosts:\n  a: {to: t, bandwidth: 1}", "missing .* link of t has none", 3),
        (edited("bandwidth: 25", "bandwidth: 0"), "bandwidth=0 is not above zero", 1),
        (edited("bandwidth: 6", "bandwidth: -6"), "bandwidth=-6 is not above zero", 9),
        (edited("up: 50", "up: inf"), "up=inf is not above zero and finite", 6),
        (edited("down: 40", "down: nan"), "down=nan is not above zero and finite", 6),
        (edited("down: 40", "down: .inf"), "down='.inf' is not a number", 6),
        (edited("down: 40", "down: 1e999"), "down=inf is not above zero and finite", 6),
        (edited("down: 40", "down: 1e307"), "down=1e[+]307 is not between 1e-09 and 1e[+]09", 6),
        (edited("core: {}", "core: {}\n  spare: {}"), "switch spare has no hosts below it", 5),
        (edited("latency: 0.05", "latency: -0.05"), "latency=-0.05 is not at least zero", 2),
        (edited("bandwidth: 6", "bandwidth: fast"), "bandwidth='fast' is not a number", 9),
        (edited("bandwidth: 6", "bandwidth: true"), "bandwidth='true' is not a number", 9),
        (edited("bandwidth: 6", "bandwidth: '6'"), "bandwidth='6' is not a number", 9),
        (edited("bandwidth: 6", "bandwidth: [6]"), "bandwidth is a sequence", 9),
        (edited("bandwidth: 6", "bandwidth: "), "bandwidth='' is not a number", 9),
        # The tree.
        (edited("core: {}", "core: {to: rack1}"), "cycle: core -> rack1 -> core.* See line 6", 4),
        (edited("core: {}", "core: {to: core}"), "cycle: core -> core", 4),
        (edited("to: core, bandwidth: 50", ""), "rack0 and core both have no switch above them.* See line 4", 5),
        (edited("to: core, bandwidth: 50", "bandwidth: 50"), "switch rack0 has a link, but to no other", 5),
        (edited("slow: {to: rack1", "slow: {to: rack9"), "'rack9' is an unknown switch", 9),
        (edited("to: rack1, bandwidth", "to: n0, bandwidth"), "'n0' is an unknown switch", 9),
        (edited("to: rack1, bandwidth", "to: , bandwidth"), "'' is an unknown switch", 9),
        (edited("to: rack1, bandwidth", "bandwidth"), "host slow is on no switch", 9),
        (edited("  slow", "  rack0"), "rack0 is named twice, first in line 5", 9),
        (edited("  slow", "  n1"), "n1 is named twice, first in line 8", 9),
        (edited("hosts:", "  rack2: {to: core}\nhosts:"), "switch rack2 has no hosts below it", 7),
        ("bandwidth: 1\nhosts:\n  a: {to: x}", "'x' is an unknown switch", 3),
        # The text.
        ("", "there is nothing here", 1),
        ("# a comment\n", "there is nothing here", 1),
        ("~", "there are no hosts", 1),
        ("- a", "the file is a sequence, not a mapping", 1),
        ("bandwidth: 1\nhosts:\n", "there are no hosts", 2),
        ("bandwidth: 1\nhosts: [a, b]\n", "hosts is a sequence, not a mapping", 2),
        ("bandwidth: 1\nhosts:\n  a: core\n", "a is a scalar, not a mapping", 3),
        (CLUSTER + "hostz: {}\n", "the file has an unknown key 'hostz'", 10),
        (edited("bandwidth: 6", "speed: 6"), "slow has an unknown key 'speed'", 9),
        (edited("core: {}", "core: {ranks: [0]}"), "core has an unknown key 'ranks'", 4),
        (CLUSTER + "bandwidth: 10\n", "bandwidth is named twice, first in line 1", 10),
        (CLUSTER + "  slow: {to: rack0}\n", "slow is named twice, first in line 9", 10),
        (edited("bandwidth: 6", "bandwidth: 6, to: rack0"), "to is named twice, first in line 9", 9),
        (edited("n[0-1]", "n[1-0]"), r"\[1-0\] are no numbers", 8),
        (edited("n[0-1]", "n[0-1"), "is no host list", 8),
        (edited("n[0-1]", "[0-1]"), "a key is a sequence", 8),
        (edited("{to: core, bandwidth: 50}", "{to: core"), "this is not YAML", 6),
        ("bandwidth: 1\nhosts:\n\ta:\n", "this is not YAML", 3),
        ("bandwidth: 1\nhosts: *a\n", "this is not YAML", 2),
        ("bandwidth: 1\n---\nhosts: {a: }\n", "this is not YAML", 2),
        ("bandwidth: 1\n# \x00", "this is not YAML: unacceptable character.* HINT", 2),
    ],
)
def test_errors_have_their_place(text, message, line):
    broken(text, message, line)


def test_files(tmp_path):
    path = tmp_path / "cluster.yaml"
    with pytest.raises(FileNotFoundError, match=r"there is no topology .*cluster.yaml. HINT"):
        Topology.from_yaml(path)
    path.write_text(CLUSTER)
    assert Topology.from_yaml(path) == Topology.from_yaml(str(path)) == Topology.parse(CLUSTER)
    path.write_text(CLUSTER.replace("slow", "n1"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:9: "):
        Topology.from_yaml(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"cluster.yaml: not a text in UTF-8 .* HINT"):
        Topology.from_yaml(path)


def test_hosts_that_do_not_resolve(monkeypatch):
    def names(host, port):
        if host != "n0":
            raise socket.gaierror
        return []

    monkeypatch.setattr(socket, "getaddrinfo", names)
    broken(CLUSTER, r"host n1 does not resolve \(and 1 more\)", 8, resolve=True)
    broken(CLUSTER.replace("n[0-1]", "n[0-0]"), "host slow does not resolve. HINT", 9, resolve=True)
    assert Topology.parse("bandwidth: 1\nhosts: {n0: }", resolve=True).hosts == ("n0",)


def test_silent_name_servers_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(topology_text, "_RESOLVING", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: time.sleep(2 * (host == "slow")))
    start = time.monotonic()
    broken(CLUSTER, "host slow does not resolve. HINT", 9, resolve=True)
    assert time.monotonic() - start < 1.5


def test_ten_thousand_hosts():
    racks = "".join(f"  r{i}: {{to: core, bandwidth: 50}}\n" for i in range(100))
    hosts = "".join(f"  n{i}: {{to: r{i // 100}, ranks: [{2 * i}, {2 * i + 1}]}}\n" for i in range(10_000))
    topology = Topology.parse(f"bandwidth: 25\nswitches:\n  core:\n{racks}hosts:\n{hosts}")
    assert topology.world_size == 20_000
    assert len(str(topology).splitlines()) < 30
    assert Topology.parse("bandwidth: 25\nhosts:\n  n[0-9999]: ").world_size == 10_000
    shuffled = random.Random(0).sample(topology.host_of, 20_000)
    assert topology.with_ranks(shuffled).host_of == tuple(shuffled)


SLURM = """\
SwitchName=s0 Level=0 LinkSpeed=1 Nodes=n[0-3]
SwitchName=s1 Level=0 LinkSpeed=1 Nodes=n[4-5,7]
SwitchName=s2 Level=0 LinkSpeed=1 Nodes=gpu[01-02]
SwitchName=s3 Level=0 LinkSpeed=1
SwitchName=spine0 Level=1 LinkSpeed=1 Nodes=n[0-5,7] Switches=s[0-1]
SwitchName=spine1 Level=1 LinkSpeed=1 Nodes=gpu[01-02],login Switches=s[2-3]
"""
TOP = "SwitchName=top Level=2 LinkSpeed=1 Nodes=n[0-5,7],gpu[01-02],login Switches=spine[0-1]\n"


def test_slurm():
    topology = Topology.from_slurm(SLURM + TOP, bandwidth=10, latency=0.1, oversubscription=2)
    assert topology.hosts == ("n0", "n1", "n2", "n3", "n4", "n5", "n7", "gpu01", "gpu02", "login")
    assert topology.children == {
        "top": ("spine0", "spine1"),
        "spine0": ("s0", "s1"),
        "spine1": ("s2", "login"),  # on no switch of level 0; s3 is empty
        "s0": ("n0", "n1", "n2", "n3"),
        "s1": ("n4", "n5", "n7"),
        "s2": ("gpu01", "gpu02"),
    }
    speeds = {node: link.up for node, link in topology.links.items() if node not in topology.hosts}
    assert speeds == {"s0": 20, "s1": 15, "s2": 10, "spine0": 17.5, "spine1": 10}
    assert {(link.up == link.down, link.latency) for link in topology.links.values()} == {(True, 0.1)}
    assert topology.with_ranks(["n7.cluster", "gpu01"]).switches == ("top", "spine0", "spine1", "s1", "s2")


def test_slurm_with_several_tops():
    topology = Topology.from_slurm(SLURM, bandwidth=10)
    assert topology.top == "network"
    assert topology.children["network"] == ("spine0", "spine1")
    assert topology.links["spine0"] == Link(70, 70)


def test_slurm_with_one_switch():
    text = "# topology.conf\n\nSwitchName=s0 Nodes=b,a\n"
    assert Topology.from_slurm(text, 10).children == {"s0": ("b", "a")}


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "there are no hosts", 1),
        ("SwitchName=s0 Level=0", "there are no hosts", 1),
        (SLURM + "slurm_load_topo error: Invalid", "this is no switch: 'slurm_load_topo", 7),
        ("BlockName=b0 BlockIndex=0 Nodes=n[0-3] BlockSize=4", "this is no switch: 'BlockName", 1),
        (SLURM + "SwitchName=s0 Level=0 Nodes=m0", "switch s0 is named twice, first in line 1", 7),
        (SLURM + "SwitchName=s4 Level=0 Nodes=n[4", "is no host list", 7),
        (SLURM + "SwitchName=s4 Level=0 Nodes=m1,n3", "host n3 is on s", "[17]"),
        (SLURM + "SwitchName=s4 Level=0 Nodes=s0", "host s0 is a switch", 7),
        (SLURM + "SwitchName=s4 Level=1 Switches=s[0,9]", "switch s9 has no line|switch s0 is below spine0", 7),
        ("SwitchName=a Switches=b\nSwitchName=b Switches=a Nodes=n", "cycle", "[12]"),
    ],
)
def test_slurm_errors_have_their_place(text, message, line):
    with pytest.raises(ValueError, match=rf"^scontrol show topology:{line}: .*({message}).* HINT: "):
        Topology.from_slurm(text, 10)


def test_slurm_addresses_of_a_jobs_tasks():
    """One of each task, so that hosts come several times."""
    topology = Topology.from_slurm("top.s1.n2\ntop.s0.n0\ntop.s0.n0\ntop.s1.n3\n", bandwidth=10, oversubscription=2)
    assert topology.hosts == ("n2", "n0", "n3")
    assert topology.children == {"top": ("s1", "s0"), "s1": ("n2", "n3"), "s0": ("n0",)}
    assert (topology.links["s1"].up, topology.links["s0"].up) == (10, 5)
    for text, message in [
        ("n0\nn1", "1: 'n0' has a host alone"),
        ("s0.n0\ns1..n1", "2: 's1..n1' has an empty name"),
        ("s0.n0\ns1.n0", "2: n0 is below s1 in 's1.n0', but below s0 before"),
        ("a.b.n0\nb.a.n1", "2: a is below b|cycle"),
    ]:
        with pytest.raises(ValueError, match=f"{message}.* HINT: "):
            Topology.from_slurm(text, 10)


@pytest.mark.parametrize("nested", ["[" * 200_000, "{a: " * 200_000, "- " * 200_000, "hosts:\n  ? " + "? " * 200_000])
def test_what_is_nested_without_end_is_refused(nested):
    with pytest.raises(ValueError, match=r"^<text>:[234]: this is nested more than 100 deep. HINT: "):
        Topology.parse("# a comment\n" + nested)


def test_slurm_numbers_are_checked():
    with pytest.raises(ValueError, match="oversubscription=0 is not above zero"):
        Topology.from_slurm(SLURM, 10, oversubscription=0)
    with pytest.raises(ValueError, match="up=-1 is not above zero"):
        Topology.from_slurm(SLURM, -1)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("a", "a"),
        ("n[0-3,7],m1", "n0 n1 n2 n3 n7 m1"),
        ("n[01-03]", "n01 n02 n03"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[099-101]", "n099 n100 n101"),
        ("r[0-1]n[0-1]-ib", "r0n0-ib r0n1-ib r1n0-ib r1n1-ib"),
        ("a.b,c[1].d", "a.b c1.d"),
        ("[1-2]", "1 2"),
    ],
)
def test_host_lists(expression, names):
    assert expand(expression) == names.split()


@pytest.mark.parametrize(
    "expression",
    ["", ",", "a,", ",a", "a,,b", "n[", "n]", "n[]", "n[0-3", "n[3-0]", "n[a]", "n[0-]", "n[-1]", "n[0,]", "n[[0]]"]
    + ["n[0-1-2]", "a b", "n[0 -1]", "n[0-99999999]", "n[0-9999]m[0-9999]", "n[0-999999],m"],
)
def test_malformed_host_lists(expression):
    with pytest.raises(ValueError, match="HINT"):
        expand(expression)


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=30))
def test_a_host_list_of_numbers_is_each_of_them(numbers):
    assert expand(f"n[{','.join(map(str, numbers))}]") == [f"n{i}" for i in numbers]


def test_the_tree_for_people():
    hosts = [f"n{i}" for i in range(256)]
    topology = Topology.parse(
        "bandwidth: 25\nlatency: 0.05\nhosts:\n  n[0-99]:\n  slow: {up: 6, down: 12.5, latency: 0}\n  n[100-255]:\n"
    ).with_ranks([*hosts[:100], "slow", *hosts[100:], "slow", "n255"])
    assert str(topology).splitlines() == [
        "switch",
        "├── n0  25 Gbit/s, 0.05 ms, rank 0",
        "├── n1  25 Gbit/s, 0.05 ms, rank 1",
        "├── ... 98 more hosts",
        "├── slow  6/12.5 Gbit/s, ranks 100, 257",
        "├── n100  25 Gbit/s, 0.05 ms, rank 101",
        "├── n101  25 Gbit/s, 0.05 ms, rank 102",
        "├── ... 153 more hosts",
        "└── n255  25 Gbit/s, 0.05 ms, ranks 256, 258",
    ]


def test_many_racks_alike_are_not_all_printed():
    racks = {f"r{i}": "core" for i in range(50)}
    hosts = {f"n{i}": f"r{i // 2}" for i in range(100)}
    links = dict.fromkeys([*racks, *hosts], Link(10, 10)) | {"n99": Link(1, 1)}
    topology = Topology(racks | hosts, links, {host: (rank,) for rank, host in enumerate(hosts)})
    lines = str(topology).splitlines()
    assert lines[7] == "├── ... 47 more switches"
    assert lines[-1] == "    └── n99  1 Gbit/s, rank 99"
    assert len(lines) == 11


def test_a_deep_tree():
    depth = 5000
    above = {f"s{i + 1}": f"s{i}" for i in range(depth)} | {"a": f"s{depth}", "b": "s0"}
    topology = Topology(above, dict.fromkeys(above, LINK), {"a": (0,), "b": (1,)})
    assert len(topology.path(0, 1)) == depth + 2
    assert len(str(topology).splitlines()) == depth + 3
    assert Topology.parse(topology.to_yaml()) == topology
