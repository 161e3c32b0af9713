"""The emulated cluster (real, where this machine can make one) and the benchmark of step times."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from benchmarks import arms, cluster, report, startup, step_time
from benchmarks.arms import dssync_options
from benchmarks.cluster import SETTINGS, Cluster, ClusterError, RankError, Setting, check_machine, random_walk
from benchmarks.report import Run
from ds_lightning.groups import connect, connecting_later, gather_hosts

try:
    check_machine()
    LACKS = ""
except ClusterError as error:
    LACKS = str(error)
needs_cluster = pytest.mark.skipif(bool(LACKS), reason=LACKS)
ROOT = Path(__file__).resolve().parents[1]
MB = 10**6


def namespaces_of(pid: int) -> list[str]:
    return [name for name in cluster._namespaces() if name.startswith(f"{cluster.PREFIX}-{pid}-")]


def homogeneous(hosts: int = 2, rate: float = 100) -> Cluster:
    return Cluster(hosts, rate, SETTINGS["homogeneous"])


# ---- without a cluster ----------------------------------------------------------------------------------------------


def test_without_linux_root_or_tools_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda tool: None)
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(cluster.sys, "platform", "darwin")
    with pytest.raises(ClusterError, match=r"needs Linux.*this is darwin\. HINT"):
        check_machine()
    monkeypatch.setattr(cluster.sys, "platform", "linux")
    with pytest.raises(ClusterError, match=r"needs root.*user id is 1000\. HINT: use sudo"):
        check_machine()
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    with pytest.raises(ClusterError, match=r"no ip and no tc in PATH\. HINT: install"):
        check_machine()


def test_a_contended_links_walk_is_reproducible_and_bounded():
    walk = list(itertools.islice(random_walk(3, 4), 200))
    assert walk == list(itertools.islice(random_walk(3, 4), 200))
    assert walk != list(itertools.islice(random_walk(4, 4), 200))
    shares = [share for row in walk for share in row]
    assert min(shares) == cluster.SLOWEST_SHARE
    assert max(shares) == 1
    assert all(a != b for a, b in itertools.pairwise(walk))


def test_settings_say_who_stands_where_and_how_fast():
    ordered = Cluster(8, 100, SETTINGS["oversubscribed"])
    assert [ordered.rack_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert ordered.trunk == 100  # four hosts of 100 Mbit/s, 4:1
    interleaved = Cluster(8, 100, SETTINGS["oversubscribed-interleaved"])
    assert [interleaved.rack_of(rank) for rank in range(8)] == [0, 1] * 4
    assert Cluster(4, 100, SETTINGS["straggler"]).rates == [100, 100, 100, 25]
    assert len({ordered.name, interleaved.name}) == 2
    four = Cluster(16, 100, SETTINGS["four-racks"])
    assert [four.rack_of(rank) for rank in range(16)] == sorted([0, 1, 2, 3] * 4)
    assert four.trunk == 40
    interleaved = Cluster(5, 100, Setting("", racks=3, oversubscription=5, interleaved=True))
    assert [interleaved.rack_of(rank) for rank in range(5)] == [0, 1, 2, 0, 1]
    assert interleaved.trunk == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("hosts", "setting", "slow"),
    [
        (8, SETTINGS["stragglers"], {3, 7}),
        (8, Setting("", slow=0.25, stragglers=2, interleaved=True), {6, 7}),
        (5, Setting("", slow=0.25, interleaved=True), {3}),
        (16, Setting("", racks=4, slow=0.25, stragglers=2), {11, 15}),
        (3, Setting("", slow=0.25, stragglers=3), {0, 1, 2}),
        (5, Setting("", slow=0.25, stragglers=3), {2, 3, 4}),  # 0 to 2 are in the first rack
    ],
)
def test_stragglers_stand_in_different_racks_as_long_as_there_are_some(hosts, setting, slow):
    assert Cluster(hosts, 100, setting).rates == [25 if rank in slow else 100 for rank in range(hosts)]


def test_a_cluster_is_described_for_a_planner():
    four = yaml.safe_load(Cluster(8, 100, SETTINGS["four-racks"]).description())
    assert four["switches"] == {"core": {}, **{f"rack{i}": {"to": "core", "bandwidth": 0.02} for i in range(4)}}
    assert list(four["hosts"]) == [f"host{rank}" for rank in range(8)]
    assert four["hosts"]["host5"] == {"to": "rack2", "bandwidth": 0.1, "latency": 0, "ranks": [5]}
    slow = yaml.safe_load(Cluster(6, 100, SETTINGS["straggler"]).description())
    assert [slow["switches"][f"rack{i}"]["bandwidth"] for i in range(2)] == [0.3, 0.225]
    assert slow["hosts"]["host5"] == {"to": "rack1", "bandwidth": 0.025, "latency": 0, "ranks": [5]}
    direct = yaml.safe_load(Cluster(4, 100, SETTINGS["oversubscribed-interleaved"]).description())
    assert [direct["switches"][f"rack{i}"]["bandwidth"] for i in range(2)] == [0.05, 0.05]
    assert [host["to"] for host in direct["hosts"].values()] == ["rack0", "rack1"] * 2
    far = yaml.safe_load(Cluster(4, 100, SETTINGS["high-latency"]).description())
    assert far["hosts"]["host3"]["latency"] == 10
    assert "latency" not in far["switches"]["rack0"]  # a host's link is where it is added
    with pytest.raises(ValueError, match="no links to describe"):
        Cluster(2, 100, SETTINGS["loopback"]).description()


def test_settings_beyond_the_default_run_only_where_they_are_named(monkeypatch):
    monkeypatch.setattr(step_time, "check_machine", lambda *_: None)
    default = "homogeneous oversubscribed oversubscribed-interleaved straggler contended high-latency loopback balanced"
    assert step_time.parse([]).settings == step_time.parse(["--short"]).settings == default.split()
    named = ["four-racks", "stragglers"]
    assert step_time.parse(["--short", "--settings", *named]).settings == named


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hosts", "1"], "--hosts is 1, but must be 2 to 64"),
        (["--rate", "-5"], "--rate is -5.0, but must be positive"),
        (["--parameters-mb", "nan"], "--parameters-mb is nan, but must be positive"),
        (["--compute", "-1"], "--compute is -1.0, but must be 0 or more"),
        (["--settings", "four-racks", "--hosts", "3"], "hosts is 3, but a cluster of 4 racks has 4 to 64"),
        (["--settings", "fast"], "--settings has 'fast'. HINT: homogeneous,"),
        (["--arms", "bsp"], "'bsp' is no arm. HINT: ddp,"),
        (["--arms", "dssync-g8", "--hosts", "4"], "groups of 8, but with 4 hosts they are of 2 to 4"),
    ],
)
def test_bad_arguments_end_before_anything_is_made(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "check_machine", lambda *_: None)
    monkeypatch.setattr(step_time, "run_all", lambda args: pytest.fail("ran"))
    with pytest.raises(SystemExit, match="2"):
        step_time.main(argv)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_setting_that_the_kernel_lacks_is_skipped_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(cluster.sys, "platform", "linux")
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(cluster, "_kernel_has_netem", lambda: False)
    args = step_time.parse(["--short"])
    assert "high-latency" not in args.settings
    assert "netem, which this kernel lacks" in args.skipped["high-latency"]
    with pytest.raises(SystemExit, match="2"):
        step_time.parse(["--settings", "high-latency"])
    assert "no setting is left" in capsys.readouterr().err


def test_an_arms_name_spells_the_strategys_options():
    assert dssync_options("dssync") == {}
    assert dssync_options("dssync-corrected-g4") == {"noise_correction": "auto", "group_size": 4}
    assert dssync_options("dssync-blocking-g4-every2-bf16") == {
        "overlap": False, "group_size": 4, "sync_every": 2, "wire_dtype": "bf16",
    }  # fmt: skip


def made_up(case: str, arm: str, repetition: int, seconds: float, others: float = 0.0) -> Run:
    sent = {"ddp": 1.75e6, "compute": 0.0}.get(arm, 1e6)
    return Run(case, arm, repetition, seconds, seconds, seconds, sent, sent, 4e6, 4e6, MB, 0.0, others)


@pytest.mark.parametrize("model", ["paced", "conv"])
def test_ranks_have_one_model_and_batches_of_their_own(model):
    """Or there were no noise to correct."""
    job = arms.Job("dssync", model, 0.1, 0.0, 0, 2, "lo")
    first, second = (arms.Module(job, rank) for rank in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.batch[0], second.batch[0])


def test_ratios_are_taken_within_a_repetition():
    # The machine is twice as slow in repetition 1: medians over all runs would compare unlike with unlike.
    runs = [made_up("a", "ddp", i, 2.0 * slow) for i, slow in enumerate((1, 2, 1))]
    runs += [made_up("a", "dssync", i, 1.25 * slow) for i, slow in enumerate((1, 2))]
    runs += [made_up("a", "compute", 0, 1.0), made_up("w", "dssync", 0, 1.0), made_up("b", "dssync", 0, 3.0)]
    rows = {(row.case, row.arm): row for row in report.summarize(runs, {"a": "w"})}
    assert ("a", "compute") not in rows
    mine = rows["a", "dssync"]
    assert mine.ratio == 1.6
    assert mine.step == mine.median_step == 1.875
    assert mine.spread == 0.625
    assert mine.bytes_ratio == 1
    assert (mine.compute, mine.wire) == (1, 1)
    assert mine.hidden == 1 + 1 - 1.875
    assert rows["a", "ddp"].ratio == 1
    assert rows["a", "ddp"].bytes_ratio == 1.75
    assert (rows["b", "dssync"].ratio, rows["b", "dssync"].hidden) == (None, None)


def test_disturbed_repetitions_are_left_out_where_enough_remain():
    runs = [made_up("a", arm, i, 1.0, others=0.3 * (i == 1)) for i in range(3) for arm in ("ddp", "dssync")]
    kept, messages = report.undisturbed(runs, 0.1)
    assert {run.repetition for run in kept} == {0, 2}
    assert messages == ["a: others took processor time in repetitions 1 (30%); left out"]
    kept, messages = report.undisturbed(runs[:4], 0.1)
    assert len(kept) == 4
    assert "kept, for lack of others" in messages[0]


def test_what_the_cost_model_predicts_stands_beside_the_measured_step():
    runs = [replace(made_up("a", arm, 0, 2.0), predicted=1.9) for arm in ("ddp", "dssync")]
    assert "| ddp | 2.000 ± 0.000 | 2.000 | 1.900 (-5%) | 1.00 |" in report.markdown(report.summarize(runs), {})
    topology = Cluster(8, 100, SETTINGS["oversubscribed"]).description()
    predicted = {arm: arms.predict(arm, topology, 12_000_000, 0.05) for arm in ("ddp", "dssync", "dssync-topology")}
    assert predicted["ddp"] == pytest.approx(0.05 / 3 + 12e6 * 8 * 1514 / 1448 / 1e8 * 1.75 + 0.05 * 2 / 3 / 8)
    assert predicted["dssync"] > predicted["ddp"] > 1.6 * predicted["dssync-topology"]
    assert arms.predict("post-local-sgd", topology, 12_000_000, 0.05) == pytest.approx(0.05 + 1.7563 / 4, rel=1e-3)
    assert arms.predict("dssync-blocking-every4", topology, 12_000_000, 0.05) < predicted["dssync"] / 3
    for nothing in (arms.predict("ddp-powersgd", topology, 1, 0), arms.predict("dssync", None, 1, 0)):
        assert nothing is None


def test_the_table_shows_who_loses_and_the_picture_is_drawn(tmp_path):
    runs = [made_up("a", "ddp", 0, 1.0), made_up("a", "dssync", 0, 2.0), made_up("b", "dssync", 0, 2.0)]
    rows = report.summarize(runs)
    text = report.markdown(rows, {"a": "Setting A"})
    assert "### Setting A" in text
    assert "| dssync | 2.000 ± 0.000 | 2.000 |  | 0.50 | 1,000,000 | 1.000 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert len(report.console_tables(rows, {})) == 2
    report.plot(rows, {}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# ---- with a cluster -------------------------------------------------------------------------------------------------


def reach(rank: int, hosts: int, interface: str) -> tuple[str, str, list[str]]:
    """Every rank greets every other."""
    server = socket.create_server((f"10.0.0.{rank + 1}", 4000))
    peers = [r for r in range(hosts) if r != rank]
    greetings = []
    for peer in peers:
        for _ in range(100):
            try:
                with socket.create_connection((f"10.0.0.{peer + 1}", 4000), timeout=5) as s:
                    s.sendall(str(rank).encode())
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
    for _ in peers:
        greetings.append(server.accept()[0].recv(10).decode())
    return os.environ["RANK"], os.environ["WORLD_SIZE"], sorted(greetings)


@needs_cluster
@pytest.mark.slow
def test_every_host_knows_its_rank_and_reaches_the_others_and_all_is_gone_afterwards():
    with homogeneous(4) as c, homogeneous(2) as another:  # two may coexist
        assert len(namespaces_of(os.getpid())) == 4 + 2 + 2 + 2
        results = c.call(reach, 4, c.interface, timeout=30)
        assert another.call(reach, 2, c.interface, timeout=30)[1] == ("1", "2", ["0"])
    for rank, result in enumerate(results):
        assert result == (str(rank), "4", sorted(str(r) for r in range(4) if r != rank))
    assert not namespaces_of(os.getpid())


def shown_rate(namespace: str, device: str) -> str:
    shown = subprocess.run(
        ["tc", "-n", namespace, "qdisc", "show", "dev", device], capture_output=True, text=True, check=True
    )
    return shown.stdout.split("rate ")[1].split()[0]


@needs_cluster
@pytest.mark.slow
def test_racks_beyond_two_meet_at_a_core_by_shaped_trunks():
    setting = Setting("", racks=3, oversubscription=4, slow=0.25, stragglers=2)
    with Cluster(6, 100, setting) as c:
        assert f"{c.name}-core" in namespaces_of(os.getpid())
        results = c.call(reach, 6, c.interface, timeout=30)
        for rank in range(6):
            rate = "25Mbit" if rank in (3, 5) else "100Mbit"
            assert shown_rate(f"{c.name}-host{rank}", "eth0") == rate
            assert shown_rate(f"{c.name}-rack{rank // 2}", f"port{rank}") == rate
        for i, port in enumerate(["trunk", "trunk1", "trunk2"]):
            assert shown_rate(f"{c.name}-rack{i}", "trunk") == shown_rate(f"{c.name}-core", port) == "50Mbit"
    for rank, result in enumerate(results):
        assert result == (str(rank), "6", sorted(str(r) for r in range(6) if r != rank))
    assert not namespaces_of(os.getpid())


def names(rank: int) -> tuple[str, float, list[str]]:
    """This host's name, a sum over all ranks by gloo, and the hosts as the strategy sees them."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    x = torch.tensor([2.0**rank])
    dist.all_reduce(x)
    return socket.gethostname(), x.item(), gather_hosts()


