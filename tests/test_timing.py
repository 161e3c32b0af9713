"""``simulate time``: clusters that are made up, what steps take on them, and the command's files and errors."""

import csv
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from ds_lightning import __main__ as command_line
from ds_lightning import timing, timing_command
from ds_lightning.clusters import generate
from ds_lightning.cost import Network, ddp_step_seconds, rounds, step_seconds
from ds_lightning.flows import Contention, Run, followed_step_seconds
from ds_lightning.schedule import CyclicSchedule, GridSchedule
from ds_lightning.timing import NAMES, Setting, run, schedule, walk
from ds_lightning.timing_command import main
from ds_lightning.topology import Topology

MB = 1e6
SCHEDULES = ("pairs", "grid", "shuffle")


def small(**options):
    """16 ranks on 8 hosts in 2 racks."""
    return generate(16, hosts_per_rack=4, ranks_per_host=2, bandwidth=10, **options)


def ends_of(setting, name, steps):
    return np.array([ends for ends, _ in walk(setting, name, steps)])


# Clusters.


def test_a_cluster_has_what_was_asked_for():
    topology = generate(1024, hosts_per_rack=32, ranks_per_host=8, bandwidth=25, oversubscription=4, latency=0.05)
    assert topology.world_size == 1024
    assert len(topology.hosts) == 128
    assert topology.switches == ("core", "rack0", "rack1", "rack2", "rack3")
    assert all(len(topology.children[f"rack{i}"]) == 32 for i in range(4))
    assert topology.links["n5"].up == topology.links["n5"].down == 25
    assert topology.links["rack3"].up == topology.links["rack3"].down == 32 * 25 / 4
    assert {link.latency for link in topology.links.values()} == {0.05}
    assert topology.ranks["n127"] == tuple(range(1016, 1024))


def test_what_is_left_over_makes_smaller_hosts_and_racks():
    topology = generate(21, hosts_per_rack=4, ranks_per_host=4, bandwidth=10, oversubscription=2)
    assert [len(topology.ranks[host]) for host in topology.hosts] == [4, 4, 4, 4, 4, 1]
    assert topology.links["rack0"].up == 20
    assert topology.links["rack1"].up == 10


def test_a_single_rack_has_no_trunk():
    topology = generate(16, hosts_per_rack=8, ranks_per_host=2)
    assert topology.switches == ("core",)
    assert len(topology.links) == 8


def test_stragglers_are_drawn_by_the_seed():
    slow = [
        {host for host in t.hosts if t.links[host].up == 5}
        for t in (generate(800, bandwidth=20, stragglers=0.05, straggler_share=0.25, seed=seed) for seed in (3, 3, 4))
    ]
    assert len(slow[0]) == len(slow[2]) == 5
    assert slow[0] == slow[1] != slow[2]
    assert sum(link.up < 25 for link in generate(64, stragglers=0.001, oversubscription=1).links.values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "ranks=0 is too small"),
        ({"ranks": 10**9}, "too large"),
        ({"ranks_per_host": 0}, "ranks_per_host=0"),
        ({"hosts_per_rack": -1}, "hosts_per_rack=-1"),
        ({"bandwidth": 0.0}, "bandwidth=0"),
        ({"oversubscription": -4.0}, "oversubscription=-4"),
        ({"latency": -1.0}, "latency=-1"),
        ({"stragglers": 1.5}, "stragglers=1.5 is no share"),
        ({"straggler_share": 0.0}, "straggler_share=0"),
        ({"seed": -1}, "seed=-1 is negative"),
    ],
)
def test_clusters_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"ranks": 64, **options})


