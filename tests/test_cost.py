"""What a step costs and how far replicas stay apart, against brute force, simulation, hand and measurement."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning import cost
from ds_lightning.cost import Network, Period, Round, ddp_step_seconds, rounds, steady_error, step_seconds
from ds_lightning.schedule import CyclicSchedule, GridSchedule, ShuffleSchedule, make_schedule, mixing_matrix
from ds_lightning.topology import Link, Topology
from tests.networks import (
    flat,
    grouped,
    latency_of,
    loads,
    partitions,
    racks,
    recurrence,
    schedules,
    seconds_of,
    takes_of,
    trees,
)

MODEL = 1e6


def both(draw, most=14):
    topology = draw(trees(most=most))
    return topology, draw(partitions(topology.world_size))


CASES = st.composite(both)()
BY_RACK = [0, 1, 2, 3, 4, 5, 6, 7]
INTERLEAVED = [0, 4, 1, 5, 2, 6, 3, 7]


def second(topology, rank=0):
    """What a model takes on a rank's link."""
    return seconds_of(topology, topology.host_of[rank], "up", 1, MODEL)


@given(CASES)
def test_traffic_is_what_each_path_of_each_group_puts_on_its_links(case):
    topology, partition = case
    found, network = loads(topology, partition), Network(topology)
    traffic = dict(zip(network.nodes, network.traffic(Round.of(partition)), strict=True))
    for node, models in traffic.items():
        assert models == pytest.approx(found[node, "up"])
        assert models == pytest.approx(found[node, "down"])


@given(CASES)
def test_a_group_takes_what_its_busiest_link_does_and_its_longest_path_once_per_stage(case):
    topology, partition = case
    found, seconds = loads(topology, partition), Network(topology).seconds(Round.of(partition), MODEL)
    for group, took in zip(partition, seconds, strict=True):
        links = {link for one, other in permutations(group, 2) for link in topology.path(one, other)}
        busiest = max((seconds_of(topology, *link, found[link], MODEL) for link in links), default=0.0)
        latency = max((latency_of(topology, *ends) for ends in permutations(group, 2)), default=0.0)
        assert took == pytest.approx(busiest + latency * (2 if len(group) > 2 else 1))


@given(trees(), st.data())
def test_a_ring_takes_what_its_busiest_link_does_and_its_longest_hop_each_time(topology, data):
    n = topology.world_size
    order = data.draw(st.permutations(range(n)))
    hops = [(rank, order[(i + 1) % n]) for i, rank in enumerate(order) if n > 1]
    found = [link for hop in hops for link in topology.path(*hop)]
    busiest = max((seconds_of(topology, *link, found.count(link), MODEL) for link in found), default=0.0)
    latency = max((latency_of(topology, *hop) for hop in hops), default=0.0)
    expected = 2 * (n - 1) / n * busiest + 2 * (n - 1) * latency
    assert Network(topology).ring_seconds(order, MODEL) == pytest.approx(expected)


@given(trees(most=20))
def test_the_ranks_of_every_part_of_the_tree_are_ordered_beside_each_other(topology):
    order = Network(topology).ordered_ranks()
    assert sorted(order) == [*range(topology.world_size)]
    for node in topology.links:
        places = [order.index(r) for r, host in enumerate(topology.host_of) if node in topology.way_up(host)]
        assert max(places) - min(places) == len(places) - 1


def test_ranks_are_ordered_where_a_rack_and_a_host_share_a_switch():
    above = {"n0": "rack", "n1": "core", "n2": "rack", "rack": "core"}
    topology = Topology(above, dict.fromkeys(above, Link(10, 10)), {"n0": (0,), "n1": (1,), "n2": (2,)})
    assert Network(topology).ordered_ranks() == [0, 2, 1]


@given(trees())
def test_no_order_of_a_ring_is_faster_than_that_along_the_tree(topology):
    still = {node: Link(link.up, link.down) for node, link in topology.links.items()}
    network = Network(Topology(topology.above, still, topology.ranks))
    ordered = network.ring_seconds(network.ordered_ranks(), MODEL)
    assert ordered <= network.ring_seconds(range(network.world_size), MODEL) * (1 + 1e-9)