@needs_cluster
@pytest.mark.slow
def test_every_host_has_a_name_of_its_own():
    mine = socket.gethostname()
    with homogeneous(3) as c:
        results = c.call(names, timeout=30)
    assert results == [(f"host{rank}", 7, ["host0", "host1", "host2"]) for rank in range(3)]
    with Cluster(2, 100, SETTINGS["loopback"]) as c:
        assert [name for name, *_ in c.call(names, timeout=30)] == [mine] * 2
    assert socket.gethostname() == mine
    output, _ = cli("--", "uname", "-n").communicate(timeout=60)
    assert sorted(output.splitlines()) == ["[0] host0", "[1] host1"]


def fail_or_sleep(rank: int) -> None:
    if rank == 1:
        raise KeyError("no such thing")
    time.sleep(60)


@needs_cluster
@pytest.mark.slow
def test_a_rank_that_fails_shows_its_traceback_and_ends_the_others():
    start = time.monotonic()
    with homogeneous() as c:
        with pytest.raises(RankError, match=r"(?s)rank 1 failed in fail_or_sleep.*KeyError: 'no such thing'"):
            c.call(fail_or_sleep, timeout=30)
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not finish sleep within 0.5 s"):
            c.call(sleep, timeout=0.5)
    assert time.monotonic() - start < 20
    assert not namespaces_of(os.getpid())


