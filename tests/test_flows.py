"""Runs that are followed event by event: by hand, against the recurrence, and within what links carry."""

from collections import defaultdict
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_lightning import flows
from ds_lightning.cost import Network, rounds, step_seconds
from ds_lightning.flows import Run, followed_step_seconds
from ds_lightning.schedule import CyclicSchedule, GridSchedule
from ds_lightning.topology import Link, Topology
from tests.networks import (
    flat,
    grouped,
    latency_of,
    loads,
    pairs,
    partitions,
    racks,
    recurrence,
    schedules,
    seconds_of,
    takes_of,
    trees,
)

# A model takes one second on a link of 10 Gbit/s.
MODEL = 10e9 / 8 * 1448 / 1514
COMPUTES = st.sampled_from([0.0, 0.3, 1.0, 5.0])
TREES = trees(most=9)
FLAT = st.lists(st.sampled_from([2.5, 5.0, 10.0, 40.0]), min_size=1, max_size=9).map(lambda speeds: flat(*speeds))


def ends(topology, schedule, steps, compute=0.0, overlap=True):
    schedule = schedule if hasattr(schedule, "partition") else CyclicSchedule(schedule)
    return Run(Network(topology), rounds(schedule), MODEL, compute, overlap).ends(steps)


def takes(topology, schedule):
    return takes_of(Network(topology), schedule, MODEL)


@st.composite
def runs(draw, topologies=TREES, of=partitions, most_parts=3):
    topology = draw(topologies)
    schedule = draw(schedules(topology.world_size, 3, of, most_parts))
    return topology, schedule, draw(COMPUTES), draw(st.booleans())


