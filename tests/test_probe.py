"""Probing: the topology that is written for what was found, and real measurements on one machine and emulated hosts."""

import io
import os
import subprocess
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from benchmarks.cluster import SETTINGS, Cluster, Setting
from ds_lightning import DSSyncStrategy, probe_command, station
from ds_lightning.__main__ import main
from ds_lightning.bottlenecks import MOST_ROUNDS, Findings
from ds_lightning.cost import FRAMES
from ds_lightning.probe import MOST_BYTES, describe, probe
from ds_lightning.topology import Link, Topology
from tests.ranks import run_ranks
from tests.test_benchmarks import needs_cluster
from tests.test_preemption import Slow
from tests.test_strategy import RankData, trainer_for

TRIALS = int(os.environ.get("TRIALS", "1"))
GBIT = 1e9 / 8 / FRAMES  # bytes per second of a program that fills a link of 1 Gbit/s


def findings(speeds, racks=(), trunks=()):
    rates = [speed * GBIT for speed in speeds]
    return Findings(rates, rates, racks, [(up * GBIT, down * GBIT) for up, down in trunks])


# ---- what is written -------------------------------------------------------------------------------------------------


def test_racks_trunks_and_ranks_are_written():
    found = findings([10.01, 9.9, 10.2, 2.5], [(0, 2)], [(4, 5)])
    topology = describe(found, {}, ["a", "a", "b", "c", "b", "d"])
    assert topology == Topology(
        above={"rack0": "core", "a": "rack0", "b": "core", "c": "rack0", "d": "core"},
        links={"rack0": Link(4, 5), **dict.fromkeys("abc", Link(10, 10)), "d": Link(2.5, 2.5)},
        ranks={"a": (0, 1), "b": (2, 4), "c": (3,), "d": (5,)},
    )
    assert Topology.parse(topology.to_yaml()) == topology


def test_bandwidths_that_are_close_are_one_and_others_are_not():
    links = describe(findings([9.6, 10, 10.3, 12]), {}, [*"abcd"]).links
    assert [links[host].up for host in "abcd"] == [10, 10, 10, 12]


def test_latencies_of_hosts_and_of_trunks():
    found = findings([1] * 4, [(0, 1), (2, 3)], [(1, 1)] * 2)
    inside, across = {(0, 1): 0.001, (2, 3): 0.00101}, dict.fromkeys([(0, 2), (0, 3), (1, 2), (1, 3)], 0.005)
    links = describe(found, inside | across, [*"abcd"]).links
    assert [links[host].latency for host in "abcd"] == pytest.approx([0.5] * 4, abs=0.01)
    assert [links[f"rack{rack}"].latency for rack in (0, 1)] == pytest.approx([2, 2], abs=0.01)


def test_hosts_may_be_called_like_switches():
    topology = describe(findings([1, 1, 1], [(0, 1)], [(1, 1)]), {}, ["core", "rack0", "switch"])
    assert topology.hosts == ("core", "rack0", "switch")
    assert topology.switches == ("core_", "rack0_")


# ---- on this machine, each rank a thread ---------------------------------------------------------------------------


def by_threads(hosts, **options):
    """What `probe` returns or raises on each rank."""
    store = dist.HashStore()
    results = [None] * len(hosts)

    def run(rank):
        try:
            results[rank] = probe(store, rank, hosts, **{"timeout": timedelta(seconds=20), "seconds": 0.05} | options)
        except RuntimeError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.mark.parametrize("hosts", ["ab", "aabb", "abcab"])
def test_all_ranks_get_the_same_and_few_bytes_are_sent(hosts):
    most = 40 * 2**20
    first, *others = by_threads([*hosts], most_bytes=most)
    assert isinstance(first, type(others[0])), first
    assert all(other == first for other in others)
    assert {host: list(ranks) for host, ranks in first.topology.ranks.items()} == {
        host: [rank for rank, name in enumerate(hosts) if name == host] for host in hosts
    }
    assert 0 < first.sent <= most
    assert first.rounds <= MOST_ROUNDS