def sleep(rank: int) -> None:
    time.sleep(60)


@needs_cluster
@pytest.mark.slow
def test_an_exception_in_the_body_and_a_dead_owner_leave_nothing():
    with pytest.raises(ZeroDivisionError), homogeneous():
        raise ZeroDivisionError
    assert not namespaces_of(os.getpid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    subprocess.run(["ip", "netns", "add", f"{cluster.PREFIX}-{gone.pid}-0-host0"], check=True)
    with homogeneous():
        assert not namespaces_of(gone.pid)


def cli(*arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cluster", "--hosts", "2", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


@needs_cluster
@pytest.mark.slow
def test_the_command_line_prefixes_output_and_returns_the_first_failure():
    process = cli("--", "sh", "-c", "echo I am $RANK of $WORLD_SIZE; test $RANK = 0 || exit 7; sleep 60")
    output, _ = process.communicate(timeout=60)
    assert "[0] I am 0 of 2\n" in output
    assert "[1] I am 1 of 2\n" in output
    assert "rank 1 ended with 7" in output
    assert process.returncode == 7
    assert not namespaces_of(process.pid)
    process = cli("--timeout", "1", "--", "sleep", "60")
    output, _ = process.communicate(timeout=60)
    assert "ranks [0, 1] did not finish within 1 s" in output
    assert process.returncode == 124
    assert not namespaces_of(process.pid)


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_cluster_down(number):
    # A suite that a script runs in the background ignores SIGINT, and so would all that it starts.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = cli("--", "sh", "-c", "echo up $$; sleep 60 & wait", preexec_fn=default)
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    assert namespaces_of(process.pid)
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert not namespaces_of(process.pid)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def received_by(interface: str) -> int:
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return int(counts.split()[0])
    raise ValueError(interface)


def flow(rank: int, pairs: dict[int, int], start: float) -> tuple[float, int]:
    """Sends to the rank's partner of `pairs` for 3 seconds, and receives from whose partner it is.

    Returns:
        Mbit/s that the interface received while all flows ran, and bytes that the program received in all.
    """
    os.nice(-10)
    server = socket.create_server((f"10.0.0.{rank + 1}", 4000))
    time.sleep(max(0.0, start - time.monotonic()))

    def send() -> None:
        with socket.create_connection((f"10.0.0.{pairs[rank] + 1}", 4000), timeout=20) as s:
            while time.monotonic() < start + 3:
                s.sendall(bytes(1 << 16))

    received = 0

    def receive() -> None:
        nonlocal received
        incoming = [server.accept()[0] for target in pairs.values() if target == rank]
        while incoming:
            for connection in select.select(incoming, [], [])[0]:
                got = len(connection.recv(1 << 20))
                received += got
                if not got:
                    incoming.remove(connection)

    threads = [threading.Thread(target=receive), *([threading.Thread(target=send)] if rank in pairs else [])]
    for thread in threads:
        thread.start()
    samples = []
    for moment in (1.0, 2.8):
        time.sleep(max(0.0, start + moment - time.monotonic()))
        samples.append((time.monotonic(), received_by("eth0")))
    (then, before), (now, after) = samples
    for thread in threads:
        thread.join()
    return (after - before) * 8 / 1e6 / (now - then), received


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "trunk", "shared"),
    [
        ({0: 1, 1: 0}, None, [(0,), (1,)]),  # a host's link carries its rate in each direction at the same time
        ({0: 1, 2: 1}, None, [(1,)]),  # both share the link of their target
        ({0: 2, 1: 3, 2: 0, 3: 1}, 50.0, [(0, 1), (2, 3)]),  # two pairs share the trunk, both directions at once
    ],
)
def test_shaping_holds(pairs, trunk, shared):
    """What comes in while a link is full is its rate, less the headers that the counter of a veth hardly sees."""
    rate = 50 * 1448 / 1514
    with Cluster(4, 50, SETTINGS["homogeneous"], trunk) as c:
        fastest = [0.0] * len(shared)
        for _ in range(5):  # whatever else runs on this machine delays it, but nothing makes it faster
            results = c.call(flow, pairs, time.monotonic() + 1, timeout=30)
            fastest = [
                max(best, sum(results[rank][0] for rank in ranks)) for best, ranks in zip(fastest, shared, strict=True)
            ]
            if min(fastest) > 0.95 * rate:
                break
    assert fastest == pytest.approx([rate] * len(shared), rel=0.1)