# Where nothing varies, times are those of the cost model.


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_recurrence_is_that_of_the_cost_model(name, overlap):
    setting = Setting(small(latency=0.1), 100 * MB, 0.2, overlap, event_ranks=0)
    period = rounds(schedule(setting, name))
    settling, measured = (-(-steps // len(period)) * len(period) for steps in (24, 48))
    ends = ends_of(setting, name, settling + measured).mean(axis=1)
    expected = step_seconds(setting.network, period, setting.size, setting.compute, overlap)
    assert (ends[-1] - ends[settling - 1]) / measured == pytest.approx(expected)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("event_ranks", [0, 32])
def test_a_schedule_in_parts(event_ranks, overlap, monkeypatch):
    """Links are busy with what all parts put on them, and times are those of the cost model."""
    partitions = [GridSchedule(16, 2).partition(t) for t in range(4)]
    in_parts = CyclicSchedule([*partitions[:3], [[rank] for rank in range(16)]], 4)
    monkeypatch.setattr(timing, "schedule", lambda *_: in_parts)
    setting = Setting(small(latency=0.1), 100 * MB, 0.02, overlap, event_ranks=event_ranks)
    period, found = rounds(in_parts), run(setting, "own", 96)
    time = followed_step_seconds if event_ranks else step_seconds
    expected = time(setting.network, period, setting.size, setting.compute, overlap)
    assert (found.ends[-1, 0] - found.ends[23, 0]) / 72 == pytest.approx(expected, rel=0.02)
    one = sum(setting.network.traffic(groups) for groups in period) / 4
    np.testing.assert_allclose(found.busy, one * setting.network.seconds_per_byte * setting.size)


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_ranks_are_followed_event_by_event(name):
    setting = Setting(small(stragglers=0.1), 100 * MB, 0.2)
    followed = Run(setting.network, rounds(schedule(setting, name)), setting.size, 0.2, True).ends(12)
    assert ends_of(setting, name, 12) == pytest.approx(followed)


@pytest.mark.parametrize("name", ["ddp", "hierarchical"])
def test_all_reduces_take_what_the_cost_model_says(name):
    setting = Setting(small(latency=0.1), 100 * MB, 0.2)
    network = setting.network
    wire = network.ring_seconds(range(16), 100 * MB) if name == "ddp" else network.hierarchical_seconds(100 * MB)
    assert run(setting, name, 5).steps == pytest.approx([ddp_step_seconds(wire, 0.2)] * 5)


def test_local_sgd_meets_every_few_steps():
    setting = Setting(small(), 100 * MB, 0.2, local_steps=3)
    wire = setting.network.ring_seconds(range(16), 100 * MB)
    assert run(setting, "local", 7).steps == pytest.approx([0.2, 0.2, 0.2 + wire] * 2 + [0.2])


def test_the_traffic_of_a_ring_and_of_a_hierarchy():
    network = Network(small())
    ring, tree = network.ring_traffic(range(16)), network.hierarchical_traffic()
    # Each link below a switch is left once; 2 (N - 1) / N models.
    assert ring == pytest.approx([2 * 15 / 16] * 10)
    of = dict(zip(network.nodes, tree, strict=True))
    # Of a host: 2 (4 - 1) / 4 models among those of the rack, then a quarter of 2 (2 - 1) / 2 among racks.
    assert of["n0"] == pytest.approx(1.5 + 0.25)
    assert of["rack1"] == pytest.approx(1.0)


def test_a_switch_at_two_heights_adds_up_what_is_below_it():
    text = "bandwidth: 10\nswitches: {core: {}, s: {to: core}, t: {to: s}}\nhosts: {a: {to: s}, b: {to: t}, c: {to: t}"
    network = Network(Topology.parse(text + ", d: {to: core}}"))
    busiest = max(traffic[network.nodes.index("s")] for traffic, _ in network._hierarchy)
    assert busiest == pytest.approx(1.0)  # a's and t's halves of 2 (2 - 1) / 2 models


# What varies.


@pytest.mark.parametrize("event_ranks", [0, 32])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "topology"])
def test_contention_slows_every_schedule(name, event_ranks):
    calm = Setting(small(), 100 * MB, 0.2, event_ranks=event_ranks)
    mean = run(calm, name, 20).mean
    assert mean < run(replace(calm, contention=0.5, contention_period=1), name, 20).mean < 4.01 * mean


@pytest.mark.parametrize("name", [name for name in NAMES if name != "topology"])
def test_jitter_slows_every_schedule(name):
    # Not event by event: there it spreads what ranks send, and a link that they share is idle for less of the time.
    calm = Setting(small(), 100 * MB, 0.2, overlap=False, event_ranks=0)
    mean = run(calm, name, 20).mean
    assert 1.01 * mean < run(replace(calm, jitter=0.3), name, 20).mean < 2 * mean


@pytest.mark.parametrize("overlap", [True, False])
def test_events_and_recurrence_agree_where_no_link_is_shared(overlap):
    topology = Topology.flat([*"abcdefgh"], bandwidth=10, latency=1)
    followed = Setting(topology, 100 * MB, 0.2, overlap, jitter=0.5)
    expected = ends_of(replace(followed, event_ranks=0), "pairs", 20)
    assert ends_of(followed, "pairs", 20) == pytest.approx(expected)


