"""The soak of `make soak`, shorter; and that its checks find what is planted."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.soak_checks import (
    SAVE_EVERY,
    Attempt,
    Memory,
    Record,
    check_end,
    check_files,
    check_final,
    check_losses,
    check_memory,
    check_resumes,
    read,
)
from tests.test_benchmarks import needs_cluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(420)
@needs_cluster
def test_a_minute_of_faults():
    """Every kind about once; with the undisturbed runs to compare with it takes two minutes or three."""
    command = [sys.executable, "-m", "tests.faults.soak", "--minutes", "1", "--seed", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS, seed 4" in done.stdout


# ---- planted defects ------------------------------------------------------------------------------------------------

MISSED = "failed RuntimeError: Rank 1 could not average step 7 with rank 2 (host-3) within 0:00:06: reset. HINT: look."
ABSENT = (
    "failed RuntimeError: Rank 0 waited in vain for ranks 1 (a), 2 (b) to save a checkpoint after step 7, at most 6."
)


def attempt(ends, fault="kill", victim=2, gone=(2,), late=(), codes=None, stops=False, may_stop=False):
    records = [Record(ready=True, begin=0, end=end) for end in ends]
    if codes is None:
        codes = {rank: 143 if end == "stopped" else 1 for rank, end in enumerate(ends)}
    return Attempt(0, fault, victim, set(gone), stops, may_stop, list(late), codes, records)


def test_ends_as_they_must_be():
    assert check_end(attempt([ABSENT, MISSED, ""])) == []
    assert check_end(attempt(["stopped"] * 3, "SIGTERM", gone=(), stops=True)) == []
    assert check_end(attempt(["stopped", MISSED, ""], "SIGTERM and kill", may_stop=True)) == []


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (attempt([ABSENT, "", ""], late=[1]), "rank 1 had not ended in time"),
        (attempt([ABSENT, "done abc", ""], codes={0: 1, 1: 0, 2: -9}), "rank 1 ended with code 0"),
        (attempt([ABSENT, MISSED, ""], codes={0: 1, 1: 0, 2: -9}), "rank 1 ended with code 0"),
        (attempt([ABSENT, "", ""], codes={0: 1, 1: -11, 2: -9}), "rank 1 ended with code -11 and ''"),
        (attempt([ABSENT, "failed RuntimeError: reset by peer", ""]), "rank 1 names nobody"),
        (attempt([MISSED, MISSED, ""], victim=3), "only [2] were blamed"),
        (attempt([ABSENT, "stopped", ""]), "rank 1 ended with code 143"),
        (attempt(["stopped", MISSED, "stopped"], "SIGTERM", gone=(), stops=True), "rank 1 ended with code 1"),
    ],
)
def test_a_wrong_end_is_found(planted, told):
    (problem,) = check_end(planted)
    assert told in problem


def trained(begin, end, saved, wrong=()):
    losses = {step: f"{step}{'!' * (step in wrong)}" for step in range(begin + 1, end + 1)}
    return Record(True, begin, losses, saved=[(saved, "last.ckpt")] if saved else [], end="done abc")


def attempts(*records):
    return [Attempt(i, "kill", 0, {0}, False, False, [], {}, [record]) for i, record in enumerate(records)]


def test_resumes_as_they_must_be():
    whole = attempts(trained(0, 50, 40), Record(), trained(40, 41, 0), trained(40, 70, 60), trained(60, 80, 80))
    reference = [trained(0, 80, 80)]
    assert check_resumes(whole) == ([], [0, 10, 1, 10])
    assert check_losses(whole, reference, 80) == []
    assert check_final(whole[-1].records, reference) == []


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (attempts(trained(0, 50, 40), trained(20, 80, 80)), "began at step 20, with 40 saved"),
        (attempts(trained(0, 50, 40), trained(60, 80, 80)), "began at step 60, with 40 saved and 50 reached"),
        (attempts(trained(0, 50, 0), trained(20, 80, 80)), f"began {SAVE_EVERY + 10} steps before the last"),
    ],
)
def test_a_wrong_resume_is_found(planted, told):
    assert any(told in problem for problem in check_resumes(planted)[0])


def test_another_trajectory_is_found():
    reference = [trained(0, 80, 80)]
    (problem,) = check_losses(attempts(trained(0, 50, 40), trained(40, 80, 80, wrong={43, 44})), reference, 80)
    assert problem == "attempt 1: rank 0 left the undisturbed run at step 43"
    (problem,) = check_losses(attempts(trained(0, 50, 40), trained(60, 80, 80)), reference, 80)
    assert problem == "rank 0 never took 10 steps, the first of them 51"
    for end in ("done abd", "failed", ""):
        assert check_final([Record(end=end), Record(end="done abc")], reference)
    assert check_final([Record(end="failed")], [Record(end="failed")])


def measured(resident=0.0, tensors=0.0, blocks=0.0, files=0.0):
    """Growth per step, beside noise of what allocators do."""
    draw = random.Random(0)
    return [
        Memory(
            step,
            int(5e8 + 3e6 * (1 - 2 ** (-step / 200)) + draw.uniform(0, 1e5) + resident * step),
            int(1e6 + tensors * step),
            int(2e6 + draw.uniform(0, 100) + blocks * step),
            int(50 + files * step),
        )
        for step in range(50, 2001, 50)
    ]


def test_memory_that_stays_and_memory_that_grows():
    assert check_memory([Record(memory=measured())]) == []
    for planted, told in [
        (measured(resident=1500), "RSS MB per 1,000 steps"),
        (measured(tensors=40), "tensor MB per 1,000 steps"),
        (measured(blocks=1), "Python blocks per 1,000 steps"),
        (measured(files=0.001), "had 50 open files and then 52"),
        (measured()[:9], "was measured 9 times only"),
    ]:
        (problem,) = check_memory([Record(memory=planted)])
        assert told in problem


def test_files_that_are_left_over(tmp_path):
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    for name in ("checkpoints/last.ckpt", "checkpoints/epoch=1-step=80.ckpt", "hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (run / "replicas_2").mkdir()
    (run / "replicas_2" / "rank_0.ckpt").touch()
    assert check_files(run, temporary, 2, 80) == []
    assert "checkpoints of 3 stops" in check_files(run, temporary, 3, 80)[0]
    for name in ("checkpoints/.last.ckpt.tmp", "checkpoints/epoch=1-step=60.ckpt", "replicas_1/rank_0.ckpt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
        (problem,) = check_files(run, temporary, 2, 80)
        assert name in problem
        (run / name).unlink()
    (temporary / "torch_1").touch()
    (problem,) = check_files(run, temporary, 2, 80)
    assert "torch_1" in problem


def test_a_diary_that_a_kill_cut_short(tmp_path):
    assert read(tmp_path / "none") == Record()
    path = tmp_path / "0-0"
    path.write_text("ready\nbegin 20\nstep 21 0x1p+0\nsaving 40 last.ckpt\nsaved 40 last.ckpt\nsaving 60 a b.ckpt\n")
    record = read(path)
    assert (record.ready, record.begin, record.reached, record.resumable, record.end) == (True, 20, 21, 40, "")
    assert record.saving == [(40, "last.ckpt"), (60, "a b.ckpt")]