@needs_cluster
@pytest.mark.slow
def test_counters_count_what_was_sent():
    pairs = {0: 1, 1: 0}  # nothing is lost on the way, so nothing is sent twice
    with Cluster(2, 50, SETTINGS["homogeneous"]) as c:
        before = c.bytes_sent()
        results = c.call(flow, pairs, time.monotonic() + 1, timeout=30)
        sent = [now - then for now, then in zip(c.bytes_sent(), before, strict=True)]
    for rank, partner in pairs.items():
        assert results[partner][1] > 10 * MB
        assert sent[rank] == pytest.approx(results[partner][1], rel=0.05)


def watch_rates(rank: int) -> list[str]:
    rates = []
    for _ in range(15):
        shown = subprocess.run(["tc", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True).stdout
        rates.append(shown.split("rate ")[1].split()[0])
        time.sleep(0.1)
    return rates


@needs_cluster
@pytest.mark.slow
def test_a_contended_link_changes_while_it_is_used(monkeypatch):
    monkeypatch.setattr(cluster, "CONTENTION_PERIOD", 0.1)
    with Cluster(2, 100, SETTINGS["contended"]) as c:
        shown = c.call(watch_rates, timeout=30)[0]
        rates = {int(rate.removesuffix("Kbit").replace("Mbit", "000")) for rate in shown}
    assert len(rates) > 2
    assert min(rates) >= 25_000
    assert max(rates) <= 100_000


def echo(rank: int, start: float) -> list[float]:
    """Rank 0 says something every 0.1 s, which rank 1 hears; returns when each arrived, in seconds after `start`."""
    if rank == 0:
        time.sleep(max(0.0, start - time.monotonic()))
        with socket.create_connection(("10.0.0.2", 4000), timeout=5) as s:
            for _ in range(30):
                s.sendall(bytes(10_000))
                time.sleep(0.1)
        return []
    heard = []
    with socket.create_server(("10.0.0.2", 4000)) as server:
        connection, _ = server.accept()
        while connection.recv(1 << 20):
            heard.append(time.monotonic() - start)
    return heard


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1])
def test_a_cut_link_carries_nothing_until_it_is_mended(cut):
    with homogeneous() as c:
        start = time.monotonic() + 1
        timers = [threading.Timer(2, c.cut, (cut,)), threading.Timer(3, c.mend, (cut,))]
        for timer in timers:
            timer.start()
        heard = c.call(echo, start, timeout=30)[1]
    pause, begin = max((after - before, before) for before, after in itertools.pairwise(heard))
    assert 0.7 < begin < 1.5
    assert 0.8 < pause < 5
    assert heard[-1] > 2.5