def test_all_schedules_meet_the_same_cluster():
    def shares(seed):
        others = Setting(small(), MB, contention=0.3, seed=seed).others
        return np.array([others.shares(period) for period in range(200)])

    assert (shares(1) == shares(1)).all()
    assert (shares(1) != shares(2)).any()
    slow = shares(1)[shares(1) < 1]
    assert 0.25 < len(slow) / shares(1).size < 0.35
    assert slow.min() >= 0.25
    assert slow.mean() == pytest.approx(0.625, abs=0.03)
    setting = Setting(small(), MB, 0.2, jitter=0.1)
    assert (setting.computing(3) == setting.computing(3)).all()
    assert (setting.computing(3) != setting.computing(4)).all()
    assert np.mean([setting.computing(t) for t in range(500)]) == pytest.approx(0.2, rel=0.01)


def test_a_followed_run_sees_links_change_in_the_middle_of_a_transfer():
    network = Network(Topology.flat(["a", "b"], bandwidth=10))

    class Halved(Contention):
        def shares(self, period):
            return np.array([1.0, 0.5 if period == 1 else 1.0])

    others = Halved(2, 1.0, period=1.0, seed=0)
    alone = network.seconds_per_byte[0]
    ends = Run(network, rounds(GridSchedule(2, 2)), 2 / alone, 0.0, True, others).ends(1)
    assert ends == pytest.approx(np.full((1, 2), 2.5))  # one second, half of one in the next, the rest


def test_an_all_reduce_waits_for_the_slowest_rank():
    setting = Setting(small(), 100 * MB, 0.2, jitter=0.3)
    wire = setting.network.ring_seconds(range(16), 100 * MB)
    expected = [ddp_step_seconds(wire, setting.computing(t).max()) for t in range(6)]
    assert run(setting, "ddp", 6).steps == pytest.approx(expected)


def test_stragglers_hold_up_ddp_more_than_what_is_planned():
    slow = Setting(small(stragglers=0.1, oversubscription=1), 200 * MB, 0.2)
    fast = Setting(small(oversubscription=1), 200 * MB, 0.2)
    ddp = run(slow, "ddp", 24)
    assert ddp.mean > 2 * run(fast, "ddp", 24).mean
    assert run(slow, "topology", 24).mean < 0.6 * ddp.mean
    host = slow.network.nodes[ddp.busy.argmax()]
    assert slow.topology.links[host].up == 2.5


def test_a_timing_sums_up_what_the_ranks_do():
    setting = Setting(small(stragglers=0.1), 100 * MB, 0.2, jitter=0.1)
    ends, seen = ends_of(setting, "pairs", 9), []
    found = run(setting, "pairs", 9, lambda step, row: seen.append((step, *row)))
    assert found.ends == pytest.approx(np.array([ends.mean(1), ends.min(1), ends.max(1)]).T)
    assert np.array(seen) == pytest.approx(np.column_stack([np.arange(9), found.ends]))
    assert found.slowest == ends[-1].argmax()
    computed = sum(setting.computing(t) for t in range(9))
    assert found.waiting == pytest.approx(1 - computed / ends[-1])
    assert found.spread[4, [0, 50, 100]] == pytest.approx(np.percentile(ends[4] - ends[3], (0, 50, 100)))
    assert found.mean == pytest.approx(found.steps.mean())


