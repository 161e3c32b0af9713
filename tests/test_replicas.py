"""A run that signals stop, with `save_replicas`, against the undisturbed one: every rank, after every batch."""

import copy
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ds_lightning import DSSyncStrategy
from recipes.train import train
from tests.ranks import run_ranks
from tests.test_checkpoint import Net as StepNet
from tests.test_checkpoint import Recorder, different
from tests.test_strategy import trainer_for
from tests.test_synchronizer import batch

ROOT = Path(__file__).resolve().parents[1]


class Random(StepNet):
    """Each rank's own randomness in training, and an embedding of which few rows are touched."""

    def __init__(self, optimizer, sparse):
        super().__init__(optimizer)
        self.rows = torch.nn.Embedding(50, 10, sparse=sparse)
        self.register_buffer("seen", torch.tensor(0))

    def configure_optimizers(self):
        if self.rows.sparse:  # which takes no weight decay
            return torch.optim.SGD(self.parameters(), 0.05)
        return super().configure_optimizers()

    def loss(self):
        x, y = batch(self.global_rank, self.t)
        x = torch.nn.functional.dropout(x + self.rows(y), 0.5) * np.random.uniform(0.5, 1.5) + random.gauss(0, 0.1)
        self.seen.add_(self.global_rank + 1)
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        random.random()


class StopAt(pl.Callback):
    """A signal to rank `rank` in batch `t`, and time for all to hear of it."""

    def __init__(self, rank, t):
        self.rank, self.t = rank, t

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, pl_module.t) == (self.rank, self.t):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)


def fit_with_stops(rank, folder, stops, make, options, trainer_options, save_replicas=True):
    """The state after every batch, over all the runs that it takes; and how many runs that were."""
    states: dict[Any, Any] = {}
    starts: list[int] = []
    warned: list[str] = []
    for stop in [*stops, None]:
        seed_everything(1000 * rank + len(starts), verbose=False)  # what a new process begins with matters nothing
        recorder = Recorder()
        callbacks = [*([] if stop is None else [StopAt(*stop)]), recorder]
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=6, monitor="step", mode="max", save_top_k=1))
        strategy = DSSyncStrategy(timeout=timedelta(seconds=20), save_replicas=save_replicas, **options)
        settings = {"max_epochs": 5, "val_check_interval": 3, "enable_checkpointing": True, **trainer_options}
        trainer = trainer_for(rank, callbacks, strategy, default_root_dir=folder, **settings)
        torch.manual_seed(0)
        module = make()
        if not starts:
            seed_everything(rank, verbose=False)
        path = max(Path(folder).glob("hpc*.ckpt"), default=None)
        data: DataLoader[Any] = DataLoader(torch.zeros(5, 1))
        with warnings.catch_warnings(record=True) as caught, suppress(SIGTERMException):
            warnings.simplefilter("always")
            trainer.fit(module, data, data, ckpt_path=None if path is None else str(path))
        warned += [str(w.message) for w in caught if "bit for bit" in str(w.message)]
        starts.append(min(recorder.states))
        states.update(recorder.states)
        states["end"] = copy.deepcopy(module.state_dict())
    return states, starts, warned


CORRECT = {"noise_correction": "auto"}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("make", "strategy", "options"),
    [
        (partial(Random, "momentum", False), {}, {}),
        (partial(Random, "momentum", True), {"overlap": False}, {}),
        (partial(Random, "adamw", False), {"average_optimizer_state": ["exp_avg_sq"], **CORRECT}, {}),
        (partial(Random, "momentum", True), {"sync_every": 3, "wire_dtype": "int8"}, {}),
        (partial(Random, "adamw", False), {"overlap": False, "group_size": 4, **CORRECT}, {}),
        (partial(Random, "adamw", False), {"average_gradients": True}, {"accumulate_grad_batches": 2}),
    ],
    ids=["overlap", "paper-sparse", "adam", "rounds-sparse-int8", "adam-paper", "accumulate"],
)
def test_a_run_stopped_three_times_equals_the_undisturbed_one(make, strategy, options, tmp_path):
    """At random batches, bit for bit after every batch, with randomness of its own on every rank."""
    draw = random.Random(str(strategy))
    stops = [(draw.randrange(4), t) for t in sorted(draw.sample(range(1, 20), 3))]
    stops = [(rank, t + i) for i, (rank, t) in enumerate(stops)]  # a stop comes a batch later than its signal
    undisturbed = run_ranks(fit_with_stops, 4, str(tmp_path / "a"), [], make, strategy, options)
    stopped = run_ranks(fit_with_stops, 4, str(tmp_path / "b"), stops, make, strategy, options, timeout=120)
    for (states, starts, warned), (expected, *_) in zip(stopped, undisturbed, strict=True):
        assert len(set(starts)) == 4, starts
        assert warned == []
        assert sorted(map(str, states)) == sorted(map(str, expected))
        for t, state in states.items():
            assert different(state, expected[t]) == [], (t, starts)
    assert len(list((tmp_path / "b").glob("replicas_*"))) == 1  # of the last stop alone