@given(trees())
def test_an_all_reduce_by_levels_is_the_sum_of_their_exchanges(topology):
    ways = [topology.way_up(host) for host in topology.host_of]
    expected = 0.0
    for depth in range(1, max(map(len, ways)) + 1):
        found, latency = dict.fromkeys(topology.links, 0.0), 0.0
        for way in ways:
            if len(way) < depth:
                continue
            node = way[-depth]
            c = len(topology.children[topology.above[node]])
            part = 2 * (c - 1) / c / sum(node in other for other in ways)
            below = way[: len(way) - depth + 1]
            for link in below:
                found[link] += part
            latency = max(latency, 2 * (c - 1) * sum(2e-3 * topology.links[link].latency for link in below))
        busy = [seconds_of(topology, node, way, k, MODEL) for node, k in found.items() for way in ("up", "down")]
        expected += max(busy) + latency
    assert Network(topology).hierarchical_seconds(MODEL) == pytest.approx(expected)


def test_an_all_reduce_by_levels_in_two_racks_of_four():
    racked = racks(4, 4)
    links = {n: Link(20, 20, 0.2) if n.startswith("rack") else Link(10, 10, 0.1) for n in racked.links}
    topology = Topology(racked.above, links, racked.ranks)
    hosts = 1.5 * second(topology) + 6 * 0.2e-3  # 2 (4 - 1) / 4 models; 6 messages of two links each
    trunk = second(topology) / 2 + 2 * 0.6e-3
    assert Network(topology).hierarchical_seconds(MODEL) == pytest.approx(hosts + trunk)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_on_one_switch_an_all_reduce_by_levels_is_the_ring(n):
    network = Network(flat(*[10.0] * n, latency=0.1))
    assert network.hierarchical_seconds(MODEL) == pytest.approx(network.ring_seconds(range(n), MODEL))


def test_the_slower_direction_counts():
    one = Topology({"a": "s", "b": "s"}, {"a": Link(10, 2), "b": Link(10, 10)}, {"a": (0,), "b": (1,)})
    other = Topology({"a": "s", "b": "s"}, {"a": Link(2, 10), "b": Link(10, 10)}, {"a": (0,), "b": (1,)})
    for topology in (one, other):
        network = Network(topology)
        assert network.ring_seconds([0, 1], MODEL) == pytest.approx(MODEL * 8 / 2e9 * 1514 / 1448)
        assert network.seconds(Round.of(((0, 1),)), MODEL)[0] == pytest.approx(MODEL * 8 / 2e9 * 1514 / 1448)


