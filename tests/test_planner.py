"""Plans: properties on any tree, and what they must come to on networks with a known bottleneck."""

import math
import os
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ds_lightning
from ds_lightning.cost import Network, rounds, steady_error
from ds_lightning.flows import Run, followed_step_seconds
from ds_lightning.planner import BLIND_PAIRS, LARGEST_GROUP, LONGEST_PERIOD, MOST_ERROR, SAME_TIME, plan
from ds_lightning.schedule import (
    GridSchedule,
    check_schedule,
    consensus_rate,
    mixing_matrix,
    schedule_parts,
    schedule_period,
)
from ds_lightning.topology import Link, Topology
from tests.networks import flat, loads, racks, seconds_of, trees

MB = 1e6
# Few kinds: what each of them suggests is tried.
LINKS = st.sampled_from([Link(10, 10), Link(2.5, 40, 0.1)])


def meetings(schedule, rank):
    """Steps of the period in which a rank is not alone."""
    return sum(len(schedule.group(rank, t)) > 1 for t in range(schedule_period(schedule)))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees(least=2, most=7, links=LINKS), st.sampled_from([None, 0.0, 0.1, 5.0]), st.booleans(), st.integers(0, 9))
def test_every_plan_is_a_valid_schedule_that_reaches_consensus(topology, compute, overlap, seed):
    found = plan(topology, 100 * MB, compute, overlap, seed)
    schedule, pairs = found.schedule, next(o for o in found.alternatives if o.name == BLIND_PAIRS)
    check_schedule(schedule)
    assert schedule.world_size == topology.world_size
    assert schedule_period(schedule) <= LONGEST_PERIOD
    assert consensus_rate(schedule) < 1
    values = np.random.default_rng(seed).standard_normal(topology.world_size)
    for t in range(schedule_period(schedule)):
        np.testing.assert_allclose((mixing_matrix(schedule, t) @ values).sum(), values.sum(), atol=1e-12)
    assert found.best.error <= MOST_ERROR * pairs.error + 1e-6
    assert found.best.error == pytest.approx(steady_error(rounds(schedule)))
    assert found.best.seconds <= SAME_TIME * pairs.seconds
    assert all(math.isfinite(o.seconds) and o.seconds >= 0 for o in found.alternatives)


def test_a_chain_of_switches_is_refused_at_once():
    above = {f"s{i + 1}": f"s{i}" for i in range(3000)} | {"a": "s3000", "b": "s0"}
    deep = Topology(above, dict.fromkeys(above, Link(10, 10)), {"a": (0,), "b": (1,)})
    with pytest.raises(ValueError, match=r"hosts with 3001 links to the top, but .* at most 64\. HINT: leave out"):
        plan(deep, 100 * MB)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees(least=2, most=7))
def test_no_link_carries_more_than_the_plan_states(topology):
    found = plan(topology, 100 * MB)
    network = found.network
    period = rounds(found.schedule)
    for t in range(len(period)):
        stated = dict(zip(network.nodes, network.traffic(*period.step(t)), strict=True))
        for (node, _), models in step_loads(topology, found.schedule, t).items():
            assert models == pytest.approx(stated[node])


def step_loads(topology, schedule, step):
    """Models on each link and direction at a step, of all parts."""
    total: Counter[tuple[str, str]] = Counter()
    parts = schedule_parts(schedule)
    for part in range(parts):
        total.update(
            {link: models / parts for link, models in loads(topology, schedule.partition(step + part)).items()}
        )
    return total


def check_links(found):
    """Over a period of the plan no link has more than it carries in that time."""
    steps = schedule_period(found.schedule)
    total: Counter[tuple[str, str]] = Counter()
    for t in range(steps):
        total.update(step_loads(found.topology, found.schedule, t))
    for link, models in total.items():
        carried = steps * found.best.seconds
        assert seconds_of(found.topology, *link, models, found.size) <= 1.02 * carried, link