@needs_cluster
@pytest.mark.slow
def test_a_link_can_be_slowed_while_it_is_used():
    with Cluster(2, 50, SETTINGS["homogeneous"]) as c:
        c.slow(1, 0.2)
        slow = c.call(flow, {0: 1, 1: 0}, time.monotonic() + 1, timeout=30)
        c.slow(1, 1)
        fast = c.call(flow, {0: 1, 1: 0}, time.monotonic() + 1, timeout=30)
    for rank in range(2):
        assert slow[rank][0] < 1.1 * 10
        assert fast[rank][0] > 2 * slow[rank][0]


def test_ranks_on_the_loopback_have_no_links_to_cut():
    with pytest.raises(ValueError, match="no links of their own"):
        Cluster(2, 100, SETTINGS["loopback"]).cut(0)


@needs_cluster
@pytest.mark.slow
def test_step_times_of_real_fits_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(step_time, "exit_on_sigterm", lambda: None)
    argv = "--hosts 4 --parameters-mb 1.5 --compute 0.01 --steps 4 --repetitions 1 --settings homogeneous loopback"
    argv += f" --arms ddp ddp-bf16 dssync --timeout 60 --output {tmp_path} --trace {tmp_path / 'trace'}"
    assert step_time.main(argv.split()) == 0
    (folder,) = (tmp_path / "step_time").iterdir()
    assert (folder / "step_time.png").stat().st_size > 10_000
    assert "| dssync |" in (folder / "table.md").read_text()
    record = json.loads((folder / "runs.json").read_text())
    assert record["command"].startswith("python -m benchmarks.step_time --hosts 4")
    rows = {(row["case"], row["arm"]): row for row in record["rows"]}
    for case, tolerance in {"homogeneous": 0.05, "loopback": 0.1}.items():
        assert rows[case, "ddp"]["bytes_ratio"] == pytest.approx(1.5, rel=tolerance)
        assert rows[case, "ddp-bf16"]["bytes_ratio"] == pytest.approx(0.75, rel=tolerance)
        assert rows[case, "dssync"]["bytes_ratio"] == pytest.approx(1.0, rel=tolerance)
    assert all(row["memory"] > 0 and row["step"] > 0 and row["compute"] > 0 for row in record["rows"])
    assert json.loads((tmp_path / "trace" / "homogeneous-dssync-rank1.json").read_text())["traceEvents"]


