"""Plans that follow the network: what is made of measured times, and that all ranks change at the same round."""

import itertools
import logging
import os
import random
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.arms import PacedNet
from benchmarks.cluster import SETTINGS, Cluster, ClusterError, check_machine
from ds_lightning import CyclicSchedule, DSSyncStrategy, adapting
from ds_lightning.adapting import Adapting, Leader, Watch
from ds_lightning.cost import Network, rounds
from ds_lightning.payload import seconds_per_byte
from ds_lightning.planner import plan
from ds_lightning.schedule import Schedule, schedule_parts
from ds_lightning.topology import Link, Topology
from tests.ranks import QUIET

SIZE = 1e6
HOSTS = [f"h{i}" for i in range(8)]


def two_racks(trunk=4.0):
    """8 hosts in 2 racks; what the trunk carries, in links of hosts."""
    above = {host: f"rack{i // 4}" for i, host in enumerate(HOSTS)} | {"rack0": "core", "rack1": "core"}
    links = {node: Link(*[trunk if node.startswith("rack") else 1.0] * 2) for node in above}
    return Topology(above, links, {host: (i,) for i, host in enumerate(HOSTS)})


class Run:
    """Averages as the cost model has them on links that are slow, told to a watch a tenth of a second apart."""

    def __init__(self, topology, schedule, noise=lambda: 1.0):
        self.network, self.schedule, self.noise = Network(topology), schedule, noise
        self.watch = Watch(self.network, schedule, SIZE)
        self.round, self.slow = 0, {}

    def go(self, steps, look=None):
        """So many rounds; whether a judgement changed anything."""
        changed = False
        for _ in range(steps):
            self.tell(look)
            changed |= self.watch.judge()
        return changed

    def tell(self, look=None):
        t, parts, period = self.round, schedule_parts(self.schedule), rounds(self.schedule)
        at = [look if look is not None else (t + part) % len(period) for part in range(parts)]
        load = np.mean([self.network.traffic(period[i]) for i in at], axis=0) * self.network.seconds_per_byte
        for node, share in self.slow.items():
            load[self.network.nodes.index(node)] /= share
        for part, i in enumerate(at):
            for group in period[i].partition() if look is None or part == 0 else []:
                crossed = {n for rank in group for n in self.network.above[:, rank].tolist() if n >= 0}
                crossed = {n for n in crossed if not all(n in self.network.above[:, rank] for rank in group)}
                if len(group) == 1 or not crossed:
                    continue
                slowest = max(group, key=lambda rank: max(load[n] for n in self.network.above[:, rank]))
                took = max(load[n] for n in crossed) * (parts if look is None else 1) * self.noise()
                for rank in group:
                    last = slowest if rank != slowest else group[0] if group[0] != rank else group[1]
                    self.watch.take(0.1 * t, rank, t, part, took, last)
        self.round += 1

    def shares(self):
        return {
            node: round(float(share), 3)
            for node, share in zip(self.network.nodes, self.watch.shares, strict=True)
            if share < 1
        }


