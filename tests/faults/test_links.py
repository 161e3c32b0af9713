"""The link of a random host is cut, comes back, or turns slow at a random moment of a real fit on emulated hosts."""

import itertools
import os
import random
import re
import threading
import time
import warnings
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.cluster import SETTINGS, Cluster
from ds_lightning import DSSyncStrategy
from tests.faults.test_ranks_that_vanish import OPTIONS
from tests.reference import flat
from tests.test_benchmarks import needs_cluster
from tests.test_preemption import Slow
from tests.test_strategy import RankData, trainer_for

HOSTS = 4
TIMEOUT = 4
WHOM = r"ranks? (\d \(host\d\)(?:, \d \(host\d\))*)"
SAYS = (
    rf"Rank \d could not average step \d+ with {WHOM} within 0:00:04: ",
    rf"Rank \d waited in vain for {WHOM} .+ after step \d+, at most 0:00:04: ",
)
# Before ranks have told each other their hosts.
SAYS_AT_FIRST = (
    r"Rank \d \(host\d\) could not meet the other 3 ranks at 10.0.0.1:29500 within 0:00:04: ",
    r"Rank \d waited in vain for ranks? \d.* to begin, at most 0:00:04: ",
)

pytestmark = [pytest.mark.slow, needs_cluster, pytest.mark.timeout(180)]


class Began(pl.Callback):
    """Says that training has begun, and takes the time of batches, with what lies between them."""

    def __init__(self, folder):
        self.folder = folder
        self.times = []

    def on_train_start(self, trainer, pl_module):
        self.times.append(time.monotonic())
        (self.folder / "training").touch()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.times.append(time.monotonic())


def fit(rank, folder, seed, timeout, epochs):
    """What an error said, when the fit ended, the values of the model, and the seconds that each batch took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pauses = random.Random(seed).choices([0, 0.01, 0.03], k=HOSTS)
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=2, monitor="step", mode="max")
    began = Began(folder)
    strategy = DSSyncStrategy(timeout=timedelta(seconds=timeout), **OPTIONS[seed % len(OPTIONS)])
    trainer = trainer_for(
        rank, [checkpoint, began], strategy, devices=1, num_nodes=HOSTS, max_epochs=epochs,
        val_check_interval=4, enable_checkpointing=True, default_root_dir=folder,
    )  # fmt: skip
    module = Slow(pauses[rank])
    data, val = (DataLoader(RankData(rank, n), batch_size=None) for n in (12, 2))
    error = ""
    (folder / "starting").touch()
    try:
        trainer.fit(module, data, val)
    except RuntimeError as e:
        error = str(e)
    return error, time.monotonic(), flat(module), [b - a for a, b in itertools.pairwise(began.times)]


def after(file, *actions):
    """Calls each ``(seconds, action)`` so long after the one before, the first after the file is there.

    Returns:
        When it did so, later.
    """
    moments: list[float] = []

    def run():
        while not file.exists():
            time.sleep(0.01)
        for pause, action in actions:
            time.sleep(pause)
            moments.append(time.monotonic())
            action()

    threading.Thread(target=run, daemon=True).start()
    return moments


def fit_with_a_cut(folder, seed, file, seconds):
    """Cuts a random host off for good. Returns it, and each rank's error and how many seconds later it ended."""
    draw = random.Random(seed)
    who, when = draw.randrange(HOSTS), draw.uniform(0, seconds)
    with Cluster(HOSTS, 100, SETTINGS["homogeneous"]) as cluster:
        cuts = after(folder / file, (when, partial(cluster.cut, who)))
        ends = cluster.call(fit, folder, seed, TIMEOUT, 1000, timeout=60)
    for error, end, *_ in ends:
        print(f"{end - cuts[0]:.1f} s: {error}")
    return who, [(error, end - cuts[0]) for error, end, *_ in ends]


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIALS", "4"))))
def test_all_end_in_time_and_name_step_ranks_and_hosts(seed, tmp_path):
    """20 trials: `TRIALS=20 pytest tests/faults/test_links.py`."""
    who, ends = fit_with_a_cut(tmp_path, seed, "training", 1.5)
    blamed = set()
    for rank, (error, seconds) in enumerate(ends):
        assert seconds < TIMEOUT + 5
        said = next(filter(None, (re.match(say, error) for say in SAYS)), None)
        assert said, error
        if rank != who:
            blamed |= set(said[1].split(", "))
    assert f"{who} (host{who})" in blamed


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIALS", "2"))))
def test_all_end_in_time_also_during_start_up(seed, tmp_path):
    _, ends = fit_with_a_cut(tmp_path, seed, "starting", 0.35)
    for error, seconds in ends:
        assert seconds < TIMEOUT + 5
        assert any(re.match(say, error) for say in SAYS + SAYS_AT_FIRST), error


def fit_with_a_fault(folder, seed, *actions):
    """On a cluster. Returns when the fault was, when the fit ended, each rank's model, and its two slowest batches."""
    folder.mkdir()
    with Cluster(HOSTS, 100, SETTINGS["homogeneous"]) as cluster:
        moments = after(folder / "training", *[(seconds, partial(action, cluster)) for seconds, action in actions])
        ends = cluster.call(fit, folder, seed, 10, 2, timeout=90)
    assert [error for error, *_ in ends] == [""] * HOSTS
    slowest = [sorted(seconds)[-2:] for *_, seconds in ends]
    print(f"batches took {[sum(seconds) for *_, seconds in ends]} s, the slowest {slowest} s")
    return moments, max(end for _, end, *_ in ends), [values for _, _, values, _ in ends], slowest


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIALS", "2"))))
def test_a_link_that_comes_back_costs_one_slow_step_and_nothing_else(seed, tmp_path):
    """The connection goes on when TCP tries again: after up to as long again as the link was away."""
    draw = random.Random(seed)
    who, when = draw.randrange(HOSTS), draw.uniform(0, 0.5)
    _, _, expected, _ = fit_with_a_fault(tmp_path / "undisturbed", seed)
    away = (when, lambda c: c.cut(who)), (2.5, lambda c: c.mend(who))
    (_, back), end, values, slowest = fit_with_a_fault(tmp_path / "disturbed", seed, *away)
    assert end > back  # it was still training
    for second, first in slowest:
        assert 2 < first < 10
        assert second < 2.5
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRIALS", "1"))))
def test_a_link_that_turns_slow_costs_time_alone(seed, tmp_path):
    draw = random.Random(seed)
    who, when = draw.randrange(HOSTS), draw.uniform(0, 0.5)
    _, _, expected, _ = fit_with_a_fault(tmp_path / "undisturbed", seed)
    (slowed,), end, values, _ = fit_with_a_fault(tmp_path / "disturbed", seed, (when, lambda c: c.slow(who, 0.002)))
    assert end > slowed
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