@needs_cluster
@pytest.mark.slow
def test_a_run_that_hangs_ends_with_the_ranks_it_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "exit_on_sigterm", lambda: None)
    argv = f"--hosts 2 --settings homogeneous --arms ddp --timeout 1 --compute 60 --output {tmp_path}"
    assert step_time.main(argv.split()) == 1
    assert "error: ranks [0, 1] did not finish measure within 1 s" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert not namespaces_of(os.getpid())


@needs_cluster
@pytest.mark.slow
def test_startup_takes_no_more_than_n_log_n_messages(capsys):
    """Every pair of 32 ranks, as gloo connects them of itself, would be 48 times the connections of 4, not 20."""
    few, many = 4, 32
    assert startup.main(["--ranks", f"{few}", f"{many}"]) == 0
    rows = [line.rsplit(maxsplit=5) for line in capsys.readouterr().out.splitlines()[1:]]
    counted = {(row[0].strip(), int(row[1])): (int(row[3]), int(row[4])) for row in rows}
    assert {phase for phase, _ in counted} == set(startup.PHASES)
    n_log_n = many * math.log2(many) / (few * math.log2(few))
    for phase in startup.PHASES:
        (_, segments), (_, more) = counted[phase, few], counted[phase, many]
        assert 0 < more < 1.3 * n_log_n * segments, phase  # TCP joins and repeats some
    opened = [sum(counted[phase, ranks][0] for phase in startup.PHASES) for ranks in (few, many)]
    assert 0 < opened[1] < 1.3 * n_log_n * opened[0]