PAIRS = CyclicSchedule(
    [[(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (1, 3), (4, 6), (5, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]]
)
IN_PARTS = CyclicSchedule([[tuple(range(8))], [(i,) for i in range(8)], [(i,) for i in range(8)]], parts=3)
SCHEDULES = pytest.mark.parametrize("schedule", [PAIRS, IN_PARTS], ids=["pairs", "parts"])


@SCHEDULES
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_noise_changes_nothing(schedule, seed):
    generator = random.Random(seed)
    run = Run(two_racks(), schedule, lambda: generator.choice([0.5, 0.8, 1.0, 1.1, 1.3, 1.4, 1.45]))
    assert not run.go(40)
    run.noise = lambda: 4.0 if generator.random() < 0.05 else 1.0  # now and then one takes long
    assert not run.go(40)


@SCHEDULES
def test_a_link_that_shares_all_others_fate_is_not_blamed_for_a_slow_host(schedule):
    run = Run(two_racks(), schedule)
    assert not run.go(20)
    run.slow = {"h5": 0.25}
    assert run.go(24)
    assert set(run.shares()) == {"h5"}
    assert 0.2 < run.shares()["h5"] < 0.35
    assert "h5 0." in run.watch.slow()
    assert run.watch.topology().links["h5"].up == pytest.approx(run.watch.shares[run.network.nodes.index("h5")])


def test_a_slow_trunk_is_found_and_no_host_blamed():
    run = Run(two_racks(), PAIRS)
    run.slow = {"rack0": 0.1, "rack1": 0.1}
    assert run.go(40)
    assert run.shares()
    assert set(run.shares()) <= {"rack0", "rack1"}


def test_a_link_that_came_back_is_known_by_its_own_averages():
    run = Run(two_racks(), PAIRS)
    run.slow = {"h5": 0.25}
    run.go(24)
    run.slow = {}
    assert run.go(24)
    assert run.shares() == {}
    assert run.watch.slow() == "all links carry what the topology says"


def test_parts_need_a_look():
    """A look tells a link that is slow from one that is not, which the averages of parts do not show."""
    in_parts = CyclicSchedule([[(0, 5), (1, 2), (3, 4), (6, 7)], *[[(0, 1), (2, 3), (4, 6), (5,), (7,)]] * 3], parts=4)
    run = Run(two_racks(), in_parts)
    run.slow = {"h5": 0.25}
    run.watch.shares[run.network.nodes.index("h5")] = 0.25
    assert not run.go(16)
    look = run.watch.worth_a_look()
    assert look is not None
    partition, seconds = look
    assert partition == 0
    assert seconds == pytest.approx(4 * SIZE * run.network.seconds_per_byte[0])
    run.watch.look(run.round, partition)
    assert not run.go(1, look=partition)
    run.slow = {}
    run.watch.look(run.round, partition)
    assert run.go(1, look=partition)
    assert run.shares() == {}
    assert run.watch.worth_a_look() is None


# ---- the protocol, threads as ranks ---------------------------------------------------------------------------------


@dataclass
class At:
    """As lanes.Result, of a task that has ended."""

    seconds: float

    def seconds_since(self, other):
        return self.seconds - other.seconds


@dataclass
class Came:
    """As payload.Arrivals, of an average that is known already."""

    first: At
    last: At
    share: float = 1.0
    size: float = SIZE
    last_member: int | None = None


def ranks_in_threads(topology, rounds_, slow, monkeypatch, version, jitter=0.004):
    """Ranks that go through rounds at their own pace; the rounds at which each changed, and to what."""
    monkeypatch.setattr(adapting, "SECONDS", 0.1)
    monkeypatch.setattr(adapting, "PAUSE", 1)
    monkeypatch.setattr(adapting, "_PACE", 0.02)
    n = topology.world_size
    store = dist.HashStore()
    leader = Leader(plan(topology, SIZE), 0)
    network = Network(topology)
    changes: list[list[tuple[int, int, str]]] = [[] for _ in range(n)]
    errors: list[BaseException] = []
    done: list[int] = []

    def rank_main(rank):
        generator = random.Random(rank)
        mine = Adapting(
            store, rank, n, 0, leader.found.schedule, version, leader if rank == 0 else None, timedelta(seconds=20)
        )
        try:
            schedule: Schedule = leader.found.schedule
            arrivals: deque[tuple[int, int, Any]] = deque()
            for t in range(rounds_):
                mine.passed(t, 0.0, arrivals)
                change, look = mine.at(t)
                assert t < mine._word.until
                if change is not None:
                    schedule = change.schedule
                    changes[rank].append((t, mine.version, repr(schedule)))
                    mine.changed(0.01)
                time.sleep(0.01 + jitter * generator.random())
                for part in range(schedule_parts(schedule)):
                    members = schedule.group(rank, (t + part) if look is None else look)
                    if len(members) > 1:
                        factor = 4.0 if slow in members and t >= 40 else 1.0
                        seconds = factor * SIZE * network.seconds_per_byte[0]
                        arrivals.append(
                            (t, part, Came(At(0), At(seconds), last_member=slow if slow in members else None))
                        )
            if rank == 0:
                while len(done) < n - 1:
                    time.sleep(0.01)
            done.append(rank)
        except BaseException as error:
            errors.append(error)
        finally:
            mine.stop()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)
    return changes


@pytest.mark.parametrize("version", [0, 3])
def test_all_ranks_change_before_the_same_round(version, monkeypatch):
    """Also in a fit after others in which plans have changed."""
    topology = Topology.flat(HOSTS[:4], bandwidth=1.0)
    changes = ranks_in_threads(topology, 400, 2, monkeypatch, version)
    assert changes[0]
    assert all(mine == changes[0] for mine in changes)
    assert [found for _, found, _ in changes[0]] == [*range(version + 1, version + len(changes[0]) + 1)]
    assert changes[0][0][0] > 40


def test_parts_in_the_same_group_are_one_measurement():
    """1,000 bytes a second, whether they have the link one after the other or all at once."""
    ways: list[Any] = [Came(At(start), At(start + 0.2), share=2 / 3, size=300) for start in (0.1, 0.4, 0.7)]
    assert seconds_per_byte(ways[:1]) == pytest.approx(0.001)
    assert seconds_per_byte(ways) == seconds_per_byte(ways[::-1]) == pytest.approx(0.001)
    at_once: list[Any] = [Came(At(0.3 + late), At(0.9 - late), share=2 / 3, size=300) for late in (0, 0.01, 0.02)]
    assert seconds_per_byte(at_once) == pytest.approx(0.001)
    mine = Adapting(dist.HashStore(), 1, 2, 0, PAIRS)
    mine._looks = 5
    arrivals: deque[tuple[int, int, Any]] = deque([(4, 0, ways[0]), (5, 0, ways[0]), (5, 1, ways[1]), (6, 1, ways[1])])
    mine.passed(7, 0.0, arrivals)
    told = [*itertools.chain(*mine._told_samples, mine._samples)]
    assert told == [(4, 0, 0.001, None), (5, 0, 0.001, None), (6, 1, 0.001, None)]
    mine._over = True


def test_without_rank_0_a_rank_says_so():
    store = dist.HashStore()
    mine = Adapting(store, 1, 2, 0, PAIRS, timeout=timedelta(seconds=0.3))
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="Rank 1 waited in vain for rank 0 to say whether the schedule changes"):
        mine.at(0)
    assert time.monotonic() - begun < 5
    mine._over = True