@settings(max_examples=4, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    st.lists(st.sampled_from([2.5, 5.0, 10.0]), min_size=3, max_size=8),
    st.sampled_from([None, 0.0, 0.1]),
    st.booleans(),
    st.integers(0, 9),
)
def test_plans_in_parts_are_valid_schedules_too(bandwidths, compute, overlap, seed):
    """Hosts of different speeds on one switch; every step has each residue of the partitions once."""
    topology = flat(*bandwidths)
    found = plan(topology, 100 * MB, compute, overlap, seed, thorough=False)
    again = plan(topology, 100 * MB, compute, overlap, seed, thorough=False)
    assert repr(found.best) == repr(again.best)
    schedule = found.schedule
    check_schedule(schedule)
    check_links(found)
    assert consensus_rate(schedule) < 1
    assert 1 <= schedule_parts(schedule) <= 4
    assert found.best.error == pytest.approx(steady_error(rounds(schedule)))
    assert found.best.name.startswith(f"planned in {schedule_parts(schedule)} parts") == (schedule_parts(schedule) > 1)
    assert found.best.seconds <= SAME_TIME * next(o for o in found.alternatives if o.name == BLIND_PAIRS).seconds


@pytest.mark.parametrize("thorough", [True, False])
def test_a_slow_host_takes_part_in_a_part_of_the_model(thorough):
    """Its link carries that part per step, and nobody waits: a step takes little more than a pair of fast hosts."""
    topology = flat(*[10] * 7, 2.5)
    found = plan(topology, 100 * MB, 0.0, thorough=thorough)
    assert schedule_parts(found.schedule) == 4
    assert found.best.seconds < (1.01 if thorough else 1.2) * seconds_of(topology, "n0", "up", 1, 100 * MB)
    for t in range(schedule_period(found.schedule)):
        assert step_loads(topology, found.schedule, t)["n7", "up"] <= 1 / 4 + 1e-9
    check_links(found)


def test_parts_that_save_no_time_are_not_made():
    for topology in (flat(*[10] * 8), racks(4, 4, trunk=40), flat(10, 10)):
        assert schedule_parts(plan(topology, 100 * MB, 0.0).schedule) == 1
    # Nor where compute hides a slow host's pair.
    assert schedule_parts(plan(flat(*[10] * 7, 2.5), 100 * MB, 1.0).schedule) == 1


@pytest.mark.parametrize(("topology", "seconds"), [(flat(*[10] * 7, 2.5), 1), (racks(4, 4, 4, 4, trunk=4), 3)])
def test_a_plan_may_be_made_while_training(topology, seconds):
    start = time.process_time()
    plan(topology, 100 * MB, 0.1, thorough=False)
    assert time.process_time() - start < 2 * seconds  # half of it on a machine that does nothing else


