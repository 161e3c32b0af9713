"""What `ConsensusMonitor` logs: the distance against all replicas, bytes against arithmetic, seconds against sleeps."""

import csv
import math
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning import ConsensusMonitor, DSSyncStrategy, Topology
from ds_lightning.callbacks import consensus_distance
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow  # each takes seconds; together they would double `make check`

KEYS = ["consensus_distance", "relative_consensus_distance", "seconds_waiting", "seconds_running"]
KEYS = [f"dssync/{key}" for key in [*KEYS, "hidden_share", "bytes_sent"]]
SIZE = 4 * (10 * 8 + 8 + 8 * 3)  # bytes of the parameters that train


class Model(LightningModule):
    """Trainable in two dtypes, one frozen; a rank sleeps as long as it is told."""

    def __init__(self, sleep=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(10, 8)
        self.b = nn.Linear(8, 3, bias=False)
        self.frozen = nn.Linear(50, 50).requires_grad_(False)
        self.sleep = sleep

    def training_step(self, batch, batch_idx):
        time.sleep(self.sleep)
        (x,) = batch
        return self.b(self.a(x).tanh()).logsumexp(-1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.global_rank)
        return DataLoader(TensorDataset(torch.randn(400, 10, generator=generator)), batch_size=4)


class TwoOptimizers(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.a, self.b)]


class Memory(Logger):
    """Keeps what a logger gets, on every rank."""

    name = version = "memory"

    def __init__(self):
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        if KEYS[0] in metrics:
            self.rows[step + 1] = metrics

    def log_hyperparams(self, *args, **kwargs):
        pass


class Direct(Callback):
    """Consensus distance and norm from the gathered replicas, after every step."""

    def __init__(self):
        self.distances = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        own = torch.cat([p.detach().flatten().double() for p in pl_module.parameters() if p.requires_grad])
        replicas = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(replicas, own)
        x = torch.stack(replicas)
        distance = (x - x.mean(0)).square().sum(1).mean().sqrt().item()
        self.distances[trainer.global_step] = distance, x.mean(0).norm().item()


def fit(model, world_size, monitor, options=(), callbacks=(), logger=None, **settings):
    trainer = Trainer(
        **{
            "strategy": DSSyncStrategy(**dict(options)),
            "accelerator": "cpu",
            "devices": world_size,
            "max_steps": 12,
            "logger": logger if logger is not None else Memory(),
            "log_every_n_steps": monitor.every_n_steps if monitor else 1,
            "callbacks": [monitor, *callbacks] if monitor else [],
            "use_distributed_sampler": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )
    trainer.fit(model)
    return trainer


def rows_of(world_size, make=Model, every_n_steps=1, options=(), **trainer):
    """What the loggers of all ranks got, which must be the same, and the distances themselves."""

    def run(rank):
        direct = Direct()
        ran = fit(make(), world_size, ConsensusMonitor(every_n_steps), options, [direct], **trainer)
        return ran.logger.rows, direct.distances, ran.strategy.statistics

    ranks = run_ranks(run, world_size, init=False)
    rows, distances, _ = ranks[0]
    for others, _, _ in ranks:
        assert others == rows
    for row in rows.values():
        assert set(KEYS) <= set(row)
        assert all(math.isfinite(row[key]) for key in KEYS)
        assert 0 <= row["dssync/seconds_waiting"] <= row["dssync/seconds_running"]
        assert 0 <= row["dssync/hidden_share"] <= 1
    return rows, distances, [statistics for _, _, statistics in ranks]


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"wire_dtype": "int8", "schedule": "shuffle"}], ids=repr)
def test_the_distance_is_that_of_the_replicas(options):
    rows, distances, _ = rows_of(4, options=options)
    assert list(rows) == list(range(1, 13))
    for step, row in rows.items():
        distance, norm = distances[step]
        assert row["dssync/consensus_distance"] == pytest.approx(distance, rel=1e-4, abs=1e-7)
        assert row["dssync/relative_consensus_distance"] == pytest.approx(distance / norm, rel=1e-4, abs=1e-7)
    assert max(distance for distance, _ in distances.values()) > 1e-3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SIZE),  # a ring all-reduce of a pair
        ({"group_size": 4}, SIZE * 2 * 3 / 4),
        ({"wire_dtype": "bf16"}, SIZE / 2),
        ({"sync_every": 3}, SIZE / 3),
        ({"average_gradients": True}, 2 * SIZE + 3 * 4),  # and which of the three there are
    ],
    ids=repr,
)
def test_bytes(options, expected):
    rows, *_ = rows_of(4, options=options, every_n_steps=3)
    assert [row["dssync/bytes_sent"] for row in rows.values()] == pytest.approx([expected] * 4)