def test_adapt_without_a_topology_warns(monkeypatch):
    strategy = DSSyncStrategy(adapt=False)
    strategy._world_size = 4
    monkeypatch.setattr(type(strategy), "world_size", 4)
    with pytest.warns(UserWarning, match="adapt=False has no effect"):
        strategy._make_schedule(["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="adapt='yes'"):
        DSSyncStrategy(adapt="yes")


# ---- on an emulated cluster -----------------------------------------------------------------------------------------


class Paced(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = PacedNet(1.2, 0.1)
        self.batch = torch.randn(4, self.net.width), torch.randint(self.net.width, (4,))

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Versions(Callback):
    """The step and the schedule after each change."""

    def __init__(self, progress):
        self.progress = progress
        self.seen = []
        self.slow = set()  # links that rank 0 takes to be slow

    def on_train_batch_end(self, trainer, *args):
        strategy = trainer.strategy
        if len(self.seen) < strategy.adapting.version:
            self.seen.append((trainer.global_step, repr(strategy._groups.schedule), strategy.adapting.slowest))
        if strategy._leader is not None:
            self.progress.write_text(str(trainer.global_step))
            self.slow.add(strategy._leader._watch.slow())


def fit_on_host(rank, topology, steps, progress):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, versions = Paced(), Versions(progress)
    limit = timedelta(seconds=60)
    strategy = DSSyncStrategy(
        schedule="topology", topology=Topology.parse(topology), timeout=limit, process_group_backend="gloo"
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=4,
        strategy=strategy,
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[versions],
        **QUIET,
    )
    trainer.fit(module, DataLoader([module.batch] * steps, batch_size=None))
    values = torch.cat([p.detach().flatten() for p in module.parameters()])
    return versions.seen, versions.slow, float(values.double().sum()), strategy.adapting


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_link_that_is_slow_for_a_while(tmp_path):
    """A real fit: ranks leave the slow host be, all at the same step, and its coming back is seen as well."""
    try:
        check_machine()
    except ClusterError as error:
        pytest.skip(str(error))
    with Cluster(4, 100, SETTINGS["homogeneous"]) as cluster:
        over, progress = threading.Event(), tmp_path / "step"
        progress.write_text("0")

        def events():
            for step, share in ((40, 0.25), (160, 1.0)):
                while not over.wait(0.05) and int(progress.read_text() or 0) < step:
                    pass
                if not over.is_set():
                    cluster.slow(2, share)

        thread = threading.Thread(target=events)
        thread.start()
        try:
            ranks = cluster.call(fit_on_host, cluster.description(), 300, progress, timeout=150)
        finally:
            over.set()
            thread.join()
    seen, slow, value, following = ranks[0]
    assert following is None  # the thread ended with the fit
    assert any("host2 0." in links for links in slow), (seen, slow)
    assert all(other[0] == seen for other in ranks)
    assert all(other[2] == value for other in ranks)  # in consensus
    assert min(slowest for _, _, slowest in seen) < 0.5