@given(CASES.flatmap(lambda case: st.tuples(st.just(case[0]), schedules(case[0].world_size, most_parts=4))), st.data())
def test_steps_are_coupled_through_membership(case, data):
    topology, schedule = case
    network, period = Network(topology), rounds(schedule)
    typical = max(float(network.seconds(groups, MODEL).max()) for groups in period)
    compute, overlap = data.draw(st.sampled_from([0.0, 0.5, 2.0])) * typical, data.draw(st.booleans())
    takes = takes_of(network, schedule, MODEL)
    settled, steps = (-(-k // schedule.period) * schedule.period for k in (24, 48))
    ends = recurrence(schedule, takes, settled + steps, compute, overlap)
    expected = (np.mean(ends[-1]) - np.mean(ends[settled - 1])) / steps
    assert step_seconds(network, period, MODEL, compute, overlap) == pytest.approx(expected)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("compute", [0.0, 1.0])
@pytest.mark.parametrize("topology", [racks(4, 4), racks(4, 4, slow=2.5), racks(6, 3, 2, trunk=5.0)])
def test_the_rhythm_is_that_of_long_runs(topology, compute, overlap):
    network, schedule = Network(topology), make_schedule("auto", topology.world_size, 2)
    takes = takes_of(network, schedule, MODEL)
    compute *= second(topology)
    ends = recurrence(schedule, takes, 2400, compute, overlap)
    expected = (np.mean(ends[-1]) - np.mean(ends[1199])) / 1200
    assert step_seconds(network, rounds(schedule), MODEL, compute, overlap) == pytest.approx(expected, rel=0.02)


def test_compute_is_hidden_or_not():
    topology = flat(10, 10)
    network, period, pair = Network(topology), Period([Round.of(((0, 1),))]), second(topology)
    assert step_seconds(network, period, MODEL) == pytest.approx(pair)
    assert step_seconds(network, period, MODEL, 0.5 * pair) == pytest.approx(pair)
    assert step_seconds(network, period, MODEL, 3 * pair) == pytest.approx(3 * pair)
    assert step_seconds(network, period, MODEL, 3 * pair, overlap=False) == pytest.approx(4 * pair)
    alone = Period([Round.of(((0,), (1,)))])
    assert step_seconds(network, alone, MODEL, 2.0) == step_seconds(network, alone, MODEL, 2.0, False) == 2
    assert step_seconds(network, alone, MODEL) == 0


@given(CASES, st.data())
def test_groups_of_all_parts_share_links_with_a_part_of_the_model_each(case, data):
    topology, partition = case
    parts = [partition, *data.draw(st.lists(partitions(topology.world_size), min_size=1, max_size=3))]
    network, total = Network(topology), dict.fromkeys(topology.links, 0.0)
    for part in parts:
        for (node, way), models in loads(topology, part).items():
            total[node] += models / len(parts) if way == "up" else 0
    traffic = network.traffic(*map(Round.of, parts))
    assert dict(zip(network.nodes, traffic, strict=True)) == pytest.approx(total)
    for part, seconds in zip(parts, network.step_seconds([*map(Round.of, parts)], MODEL), strict=True):
        for group, took in zip(part, seconds, strict=True):
            links = {link for ends in permutations(group, 2) for link in topology.path(*ends)}
            busiest = max((seconds_of(topology, *link, total[link[0]], MODEL) for link in links), default=0.0)
            latency = max((latency_of(topology, *ends) for ends in permutations(group, 2)), default=0.0)
            assert took == pytest.approx(busiest + latency * (2 if len(group) > 2 else 1))


SLOW_ONCE = (
    ((0, 7), (1, 2), (3, 4), (5, 6)),
    ((0, 1), (2, 3), (4, 5), (6,), (7,)),
    ((0, 2), (1, 3), (4, 6), (5,), (7,)),
    ((0, 3), (1, 4), (2, 6), (5,), (7,)),
)


@pytest.mark.parametrize("overlap", [True, False])
def test_in_parts_a_slow_host_keeps_nobody_waiting(overlap):
    """A quarter of a model per step on a link of a quarter of the speed takes what a model does on the others'."""
    network = Network(flat(*[10] * 7, 2.5))
    pair = second(flat(10))
    whole, in_parts = (rounds(CyclicSchedule(SLOW_ONCE, parts)) for parts in (1, 4))
    expected = pair if overlap else 1.2 * pair
    assert step_seconds(network, in_parts, MODEL, 0.2 * pair, overlap) == pytest.approx(expected)
    assert step_seconds(network, whole, MODEL, 0.2 * pair, overlap) > 1.6 * pair
    assert steady_error(in_parts) == steady_error(whole)


def test_ddp_hides_behind_backward_what_it_can():
    assert ddp_step_seconds(2.0, 0.0) == 2
    assert ddp_step_seconds(0.0, 3.0) == pytest.approx(3)
    assert ddp_step_seconds(0.8, 300.0) == pytest.approx(300.1)  # the last of 8 buckets
    assert ddp_step_seconds(300.0, 2.4) == pytest.approx(300 + 0.8 + 0.2)  # forward, and the first bucket's gradients
    assert all(ddp_step_seconds(w, c) <= w + c for w in (0.1, 1.0, 9.0) for c in (0.1, 1.0, 9.0))


def ranked(topology, order):
    """The same hosts with the ranks in another order."""
    return topology.with_ranks([topology.host_of[rank] for rank in order])


def test_measured_bytes_and_times_of_groups_at_eight_hosts():
    """facts.md: NIC bytes per worker 1.758 M in an all-reduce, 1.004 M in pairs; times 0.571 and 0.857 of it."""
    topology = flat(*[0.2] * 8)
    network = Network(topology)
    world = network.ring_seconds(BY_RACK, MODEL)
    pairs, fours = (network.seconds(rounds(GridSchedule(8, g))[0], MODEL).max() for g in (2, 4))
    assert world / second(topology) == pytest.approx(1.758, rel=0.005)
    assert pairs / second(topology) == pytest.approx(1.004, rel=0.005)
    assert pairs / world == pytest.approx(0.571, abs=0.001)
    assert fours / world == pytest.approx(0.857, abs=0.001)
    assert network.traffic(rounds(GridSchedule(8, 8))[0]).tolist() == [1.75] * 8


def test_measured_ratios_with_a_trunk_at_4_to_1():
    """facts.md: a ring by racks loses nothing, blind pairs take 2.3 times as long, an interleaved ring 4 times."""
    topology = racks(4, 4, bandwidth=0.2, trunk=0.2)
    network = Network(topology)
    world = network.ring_seconds(BY_RACK, MODEL)
    assert world == pytest.approx(1.75 * second(topology))
    crossing = network.seconds(rounds(GridSchedule(8, 2))[0], MODEL)
    assert crossing / world == pytest.approx([2.3] * 4, rel=0.01)
    assert network.ring_seconds(INTERLEAVED, MODEL) == pytest.approx(4 * world)
    interleaved = Network(ranked(topology, INTERLEAVED))
    assert interleaved.ring_seconds(range(8), MODEL) == pytest.approx(4 * world)
    assert interleaved.ring_seconds(interleaved.ordered_ranks(), MODEL) == pytest.approx(world)
    inside = network.seconds(rounds(GridSchedule(8, 2))[2], MODEL)
    assert inside / (4 * world) == pytest.approx([0.14] * 4, rel=0.03)


def test_measured_times_of_steps():
    """facts.md, 200 Mbit/s: trunk 4:1 with 24 MiB, and one host at a quarter with 6 MiB; within 10%."""
    trunk, slow = Network(racks(4, 4, bandwidth=0.2, trunk=0.2)), Network(flat(*[0.2] * 7, 0.05))
    pairs = rounds(GridSchedule(8, 2))
    assert trunk.ring_seconds(BY_RACK, 24 * 2**20) == pytest.approx(1.98, rel=0.1)
    assert step_seconds(trunk, pairs, 24 * 2**20) == pytest.approx(2.2, rel=0.1)
    assert slow.ring_seconds(BY_RACK, 6 * 2**20) == pytest.approx(1.88, rel=0.1)
    assert step_seconds(slow, pairs, 6 * 2**20) == pytest.approx(1.06, rel=0.1)
    assert sorted(slow.seconds(pairs[0], MODEL) / second(flat(0.2))) == pytest.approx([1, 1, 1, 4])


def simulated(schedule, passes):
    """Steady error of ``X <- W (X + noise)``, its covariance by whole matrices."""
    n = schedule.world_size
    noise, covariance = np.eye(n) - np.full((n, n), 1 / n), np.zeros((n, n))
    errors: list[float] = []
    matrices = [mixing_matrix(schedule, t) for t in range(schedule.period)]
    for _ in range(passes):
        errors = []
        for matrix in matrices:
            covariance = matrix @ (covariance + noise) @ matrix.T
            errors.append(np.trace(covariance) / n)
    return np.mean(errors)


def connected(schedule):
    reach = np.linalg.matrix_power(sum(mixing_matrix(schedule, t) for t in range(schedule.period)), schedule.world_size)
    return bool((reach > 0).all())


@settings(max_examples=60)
@given(st.integers(1, 9).flatmap(schedules))
def test_the_steady_error_is_what_a_simulation_settles_at(schedule):
    error = steady_error(rounds(schedule))
    if connected(schedule):
        assert error == pytest.approx(simulated(schedule, 1000), rel=1e-3, abs=1e-9)
    else:
        assert error == math.inf


def test_the_error_is_that_of_replicas_with_noise():
    schedule, random = ShuffleSchedule(7, 2), np.random.default_rng(0)
    values, errors = np.zeros((7, 20_000)), []
    for t in range(10 * schedule.period):
        values = mixing_matrix(schedule, t) @ (values + random.standard_normal(values.shape))
        errors.append(((values - values.mean(axis=0)) ** 2).mean())
    assert steady_error(rounds(schedule)) == pytest.approx(np.mean(errors[-schedule.period :]), rel=0.01)


@pytest.mark.parametrize(
    ("n", "g", "error"), [(4, 2, 0.25), (8, 2, 0.5), (16, 2, 0.6875), (64, 2, 0.8906), (16, 4, 0.1875), (64, 4, 0.28)]
)
def test_known_errors_of_grids(n, g, error):
    assert steady_error(rounds(GridSchedule(n, g))) == pytest.approx(error, abs=0.005 if n == 64 else 1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11, 64, 300])
def test_one_group_of_all_has_no_error(n):
    assert steady_error(rounds(GridSchedule(n, n))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [3, 11])
def test_rare_averages_of_all(n):
    """Replicas are one step apart, then two, then none."""
    alone = grouped(range(n))
    schedule = CyclicSchedule([alone, alone, grouped([0] * n)])
    assert steady_error(rounds(schedule)) == pytest.approx((1 - 1 / n) * (1 + 2 + 0) / 3)


@pytest.mark.parametrize("n", [2, 8, 300])
def test_ranks_that_never_hear_of_each_other_have_no_bound(n):
    assert steady_error(rounds(CyclicSchedule([grouped(range(n))]))) == math.inf
    assert steady_error(rounds(CyclicSchedule([grouped([0] * (n - 1) + [1])]))) == math.inf


@pytest.mark.parametrize("make", [GridSchedule, ShuffleSchedule])
@pytest.mark.parametrize(("n", "g"), [(48, 2), (64, 2), (64, 4), (128, 2), (200, 8), (250, 3)])
def test_many_ranks_are_sampled(make, n, g, monkeypatch):
    period = rounds(make(n, g))
    exact = steady_error(period)
    monkeypatch.setattr(cost, "_EXACT_RANKS", 1)
    assert steady_error(period) == pytest.approx(exact, rel=0.06)


def test_what_shrinks_slowly_is_told_of_many_ranks():
    """One pair every 8 steps between two halves that agree among themselves: most of the error is between these."""
    n = 320
    half, pairs = [*range(n // 2)], ShuffleSchedule(n // 2, 2)
    partitions = []
    for t in range(8):
        inside = [tuple(r + n // 2 * side for r in group) for side in (0, 1) for group in pairs.partition(t)]
        crossing: tuple[int, ...] = (half[t], half[t] + n // 2) if t == 0 else ()
        partitions.append([tuple(r for r in group if r not in crossing) for group in inside] + [crossing])
    period = rounds(CyclicSchedule([[group for group in partition if group] for partition in partitions]))
    exact = cost._exact_error(period, n)
    assert exact > 2  # where pairs of a grid have 0.98
    assert steady_error(period) == pytest.approx(exact, rel=0.35)  # a sample of one direction: 48 numbers


def test_ten_thousand_ranks():
    n = 10_000
    hosts = {f"n{i}": f"r{i // 40}" for i in range(n)}
    above = {**hosts, **{f"r{i}": "core" for i in range(250)}}
    network = Network(Topology(above, dict.fromkeys(above, Link(10, 10)), {host: (i,) for i, host in enumerate(hosts)}))
    period = rounds(make_schedule("auto", n, 2))
    assert step_seconds(network, period, MODEL) > 0
    assert steady_error(period) == pytest.approx(1, rel=0.05)
    assert network.ordered_ranks() == [*range(n)]
