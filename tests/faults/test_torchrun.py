"""torchrun with two agents as nodes: a rank or a node is killed, and the job goes on from the last checkpoint."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.faults.elastic import EPOCHS, EVERY, STEPS, train
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Attempt(NamedTuple):
    rank: int
    world_size: int
    step: int  # at which it began
    pid: int
    agent: int
    schedule: str


class Job:
    """Agents, and what their ranks noted in a folder."""

    def __init__(self, folder, nodes):
        self.folder, self.nodes, self.port = folder, nodes, free_port()
        self.agents = []

    def start(self, agents, command=False):
        """Agents as torchrun starts them, by its command or forked: importing torch takes longer than all the rest."""
        for _ in range(agents):
            agent = multiprocessing.get_context("fork").Process(target=self._command if command else self._launch)
            agent.start()
            self.agents.append(agent)

    def _launch(self):
        os.setsid()
        os.environ.update(ENVIRONMENT)
        low, _, high = self.nodes.rpartition(":")
        config = LaunchConfig(
            min_nodes=int(low or high), max_nodes=int(high), nproc_per_node=2, max_restarts=3, run_id="test",
            rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{self.port}", local_addr="127.0.0.1",
            rdzv_configs={"last_call_timeout": 2}, start_method="fork",
        )  # fmt: skip
        elastic_launch(config, train)(self.folder)
        os._exit(0)

    def _command(self):
        os.setsid()
        os.chdir(ROOT)
        arguments = f"--nnodes={self.nodes} --nproc-per-node=2 --max-restarts=3 --rdzv-id=test --rdzv-backend=c10d"
        arguments += f" --rdzv-endpoint=127.0.0.1:{self.port} --local-addr=127.0.0.1 -m tests.faults.elastic"
        command = [sys.executable, "-m", "torch.distributed.run", *arguments.split(), str(self.folder)]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})

    def attempts(self):
        """Of all ranks, in the order of time."""
        notes = [path.read_text().split(" ", 5) for path in sorted(self.folder.glob("began-*[0-9]"))]
        return [Attempt(*map(int, words[:5]), words[5]) for words in notes]

    def wait_for(self, what):
        deadline = time.monotonic() + 120
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def kill_node_of(self, rank):
        """Its agent and all of the agent's ranks, as a power cut does."""
        agent = next(a.agent for a in self.attempts() if a.rank == rank)
        for pid in [agent, *(a.pid for a in self.attempts() if a.agent == agent)]:
            os.kill(pid, signal.SIGKILL)
        self.agents = [a for a in self.agents if a.pid != agent]

    def ends_well(self):
        for agent in self.agents:
            agent.join(150)
            assert agent.exitcode == 0


@contextmanager
def job(folder, nodes):
    it = Job(folder, nodes)
    try:
        yield it
    finally:
        for agent in it.agents:
            if agent.is_alive():
                agent.terminate()
                agent.join(10)
                agent.kill()
        for attempt in it.attempts():
            with suppress(ProcessLookupError):
                os.kill(attempt.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(rank):
        os.environ.update(GROUP_WORLD_SIZE="1", GROUP_RANK="0")
        train(folder)

    run_ranks(run, 4, init=False)
    return torch.load(folder / "end")


def same(end, other):
    return end["steps"] == other["steps"] and all(torch.equal(v, other["model"][k]) for k, v in end["model"].items())


def fault(folder, rank, seed):
    """A random step at which that rank is to stay until it is killed."""
    step = random.Random(seed).randrange(1, EPOCHS * STEPS)
    print(f"rank {rank} at step {step}")
    (folder / f"fault-{rank}").write_text(str(step))
    return step


SEEDS = range(int(os.environ.get("TRIALS", "1")))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("command", [True, False], ids=["command", "forked"])
def test_a_killed_rank_brings_all_back_from_the_last_checkpoint(command, seed, undisturbed, tmp_path):
    """10 trials: `TRIALS=10 pytest tests/faults/test_torchrun.py`."""
    who = random.Random(-seed).randrange(4)
    step = fault(tmp_path, who, seed)
    with job(tmp_path, "2") as it:
        it.start(2, command)
        it.wait_for((tmp_path / "now").exists)
        os.kill(next(a.pid for a in it.attempts() if a.rank == who), signal.SIGKILL)
        it.ends_well()
    assert [a.step for a in it.attempts()] == [0] * 4 + [step // EVERY * EVERY] * 4
    assert same(torch.load(tmp_path / "end"), undisturbed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_node_that_is_started_again_rejoins(seed, undisturbed, tmp_path):
    step = fault(tmp_path, 2, seed)
    with job(tmp_path, "2") as it:
        it.start(2)
        it.wait_for((tmp_path / "now").exists)
        it.kill_node_of(2)
        it.start(1)
        it.ends_well()
    assert [a.step for a in it.attempts()] == [0] * 4 + [step // EVERY * EVERY] * 4
    assert same(torch.load(tmp_path / "end"), undisturbed)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_fewer_nodes_the_schedule_adapts(seed, tmp_path):
    step = fault(tmp_path, 2, seed)
    with job(tmp_path, "1:2") as it:
        it.start(2)
        it.wait_for((tmp_path / "now").exists)
        it.kill_node_of(2)
        it.ends_well()
    first, second = it.attempts()[:4], it.attempts()[4:]
    assert {(a.world_size, a.step, a.schedule) for a in first} == {(4, 0, "GridSchedule(world_size=4, group_size=2)")}
    resumed = step // EVERY * EVERY
    assert [(a.world_size, a.step) for a in second] == [(2, resumed)] * 2
    assert {a.schedule for a in second} == {"GridSchedule(world_size=2, group_size=2)"}
    assert torch.load(tmp_path / "end")["steps"] > EPOCHS * STEPS  # as many samples in an epoch, on fewer ranks
