"""Which hosts share a bottleneck: inferred from the figures of a simulated network whose flows share links fairly."""

import random

import pytest

from ds_lightning.bottlenecks import (
    MOST_ROUNDS,
    MOST_TOURNAMENT,
    find_bottlenecks,
    tournament,
)


class Network:
    """Hosts in racks; what flows get is max-min fair among their connections, off by noise.

    Args:
        racks: The hosts of each rack.
        trunk: What each rack's trunk carries, each way.
        slow: The rates of hosts whose link does not carry 1.
        noise: Each figure is off by up to this share.
        unfair: Each flow counts for up to so many times its connections.
    """

    def __init__(self, racks, trunk, slow=None, noise=0.0, unfair=1.0, seed=0):
        self.rack_of = {host: rack for rack, hosts in enumerate(racks) for host in hosts}
        self.carries = {(kind, host): (slow or {}).get(host, 1.0) for host in self.rack_of for kind in ("up", "down")}
        trunks = trunk if isinstance(trunk, list) else [trunk] * len(racks)
        self.carries |= {(kind, rack): t for rack, t in enumerate(trunks) for kind in ("out of", "into")}
        self.noise, self.unfair = noise, unfair
        self.random = random.Random(seed)
        self.rounds = 0

    def path(self, a, b):
        racks = self.rack_of[a], self.rack_of[b]
        return [("pace", (a, b)), ("up", a), ("down", b)] + (
            [("out of", racks[0]), ("into", racks[1])] if racks[0] != racks[1] else []
        )

    def measure(self, flows, windows=1):
        self.rounds += 1
        weights = {flow: how.connections * self.random.uniform(1, self.unfair) for flow, how in flows.items()}
        left, rates = dict(self.carries), {}
        left |= {("pace", flow): how.pace for flow, how in flows.items()}
        while weights:
            on = {link: [f for f in weights if link in self.path(*f)] for link in left}
            busiest = min(
                (link for link in left if on[link]), key=lambda at: left[at] / sum(weights[f] for f in on[at])
            )
            each = left[busiest] / sum(weights[f] for f in on[busiest])
            for flow in on[busiest]:
                rates[flow] = each * weights.pop(flow)
                for link in self.path(*flow):
                    left[link] -= rates[flow]
        return {flow: rates[flow] * self.random.uniform(1 - self.noise, 1 + self.noise) for flow in flows}

    def find(self):
        return find_bottlenecks(len(self.rack_of), self.measure)


def blocks(racks, size):
    return [tuple(range(rack * size, (rack + 1) * size)) for rack in range(racks)]


def interleaved(racks, size):
    return [tuple(range(rack, racks * size, racks)) for rack in range(racks)]


def shuffled(racks, size, seed=1):
    hosts = list(range(racks * size))
    random.Random(seed).shuffle(hosts)
    return [tuple(sorted(hosts[i::racks])) for i in range(racks)]


LAYOUTS = {
    "two racks": blocks(2, 4),
    "two racks interleaved": interleaved(2, 4),
    "two racks shuffled": shuffled(2, 4),
    "two racks of eight": blocks(2, 8),
    "two small racks": blocks(2, 3),
    "two racks of two": blocks(2, 2),
    "four racks": blocks(4, 4),
    "four racks interleaved": interleaved(4, 4),
    "four racks of two": blocks(4, 2),
    "odd": [(0, 1, 2), (3, 4, 5, 6)],
    "odd interleaved": [(0, 2, 4, 6, 8), (1, 3, 5, 7)],
    "three racks": [(0, 1, 2), (3, 4), (5, 6, 7, 8)],
}
NOISES = {"exact": {}, "noisy": {"noise": 0.05, "unfair": 2.0}}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("racks", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("ratio", [2, 4, 10])
def test_racks_and_what_their_trunks_carry(racks, ratio, noise):
    for seed in range(5 if noise else 1):
        trunk = min(map(len, racks)) / ratio
        network = Network(racks, trunk, **noise, seed=seed)
        found = network.find()
        assert sorted(found.racks) == sorted(racks), seed
        assert network.rounds <= MOST_ROUNDS
        for both in found.trunks:
            assert both == pytest.approx((trunk, trunk), rel=0.1)
        assert [*found.up, *found.down] == pytest.approx([1] * 2 * len(network.rack_of), rel=0.1)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("slow", [{7: 0.25}, {0: 0.25}, {3: 0.1}, {3: 0.25, 7: 0.25}, {2: 0.5}], ids=str)
@pytest.mark.parametrize("layout", ["two racks", "two racks interleaved", "two racks shuffled", "odd interleaved"])
def test_slow_hosts_are_found_in_their_racks(layout, slow, noise):
    for seed in range(5 if noise else 1):
        found = Network(LAYOUTS[layout], 1, slow, **noise, seed=seed).find()
        assert sorted(found.racks) == sorted(LAYOUTS[layout]), seed
        for host, rate in slow.items():
            assert (found.up[host], found.down[host]) == pytest.approx((rate, rate), rel=0.1)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8, 13, 16, 40])
