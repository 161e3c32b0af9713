"""The benchmark of time to accuracy, and the all-reduce by racks that it compares with."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import accuracy, arms, curves, learning
from benchmarks.accuracy import Slow
from benchmarks.arms import check_arm, dssync_options
from benchmarks.cluster import SETTINGS, Cluster, ClusterError, check_machine
from benchmarks.curves import Run
from benchmarks.hierarchical import HierarchicalMean, racks_of
from benchmarks.learning import Learned, Point, reached
from ds_lightning.cost import Network, ddp_step_seconds
from ds_lightning.topology import Topology
from tests.ranks import run_ranks

try:
    check_machine()
    LACKS = ""
except ClusterError as error:
    LACKS = str(error)
needs_cluster = pytest.mark.skipif(bool(LACKS), reason=LACKS)


# ---- the all-reduce by racks ----------------------------------------------------------------------------------------


def far_from_the_mean(rank: int, racks: list[list[int]]) -> float:
    """The largest difference from gloo's own all-reduce, over tensors that do and do not divide into shards."""
    hierarchical = HierarchicalMean(racks, timedelta(seconds=20))
    farthest = 0.0
    for length in (1, 5, 37, 1000):
        x = torch.randn(length, generator=torch.Generator().manual_seed(rank))
        mean = x.clone()
        dist.all_reduce(mean)
        hierarchical.mean_(x)
        farthest = max(farthest, float((x - mean / dist.get_world_size()).abs().max()))
    return farthest


@pytest.mark.parametrize(
    "racks",
    [
        [[0, 1], [2, 3]],
        [[0, 2, 4], [1, 3, 5]],
        [[0, 1, 2]],
        [[0], [1], [2]],
        [[0, 1], [2, 3], [4, 5]],
        [[0, 3], [1, 2, 4]],  # unlike
        [[0, 1, 2, 3], [4, 5, 6], [7]],
    ],
)
def test_a_mean_by_racks_is_the_mean(racks):
    assert max(run_ranks(far_from_the_mean, sum(map(len, racks)), racks, timeout=30)) < 1e-6


def gradients(rank: int, racks: list[list[int]] | None) -> list[torch.Tensor]:
    """Of the third step of DDP, which has many buckets, with the hook or without."""
    torch.manual_seed(0)
    net = DistributedDataParallel(
        nn.Sequential(*[nn.Linear(48, 48) for _ in range(6)]), bucket_cap_mb=0.02, gradient_as_bucket_view=True
    )
    if racks is not None:
        net.register_comm_hook(None, HierarchicalMean(racks, timedelta(seconds=20)).hook)
    torch.manual_seed(rank + 1)
    for _ in range(3):
        net.zero_grad()
        net(torch.randn(4, 48)).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def test_buckets_of_ddp_become_the_mean_over_all_ranks():
    plain = run_ranks(gradients, 4, None, timeout=30)
    for mine in run_ranks(gradients, 4, [[0, 1, 2], [3]], timeout=30):
        torch.testing.assert_close(mine, plain[0])


class Failing(HierarchicalMean):
    def mean_(self, flat: torch.Tensor) -> None:
        raise ZeroDivisionError("division by zero")


def fail_in_the_hook(rank: int) -> str:
    net = DistributedDataParallel(nn.Linear(2, 2))
    hierarchical = Failing([[0, 1]], timedelta(seconds=20))
    net.register_comm_hook(None, hierarchical.hook)
    try:
        net(torch.randn(1, 2)).sum().backward()
    except Exception as error:
        return str(error)
    return "nothing"


def test_an_error_in_the_worker_is_raised_by_backward():
    assert all("division by zero" in message for message in run_ranks(fail_in_the_hook, 2, timeout=30))


def refused(rank: int, racks: list[list[int]]) -> str:
    with pytest.raises(ValueError, match="exactly once") as error:
        HierarchicalMean(racks, timedelta(seconds=20))
    return str(error.value)


@pytest.mark.parametrize("racks", [[[0]], [[0, 1], [1]], [[0, 1], []], [[0, 1, 2]]])
def test_racks_without_each_rank_once_are_refused(racks):
    assert run_ranks(refused, 2, racks, timeout=30)[1].startswith("racks are [[0")