@given(runs(FLAT, pairs, most_parts=1))
def test_pairs_on_one_switch_take_what_the_recurrence_says(run):
    """Nothing is shared, however slow a host is."""
    topology, schedule, compute, overlap = run
    expected = recurrence(schedule, takes(topology, schedule), 12, compute, overlap)
    np.testing.assert_allclose(ends(topology, schedule, 12, compute, overlap), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("compute", [0.0, 0.7, 4.0])
@pytest.mark.parametrize(("n", "g"), [(1, 1), (2, 2), (8, 2), (9, 3), (16, 4), (8, 8), (5, 5)])
def test_equal_groups_on_one_switch_take_what_the_recurrence_says(n, g, compute, overlap):
    topology, schedule = flat(*[10.0] * n, latency=100), GridSchedule(n, g)
    expected = recurrence(schedule, takes(topology, schedule), 7, compute, overlap)
    np.testing.assert_allclose(ends(topology, schedule, 7, compute, overlap), expected, rtol=1e-6)
    arguments = Network(topology), rounds(schedule), MODEL, compute, overlap
    assert followed_step_seconds(*arguments) == pytest.approx(step_seconds(*arguments))


@given(runs())
def test_no_link_carries_more_than_it_can(run):
    topology, schedule, compute, overlap = run
    end = ends(topology, schedule, 9, compute, overlap).max()
    total: dict[tuple[str, str], float] = defaultdict(float)
    for t in range(9):
        for part in range(schedule.parts):
            for link, models in loads(topology, schedule.partition(t + part)).items():
                total[link] += models / schedule.parts
    for link, models in total.items():
        assert seconds_of(topology, *link, models, MODEL) <= end * (1 + 1e-6)


@given(runs())
def test_links_are_shared_fairly_at_every_moment(run):
    """Max-min: no link is overfull, and each transfer has a full link on which no other one is faster."""
    share, moments = flows._share, []

    def watched(transfers, capacity):
        transfers = list(transfers)
        share(transfers, capacity)
        rates = defaultdict(list)
        for transfer in transfers:
            for link in transfer.links:
                rates[link].append(transfer.rate)
        assert all(sum(found) <= capacity[link] * (1 + 1e-9) for link, found in rates.items())
        full = {link: max(found) for link, found in rates.items() if sum(found) >= capacity[link] * (1 - 1e-9)}
        for transfer in transfers:
            assert any(transfer.rate >= full.get(link, np.inf) * (1 - 1e-9) for link in transfer.links)
        moments.append(len(transfers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows, "_share", watched)
        topology, schedule, compute, overlap = run
        ends(topology, schedule, 5, compute, overlap)
    apart = any(topology.path(*two) for t in range(5) for g in schedule.partition(t) for two in permutations(g, 2))
    assert any(moments) == apart


@given(runs(of=pairs))
def test_pairs_never_end_before_they_would_if_nobody_else_sent(run):
    topology, schedule, compute, overlap = run
    alone: list[list[float]] = []
    for t in range(schedule.period):
        alone.append([])
        for group in schedule.partition(t):
            ways = [*topology.path(group[0], group[-1]), *topology.path(group[-1], group[0])]
            busiest = max((seconds_of(topology, *link, 1 / schedule.parts, MODEL) for link in ways), default=0.0)
            alone[-1].append(busiest + latency_of(topology, group[0], group[-1]))
    by_part = [[alone[(t + q) % schedule.period] for q in range(schedule.parts)] for t in range(schedule.period)]
    earliest = np.array(recurrence(schedule, by_part, 9, compute, overlap))
    assert (ends(topology, schedule, 9, compute, overlap) >= earliest - 1e-6 * (1 + earliest)).all()


@given(runs())
def test_ranks_end_their_steps_in_order_and_members_together(run):
    topology, schedule, compute, overlap = run
    found = ends(topology, schedule, 6, compute, overlap)
    before = np.vstack([np.zeros(topology.world_size), found[:-1]])
    assert (found >= before + compute - 1e-9).all()
    for t in range(6 if schedule.parts == 1 else 0):  # of some parts members may have others to wait for
        for group in map(list, schedule.partition(t)):
            own = before[t, group] + compute if overlap else np.zeros(len(group))
            done = found[t, group].min()
            np.testing.assert_allclose(found[t, group], np.maximum(own, done))


@given(runs(FLAT, pairs, most_parts=1), st.data())  # who swaps parts with several has more left for the others
def test_a_slower_link_makes_nobody_end_earlier(run, data):
    topology, schedule, compute, overlap = run
    host = data.draw(st.sampled_from(topology.hosts))
    slower = Topology(topology.above, {**topology.links, host: Link(2, 1)}, topology.ranks)
    before, after = (ends(network, schedule, 8, compute, overlap) for network in (topology, slower))
    assert (after >= before * (1 - 1e-6)).all()


@given(runs())
def test_a_run_can_be_repeated(run):
    topology, schedule, compute, overlap = run
    run = Run(Network(topology), rounds(schedule), MODEL, compute, overlap)
    short, long = run.ends(3), run.ends(5)
    assert short.shape == (3, topology.world_size)
    assert (long == ends(topology, schedule, 5, compute, overlap)).all()
    assert (short == run.ends(3)).all()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("compute", [0.0, 0.25, 1.5])
def test_in_parts_a_slow_host_keeps_nobody_waiting(compute, overlap):
    """Rank 3 swaps a quarter of a model per step at a quarter of the speed: 1 s, as long as the others take."""
    partitions = [((0, 3), (1, 2)), ((0, 1), (2,), (3,)), ((0, 2), (1,), (3,)), ((0,), (1, 2), (3,))]
    found = ends(flat(10, 10, 10, 2.5), CyclicSchedule(partitions, 4), 5, compute, overlap)
    step = max(1.0, compute) if overlap else 1.0 + compute
    np.testing.assert_allclose(found[:, 3], step * np.arange(1, 6))
    whole = ends(flat(10, 10, 10, 2.5), partitions, 40, compute, overlap)
    in_parts = ends(flat(10, 10, 10, 2.5), CyclicSchedule(partitions, 4), 40, compute, overlap)
    assert in_parts[-1].mean() <= whole[-1].mean() * (1 + 1e-9)


def test_two_parts_share_links_and_the_last_one_ends_the_step():
    """Two hosts swap one half of the model at each step."""
    schedule = CyclicSchedule([((0, 1),), ((0,), (1,))], 2)
    np.testing.assert_allclose(ends(flat(10, 10), schedule, 3), [[0.5] * 2, [1] * 2, [1.5] * 2])
    # Rank 0 swaps half a model with each of the others: they wait for half a second's worth at half its speed.
    schedule = CyclicSchedule([((0, 1), (2,)), ((0, 2), (1,))], 2)
    np.testing.assert_allclose(ends(flat(10, 10, 10), schedule, 2), [[1] * 3, [2] * 3])
    np.testing.assert_allclose(ends(flat(10, 10, 10, latency=100), schedule, 2), [[1.2] * 3, [2.4] * 3])


def test_as_many_equal_parts_as_one_take_as_long():
    topology = racks(2, 2, trunk=7, slow=3)
    for partition in [((0, 2), (1, 3)), ((0, 1, 2), (3,)), ((0, 1, 2, 3),)]:
        expected = ends(topology, [partition], 4, 0.2)
        np.testing.assert_allclose(ends(topology, CyclicSchedule([partition], 3), 4, 0.2), expected)


def test_two_pairs_share_a_trunk():
    np.testing.assert_allclose(ends(racks(2, 2), [((0, 2), (1, 3))], 3), [[2] * 4, [4] * 4, [6] * 4])


def test_pairs_that_share_no_link_are_not_slowed():
    np.testing.assert_allclose(ends(racks(2, 2, trunk=1), [((0, 1), (2, 3))], 2), [[1] * 4, [2] * 4])
    partition = ((0, 3), (1, 2), (4, 5))  # one crosses a trunk that is slow
    np.testing.assert_allclose(ends(racks(3, 3, trunk=5), [partition], 1), [[2, 1, 1, 2, 1, 1]])


def test_those_who_run_ahead_are_in_the_way():
    """Ranks 1 and 4 have nothing to do at the first step: their average of the second is on the trunk at once."""
    schedule = [grouped([0, 1, 2, 0, 4, 5]), grouped([0, 1, 2, 3, 1, 5])]  # (0, 3), then (1, 4)
    np.testing.assert_allclose(ends(racks(3, 3), schedule, 2), [[2, 0, 0, 2, 0, 0], [2, 2, 0, 2, 2, 0]])


def test_a_trunk_is_shared_from_when_the_second_pair_comes():
    """Half of (0, 3) is over by then; the other half takes 2 s beside (1, 4), which needs 1 s more alone."""
    schedule = [((0,), (1, 2), (3,), (4, 5)), ((0, 3), (1, 4), (2,), (5,))]
    found = ends(racks(3, 3, trunk=5), schedule, 2)
    np.testing.assert_allclose(found, [[0, 1, 1, 0, 1, 1], [3, 4, 1, 3, 4, 1]])


def test_what_a_slow_host_leaves_of_a_trunk_others_take():
    """The pair of the slow host takes a quarter of the trunk, the other one the rest: 4/3 s, not 2."""
    np.testing.assert_allclose(ends(racks(2, 2, slow=2.5), [((0, 2), (1, 3))], 1), [[4 / 3, 4, 4 / 3, 4]])


def test_a_groups_two_stages():
    np.testing.assert_allclose(ends(flat(*[10.0] * 4), [((0, 1, 2, 3),)], 2), [[1.5] * 4, [3] * 4])
    np.testing.assert_allclose(ends(racks(2, 2), [((0, 1, 2, 3),)], 1), [[2] * 4])  # twice 4 quarters on the trunk


def test_a_groups_stages_begin_when_two_are_ready_and_when_all_are():
    """Ranks 0 and 1 swap thirds at once; rank 2 comes at 4 s from a slow pair, and its own link is fast."""
    # It takes 1/3 s until it has swapped thirds with both, 2/3 s for all three to swap what they reduced.
    schedule = [((0,), (1,), (2, 3)), ((0, 1, 2), (3,))]
    np.testing.assert_allclose(ends(flat(10, 10, 20, 2.5), schedule, 2), [[0, 0, 4, 4], [5, 5, 5, 4]])


@pytest.mark.parametrize(
    ("compute", "overlap", "step"),
    [(0.0, True, 1.0), (0.6, True, 1.0), (1.0, True, 1.0), (1.5, True, 1.5), (0.6, False, 1.6), (1.5, False, 2.5)],
)
def test_compute_is_hidden_or_not(compute, overlap, step):
    found = ends(flat(10, 10), [((0, 1),)], 3, compute, overlap)
    np.testing.assert_allclose(found, [[step] * 2, [2 * step] * 2, [3 * step] * 2])


def test_ranks_alone_only_compute():
    for overlap in (True, False):
        np.testing.assert_allclose(ends(flat(10, 10), [((0,), (1,))], 2, 0.7, overlap), [[0.7] * 2, [1.4] * 2])
    assert (ends(flat(10, 10), [((0,), (1,))], 2) == 0).all()
    assert ends(flat(10), [((0,),)], 2, 0.5).tolist() == [[0.5], [1.0]]


def test_latency_comes_on_top_once_per_stage():
    topology = racks(2, 2)
    links = {n: Link(10, 10, 200 if n.startswith("rack") else 100) for n in topology.links}
    late = Topology(topology.above, links, topology.ranks)
    np.testing.assert_allclose(ends(late, [((0, 1), (2, 3))], 1), [[1.2] * 4])
    np.testing.assert_allclose(ends(late, [((0, 2), (1,), (3,))], 1), [[1.6, 0, 1.6, 0]])
    np.testing.assert_allclose(ends(late, [((0, 1, 2, 3),)], 1), [[2 + 2 * 0.6] * 4])


def test_ranks_of_one_host_share_its_link_and_swap_for_nothing():
    topology = Topology.flat(["a", "a", "b", "b"], 10)
    np.testing.assert_allclose(ends(topology, [((0, 1), (2, 3))], 1, 0.5), [[0.5] * 4])
    np.testing.assert_allclose(ends(topology, [((0, 2), (1, 3))], 1), [[2] * 4])
    np.testing.assert_allclose(ends(topology, [((0, 2), (1,), (3,))], 1), [[1, 0, 1, 0]])
    np.testing.assert_allclose(ends(topology, [((0, 1, 2, 3),)], 1), [[2] * 4])  # 2 stages of 4 quarters
    np.testing.assert_allclose(ends(topology, [((0, 1), (2, 3)), ((0, 2), (1, 3))], 4)[:, 0], [0, 2, 2, 4])


@pytest.mark.parametrize("compute", [1e3, 1e6, 1e9])
def test_a_run_of_years_comes_to_an_end(compute):
    """Where a clock of seconds is too coarse for the last bytes of a transfer."""
    schedule = [((0, 2), (1, 3)), ((0, 1, 2), (3,)), ((0, 1), (2, 3))]
    for overlap in (True, False):
        found = ends(racks(2, 2, trunk=7, slow=3), schedule, 9, compute, overlap)
        np.testing.assert_allclose(found[-1], 9 * compute, rtol=0.02)


def test_a_small_model_on_fast_links_after_a_while():
    """20 us each; the same, and much earlier than years."""
    network, schedule = Network(racks(2, 2, bandwidth=400, trunk=300)), [((0, 2), (1, 3)), ((0, 1, 2), (3,))]
    found = Run(network, rounds(CyclicSchedule(schedule)), 1e6, 100.0, False).ends(40)
    np.testing.assert_allclose(found[-1], 4000, rtol=1e-5)
