"""A rank is killed, stopped, or raises, at a random moment of a real fit: the others end, and say whom they missed."""

import multiprocessing
import os
import random
import re
import signal
import socket
import threading
import time
import warnings
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from ds_lightning import DSSyncStrategy
from ds_lightning import strategy as strategy_module
from tests.ranks import RankError, run_ranks
from tests.test_preemption import Slow
from tests.test_strategy import RankData, trainer_for

TIMEOUT = 4
HOWS = ("kill", "stop", "raise")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sync_every": 3},
    {"overlap": False},
    {"average_gradients": True},
    {"schedule": "shuffle"},
]
SAYS = (
    r"Rank \d could not average step \d+ with rank \d \(.+\) within 0:00:04: ",
    r"Rank \d waited in vain for ranks? \d( \(.+\))?.* to begin, at most 0:00:04: ",
    r"Rank \d waited in vain for ranks? \d \(.+\).* after step \d+, at most 0:00:04: ",
    r"Rank \d lost the store of rank 0, in which ranks agree to stop: ",  # noticed between two batches
)


class Vanish(pl.Callback):
    def __init__(self, how, seconds, folder):
        self.how, self.seconds, self.folder = how, seconds, folder
        self.due = False

    def setup(self, trainer, pl_module, stage):
        threading.Timer(self.seconds, self.vanish).start()

    def vanish(self):
        (self.folder / "vanished").write_text(str(time.time()))
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "stop":
            me = os.getpid()
            if os.fork() == 0:  # who ends the stopped process when the others have ended
                time.sleep(3 * TIMEOUT)
                os.kill(me, signal.SIGKILL)
                os._exit(0)
            os.kill(me, signal.SIGSTOP)
        self.due = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.due:
            raise KeyError("a defect of the user's")


def trial(rank, folder, seed, how):
    draw = random.Random(seed)
    who, when = draw.randrange(4), draw.uniform(0, 1.5)
    pauses = [draw.choice([0, 0.01, 0.03]) for _ in range(4)]
    options = OPTIONS[seed % len(OPTIONS)]
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=2, monitor="step", mode="max")]
    if rank == who:
        callbacks.append(Vanish(how, when, folder))
    strategy = DSSyncStrategy(timeout=timedelta(seconds=TIMEOUT), **options)
    limits = {"max_epochs": 1000, "val_check_interval": 4, "enable_checkpointing": True}
    trainer = trainer_for(rank, callbacks, strategy, default_root_dir=folder, **limits)
    warnings.simplefilter("ignore")
    data, val = (DataLoader(RankData(rank, n), batch_size=None) for n in (12, 2))
    try:
        trainer.fit(Slow(pauses[rank]), data, val)
    finally:
        (folder / f"{rank}").write_text(str(time.time()))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIALS", "5"))))
def test_the_others_end_in_time_and_name_whom_they_missed(seed, how, tmp_path):
    """40 trials each: `TRIALS=40 pytest tests/faults/test_ranks_that_vanish.py`."""
    ends = run_ranks(trial, 4, tmp_path, seed, how, timeout=40, init=False, errors=True)
    who = random.Random(seed).randrange(4)
    vanished = float((tmp_path / "vanished").read_text())
    blamed = set()
    for rank, end in enumerate(ends):
        assert isinstance(end, RankError)
        if rank == who:
            continue
        assert float((tmp_path / str(rank)).read_text()) - vanished < TIMEOUT + 5
        assert any(re.match(say, end.message) for say in SAYS), end.message
        whom = re.split(r" in vain for | with | the store of ", end.message)[1].split(":")[0]
        blamed |= set(re.findall(r" (\d)", whom))
    assert str(who) in blamed


def fit_without_the_last(rank, port, signum, imported, errors):
    """A process of its own, which ends as a program does, not by ``os._exit``."""
    os.environ.update(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3", GROUP_RANK="0", NODE_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    if rank == 2:
        strategy_module.connect = lambda timeout: os.kill(os.getpid(), signum)
    trainer = trainer_for(rank, (), DSSyncStrategy(timeout=timedelta(seconds=TIMEOUT)), devices=3)
    imported.wait(150)
    try:
        trainer.fit(Slow(), DataLoader(RankData(rank, 4), batch_size=None))
    except RuntimeError as e:
        errors.put((rank, str(e)))
        raise


@pytest.mark.slow
@pytest.mark.timeout(250)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_end_when_a_rank_vanishes_before_gloo_has_connected_it(signum):
    """Of itself gloo would wait five times the timeout for it, or without a limit."""
    context = multiprocessing.get_context("spawn")
    imported, errors = context.Barrier(4), context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (port, signum, imported, errors)
    ranks = [context.Process(target=fit_without_the_last, args=(rank, *arguments)) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        imported.wait(150)
        start = time.monotonic()  # of the process group, which may take the timeout as well
        ends = dict(errors.get(timeout=2 * TIMEOUT + 5) for _ in range(2))
        for rank, end in ends.items():
            assert re.match(rf"Rank {rank} waited in vain for ranks \d.* to connect after step 0, at most 0:00:04", end)
            ranks[rank].join(2 * TIMEOUT + 5 - (time.monotonic() - start))
            assert ranks[rank].exitcode == 1
    finally:
        for process in ranks:
            process.kill()
            process.join()