def test_racks_are_the_ranks_below_a_switch():
    interleaved = Topology.parse(Cluster(5, 100, SETTINGS["oversubscribed-interleaved"]).description())
    assert racks_of(interleaved) == [[0, 2, 4], [1, 3]]
    four = Topology.parse(Cluster(8, 100, SETTINGS["four-racks"]).description())
    assert racks_of(four) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_an_all_reduce_by_racks_takes_is_predicted():
    topology = Cluster(8, 100, SETTINGS["oversubscribed-interleaved"]).description()
    network = Network(Topology.parse(topology))
    takes = ddp_step_seconds(network.hierarchical_seconds(4_000_000), 0.05)
    assert arms.predict("ddp-hierarchical", topology, 4_000_000, 0.05) == takes
    assert takes < arms.predict("ddp", topology, 4_000_000, 0.05) / 2  # 3.5 models cross a trunk beside 1


def test_an_arm_may_keep_its_plan():
    assert check_arm("dssync-topology-fixed", 8) == "dssync-topology-fixed"
    assert dssync_options("dssync-topology-fixed") == {"schedule": "topology", "adapt": False}
    assert dssync_options("dssync-topology-fixed-every2-int8") == {
        "schedule": "topology", "adapt": False, "sync_every": 2, "wire_dtype": "int8",
    }  # fmt: skip
    for wrong in ("dssync-fixed", "dssync-g4-fixed", "dssync-topology-int8-fixed"):
        with pytest.raises(ValueError, match=r"is no arm\. HINT: ddp, .*-topology\[-fixed\]"):
            dssync_options(wrong)


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hosts", "1"], "--hosts is 1, but must be 2 to 64"),
        (["--rate", "nan"], "--rate is nan, but must be positive"),
        (["--lr", "0"], "--lr is 0.0, but must be positive"),
        (["--width", "0"], "--width is 0, but must be 1 to 64"),
        (["--depth", "11"], "depth is 11, but a wide ResNet has depth 6n + 2 or 6n + 4"),
        (["--batch-size", "200"], "--batch-size 200 on 8 hosts takes 1600 images a step, but there are 1167"),
        (["--target", "96"], "--target is 96.0, but an accuracy is above 0 and at most 1"),
        (["--steps", "25", "--eval-every", "10"], "--eval-every is 10, but must divide --steps 25"),
        (["--eval-every", "0"], "--eval-every is 0, but must divide"),
        (["--settings", "fast"], "--settings has 'fast'. HINT: homogeneous,"),
        (["--settings", "loopback"], "--arms has dssync-topology, but ranks of the setting loopback have no links"),
        (["--settings", "loopback", "--arms", "ddp", "--slow", "1:0.5:1:1"], "--slow is given, but ranks of the"),
        (["--settings", "contended", "--slow", "1:0.5:1:1"], "links of the setting contended change their rates"),
        (["--settings", "four-racks", "--hosts", "3"], "hosts is 3, but a cluster of 4 racks has 4 to 64"),
        (["--arms", "bsp"], "'bsp' is no arm. HINT: ddp,"),
        (["--slow", "5"], "--slow is '5', but must be RANK:SHARE:START:SECONDS"),
        (["--output", __file__], "is a file, but results need a folder"),
    ],
)
def test_bad_arguments_end_before_anything_is_made(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "check_machine", lambda *_: None)
    monkeypatch.setattr(accuracy, "run_all", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit, match="2"):
        accuracy.main(argv)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.5:1:1", "must be RANK:SHARE:START:SECONDS"),
        ("1:0.5:1", "must be RANK:SHARE:START:SECONDS"),
        ("1:0.5:1:1:1", "must be RANK:SHARE:START:SECONDS"),
        ("8:0.5:1:1", "--slow has rank 8, but 8 hosts have ranks 0 to 7"),
        ("-1:0.5:1:1", "--slow has rank -1"),
        ("1:0:1:1", "a share of 0, but"),
        ("1:1.5:1:1", "a share of 1.5, but"),
        ("1:nan:1:1", "a share of nan, but"),
        ("1:0.5:-1:1", "starts after -1 s for 1 s, but"),
        ("1:0.5:1:0", "starts after 1 s for 0 s, but"),
        ("1:0.5:1:inf", "starts after 1 s for inf s, but"),
    ],
)
def test_what_is_slow_is_spelt_out(text, message):
    assert Slow.parse("7:1:0:0.5", 8) == Slow(7, 1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match=message):
        Slow.parse(text, 8)