def test_one_host_has_nothing_to_measure():
    first, second = by_threads(["a", "a"])
    assert first == second
    assert first.topology == Topology.flat(["a", "a"], bandwidth=1)
    assert first.sent == 0


def test_an_error_on_one_host_ends_all_alike(monkeypatch):
    listen = station.Station._listen

    def broken(self, token):
        if self.number == 1:
            raise OSError("no sockets today")
        return listen(self, token)

    monkeypatch.setattr(station.Station, "_listen", broken)
    errors = by_threads([*"abcc"])
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "failed: b: no sockets today" in str(errors[0])


def test_a_host_that_does_not_come_is_named():
    start = time.monotonic()
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match="no answer from host b"):
        probe(store, 0, [*"ab"], timeout=timedelta(seconds=1))
    with pytest.raises(RuntimeError, match="no answer from host b"):  # once it comes
        probe(store, 1, [*"ab"], timeout=timedelta(seconds=1))
    assert time.monotonic() - start < 6


def test_without_rank_0_the_others_end():
    with pytest.raises(RuntimeError, match="a, the host of rank 0, did not answer"):
        probe(dist.HashStore(), 1, [*"ab"], timeout=timedelta(seconds=0.5))


def test_a_stranger_is_sent_away():
    one = station.Station(0, lambda: 5.0)
    try:
        address = one.obey({"do": "listen", "token": "secret"})["address"]
        with station.socket.create_connection(address, 2) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n")
            stranger.settimeout(3)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        assert not any(one._incoming.values())
    finally:
        one.close()


def test_the_address_towards_another_host_may_be_another():
    assert station.own_address() == (station.socket.AF_INET, "127.0.0.1")
    assert station.own_address("127.0.0.5")[1] in ("127.0.0.1", "127.0.0.5")