@pytest.mark.timeout(120)
def test_without_replicas_a_stop_is_a_consensus_point(tmp_path):
    """So that the test above can fail; with them, the simplest of its cases."""
    make, stops = partial(Random, "momentum", False), [(2, 7)]
    runs = {"undisturbed": ([], True), "kept": (stops, True), "averaged": (stops, False)}
    ends = {}
    for name, (at, save_replicas) in runs.items():
        arguments: Any = str(tmp_path / name), at, make, {}, {}, save_replicas
        ends[name] = [states["end"] for states, *_ in run_ranks(fit_with_stops, 4, *arguments)]
    for end in ends.values():  # every run ends with one model
        assert all(torch.equal(state["net.0.weight"], end[0]["net.0.weight"]) for state in end)
    assert different(ends["kept"], ends["undisturbed"]) == []
    assert "/0/net.0.weight" in different(ends["averaged"], ends["undisturbed"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["file", "mark", "truncated"])
def test_a_lost_replica_warns_and_the_average_goes_on(loss, tmp_path):
    make = partial(Random, "momentum", False)
    run_ranks(stop_once, 4, str(tmp_path), make)
    path = tmp_path / "replicas_1" / "rank_2.ckpt"
    if loss == "file":
        path.unlink()
    elif loss == "mark":
        state = torch.load(path, weights_only=True)
        torch.save(state | {"mark": "another"}, path)
    else:
        path.write_bytes(path.read_bytes()[:-9])
    ranks = run_ranks(go_on, 4, str(tmp_path), make)
    (warning,) = ranks[0][0]
    assert "going on from the average of all replicas, not bit for bit" in warning
    assert "rank_2.ckpt" in warning
    assert all(warned == [] for warned, _ in ranks[1:])
    assert all(torch.equal(weight, ranks[0][1]) for _, weight in ranks)


@pytest.mark.slow
def test_a_replica_that_cannot_be_saved_costs_no_checkpoint(tmp_path):
    make = partial(Random, "momentum", False)
    (tmp_path / "replicas_1").write_text("a file in the folder's place")
    run_ranks(stop_once, 4, str(tmp_path), make)
    ranks = run_ranks(go_on, 4, str(tmp_path), make)
    assert [warned for warned, _ in ranks] == [[]] * 4
    assert all(torch.equal(weight, ranks[0][1]) for _, weight in ranks)


@pytest.mark.slow
def test_another_world_size_goes_on_from_the_average(tmp_path):
    make = partial(Random, "momentum", False)
    run_ranks(stop_once, 4, str(tmp_path), make)
    ranks = run_ranks(go_on, 2, str(tmp_path), make)
    assert torch.equal(ranks[0][1], ranks[1][1])


def stop_once(rank, folder, make):
    trainer = trainer_for(rank, [StopAt(1, 3)], replicas(), max_epochs=2, default_root_dir=folder)
    with pytest.raises(SIGTERMException):
        trainer.fit(make(), DataLoader(torch.zeros(5, 1)))


def go_on(rank, folder, make):
    """What it warned of, and a parameter before the first batch."""

    class First(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights.append(pl_module.net[0].weight.detach().clone())

    weights: list[torch.Tensor] = []
    trainer = trainer_for(rank, [First()], replicas(), max_epochs=2, default_root_dir=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make(), DataLoader(torch.zeros(5, 1)), ckpt_path="hpc")
    return [str(w.message) for w in caught if "bit for bit" in str(w.message)], weights[0]


def replicas():
    return DSSyncStrategy(timeout=timedelta(seconds=20), save_replicas=True)


def train_recipe(folder, overrides):
    """The entry point's work in a process of its own that need not import all that again."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*overrides, f"output_dir={folder}", "callbacks.progress=null"])
    try:
        results = train(cfg)
    except ProcessExitedException as error:
        os._exit(error.exit_code)
    (folder / "results.json").write_text(json.dumps(results))
    os._exit(0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "recipe",
    [
        ("recipe=wide_resnet", "model.net.width=1", "model.net.depth=10", "trainer.max_epochs=30"),
        ("recipe=deepfm", "trainer.max_epochs=18", "strategy.sync_every=2"),  # with dropout
    ],
    ids=["wide_resnet", "deepfm"],
)
def test_a_recipe_stopped_three_times_ends_where_the_undisturbed_one_does(recipe, tmp_path):
    """In the middle of epochs, whose loaders go on where they were; `ckpt_path=last` finds what there is."""
    draw, context = random.Random(recipe[0]), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # forks from a process in which no other test ran
    ends = []
    for stops in (0, 3):
        folder = tmp_path / str(stops)
        folder.mkdir()
        last = folder / "checkpoints" / "last.ckpt"
        for run in range(stops + 1):
            overrides = [*recipe, "strategy.save_replicas=true", "ckpt_path=last"]
            process = context.Process(target=train_recipe, args=(folder, overrides))
            before = last.stat().st_mtime_ns if last.exists() else None
            process.start()
            try:
                if run < stops:
                    deadline = time.monotonic() + 60
                    while not last.exists() or last.stat().st_mtime_ns == before:  # an epoch has not ended yet
                        assert process.is_alive()
                        assert time.monotonic() < deadline
                        time.sleep(0.02)
                    time.sleep(draw.uniform(0, 0.1))
                    os.kill(process.pid, signal.SIGTERM)
                process.join(90)
            finally:
                process.kill()
            assert process.exitcode == (0 if run == stops else 143)
        assert len(list(folder.glob("hpc_ckpt_*.ckpt"))) == stops
        ends.append((json.loads((folder / "results.json").read_text()), torch.load(last, weights_only=True)))
    results = [{k: v for k, v in r.items() if k.startswith("test/") and "seconds" not in k} for r, _ in ends]
    assert results[0]
    assert results[0] == results[1]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert different(ends[0][1][part], ends[1][1][part]) == []