# A plan takes a second: no shrinking.
@settings(max_examples=4, phases=[Phase.reuse, Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    trees(least=2, most=14, links=LINKS),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.booleans(),
    st.sampled_from([1.0, 1e6, 1e8]),
)
def test_any_size_of_model_has_a_plan(topology, compute, overlap, size):
    found = plan(topology, size, compute, overlap)
    check_schedule(found.schedule)
    check_links(found)
    product = np.eye(topology.world_size)
    for t in range(schedule_period(found.schedule)):
        product = mixing_matrix(found.schedule, t) @ product
    assert (np.linalg.matrix_power(product, topology.world_size) > 0).all()  # what one knows, all hear in the end
    exact = [option.seconds for option in found.alternatives if option.name.startswith("DDP")]
    assert found.ddp_is_better == (min(exact) <= SAME_TIME * found.best.seconds)
    assert ("is the better choice here" in found.verdict) == found.ddp_is_better


def trunk():
    return racks(4, 4)


def straggler():
    return flat(*[10] * 7, 2.5)


def uneven():
    """Two ranks on some hosts, one host at the top, racks below racks, and slow links."""
    above = {"a": "core", "pod": "core", "r0": "pod", "r1": "pod", "f": "pod"}
    above |= {"b": "r0", "c": "r0", "d": "r1", "e": "r1"}
    links = dict.fromkeys(above, Link(10, 10, 0.05)) | {"r1": Link(2.5, 10), "e": Link(2.5, 2.5)}
    return Topology(above, links, {"a": (0, 7), "b": (1,), "c": (2, 5), "d": (3,), "e": (4,), "f": (6,)})


@cache
def plan_on(make):
    return plan(make(), 100 * MB, 0.0)


@pytest.mark.parametrize("make", [trunk, straggler, uneven])
def test_the_time_of_a_plan_is_that_of_a_long_run(make):
    found = plan_on(make)
    check_links(found)
    ends = Run(found.network, rounds(found.schedule), 100 * MB, 0.0, True).ends(240).mean(axis=1)
    assert found.best.seconds == pytest.approx((ends[-1] - ends[119]) / 120, rel=0.03)


CODE = """
import sys, types
package = types.ModuleType("ds_lightning")  # without torch
package.__path__ = [sys.argv[1]]
sys.modules["ds_lightning"] = package
from ds_lightning.planner import plan
from ds_lightning.topology import Topology
found = plan(Topology.parse(sys.stdin.read()), 1e8, 0.0)
print([found.schedule.partition(t) for t in range(found.schedule.period)], found.verdict)
assert "torch" not in sys.modules
"""


def test_a_plan_is_the_same_in_any_process_and_for_equal_topologies():
    text = uneven().to_yaml()
    assert [*Topology.parse(text).links] != [*uneven().links]  # only their order differs
    out = subprocess.run(
        [sys.executable, "-c", CODE, str(Path(ds_lightning.__file__).parent)],
        input=text,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    found = plan_on(uneven)
    expected = f"{[found.schedule.partition(t) for t in range(found.schedule.period)]} {found.verdict}"
    assert out.stdout.strip() == expected


def test_seeds_draw_other_lots():
    plans = [plan(flat(*[10] * 14), 100 * MB, 0.0, seed=seed).schedule for seed in (0, 1, 2)]
    assert len({str([schedule.partition(t) for t in range(schedule.period)]) for schedule in plans}) > 1


@pytest.mark.parametrize("compute", [None, 0.0, 0.02])
def test_an_oversubscribed_trunk(compute):
    """Blind pairs take longer than DDP; a plan at most 1 / 1.6 of DDP's step, with at most 2.5 times pairs' error."""
    found = plan(racks(4, 4, trunk=10), 440 * MB, compute)
    ddp, pairs = found.alternatives[0], next(o for o in found.alternatives if o.name == BLIND_PAIRS)
    assert pairs.seconds > ddp.seconds or compute is None
    assert found.best.seconds < ddp.seconds / 1.6
    assert found.best.error < 2.5 * pairs.error
    assert not found.ddp_is_better
    assert "times faster than DDP's" in found.verdict


def test_what_crosses_a_trunk_fits_the_time_of_the_step():
    topology = racks(4, 4, trunk=10)
    found = plan(topology, 440 * MB, 0.0)
    on_trunk = [loads(topology, found.schedule.partition(t))["rack0", "up"] for t in range(found.schedule.period)]
    assert seconds_of(topology, "rack0", "up", sum(on_trunk), found.size) <= 1.01 * len(on_trunk) * found.best.seconds
    assert max(on_trunk) < 4  # where blind pairs put all four


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7]])
def test_each_step_fits_where_compute_hides_one_pair(ranks):
    """No link has more than it carries in the time of a step, at any step, and a step takes no longer than a pair."""
    topology = racks(4, 4).with_ranks([f"n{rank}" for rank in ranks])
    pair = seconds_of(topology, "n0", "up", 1, 100 * MB)
    found = plan(topology, 100 * MB, pair)
    assert found.best.seconds <= SAME_TIME * pair
    for t in range(schedule_period(found.schedule)):
        for link, models in step_loads(topology, found.schedule, t).items():
            assert seconds_of(topology, *link, models, 100 * MB) <= SAME_TIME * found.best.seconds