def test_an_interface_without_an_address_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    with pytest.raises(OSError, match="no IPv4 address of GLOO_SOCKET_IFNAME=nothing0"):
        station.own_address()


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ([], {}, "RANK, WORLD_SIZE, MASTER_PORT"),
        ([], {"RANK": "one", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK is 'one', not a number"),
        ([], {"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "rank 2 is not below"),
        ([], {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999999"}, "ports are 1 to 65535"),
        (["--timeout", "0"], {}, "--timeout is 0"),
        (["--timeout", "soon"], {}, "invalid float value"),
    ],
)
def test_wrong_input_is_one_line(arguments, environment, says, monkeypatch, capsys, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["probe", *(argument.format(folder=tmp_path) for argument in arguments)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("output", "says"), [("", "is a folder"), ("a/b", "there is no folder"), ("c", "exists")])
def test_a_file_that_rank_0_cannot_write_ends_all_ranks(output, says, tmp_path):
    (tmp_path / "c").touch()

    def run(rank):
        said = io.StringIO()
        with pytest.raises(SystemExit) as end, redirect_stderr(said):
            main(["probe", "--output", str(tmp_path / output)])
        return end.value.code, said.getvalue()

    start = time.monotonic()
    for code, said in run_ranks(run, 3, init=False):
        assert code == 2
        assert says in said
        assert said.count("\n") == 1
    assert time.monotonic() - start < 20


def test_slurm_says_who_and_where(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": "3", "NTASKS": "8", "JOB_ID": "120042", "JOB_NODELIST": "n[3-6],m1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert probe_command._job() == (3, 8, "n3", 15042)


# ---- on emulated hosts -----------------------------------------------------------------------------------------------

BOTH = Setting("trunk 4:1, and the last host at a quarter", oversubscription=4, slow=0.25)
FOUND = {"oversubscribed": 0, "oversubscribed-interleaved": 0, "straggler": 0, "both": 0}


def measured(rank, hosts, seconds):
    """What `probe` finds or says on a host, and how long it took."""
    start = time.monotonic()
    port = int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore("10.0.0.1", port, None, rank == 0, timedelta(seconds=seconds), wait_for_workers=False)
        names = [f"host{i}" for i in range(hosts)]
        found = probe(store, rank, names, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return found, time.monotonic() - start


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("setting", [*(SETTINGS[name] for name in list(FOUND)[:3]), BOTH], ids=FOUND)
def test_racks_and_slow_hosts_are_found(setting, trial):
    """10 trials: `TRIALS=10 pytest tests/test_probe.py`."""
    hosts, rate = 8, 100
    with Cluster(hosts, rate, setting) as cluster:
        results = cluster.call(measured, hosts, 60, timeout=120)
        sent = cluster.bytes_sent()
    found = results[0][0]
    assert all(result == found for result, _ in results), results
    print(f"{found.seconds:.1f} s, {found.rounds} rounds, {found.sent / 1e6:.0f} MB\n{found.topology}")
    topology = found.topology
    below = [{name for name in hosts_ if name in topology.ranks} for hosts_ in topology.children.values()]
    racks = [{f"host{r}" for r in range(hosts) if cluster.rack_of(r) == rack} for rack in (0, 1)]
    expected = racks if cluster.trunk is not None else [racks[0] | racks[1]]
    assert [names for names in below if names] == expected
    for r in range(hosts):
        link = topology.links[f"host{r}"]
        assert (link.up, link.down) == pytest.approx([cluster.rates[r] / 1000] * 2, rel=0.15)
    for switch in topology.switches[1:]:
        link = topology.links[switch]
        assert (link.up, link.down) == pytest.approx([cluster.trunk / 1000] * 2, rel=0.3)
    assert found.seconds < 15
    assert found.sent < MOST_BYTES
    assert max(sent) < 1.2 * found.sent + 1e6  # with headers, acknowledgements, and what was sent twice


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_four_racks_are_found(trial):
    with Cluster(16, 100, SETTINGS["four-racks"]) as cluster:
        results = cluster.call(measured, 16, 60, timeout=120)
    found = results[0][0]
    assert all(result == found for result, _ in results), results
    print(f"{found.seconds:.1f} s, {found.rounds} rounds, {found.sent / 1e6:.0f} MB\n{found.topology}")
    racks = [tuple(f"host{4 * rack + i}" for i in range(4)) for rack in range(4)]
    assert [found.topology.children[f"rack{rack}"] for rack in range(4)] == racks


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize(("who", "limit"), [(1, 6), (0, 6)], ids=["a host", "the host of rank 0"])
def test_a_cut_ends_all_in_time(who, limit):
    with Cluster(4, 100, replace(SETTINGS["oversubscribed"], summary="cut")) as cluster:
        threading.Timer(2.0, partial(cluster.cut, who)).start()
        results = cluster.call(measured, 4, limit, timeout=40)
    print(results)
    for rank, (said, seconds) in enumerate(results):
        assert seconds < limit + 6
        assert isinstance(said, str)
        if who and rank != who:
            assert f"host{who}" in said
        else:
            assert "host" in said


def planned(rank):
    """The topology of a strategy that probes, after a fit."""
    warnings.simplefilter("ignore")
    strategy = DSSyncStrategy(schedule="topology", topology="probe", timeout=timedelta(seconds=30))
    trainer = trainer_for(rank, [], strategy, devices=1, num_nodes=4, max_epochs=1)
    trainer.fit(Slow(0), DataLoader(RankData(rank, 4), batch_size=None), DataLoader(RankData(rank, 1), batch_size=None))
    return strategy.topology, strategy._groups.schedule.partition(0)


@needs_cluster
@pytest.mark.slow
def test_a_strategy_plans_for_what_it_finds():
    with Cluster(4, 100, SETTINGS["oversubscribed"]) as cluster:
        first, *others = cluster.call(planned, timeout=100)
    assert all(other == first for other in others)
    assert first[0].children["rack0"] == ("host0", "host1")
    assert first[0].children["rack1"] == ("host2", "host3")


@pytest.mark.slow
def test_under_torchrun_whose_own_store_is_on_the_port(tmp_path):
    """The ranks are on one host, so that there is nothing to measure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713"]
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    file = tmp_path / "cluster.yaml"
    arguments = [*command, "-m", "ds_lightning", "probe", "--output", str(file)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert Topology.from_yaml(file).world_size == 2
    assert f"Wrote {file}" in done.stdout
