"""Real `Trainer` steps at any world size: 1 is a no-op, primes work, and nothing is made inside the training loop."""

import logging
import math
import re

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from ds_lightning import ConsensusMonitor, DSSynchronizer, DSSyncStrategy, GridSchedule, ShuffleSchedule
from ds_lightning.groups import ScheduledGroups
from tests.ranks import QUIET, run_ranks

pytestmark = pytest.mark.slow  # each takes seconds; together they would double `make check`


class Model(BoringModel):
    """Ranks have gradients of their own; what the loss is does not matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch + self.global_rank, batch_idx)


class Counter(Callback):
    """Counts process groups made, in all and since training began."""

    def __init__(self):
        self.made = self.made_in_training = 0
        self.training = False
        new_group = dist.new_group

        def counted(*args, **kwargs):
            self.made += 1
            self.made_in_training += self.training
            return new_group(*args, **kwargs)

        dist.new_group = counted  # in this rank's process alone

    def on_train_start(self, *args):
        self.training = True


def train(rank, world_size, options, steps=6):
    told = []

    class Listener(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    for name in ("lightning.pytorch", "lightning.fabric"):  # neither passes on to the root logger
        logging.getLogger(name).addHandler(Listener())
    counter = Counter()
    trainer = Trainer(
        strategy=DSSyncStrategy(**options),
        accelerator="cpu",
        devices=world_size,
        max_steps=steps,
        limit_val_batches=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[counter],
        **QUIET,
    )
    model = Model()
    trainer.fit(model)
    lines = [line for line in told if "dssync" in line]
    groups = 0 if trainer.strategy._groups is None else len(trainer.strategy._groups)
    return model.layer.weight.data, lines, groups, counter.made_in_training, trainer.global_step


def described(world_size, **options):
    """Trains, checks what holds at every world size, and returns the line that rank 0 logged."""
    ranks = run_ranks(train, world_size, world_size, options, init=False, timeout=100)
    before = Model().layer.weight.data
    for rank, (weight, lines, _, made_in_training, steps) in enumerate(ranks):
        assert torch.equal(weight, ranks[0][0])  # consensus after fit
        assert not torch.equal(weight, before)
        assert made_in_training == 0
        assert steps == 6
        assert len(lines) == (rank == 0)
    line, times = ranks[0][1][0].split(" Start-up: ")
    phases = ("process group", "agreement", "connections", "model", "groups")
    assert re.fullmatch(", ".join(rf"{phase} \d+\.\d s" for phase in phases) + r"\.", times)
    return line, max(groups for _, _, groups, *_ in ranks)


@pytest.mark.parametrize(
    ("world_size", "options", "line", "groups"),
    [
        (2, {}, "GridSchedule(world_size=2, group_size=2), groups of 2, exact consensus after 1 step.", 1),
        (3, {}, "GridSchedule(world_size=3, group_size=2), groups of 3, exact consensus after 1 step.", 1),
        (4, {}, "GridSchedule(world_size=4, group_size=2), groups of 2, exact consensus after 2 steps.", 2),
        (5, {}, "ShuffleSchedule(world_size=5, group_size=2, seed=0), groups of 2 and 3, consensus rate 0.", 8),
        (6, {}, "GridSchedule(world_size=6, group_size=2), groups of 2 and 3, exact consensus after 2 steps.", 2),
        (7, {"group_size": 3}, "ShuffleSchedule(world_size=7, group_size=3, seed=0), groups of 3 and 4, consensus", 8),
        (8, {}, "GridSchedule(world_size=8, group_size=2), groups of 2, exact consensus after 3 steps.", 3),
        (12, {}, "GridSchedule(world_size=12, group_size=3), groups of 3 and 4, exact consensus after 2 steps.", 2),
    ],
)
def test_world_sizes(world_size, options, line, groups):
    told, most = described(world_size, **options)
    assert told.startswith(f"dssync: {line}")
    assert "\n" not in told
    assert most <= groups


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 1},
        {"group_size": 4, "schedule": "grid"},
        {"schedule": GridSchedule(4, 2)},
        {"overlap": False, "average_gradients": True, "wire_dtype": "int8", "average_optimizer_state": ["exp_avg_sq"]},
    ],
    ids=repr,
)
def test_one_rank_is_plain_training(options):
    ((weight, lines, groups, made, _),) = run_ranks(train, 1, 1, options, init=False)
    assert lines == ["dssync: the world size is 1, so there is nothing to synchronize."]
    assert groups == made == 0

    def plain(rank):
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=6,
            limit_val_batches=1,
            val_check_interval=2,
            num_sanity_val_steps=0,
            **QUIET,
        )
        model = Model()
        trainer.fit(model)
        return model.layer.weight.data

    assert torch.equal(weight, run_ranks(plain, 1, init=False)[0])


def test_one_rank_validates_tests_and_predicts():
    def run(rank):
        trainer = Trainer(
            strategy="dssync",
            accelerator="cpu",
            devices=1,
            fast_dev_run=2,
            callbacks=[ConsensusMonitor(1)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Model())
        trainer.validate(Model())
        trainer.test(Model())
        return len(trainer.predict(Model()))

    assert run_ranks(run, 1, init=False) == [2]


@pytest.mark.parametrize(("world_size", "group_size"), [(4, 2), (6, 2), (6, 3)])
def test_a_grid_has_at_most_log_g_of_n_groups(world_size, group_size):
    counts = run_ranks(lambda rank: len(ScheduledGroups(GridSchedule(world_size, group_size))), world_size)
    assert max(counts) <= math.ceil(math.log(world_size, group_size))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [GridSchedule, ShuffleSchedule])
def test_64_ranks(make):
    """A tiny model, without Lightning: the mean of what every rank began with, on all of them."""
    schedule = make(64, 8)
    steps = 2 if make is GridSchedule else 40

    def run(rank):
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(schedule))
        model.weight.data.fill_(float(rank))
        for _ in range(steps):
            sync.synchronize()
        return model.weight.item(), len(sync.groups)

    ranks = run_ranks(run, 64, timeout=250, collective_timeout=200)
    assert [weight for weight, _ in ranks] == pytest.approx([31.5] * 64, abs=1e-4)
    assert max(groups for _, groups in ranks) <= (2 if make is GridSchedule else ShuffleSchedule.POOL_SIZE)