def test_the_alternatives_by_hand():
    found = plan_on(trunk)
    pair = seconds_of(found.topology, "n0", "up", 1, 100 * MB)
    assert {option.name: pytest.approx(option.seconds / pair) for option in found.alternatives} == {
        "DDP, ring in rank order": 1.75,
        "DDP, ring in rack order": 1.75,
        "DDP, hierarchical": 2.5,
        "local SGD, every 4 steps": 1.75 / 4,
        "blind pairs": 2,  # (4 + 1 + 1) / 3
        "grid along the tree": 2,
    }
    assert [option.error for option in found.alternatives] == pytest.approx([0, 0, 0, 1.5 * 7 / 8, 0.5, 0.5])
    assert [option.schedule is None for option in found.alternatives] == [True] * 4 + [False] * 2


def test_ranks_alternate_between_racks():
    in_order = racks(4, 4, trunk=10)
    interleaved = in_order.with_ranks([f"n{rank // 2 + 4 * (rank % 2)}" for rank in range(8)])
    found = plan(interleaved, 440 * MB)
    assert found.best.seconds < found.alternatives[0].seconds / 4
    ring = found.alternatives[1]
    assert ring.seconds == pytest.approx(plan(in_order, 440 * MB).alternatives[0].seconds)
    assert f"({ring.seconds / found.best.seconds:.2f} times faster than DDP, ring in rack order)" in found.verdict


@pytest.mark.parametrize(("topology", "times"), [(racks(4, 4, trunk=40, slow=2.5), 4), (flat(*[10] * 7, 2.5), 4)])
def test_a_slow_host_takes_part_more_rarely(topology, times):
    found = plan(topology, 440 * MB, 0.0)
    assert meetings(found.schedule, 7) < min(meetings(found.schedule, rank) for rank in range(7))
    assert found.best.seconds < found.alternatives[0].seconds / times


def test_two_slow_hosts():
    found = plan(flat(10, 10, 10, 2.5, 10, 10, 10, 2.5), 440 * MB, 0.0)
    assert found.best.seconds < found.alternatives[0].seconds / 3


def test_four_racks():
    found = plan(racks(4, 4, 4, 4, trunk=4), 440 * MB, 0.0)
    assert found.best.seconds < found.alternatives[1].seconds / 2


def test_several_ranks_on_a_host_share_its_link():
    found = plan(Topology.flat([f"n{rank // 4}" for rank in range(16)], bandwidth=10), 440 * MB, 0.0)
    assert found.best.seconds < next(o for o in found.alternatives if o.name == BLIND_PAIRS).seconds / 2
    assert not found.ddp_is_better


@pytest.mark.parametrize(
    ("topology", "compute", "says"),
    [
        (flat(*[100] * 4), 10.0, "Plain DDP is the better choice here"),  # whatever it is, compute hides it
        (
            racks(4, 4, trunk=10).with_ranks(["n0", "n4", "n1", "n5", "n2", "n6", "n3", "n7"]),
            3,
            "DDP, ring in rack order is",
        ),
    ],
)
def test_ddp_may_be_better(topology, compute, says):
    found = plan(topology, 440 * MB, compute)
    assert found.ddp_is_better
    assert found.verdict.startswith(says)


def test_what_is_faster_than_the_plan_is_named():
    assert "Local SGD, every 4 steps, takes" in plan(racks(8, 8, trunk=5), 440 * MB, 0.0).verdict


@pytest.mark.parametrize("n", [2, 3])
def test_very_few_ranks(n):
    found = plan(flat(*[10] * n), 440 * MB, 0.0)
    assert [found.schedule.partition(t) for t in range(3)] == [(tuple(range(n)),)] * 3
    assert found.verdict.startswith("Plain DDP is the better choice here")