def test_the_defaults_are_valid(monkeypatch):
    monkeypatch.setattr(accuracy, "check_machine", lambda *_: None)
    args = accuracy.parse([])
    assert args.settings == ["homogeneous", "oversubscribed", "straggler"]
    assert 1e6 < args.parameters < 2e6
    assert args.slow is None
    assert accuracy.parse(["--slow", "5:0.25:6:60"]).slow == Slow(5, 0.25, 6, 60)


# ---- curves ---------------------------------------------------------------------------------------------------------


def made_up(setting: str, arm: str, seed: int, step: float, accuracies: list[float], slowed=None) -> Run:
    """Evaluations every 10 steps, each after 1 s of consensus."""
    curve, ends, now = [], [], 0.0
    for i, value in enumerate(accuracies, start=1):
        for _ in range(10):
            now += step
            ends.append(now)
        now += 1
        curve.append(Point(10 * i, now, value))
    return Run(setting, arm, seed, curve, ends, slowed)


def test_the_target_counts_where_two_evaluations_in_a_row_reach_it():
    run = made_up("a", "ddp", 0, 1.0, [0.5, 0.97, 0.9, 0.96, 0.98, 0.99])
    assert reached(run.curve, 0.96) == Point(40, 44, 0.96)
    assert reached(run.curve[:4], 0.96) is None
    assert reached([], 0.96) is None


def test_the_clock_stands_still_in_pauses():
    learned = Learned([], [], 100.0, [(110.0, 115.0), (120.0, 122.0)])
    assert [learned.clock(at) for at in (100, 110, 112, 115, 119, 121, 130)] == [0, 10, 10, 10, 14, 15, 23]


def test_times_to_the_target_are_means_over_seeds_that_all_reached_it():
    good, late, never = [0.9, 0.96, 0.97, 0.98], [0.9, 0.9, 0.97, 0.96], [0.9, 0.9, 0.9, 0.94]
    runs = [made_up("a", "ddp", seed, 2.0, good) for seed in range(2)]
    runs += [made_up("a", "dssync", 0, 0.5, good), made_up("a", "dssync", 1, 0.5, late)]
    runs += [made_up("a", "ddp-bf16", 0, 1.0, good), made_up("a", "ddp-bf16", 1, 1.0, never)]
    runs += [made_up("b", "dssync", 0, 0.5, never)]
    rows = {(row.setting, row.arm): row for row in curves.summarize(runs, 0.96)}
    assert rows["a", "ddp"].step == pytest.approx(2)  # without the consensus
    assert rows["a", "ddp"].consensus == pytest.approx(1)
    assert (rows["a", "ddp"].steps, rows["a", "ddp"].seconds, rows["a", "ddp"].ratio) == (20, 42, 1)
    mine = rows["a", "dssync"]
    assert (mine.steps, mine.seconds) == (25, (12 + 18) / 2)
    assert mine.ratio == pytest.approx((42 / 12 + 42 / 18) / 2)
    assert mine.run == 24
    assert mine.accuracy == pytest.approx(0.97)
    assert mine.spread == pytest.approx(0.02 / 2**0.5)
    assert (rows["a", "ddp-bf16"].hits, rows["a", "ddp-bf16"].seconds) == (1, None)
    text = curves.markdown(list(rows.values()), {"a": "Setting A"})
    assert "### Setting A" in text
    assert "| dssync | 0.500 | 1.000 | 25 | 15.0 | 2.92 | 24.0 | 0.9700 ± 0.0141 |" in text
    assert "| ddp-bf16 | 1.000 | 1.000 | not reached by 1 of 2 seeds |" in text
    assert "| dssync | 0.500 | 1.000 | not reached | not reached |  | 24.0 | 0.9400 |" in text


def test_every_arm_keeps_its_colour_and_unknown_ones_have_one_of_their_own():
    looks = curves.looks(["ddp", "dssync-g4", "dssync-topology", "dssync-g8-int8", "ddp"])
    assert looks["ddp"] == curves.looks(["ddp"])["ddp"]
    assert len({colour for colour, _ in looks.values()}) == 4