def test_a_hundred_thousand_ranks_in_a_grid():
    begin = time.perf_counter()
    setting = Setting(generate(100_000, stragglers=0.01, latency=0.01), 440 * MB, 0.35, jitter=0.05, contention=0.3)
    found = run(setting, "grid", 6)
    assert found.ends.shape == (6, 3)
    assert (np.diff(found.ends[:, 0], prepend=0) >= 0.3).all()
    assert time.perf_counter() - begin < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": generate(1)}, "one rank alone"),
        ({"size": 0.0}, "size=0"),
        ({"compute": -1.0}, "compute=-1"),
        ({"jitter": float("nan")}, "jitter=nan"),
        ({"contention": 2.0}, "contention=2 is no share"),
        ({"contention_period": 0.0}, "contention_period=0"),
        ({"contention_period": 1e-9}, "contention_period=1e-09 is below 0.001 s"),
        ({"local_steps": 0}, "local_steps=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Setting(**{"topology": small(), "size": 1.0, **options})


# The command.


@pytest.fixture
def command(tmp_path, capsys):
    """Run the command, and return its exit code, what was printed, and the folder of its files."""

    def command(*options):
        try:
            code: object = main([*options, "--output", str(tmp_path)])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr(), next(iter(tmp_path.glob("simulate/*")), None)

    return command


def test_a_table_a_csv_and_a_picture(command):
    code, printed, folder = command(
        *("--ranks", "16", "--ranks-per-host", "1", "--hosts-per-rack", "8", "--steps", "4", "--contention", "0.3")
    )
    assert code == 0
    assert "16 ranks on 16 hosts, 440 MB" in printed.out
    assert "event by event" in printed.out
    assert all(name in printed.out for name in NAMES)
    with (folder / "timing.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["schedule"] for row in rows[::4]] == [*NAMES]
    assert [row["step"] for row in rows[:4]] == ["0", "1", "2", "3"]
    assert all(float(row["min_end"]) <= float(row["mean_end"]) <= float(row["max_end"]) for row in rows)
    assert (folder / "timing.png").read_bytes().startswith(b"\x89PNG")


def test_a_described_cluster(command, tmp_path):
    (tmp_path / "cluster.yaml").write_text(small().to_yaml())
    options = ("--topology", str(tmp_path / "cluster.yaml"), "--schedules", "pairs", "--steps", "3")
    code, printed, _ = command(*options, "--event-ranks", "0", "--no-overlap", "--compute", "0")
    assert code == 0
    assert "16 ranks on 8 hosts" in printed.out
    assert "not overlapped" in printed.out
    assert "by the recurrence" in printed.out


def test_planning_for_too_many_ranks_is_left_out(command, monkeypatch):
    monkeypatch.setattr(timing_command, "PLAN_RANKS", 15)
    code, printed, _ = command("--ranks", "16", "--steps", "2", "--schedules", "ddp", "topology")
    assert code == 0
    assert "topology is left out" in printed.err
    assert "topology" not in printed.out.replace("topology is", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no cluster"),
        (("--ranks", "many"), "--ranks"),
        (("--ranks", "1"), "one rank alone"),
        (("--ranks", "0"), "ranks=0"),
        (("--ranks", "16", "--stragglers", "2"), "stragglers=2"),
        (("--ranks", "16", "--steps", "0"), "steps=0"),
        (("--ranks", "16", "--steps", "1000000000"), "too large"),
        (("--ranks", "16", "--schedules", "none"), "invalid choice"),
        (("--ranks", "16", "--parameters", "much"), "no number of parameters"),
        (("--ranks", "16", "--seed", "-1"), "seed=-1"),
        (("--ranks", "16", "--event-ranks", "-1"), "event_ranks=-1 is negative"),
        (("--ranks", "30000", "--schedules", "topology"), "takes minutes"),
        (("--topology", "nowhere.yaml"), "no topology nowhere.yaml"),
        (("--topology", "nowhere.yaml", "--ranks", "16"), "--ranks is for generated clusters"),
    ],
)
def test_wrong_input_is_one_line(command, options, message):
    code, printed, folder = command(*options)
    assert code == 2
    assert folder is None
    assert message in printed.err
    assert printed.err.splitlines()[-1].startswith("python -m ds_lightning simulate time: error: ")
    assert printed.err.count("error:") == 1


def test_what_is_done_is_kept_after_ctrl_c(command, monkeypatch, tmp_path, capsys):
    real = timing.walk

    def interrupted(setting, name, steps):
        for t, step in enumerate(real(setting, name, steps)):
            if name == "local" and t == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(timing, "walk", interrupted)
    words = ["simulate", "time", "--ranks", "16", "--schedules", "ddp", "local", "--steps", "5"]
    assert command_line.main([*words, "--output", str(tmp_path)]) == 130
    folder = next(tmp_path.glob("simulate/*"))
    assert len((folder / "timing.csv").read_text().splitlines()) == 1 + 5 + 2
    assert (folder / "timing.png").exists()
    assert "ddp" in capsys.readouterr().out


def test_the_command_is_registered(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ds_lightning", "simulate", "time", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--oversubscription" in done.stdout