def test_ranks_of_one_host_need_no_network():
    found = plan(Topology.flat(["a"] * 4, 10), 440 * MB, 0.0)
    assert found.best.seconds == 0
    assert found.ddp_is_better


def test_unknown_compute_counts_none_and_much():
    topology = racks(4, 4, trunk=10)
    found = plan(topology, 440 * MB)
    much = 440 * MB * 8 * 1514 / 1448 / 10e9
    network, period = Network(topology), rounds(found.schedule)
    both = [followed_step_seconds(network, period, 440 * MB, compute) for compute in (0.0, much)]
    assert found.best.seconds == pytest.approx(sum(both) / 2)


@pytest.mark.parametrize(
    ("size", "compute", "message"),
    [
        (0, 0, "size=0 is out of range. HINT: use a number of at least 1"),
        (0.5, 0, "size=0.5 is out of range"),
        (math.inf, 0, "size=inf is out of range"),
        (math.nan, 0, "size=nan is out of range"),
        (None, 0, "size=None is out of range"),
        (True, 0, "size=True is out of range"),
        ("1", 0, "size='1' is out of range"),
        (1e6, -1, "compute=-1 is out of range. HINT: use a number of at least 0"),
        (1e6, math.nan, "compute=nan is out of range"),
        (1e6, math.inf, "compute=inf is out of range"),
        (1e6, "1", "compute='1' is out of range"),
        (1e6, True, "compute=True is out of range"),
    ],
)
def test_numbers_out_of_range(size, compute, message):
    with pytest.raises(ValueError, match=message):
        plan(flat(1, 1), size, compute)


def test_one_rank_has_nothing_to_plan():
    with pytest.raises(ValueError, match="the topology has one rank, which has nobody to average with"):
        plan(flat(1), 1e6)


@pytest.mark.parametrize("hosts", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_ranks(hosts):
    found = plan(racks(*[hosts // 20] * 20, trunk=hosts / 20 * 2.5), 440 * MB, 0.0)
    check_schedule(found.schedule)
    pairs = next(o for o in found.alternatives if o.name == BLIND_PAIRS)
    assert found.best.error <= MOST_ERROR * pairs.error
    assert found.best.seconds < 0.6 * found.alternatives[1].seconds
    assert max(len(group) for t in range(8) for group in found.schedule.partition(t)) <= LARGEST_GROUP


@pytest.mark.parametrize("n", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_ranks_of_which_some_are_slow(n):
    """Racks of 40 hosts, trunks oversubscribed 4:1, one host in 100 slow."""
    topology = racks(*[40] * (n // 40), trunk=100)
    slow = range(0, n, 100)
    links = {**topology.links, **{f"n{i}": Link(2.5, 2.5) for i in slow}}
    start = time.process_time()
    found = plan(Topology(topology.above, links, topology.ranks), 100 * MB, 0.1)
    assert time.process_time() - start < n / 200
    check_schedule(found.schedule)
    pairs = next(o for o in found.alternatives if o.name == BLIND_PAIRS)
    assert found.best.seconds < min(pairs.seconds, found.alternatives[0].seconds) / 2
    assert found.best.error <= MOST_ERROR * pairs.error
    others = np.mean([meetings(found.schedule, i) for i in range(1, n, 50)])
    assert np.mean([meetings(found.schedule, i) for i in slow]) < others / 1.5
    for t, groups in enumerate(rounds(found.schedule)[:2]):
        walked = loads(found.topology, found.schedule.partition(t))
        for node, models in zip(found.network.nodes, found.network.traffic(groups), strict=True):
            assert walked[node, "up"] == pytest.approx(models)


def test_where_no_link_matters_blind_pairs_will_do():
    """On equal links a plan is no worse than the grid's pairs."""
    found = plan(flat(*[10] * 8), 440 * MB, 1.0)
    assert found.best.error <= steady_error(rounds(GridSchedule(8, 2)))