def test_several_optimizers_count_each_step_of_each():
    rows, distances, statistics = rows_of(2, TwoOptimizers, every_n_steps=4, log_every_n_steps=2, max_steps=24)
    assert list(rows) == [2, 4, 6, 8, 10, 12]  # loggers count batches
    for batch, row in rows.items():
        assert row["dssync/bytes_sent"] == SIZE / 2
        assert row["dssync/consensus_distance"] == pytest.approx(distances[2 * batch][0], rel=1e-4, abs=1e-7)
    assert statistics[0].synchronizations == 24


def test_every_n_steps_goes_on_across_epochs():
    rows, *_ = rows_of(2, every_n_steps=5, limit_train_batches=7, max_steps=-1, max_epochs=3)
    assert list(rows) == [5, 10, 15, 20]


def test_accumulated_batches_are_one_step():
    rows, _, statistics = rows_of(2, every_n_steps=2, accumulate_grad_batches=3, limit_train_batches=12, max_steps=8)
    assert list(rows) == [2, 4, 6, 8]
    assert {row["dssync/bytes_sent"] for row in rows.values()} == {SIZE}
    assert statistics[0].synchronizations == 8


def test_a_fast_rank_waits_for_one_that_comes_late():
    nap = 0.05

    class Late(Callback):
        def on_train_batch_start(self, *args):
            time.sleep(nap)

    def run(rank):
        ran = fit(Model(), 2, ConsensusMonitor(3), callbacks=[Late()] if rank else [])
        return ran.strategy.statistics, ran.logger.rows

    (fast, rows), (slow, _) = run_ranks(run, 2, init=False)
    assert 0.7 * nap < fast.seconds_waiting / 12 < 3 * nap
    assert slow.seconds_waiting < 0.5 * fast.seconds_waiting
    logged = sum(row["dssync/seconds_waiting"] * 3 for row in rows.values())
    assert logged == pytest.approx((fast.seconds_waiting + slow.seconds_waiting) / 2, rel=1e-3)


def test_long_computation_hides_the_average():
    rows, *_ = rows_of(2, lambda: Model(sleep=0.05), every_n_steps=6)
    assert max(row["dssync/hidden_share"] for row in rows.values()) > 0.7
    assert min(row["dssync/seconds_waiting"] for row in rows.values()) < 0.02


def test_the_papers_order_hides_nothing():
    rows, *_ = rows_of(2, lambda: Model(sleep=0.01), options={"overlap": False}, every_n_steps=6)
    assert min(row["dssync/hidden_share"] for row in rows.values()) < 0.3


def test_loggers_and_the_progress_bar_show_it(tmp_path):
    def run(rank):
        logger = CSVLogger(tmp_path, version="run")
        ran = fit(Model(), 2, ConsensusMonitor(4), logger=logger)
        return ran.progress_bar_metrics, ran.callback_metrics

    for bar, metrics in run_ranks(run, 2, init=False):
        assert list(bar) == ["dssync/relative_consensus_distance"]
        assert set(KEYS) <= set(metrics)  # so that EarlyStopping and ModelCheckpoint may look at them
    with open(tmp_path / "lightning_logs" / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) + 1 for row in rows] == [4, 8, 12]
    assert all(float(row[key]) >= 0 for row in rows for key in KEYS)


def test_a_second_fit_counts_anew():
    def run(rank):
        monitor = ConsensusMonitor(2)
        fit(Model(), 2, monitor)
        return fit(Model(), 2, monitor).logger.rows

    for rows in run_ranks(run, 2, init=False):
        assert [row["dssync/bytes_sent"] for row in rows.values()] == [SIZE] * 6


def test_no_time_is_taken_without_a_monitor():
    def run(rank):
        return fit(Model(), 2, None).strategy.statistics

    for statistics in run_ranks(run, 2, init=False):
        assert (statistics.seconds_running, statistics.bytes_sent) == (0.0, 12 * SIZE)


