"""Signals at any moment on any rank: the agreement on threads as ranks, then real fits."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException
from torch.utils.data import DataLoader

from ds_lightning import DSSyncStrategy
from ds_lightning.preemption import StopAgreement
from tests.ranks import run_ranks
from tests.test_strategy import Net, RankData, trainer_for

# ---- the agreement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_all_ranks_stop_after_the_same_batch(seed):
    """Ranks of unequal speed that wait for each other in pairs, asked at a random moment by one or several of them."""
    world = 5
    store, draw = dist.HashStore(), random.Random(seed)
    agreements = [StopAgreement(store, rank, world, timeout=10, interval=0.002) for rank in range(world)]
    pauses = [draw.choice([0, 0.001, 0.004]) for _ in range(world)]
    asked = draw.sample(range(world), draw.choice([1, 2, world]))
    barriers = [threading.Barrier(2) for _ in range(world)]
    stopped = [None] * world

    def train(rank):
        for done in range(100_000):
            if agreements[rank].reached(done) is not None:
                stopped[rank] = done
                return
            time.sleep(pauses[rank])
            if done % 2 == 1:  # with the next on a ring, of whom one comes late
                for barrier in sorted((rank, (rank - 1) % world)):
                    barriers[barrier].wait(10)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    time.sleep(draw.uniform(0, 0.05))
    for rank in asked:
        agreements[rank].why = f"SIGTERM on rank {rank}"
    for thread in threads:
        thread.join(20)
    assert None not in stopped
    assert len(set(stopped)) == 1
    assert [agreement.close() is not None for agreement in agreements] == [rank in asked for rank in range(world)]


def test_a_rank_that_does_not_answer_is_named():
    store = dist.HashStore()
    agreement = StopAgreement(store, 0, 3, timeout=0.2, interval=0.01)
    other = StopAgreement(store, 2, 3, timeout=5, interval=0.01)
    other.why = "SIGUSR1 on rank 2"
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match=r"SIGUSR1 on rank 2.*ranks \[1\] did not"):
        agreement.reached(0)
    agreement.close()
    other.close()


def test_a_store_that_is_lost_is_named():
    class Lost:
        def check(self, keys):
            raise dist.DistNetworkError("Connection was likely closed")

    agreement = StopAgreement(Lost(), 1, 2, timeout=5, interval=0.01)
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match=r"^Rank 1 lost the store of rank 0, .*likely closed\. HINT: that rank"):
        agreement.reached(0)
    agreement.close()


def test_a_store_that_hangs_does_not_hold_up_the_end():
    """As where rank 0's process is stopped, or its host cut off: others have waited for their timeout already."""

    class Hanging:
        def check(self, keys):
            time.sleep(10)
            return False

    agreement = StopAgreement(Hanging(), 1, 2, timeout=5, interval=0.01)
    time.sleep(0.1)
    began = time.monotonic()
    assert agreement.close() is None
    assert time.monotonic() - began < 2


# ---- real fits -----------------------------------------------------------------------------------------------------

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class Slow(Net):
    """Ranks of unequal speed, in training and in validation."""

    def __init__(self, pause=0.0):
        super().__init__()
        self.pause = pause

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(self.pause)


class SignalAt(pl.Callback):
    """Sends this process a signal, so many seconds after fit was called."""

    def __init__(self, signum, seconds):
        self.signum, self.seconds = signum, seconds

    def setup(self, trainer, pl_module, stage):
        threading.Timer(self.seconds, os.kill, (os.getpid(), self.signum)).start()


def fit_until_a_signal(rank, folder, module, callbacks, plugins=(), **options):
    """Returns the steps taken, and whether a signal ended the fit."""
    options = {"max_epochs": 100, "val_check_interval": 4, **options}
    strategy = DSSyncStrategy(timeout=timedelta(seconds=20), **options.pop("strategy", {}))
    trainer = trainer_for(
        rank, callbacks, strategy, default_root_dir=folder, plugins=list(plugins), enable_checkpointing=True, **options
    )
    data = DataLoader(RankData(rank, 12), batch_size=None)
    before = [signal.getsignal(s) for s in HANDLED]
    stopped = False
    try:
        trainer.fit(module, data, DataLoader(RankData(rank, 2), batch_size=None))
    except SIGTERMException:
        stopped = True
    assert [signal.getsignal(s) for s in HANDLED] == before
    assert [t.name for t in threading.enumerate() if t.name == "dssync: stop agreement"] == []
    return trainer.global_step, stopped


