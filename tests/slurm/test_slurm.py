"""Real jobs of a real Slurm: `recipes/slurm/train.sbatch` and `hydra/launcher=slurm`, preempted and requeued."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import slurm, why_not

ROOT = Path(__file__).parents[2]
STEPS = 45  # a validation saves the last checkpoint
RECIPE = [
    "recipe=wide_resnet",
    "data.batch_size=8",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=15",
    "trainer.check_val_every_n_epoch=null",
    "+callbacks.tell._target_=tests.slurm.progress.Progress",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        running.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        yield running


def recipe(folder, *more, pause=0):
    folder.mkdir(exist_ok=True)
    return [
        *RECIPE,
        f"hydra.run.dir={folder}",
        f"+callbacks.tell.folder={folder}",
        f"+callbacks.tell.pause={pause}",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The checkpoint that four processes of this machine end with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "recipes.train", *recipe(folder), "trainer.devices=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return last(folder)


def last(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint


def assert_same(checkpoint, other):
    """Bit for bit: parameters, buffers, the optimizer's states."""
    assert checkpoint["state_dict"].keys() == other["state_dict"].keys()
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    states = [c["optimizer_states"][0]["state"] for c in (checkpoint, other)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


def submit(cluster, folder, log, *more, pause=0):
    return cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=2",
        "--time=20",
        f"--output={log}",
        "recipes/slurm/train.sbatch",
        *recipe(folder, *more, pause=pause),
        "strategy.save_replicas=true",
        cwd=ROOT,
    )


def test_two_nodes_train_what_four_local_processes_do(cluster, undisturbed, tmp_path):
    log = tmp_path / "log"
    job = submit(cluster, tmp_path / "run", log)
    ended = cluster.wait(job, 300)
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert ended["NodeList"] == "n[1-2]"
    assert_same(last(tmp_path / "run"), undisturbed)


def preempt(cluster, job, how):
    """What may come upon a job, each with a warning."""
    if how == "signal":
        cluster.command("scancel", "--signal=USR1", job)  # as --signal=USR1@120 does
    elif how == "requeue":
        cluster.command("scontrol", "requeue", job)
    else:  # a job of a partition that goes before needs the nodes
        options = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
        urgent = cluster.submit(*options, "--wrap=sleep 1", cwd=ROOT)
        cluster.wait(urgent, 60)


def test_a_job_that_is_preempted_three_times_ends_as_if_it_was_not(cluster, undisturbed, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    job = submit(cluster, folder, log, pause=0.15)
    draw = random.Random()
    for count, how in enumerate(draw.sample(["signal", "requeue", "urgent"], 3)):
        # Slurm takes up to a second to send the signal: a job that trains no longer then is not requeued.
        step = draw.randrange(1 + 13 * count, 13 * count + 6)

        def reached(step=step, count=count):
            lines = (folder / "rank_0").read_text().split("\n") if (folder / "rank_0").exists() else []
            return any(line.endswith(f" {count}") and int(line.split()[0]) >= step for line in lines)

        cluster.until(lambda: reached() or cluster.job(job)["JobState"] == "FAILED", 240, f"step {step}")
        preempt(cluster, job, how)
        cluster.until(lambda count=count: cluster.job(job)["Restarts"] == str(count + 1), 120, f"{how} to requeue")
    ended = cluster.wait(job, 300)
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert_same(last(folder), undisturbed)
    told = log.read_text()
    assert told.count("every rank goes on with its own replica") == 3, told
    # No step was taken twice.
    for rank in range(4):
        steps = [int(line.split()[0]) for line in (folder / f"rank_{rank}").read_text().splitlines()]
        assert steps == list(range(STEPS))


def test_jobs_of_a_sweep_go_on_where_submitits_signal_stopped_them(cluster, tmp_path):
    """Two jobs that train the same, of which one is preempted."""
    options = [
        *RECIPE,
        "hydra/launcher=slurm",
        "hydra.launcher.nodes=2",
        "hydra.launcher.tasks_per_node=1",
        "hydra.launcher.timeout_min=20",
        f"hydra.sweep.dir={tmp_path}",
        "trainer=slurm",
        "trainer.log_every_n_steps=10,20",
        "strategy.save_replicas=true",
        "+callbacks.tell.folder=${output_dir}",
        "+callbacks.tell.pause=0.05",
    ]
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "recipes.train", "-m", *options],
            cwd=ROOT,
            env=cluster.environment,
            stdout=log,
            stderr=log,
        )
    try:
        step = random.randrange(STEPS - 5)
        file = tmp_path / "0" / "rank_0"
        cluster.until(lambda: file.exists() and len(file.read_text().split("\n")) > step, 240, f"step {step}")
        job = cluster.command("squeue", "--noheader", "--array", "--format=%i", "--sort=i").split()[0]
        cluster.command("scancel", "--signal=USR2", job)
        assert sweep.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        sweep.kill()
        sweep.wait()
    assert_same(last(tmp_path / "0"), last(tmp_path / "1"))
    restarts = [{line.split()[1] for line in (tmp_path / n / "rank_1").read_text().splitlines()} for n in "01"]
    assert restarts == [{"0", "1"}, {"0"}]
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in "01"]
    for name in ("test/accuracy", "test/loss", "val/loss"):
        assert results[0][name] == results[1][name]


def test_a_task_that_fails_ends_the_job(cluster, tmp_path):
    log = tmp_path / "log"
    job = submit(cluster, tmp_path / "run", log, "data.batch_size=0")
    ended = cluster.wait(job, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert ended["ExitCode"] != "0:0"
    assert "error: data.batch_size is 0, but must be at least 1" in log.read_text()
    assert not list((tmp_path / "run").glob("rank_*"))