def connect_and_use(rank, ranks, barrier):
    """Connections that collectives of all ranks open after `connect`, of each kind."""
    with connecting_later():
        options = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=30)}
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{cluster.PORT}", **options)
    connect(timedelta(seconds=30))
    x, parts = torch.ones(ranks), [torch.ones(ranks) for _ in range(ranks)]
    uses = {
        "barrier": dist.barrier,
        "all_reduce": lambda: dist.all_reduce(x),
        "broadcast": lambda: [dist.broadcast(x, root) for root in range(ranks)],
        "all_gather": lambda: dist.all_gather(parts, x),
        "all_gather_object": lambda: dist.all_gather_object([None] * ranks, "a" * rank),
        "reduce": lambda: dist.reduce(x, 0),
        "reduce_scatter": lambda: dist.reduce_scatter(x, parts),
        "gather": lambda: dist.gather(x, parts if rank == 0 else None),
        "scatter": lambda: dist.scatter(x, parts if rank == 0 else None),
    }
    opened = {}
    for name, use in uses.items():
        barrier.wait(30)
        before, _ = startup.sent()
        barrier.wait(30)
        use()
        barrier.wait(30)
        opened[name] = startup.sent()[0] - before
    return opened


@needs_cluster
@pytest.mark.parametrize("ranks", [2, 5, 8, 13])
def test_once_connected_no_collective_of_all_ranks_waits_for_a_connection(ranks):
    with Cluster(ranks, 100, SETTINGS["loopback"]) as hosts:
        barrier = multiprocessing.get_context("fork").Barrier(ranks)
        for opened in hosts.call(connect_and_use, ranks, barrier, timeout=60):
            assert opened == dict.fromkeys(opened, 0)