def trial(rank, folder, seed):
    draw = random.Random(seed)
    signum, who, when = draw.choice(HANDLED), draw.sample(range(4), draw.choice([1, 1, 2, 4])), draw.uniform(0, 1)
    pauses = [draw.choice([0, 0.01, 0.03]) for _ in range(4)]
    options = [{}, {"sync_every": 3}, {"overlap": False}, {"average_gradients": True}][seed % 4]
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=2, monitor="step", mode="max")]
    if rank in who:
        callbacks.append(SignalAt(signum, when))
    accumulate = 2 if seed % 3 == 0 else 1
    module = Slow(pauses[rank])
    return fit_until_a_signal(rank, folder, module, callbacks, strategy=options, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIALS", "8"))))
def test_a_signal_at_any_moment_ends_all_ranks_after_the_same_step(seed, tmp_path):
    """In training, validation, checkpoints and start-up; 50 trials: `TRIALS=50 pytest tests/test_preemption.py`."""
    ends = run_ranks(trial, 4, str(tmp_path), seed, timeout=60)
    assert len(set(ends)) == 1
    steps, stopped = ends[0]
    assert stopped
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps


def test_a_stopped_fit_goes_on_where_it_was(tmp_path):
    """That a resumed run equals the uninterrupted one is test_checkpoint's matter."""

    def first(rank):
        callbacks = [SignalAt(signal.SIGUSR1, 0.3)] if rank == 2 else []
        return fit_until_a_signal(rank, str(tmp_path), Slow(0.02), callbacks, max_epochs=8)

    steps, stopped = run_ranks(first, 4)[0]
    assert stopped
    assert 0 < steps < 8 * 12

    class Begin(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.step = trainer.global_step

    def second(rank):
        begin = Begin()
        trainer = trainer_for(rank, [begin], max_epochs=8, default_root_dir=str(tmp_path))
        trainer.fit(Slow(), DataLoader(RankData(rank, 12), batch_size=None), ckpt_path="hpc")
        return begin.step, trainer.global_step

    assert run_ranks(second, 4) == [(steps, 8 * 12)] * 4


@pytest.mark.parametrize("signum", HANDLED)
@pytest.mark.parametrize("whom", ["worker", "parent"])
def test_forked_workers_end_the_program_that_waits_for_them(whom, signum, tmp_path):
    """Which would wait for their results forever if they ended well; a signal to itself it passes on."""
    strategy = DSSyncStrategy(start_method="fork", timeout=timedelta(seconds=20))
    options = {"devices": 2, "max_epochs": 1000, "default_root_dir": str(tmp_path), "accelerator": "cpu"}
    callback = SignalAt(signum, 0.3) if whom == "worker" else SignalParent(signum)
    trainer = trainer_for(0, [callback], strategy, **options)
    before = [signal.getsignal(s) for s in HANDLED]
    with pytest.raises(ProcessExitedException) as caught:
        trainer.fit(Slow(0.01), DataLoader(RankData(0, 12), batch_size=None))
    assert caught.value.exit_code == 128 + signum
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    assert [signal.getsignal(s) for s in HANDLED] == before


class SignalParent(pl.Callback):
    def __init__(self, signum):
        self.signum = signum

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getppid(), self.signum)


def test_after_the_workers_signals_do_what_they_did(tmp_path):
    strategy = DSSyncStrategy(start_method="fork")
    trainer = trainer_for(0, [], strategy, devices=1, accelerator="cpu", default_root_dir=str(tmp_path))
    heard = []
    original = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        trainer.fit(Slow(), DataLoader(RankData(0, 2), batch_size=None))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, original)