def warnings_of(world_size, **trainer):
    def run(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ran = fit(Model(), world_size, ConsensusMonitor(2), **trainer)
        return [str(w.message) for w in caught if "ConsensusMonitor" in str(w.message)], ran.logger and ran.logger.rows

    return run_ranks(run, world_size, init=False)


def test_it_has_no_effect_with_ddp():
    (texts, rows), (others, _) = warnings_of(2, strategy="ddp")
    assert len(texts) == 1
    assert "has no effect with DDPStrategy" in texts[0]
    assert "HINT: use Trainer(strategy='dssync')" in texts[0]
    assert not others
    assert rows == {}


def test_it_logs_nothing_at_world_size_1():
    assert warnings_of(1) == [([], {})]


def test_measurements_that_loggers_would_miss_warn():
    (texts, rows), (others, _) = warnings_of(2, log_every_n_steps=3)
    assert len(texts) == 1
    assert "(log_every_n_steps=3): they get the latest measurement only. HINT: use ConsensusMonitor(eve" in texts[0]
    assert not others
    assert list(rows) == [3, 6, 9, 12]
    assert warnings_of(2, log_every_n_steps=3, logger=False)[0][0] == []
    assert warnings_of(2, log_every_n_steps=1)[0][0] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "every_n_steps=0 is too small. HINT"), (2.5, "every_n_steps=2.5 is not an int"), ("1", "is not an int")],
)
def test_bad_every_n_steps(value, message):
    with pytest.raises(ValueError, match=message):
        ConsensusMonitor(value)


def test_a_model_without_trainable_parameters_has_distance_zero():
    assert run_ranks(lambda rank: consensus_distance(nn.Linear(2, 2).requires_grad_(False)), 2) == [(0.0, 0.0)] * 2


def test_a_plan_that_adapts_is_logged():
    options = {"schedule": "topology", "topology": Topology.flat(["a", "b"], bandwidth=1)}
    rows, _ = rows_of(2, options=options)[:2]
    assert sorted(rows) == [*range(1, 13)]
    assert all(row["dssync/plan"] == 0 and row["dssync/slowest_link"] == 1 for row in rows.values())
    rows, _ = rows_of(2, options=options | {"adapt": False})[:2]
    assert not any("dssync/plan" in row or "dssync/slowest_link" in row for row in rows.values())


class KnownNoise(Model):
    """The gradient of a sample is the sample: a common part of 0.3 and noise of 1 in each of 2,000 values.

    And what a rank's own samples have in common, if they have.
    """

    def __init__(self, optimizer=torch.optim.Adam, own=0.0):
        super().__init__()
        self.a = nn.Linear(2000, 1, bias=False)
        self.b.requires_grad_(False)
        self.optimizer, self.own = optimizer, own

    def training_step(self, batch, batch_idx):
        return self.a(batch[0]).mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.global_rank)
        own = 0.3 + self.own * torch.randn(2000, generator=generator)
        return DataLoader(TensorDataset(own + torch.randn(960, 2000, generator=generator)), batch_size=4)


def logged(model, options, key="dssync/gradient_noise_scale", **settings):
    def run(rank):
        ran = fit(model(), 4, ConsensusMonitor(30), {"noise_correction": "auto", **options}, max_steps=120, **settings)
        return {step: row[key] for step, row in ran.logger.rows.items() if key in row}

    ranks = run_ranks(run, 4, init=False)
    assert ranks == [ranks[0]] * 4
    return ranks[0]


@pytest.mark.parametrize("options", [{}, {"overlap": False, "sync_every": 2}], ids=repr)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_gradient_noise_scale_is_the_data_s(options, accumulated):
    found = logged(KnownNoise, options, accumulate_grad_batches=accumulated)
    assert list(found) == [30, 60, 90, 120]
    direct = 1 / 0.3**2  # trace of the covariance by the square of the mean
    assert [found[step] for step in (90, 120)] == pytest.approx([direct] * 2, rel=0.25)


@pytest.mark.parametrize("options", [{"noise_correction": False}, {"wire_dtype": "int8"}, {"average_gradients": True}])
def test_without_noise_correction_there_is_no_noise_scale(options):
    assert logged(KnownNoise, options) == logged(lambda: KnownNoise(torch.optim.SGD), {}) == {}
    assert logged(KnownNoise, options, "dssync/drift") == {}


@pytest.mark.parametrize("overlap", [True, False])
def test_samples_of_their_own_are_told_from_others(overlap):
    options = {"overlap": overlap, "average_optimizer_state": ["exp_avg_sq"]}
    iid, own = (logged(partial(KnownNoise, own=own), options, "dssync/drift") for own in (0.0, 1.0))
    assert [*iid] == [*own] == [120]
    assert all(share < 0.1 for share in iid.values())
    assert all(share > 0.2 for share in own.values())