@pytest.mark.parametrize("slow", [{}, {1: 0.25}], ids=str)
def test_without_bottlenecks_there_are_no_racks(hosts, slow, noise):
    found = Network([tuple(range(hosts))], 1, slow, **noise).find()
    assert not found.racks
    rates = [slow.get(host, 1) if hosts > 2 else min({1.0, *slow.values()}) for host in range(hosts)]
    assert list(found.up) == pytest.approx(rates, rel=0.1)


@pytest.mark.parametrize("racks", [blocks(2, 4), blocks(4, 4)], ids=["two", "four"])
def test_trunks_that_carry_all_are_no_bottleneck(racks):
    assert not Network(racks, 4, noise=0.05).find().racks


@pytest.mark.parametrize("seed", range(10))
def test_a_figure_that_came_out_wrong_makes_no_rack(seed):
    network = Network([tuple(range(8))], 1, noise=0.05, seed=seed)

    def measure(flows, windows=1):
        rates = network.measure(flows)
        if network.rounds % 2:
            rates[network.random.choice([*flows])] *= network.random.choice([0.2, 1.2])
        return rates

    assert not find_bottlenecks(8, measure).racks


@pytest.mark.parametrize("seed", range(10))
def test_a_figure_that_came_out_wrong_hides_no_rack(seed):
    network = Network(blocks(2, 4), 1, {7: 0.25}, noise=0.05, unfair=1.5, seed=seed)

    def measure(flows, windows=1):
        rates = network.measure(flows)
        if network.rounds % 6 == 0:
            rates[network.random.choice([*flows])] *= network.random.choice([0.2, 1.2])
        return rates

    assert find_bottlenecks(8, measure).racks == blocks(2, 4)


def test_many_hosts_in_large_racks():
    network = Network(shuffled(4, 16), 4, noise=0.05)
    found = network.find()
    for rack in found.racks:  # some come in parts
        assert sum(set(rack) <= set(hosts) for hosts in shuffled(4, 16)) == 1
    assert sum(len(rack) > 8 for rack in found.racks) == 4
    assert network.rounds <= MOST_ROUNDS


@pytest.mark.parametrize("hosts", [2, 3, 8, 15, 16])
def test_all_hosts_meet_each_other_once(hosts):
    rounds = tournament(hosts)
    assert sorted(pair for pairs in rounds for pair in pairs) == [
        (a, b) for a in range(hosts) for b in range(a + 1, hosts)
    ]
    for pairs in rounds:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs) == hosts - hosts % 2


@pytest.mark.parametrize("hosts", [17, 64, 65])
def test_of_many_hosts_each_meets_fifteen(hosts):
    rounds = tournament(hosts)
    assert len(rounds) == MOST_TOURNAMENT
    pairs = [pair for pairs in rounds for pair in pairs]
    assert len(set(pairs)) == len(pairs) == hosts // 2 * MOST_TOURNAMENT