@pytest.mark.parametrize("earlier", [False, True], ids=["scontrol", "submitit"])
def test_slurms_job_is_requeued_once_after_the_checkpoint(earlier, tmp_path, monkeypatch):
    """By `scontrol`, or by the handler that was there before, as under submitit."""
    log = tmp_path / "log"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* $(ls {tmp_path}/*.ckpt) >> {log}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"JOB_ID": "4711", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2"}

    def run(rank):
        os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()}, SLURM_PROCID=str(rank))
        os.environ.update(SLURM_LOCALID=str(rank), SLURM_JOB_NAME="train")
        if earlier:

            def handler(signum, frame):
                with log.open("a") as file:
                    file.write(
                        f"rank {rank}: {signal.Signals(signum).name} {[p.name for p in tmp_path.glob('*.ckpt')]}\n"
                    )

            signal.signal(signal.SIGUSR1, handler)
        callbacks = [SignalAt(signal.SIGUSR1, 0.2)] if rank == 1 else []
        return fit_until_a_signal(rank, str(tmp_path), Slow(0.01), callbacks, [SLURMEnvironment()])

    ends = run_ranks(run, 2)
    assert ends[0] == ends[1]
    lines = sorted(log.read_text().splitlines())
    if earlier:
        assert lines == [f"rank {rank}: SIGUSR1 ['hpc_ckpt_1.ckpt']" for rank in range(2)]
    else:
        assert lines == [f"requeue 4711 {tmp_path}/hpc_ckpt_1.ckpt"]


def test_a_signal_in_the_last_batch_changes_nothing(tmp_path):
    def run(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callbacks = [SignalInLastBatch()] if rank == 1 else []
            end = fit_until_a_signal(rank, str(tmp_path), Slow(), callbacks, max_epochs=1)
            again = fit_until_a_signal(rank, str(tmp_path), Slow(0.1), [], max_epochs=2)
            assert again == (24, False)
        return end, [str(w.message) for w in caught if "after the last batch" in str(w.message)]

    ends = run_ranks(run, 2)
    assert [end for end, _ in ends] == [(12, False)] * 2
    assert [len(warned) for _, warned in ends] == [0, 1]
    assert not list(tmp_path.glob("hpc*"))


class SignalInLastBatch(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # so that the others hear of it, too


def test_no_batch_waits_for_all_ranks(tmp_path, monkeypatch):
    """Lightning broadcasts before every batch, which holds fast ranks to rank 0's pace; nothing does that here."""

    def run(rank):
        calls = 0

        def counted(function, *args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        for name in ("broadcast", "all_reduce", "barrier", "all_gather", "all_gather_object", "broadcast_object_list"):
            monkeypatch.setattr(dist, name, partial(counted, getattr(dist, name)))

        class Count(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                counts.append(calls)

        counts: list[int] = []
        trainer = trainer_for(rank, [Count()], default_root_dir=str(tmp_path))
        trainer.fit(Slow(), DataLoader(RankData(rank, 12), batch_size=None))
        return counts

    for counts in run_ranks(run, 4):
        assert len(counts) == 12
        assert counts[0] == counts[-1]


def pretend_slurm(rank, folder):
    """Two tasks of a job, whose `scontrol` writes what it is asked into the file `log`."""
    slurm = {"JOB_ID": "4711", "PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": 2, "NTASKS_PER_NODE": 2}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in slurm.items()}, SLURM_JOB_NAME="train")
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    scontrol = folder / f"scontrol-{rank}"
    scontrol.write_text(
        f'#!/bin/sh\necho $* >> {folder}/log\n[ $1 = requeue ] || echo "JobId=4711 $(cat {folder}/shown) Power="\n'
    )
    scontrol.chmod(0o755)
    scontrol.rename(folder / "scontrol")
    return [SLURMEnvironment()]


@pytest.mark.parametrize(
    ("shown", "requeued"),
    [
        ("JobState=RUNNING PreemptTime=2026-11-25T04:51:47", True),  # has GraceTime: would be over if it ended now
        ("JobState=COMPLETING PreemptTime=None", False),  # cancelled
        ("JobState=COMPLETING Restarts=1", False),  # requeued already
        ("JobState=RUNNING PreemptTime=None", False),  # somebody else's kill
    ],
)
def test_a_job_that_slurm_preempts_with_grace_is_requeued(shown, requeued, tmp_path):
    (tmp_path / "shown").write_text(shown)

    def run(rank):
        plugins = pretend_slurm(rank, tmp_path)
        return fit_until_a_signal(rank, str(tmp_path), Slow(0.01), [SignalAt(signal.SIGTERM, 0.2)], plugins)[1]

    assert run_ranks(run, 2) == [True, True]
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked == ["--oneliner show job 4711", *["requeue 4711"] * requeued]


def test_a_signal_that_was_blocked_until_fit_stops_it(tmp_path):
    """As recipes do it under Slurm: it would have ended the job while everything is imported."""

    def run(rank):
        plugins = pretend_slurm(rank, tmp_path)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        end = fit_until_a_signal(rank, str(tmp_path), Slow(), [], plugins, devices=2)
        os.kill(os.getpid(), signal.SIGUSR1)  # waits again
        assert signal.SIGUSR1 in signal.sigpending()
        return end

    ends = run_ranks(run, 2, init=False)  # threads that were there before would not block it
    assert ends[0] == ends[1]
    assert ends[0][1]
    assert ends[0][0] < 100
    assert (tmp_path / "log").read_text() == "requeue 4711\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


def test_recipes_do_not_die_of_the_requeue_signal_while_they_are_imported():
    command = "import os, signal, recipes; os.kill(os.getpid(), signal.SIGUSR1); print(*signal.sigpending())"
    for job, expected in ({"SLURM_JOB_ID": "1"}, "10\n"), ({}, ""):
        done = subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, **job}, capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.returncode) == (expected, 0 if job else -signal.SIGUSR1)


class Evaluable(Slow):
    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


@pytest.mark.parametrize("function", ["validate", "test"])
def test_a_job_is_requeued_at_once_where_there_is_nothing_to_save(function, tmp_path):
    """Lightning would save a checkpoint inside the handler, while other ranks wait for another collective."""

    def run(rank):
        plugins = pretend_slurm(rank, tmp_path)
        trainer = trainer_for(rank, [SignalAt(signal.SIGUSR1, 0.2)], plugins=plugins, default_root_dir=str(tmp_path))
        getattr(trainer, function)(
            Evaluable(0.01 * (1 + rank)), DataLoader(RankData(rank, 60), batch_size=None), verbose=False
        )
        return signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL

    assert run_ranks(run, 2) == [True, True]
    assert (tmp_path / "log").read_text() == "requeue 4711\n"
    assert not list(tmp_path.glob("*.ckpt"))