def test_the_picture_is_drawn(tmp_path):
    good, never = [0.9, 0.96, 0.97, 0.98], [0.9]
    runs = [made_up("a", "ddp", seed, 2.0, good, (5.0, 12.0)) for seed in range(2)]
    runs += [made_up("a", "dssync-g4", 0, 0.5, good), made_up("b", "dssync", 0, 0.5, never)]
    curves.plot(runs, {}, 0.96, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_means_over_seeds_end_with_the_shortest():
    curve = curves.mean_curve([made_up("a", "ddp", 0, 1.0, [0.5, 0.7]).curve, [Point(10, 13.0, 0.6)]])
    assert curve == [Point(10, 12.0, 0.55)]


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "lasts"), [(0.1, True), (60, False)])
def test_a_link_is_slowed_and_always_at_its_rate_afterwards(seconds, lasts):
    calls = []
    cluster = SimpleNamespace(slow=lambda rank, share: calls.append((rank, share, time.monotonic())))
    begun = multiprocessing.get_context("fork").Event()
    threading.Timer(0.2, begun.set).start()
    start = time.monotonic()
    with accuracy.slowing(cluster, Slow(1, 0.5, 0.1, seconds), begun) as moments:
        time.sleep(0.7)
    assert time.monotonic() - start < 5
    (_, share, began), (_, after, ended) = calls
    assert (share, after) == (0.5, 1)
    assert began - start > 0.3
    assert (ended - start < 0.7) == lasts
    assert len(moments) == 2


def test_a_link_is_left_alone_where_the_run_ends_first():
    begun = multiprocessing.get_context("fork").Event()
    with accuracy.slowing(SimpleNamespace(), Slow(1, 0.5, 60, 1), begun) as moments:
        pass
    assert moments == []


@needs_cluster
@pytest.mark.slow
def test_times_to_accuracy_of_real_fits_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "exit_on_sigterm", lambda: None)
    argv = "--hosts 4 --width 1 --steps 6 --eval-every 2 --settings oversubscribed --target 0.01 --stop-at-target"
    argv += " --arms ddp ddp-hierarchical post-local-sgd dssync-topology --slow 3:0.5:0:60 --timeout 60"
    assert accuracy.main([*argv.split(), "--output", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "accuracy").iterdir()
    assert (folder / "accuracy.png").stat().st_size > 10_000
    assert "| dssync-topology |" in (folder / "table.md").read_text()
    record = json.loads((folder / "runs.json").read_text())
    assert record["command"].startswith("python -m benchmarks.accuracy --hosts 4 --width 1")
    runs = {run["arm"]: run for run in record["runs"]}
    assert list(runs) == ["ddp", "ddp-hierarchical", "post-local-sgd", "dssync-topology"]
    for run in runs.values():
        assert [point["step"] for point in run["curve"]] == [2, 4]  # two evaluations reach what is easy
        assert len(run["ends"]) == 4
        begin, end = run["slowed"]
        assert 0 <= begin < end <= run["ends"][-1]
    # Sums in another order apart, the hook is DDP.
    for mine, plain in zip(runs["ddp-hierarchical"]["curve"], runs["ddp"]["curve"], strict=True):
        assert mine["accuracy"] == pytest.approx(plain["accuracy"], abs=0.02)


def test_a_run_alone_learns_and_is_the_same_again(monkeypatch):
    """On this process, without any wire: what is trained and how its curve is taken."""
    training = learning.Training(1, 10, 32, 0.1, 24, 12, 0.99, False)
    first, again = (run_ranks(learn_alone, 1, training, timeout=60, init=False)[0] for _ in range(2))
    assert [point.step for point in first.curve] == [12, 24]
    assert [point.accuracy for point in first.curve] == [point.accuracy for point in again.curve]
    assert first.curve[-1].accuracy > 0.5
    assert len(first.ends) == 24
    assert first.ends == sorted(first.ends)
    assert first.curve[0].seconds >= first.ends[11]
    assert first.ends[12] - first.curve[0].seconds < first.pauses[0][1] - first.pauses[0][0] + 1


def learn_alone(rank: int, training: learning.Training) -> Learned:
    return learning.learn(rank, "compute", training, 0, 1, None, 30)
