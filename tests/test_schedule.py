"""Who meets whom: properties of the schedules, without torch and without processes."""

import math
import subprocess
import sys
import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.schedule import (
    CyclicSchedule,
    GridSchedule,
    Schedule,
    ShuffleSchedule,
    auto_group_size,
    check_schedule,
    consensus_rate,
    make_schedule,
    mixing_matrix,
    schedule_period,
)


@st.composite
def worlds(draw, largest=200):
    n = draw(st.integers(1, largest))
    return n, draw(st.integers(min(2, n), n))


def on_nodes(world, nodes, seed):
    n, g = world
    return GridSchedule(n, g, [(rank * seed + rank // 3) % nodes for rank in range(n)])


def grids_on_nodes(largest=200):
    return st.builds(on_nodes, worlds(largest), st.integers(1, 9), st.integers(0, 20))


def schedules(largest=200):
    makes = [GridSchedule, ShuffleSchedule, lambda n, g: make_schedule("auto", n, g)]
    return st.one_of(
        st.builds(lambda world, make: make(*world), worlds(largest), st.sampled_from(makes)), grids_on_nodes(largest)
    )


class Pairs:
    """A user's schedule without a `period`."""

    world_size = 4

    def __init__(self, partition=lambda step: ((0, 1), (2, 3)) if step % 3 else ((0, 3), (1, 2))):
        self.partition = partition

    def group(self, rank, step):
        return next(g for g in self.partition(step) if rank in g)


@given(schedules(), st.integers(0, 10**9))
def test_every_partition_covers_each_rank_exactly_once(schedule, t):
    assert sorted(r for group in schedule.partition(t) for r in group) == list(range(schedule.world_size))


@given(schedules(), st.integers(0, 10**9), st.integers(0, 199))
def test_group_agrees_with_partition(schedule, t, some):
    groups = {r: group for group in schedule.partition(t) for r in group}
    ranks = range(schedule.world_size) if schedule.world_size < 20 else {0, some % schedule.world_size}
    assert all(schedule.group(r, t) == groups[r] for r in ranks)
    assert all(list(group) == sorted(group) for group in schedule.partition(t))


@given(st.one_of(st.builds(lambda world: GridSchedule(*world), worlds(60)), grids_on_nodes(60)), st.integers(0, 20))
def test_grid_reaches_exact_consensus_after_any_k_steps(schedule, t):
    n, product = schedule.world_size, np.eye(schedule.world_size)
    for i in range(schedule.period):
        product = mixing_matrix(schedule, t + i) @ product
    np.testing.assert_allclose(product, np.full((n, n), 1 / n), atol=1e-15)
    assert consensus_rate(schedule) == 0.0


@given(worlds())
def test_grid_needs_no_more_groups_than_exact_ones_of_g_would(world):
    n, g = world
    schedule = GridSchedule(n, g)
    assert math.prod(schedule.dims) == n
    assert schedule.period == 1 or g ** (schedule.period - 1) < n
    if n > 1 and math.isclose(math.log(n, g), round(math.log(n, g))):
        assert set(schedule.dims) == {g}


@given(st.integers(1, 6), st.integers(1, 12), st.integers(2, 8), st.randoms())
def test_a_grid_is_laid_out_node_by_node_however_ranks_are_numbered(nodes, each, g, random):
    """The more exchanges stay within nodes, the better; no order of the axes has more."""
    n, number = nodes * each, [i for i in range(nodes) for _ in range(each)]
    g = min(g, n)
    inside = {s for p in permutations(GridSchedule(n, g).dims) for s in [math.prod(p[i:]) for i in range(len(p) + 1)]}
    most = max(product for product in inside if each % product == 0)
    random.shuffle(number)
    schedule = GridSchedule(n, g, number)
    assert sorted(schedule.dims) == sorted(GridSchedule(n, g).dims)
    reached = math.prod(
        len(schedule.partition(t)[0])
        for t in range(schedule.period)
        if all(len({number[rank] for rank in group}) == 1 for group in schedule.partition(t))
    )
    assert reached == most


def test_ranks_that_slurm_deals_out_in_turn_still_pair_up_within_nodes():
    cyclic = GridSchedule(8, 2, nodes=["n1", "n2"] * 4)
    assert cyclic.partition(0) == ((0, 1), (2, 3), (4, 5), (6, 7))  # between nodes
    assert cyclic.partition(1) == ((0, 4), (2, 6), (1, 5), (3, 7))
    assert cyclic.partition(2) == ((0, 2), (4, 6), (1, 3), (5, 7))
    assert repr(cyclic) == "GridSchedule(world_size=8, group_size=2, nodes=(0, 1, 0, 1, 0, 1, 0, 1))"
    assert eval(repr(cyclic)).partition(1) == cyclic.partition(1)
    three = GridSchedule(6, 2, nodes="aaabbb")  # 3 times 2: pairs within nodes of 3 would leave one out
    assert (three.dims, three.partition(1)) == ((2, 3), ((0, 1, 2), (3, 4, 5)))
    assert repr(GridSchedule(4, 2, nodes="aabb")) == repr(GridSchedule(4, 2))  # as they were
    with pytest.raises(ValueError, match=r"nodes has 3 entries for 4 ranks.*HINT"):
        GridSchedule(4, 2, nodes="aab")


@given(worlds(80), st.integers(0, 100), st.integers(0, 100))
def test_mixing_matrices_keep_the_mean(world, seed, t):
    w = mixing_matrix(ShuffleSchedule(*world, seed), t)
    assert w.dtype == np.float64
    np.testing.assert_allclose(w.sum(0), 1)
    np.testing.assert_allclose(w, w.T)


@given(worlds(), st.integers(-(10**6), 10**6), st.integers(0, 100))
def test_shuffle_sizes_differ_by_at_most_one_and_nobody_is_alone(world, seed, t):
    n, g = world
    sizes = [len(group) for group in ShuffleSchedule(n, g, seed).partition(t)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(n, 2)


@settings(max_examples=30)
@given(worlds(60), st.integers(0, 1000))
def test_shuffle_agrees_in_the_end(world, seed):
    assert consensus_rate(ShuffleSchedule(*world, seed)) < 1 - 1e-6


@given(worlds(), st.integers(0, 1000))
def test_shuffle_is_deterministic_in_its_seed_and_bounded(world, seed):
    one, other = ShuffleSchedule(*world, seed), ShuffleSchedule(*world, seed)
    partitions = [one.partition(t) for t in range(12)]
    assert partitions == [other.partition(t) for t in range(12)]
    assert len(set(partitions)) <= ShuffleSchedule.POOL_SIZE


def test_shuffle_is_the_same_in_another_process():
    code = "import sys; sys.path.insert(0, 'ds_lightning'); import schedule as s;"
    code += "print(s.ShuffleSchedule(23, 3, 7).partition(5))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == str(ShuffleSchedule(23, 3, 7).partition(5))


def test_seeds_differ():
    assert len({ShuffleSchedule(32, 2, seed).partition(0) for seed in range(20)}) == 20


def test_one_group_of_a_huge_world_is_fast():
    for schedule in (GridSchedule(65536, 2), ShuffleSchedule(65536, 2)):
        best = min(_seconds(lambda s=schedule: s.group(12345, 10**9)) for _ in range(20))
        assert best < 5e-4, f"{schedule}: {best:.1e} s"


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_the_papers_experiment():
    """4 workers, pairs: two steps give the mean (arXiv 2007.03298)."""
    schedule = GridSchedule(4, 2)
    assert schedule.period == 2
    np.testing.assert_array_equal(mixing_matrix(schedule, 1) @ mixing_matrix(schedule, 0), np.full((4, 4), 0.25))


def test_grid_lines_are_the_submeshes_of_a_device_mesh():
    mesh = np.arange(12).reshape(GridSchedule(12, 4).dims)
    assert GridSchedule(12, 4).partition(0) == tuple(map(tuple, mesh.T.tolist()))
    assert GridSchedule(12, 4).partition(1) == tuple(map(tuple, mesh.tolist()))


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 1), (2, 2), (3, 2), (8, 2), (9, 3), (16, 4), (64, 8), (100, 10), (10**5, 32)]
)
def test_auto_group_size(n, expected):
    assert auto_group_size(n) == expected


@pytest.mark.parametrize("n", [8, 16, 60, 127, 256, 997, 1000, 1024, 10_000, 65_536, 99_991, 100_000])
def test_a_ranks_groups_have_connections_to_order_log_n_others(n):
    schedule = make_schedule("auto", n)
    groups = {schedule.group(n // 3, t) for t in range(schedule.period)}
    assert sum(len(group) - 1 for group in groups) <= (7 if isinstance(schedule, GridSchedule) else 26) * math.log2(n)


@pytest.mark.parametrize(
    ("n", "g", "kind"),
    [(2, "auto", GridSchedule), (3, "auto", GridSchedule), (6, "auto", GridSchedule), (12, "auto", GridSchedule)]
    + [(64, "auto", GridSchedule), (64, 16, GridSchedule), (8, 8, GridSchedule)]
    + [(5, "auto", ShuffleSchedule), (7, 2, ShuffleSchedule), (127, "auto", ShuffleSchedule), (10, 2, ShuffleSchedule)],
)
def test_auto_takes_a_grid_where_factors_are_near_the_group_size(n, g, kind):
    assert type(make_schedule("auto", n, g)) is kind


@pytest.mark.parametrize(("n", "g", "dims"), [(16, 4, (4, 4)), (8, 4, (4, 2)), (64, 16, (16, 4)), (6, 2, (3, 2))])
def test_grid_uses_the_group_size_where_it_divides(n, g, dims):
    assert GridSchedule(n, g).dims == dims


def test_a_users_schedule_needs_no_period():
    assert isinstance(Pairs(), Schedule)
    assert schedule_period(Pairs()) == 3
    check_schedule(Pairs())
    assert 0 <= consensus_rate(Pairs()) < 1


def test_a_schedule_that_never_mixes_has_rate_one():
    assert consensus_rate(Pairs(lambda step: ((0, 1), (2, 3)))) == pytest.approx(1.0)


@pytest.mark.parametrize("make", [GridSchedule, ShuffleSchedule])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0), r"group_size=0 is too small.*HINT: use 2 to 4"),
        ((4, -1), "group_size=-1 is too small"),
        ((4, 1), "group_size=1 is too small: a group of one averages nothing"),
        ((4, 5), "group_size=5 is larger than the world size 4.*HINT: use 2 to 4"),
        ((4, 2.0), "group_size=2.0 is not an int but a float.*HINT: use group_size=2"),
        ((4, "2"), "group_size='2' is not an int but a str"),
        ((4, True), "group_size=True is not an int but a bool"),
        ((0, 2), "world_size=0 is too small"),
    ],
)
def test_bad_sizes(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("gird", "schedule='gird' is unknown. HINT: use one of 'auto', 'grid', 'shuffle'"),
        ("topology", "schedule='topology' needs a network to plan for"),
        (GridSchedule(8, 2), r"is for 8 ranks but the world size is 4. HINT"),
        (object(), "is no schedule: it needs `world_size`"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(schedule, 4)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (((0, 1), (1, 2, 3)), "rank 1 in two groups of step 0"),
        (((0, 1), (2,)), r"leaves out ranks \[3\] at step 0"),
        (((0, 1), (2, 4)), "rank 4 in group"),
        (((0, 1), (2, 3.0)), "rank 3.0 in group"),
    ],
)
def test_malformed_partitions(partition, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(Pairs(lambda step: partition))


def test_partitions_used_in_turn():
    schedule = CyclicSchedule([[(3, 0), (1, 2)], [(0,), (1,), (2, 3)]])
    assert isinstance(schedule, Schedule)
    assert (schedule.world_size, schedule_period(schedule)) == (4, 2)
    assert [schedule.partition(t) for t in (0, 3)] == [((0, 3), (1, 2)), ((0,), (1,), (2, 3))]
    assert [schedule.group(3, t) for t in (0, 1, 2)] == [(0, 3), (2, 3), (0, 3)]
    check_schedule(schedule)
    assert repr(schedule) == repr(CyclicSchedule([[(0, 3), (1, 2)], [(0,), (1,), (2, 3)]]))
    assert repr(schedule) != repr(CyclicSchedule([[(0, 3), (1, 2)], [(0,), (2,), (1, 3)]]))


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ([], "partitions is empty, or has an empty one or an empty group. HINT: give each rank a group"),
        ([[]], "partitions is empty, or has an empty one"),
        ([[(0,), ()]], "partitions is empty, or has an empty one or an empty group"),
        ([[0, 1], [2, 3]], r"partitions=\[\[0, 1\], \[2, 3\]\] is no list of lists of groups"),
        (None, "partitions=None is no list of lists of groups"),
        ([[(0, 1), (1, 2)]], "has rank 1 in two groups of step 0"),
        ([[(0, 1)], [(0,)]], r"leaves out ranks \[1\] at step 1"),
        ([[(0, 1)], [(0,), (2,)]], r"has rank 2 in group \(2,\) of step 1"),
        ([[(0, 1.0)]], "rank=1.0 is not an int but a float"),
    ],
)
def test_what_is_no_list_of_partitions(partitions, message):
    with pytest.raises(ValueError, match=message):
        CyclicSchedule(partitions)


def test_a_schedule_that_contradicts_itself():
    class Contradiction(Pairs):
        def group(self, rank, step):
            return (0, 1)

    with pytest.raises(ValueError, match="contradicts itself at step 0"):
        check_schedule(Contradiction())


def test_a_schedule_that_never_repeats():
    endless = Pairs(lambda step: ((0, 1), (2, 3)) if step % 300 else ((0, 3), (1, 2)))
    with pytest.raises(ValueError, match="does not repeat within 256 steps"):
        schedule_period(endless)


@pytest.mark.parametrize("rank", [-1, 4])
def test_ranks_outside_the_world(rank):
    for schedule in (GridSchedule(4, 2), ShuffleSchedule(4, 2)):
        with pytest.raises(ValueError, match="outside the world"):
            schedule.group(rank, 0)


def test_the_module_is_pure_python():
    code = "import sys, types; sys.modules['torch'] = None; sys.path.insert(0, 'ds_lightning'); import schedule"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
