"""Embedding tables with sparse gradients: only touched rows travel, and the result is that of averaging all of them."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ds_lightning import DSSynchronizer, GridSchedule, ShuffleSchedule
from ds_lightning.groups import ScheduledGroups
from ds_lightning.rows import TouchedRows
from tests.ranks import run_ranks
from tests.reference import Reference, relative_error
from tests.test_synchronizer import train_model

ROWS, WIDTH, STEPS = 200, 6, 40


class Recommender(nn.Module):
    """Two tables (one a bag) and a dense head."""

    def __init__(self, sparse=True):
        super().__init__()
        torch.manual_seed(0)
        self.users = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.items = nn.EmbeddingBag(50, WIDTH, mode="mean", sparse=sparse)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, users, items):
        return self.head(torch.cat([self.users(users), self.items(items)], 1))


class Both(torch.optim.Optimizer):
    """One optimizer for a model of sparse and dense parameters, as recommenders use them."""

    def __init__(self, model):
        tables = [model.users.weight, model.items.weight]
        self.inner = [torch.optim.SparseAdam(tables, 1e-2), torch.optim.Adam(model.head.parameters(), 1e-2)]
        super().__init__([{"params": tables}, {"params": list(model.head.parameters())}], {})

    def step(self, closure=None):
        for inner in self.inner:
            inner.step()


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.5),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), 0.1),
    "sparse adam": Both,
}


def backward(t, model, rank):
    generator = torch.Generator().manual_seed(1000 * t + rank)
    if t % 9 > 5:
        return  # nobody touches anything in a while, so that rows come to rest
    users = torch.randint(0, ROWS - 20, (4,), generator=generator)
    items = torch.randint(0, 50, (4, 2), generator=generator)
    cross_entropy(model(users, items), torch.randint(0, 3, (4,), generator=generator)).backward()


def train(rank, schedule, name, overlap, **options):
    model = Recommender()
    groups = ScheduledGroups(schedule)
    return train_model(rank, model, OPTIMIZERS[name](model), groups, backward, overlap, STEPS, **options)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", [GridSchedule(4, 2), GridSchedule(3, 3), ShuffleSchedule(5, 2)], ids=repr)
@pytest.mark.parametrize(
    "name", ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name != "sgd")]
)
def test_equals_averaging_whole_tables(name, schedule, overlap):
    ranks = run_ranks(train, schedule.world_size, schedule, name, overlap)
    reference = Reference(Recommender, OPTIMIZERS[name], schedule, overlap)
    for t in range(STEPS):
        reference.step(partial(backward, t))
    for rank, result in enumerate(ranks):
        assert relative_error(result, reference.flat(rank)) < 1e-6


def test_with_several_steps_between():
    schedule = GridSchedule(4, 2)
    ranks = run_ranks(lambda rank: train(rank, schedule, "sgd", False, sync_every=3), 4)
    reference = Reference(Recommender, OPTIMIZERS["sgd"], schedule, False, sync_every=3)
    for t in range(STEPS):
        reference.step(partial(backward, t))
    for rank, result in enumerate(ranks):
        assert relative_error(result, reference.flat(rank)) < 1e-6


@pytest.mark.parametrize("wire_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("schedule", [GridSchedule(4, 2), GridSchedule(3, 3)], ids=repr)
def test_a_lossy_wire_keeps_the_mean(schedule, wire_dtype):
    def run(rank):
        torch.manual_seed(rank)
        model = nn.Embedding(500, 5, sparse=True)
        sync = DSSynchronizer(
            model, torch.optim.SGD(model.parameters(), 1.0), ScheduledGroups(schedule), wire_dtype=wire_dtype
        )
        for t in range(20):
            model.zero_grad()
            rows = torch.randint(0, 500, (30,), generator=torch.Generator().manual_seed(100 * rank + t))
            model(rows).sum().backward()
            with torch.no_grad():
                moved = model.weight.grad.coalesce().indices()[0]
                model.weight[moved] += torch.randn(len(moved), 5)
            before = model.weight.detach().double().clone()
            sync.synchronize()
        return before, model.weight.detach().double()

    ranks = run_ranks(run, schedule.world_size)
    before, after = (torch.stack([r[i] for r in ranks]) for i in range(2))
    assert (before.mean(0) - after.mean(0)).norm() / before.mean(0).norm() < 1e-6
    assert ((after - after.mean(0)).norm() / (before - before.mean(0)).norm()) < 0.8


def rows_sent(rank, schedule, touched, steps, rows=10_000):
    """Bytes per step for a table of 10,000 rows of 16 values, of which each rank touches some in the first step."""
    model = nn.Embedding(rows, 16, sparse=True)
    sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 1.0), ScheduledGroups(schedule))
    sent = [0]
    for t in range(steps):
        model.zero_grad()
        if t == 0 and touched:
            model(torch.arange(touched) + rank * touched).sum().backward()
        sync.synchronize()
        sent.append(sync.statistics.bytes_sent)
    return [b - a for a, b in itertools.pairwise(sent)]


def test_a_row_that_nobody_touched_costs_nothing():
    """Of a grid of pairs of 4: two rounds after the touch, and only 8 bytes (how many rows: none) later."""
    for first, second, third in run_ranks(rows_sent, 4, GridSchedule(4, 2), 100, 3):
        assert first == 8 + 100 * 5 + 200 * 16 * 4  # those of both members
        assert second == 8 + 200 * 5 + 400 * 16 * 4
        assert third == 8
    assert run_ranks(rows_sent, 4, GridSchedule(4, 2), 0, 2) == [[8, 8]] * 4


def test_a_table_touched_everywhere_is_sent_whole():
    """A byte for each row tells how long it is due: the dense fallback."""
    for (first,) in run_ranks(rows_sent, 2, GridSchedule(2, 2), 1000, 1, 2000):
        assert first == 8 + 2000 + 2000 * 16 * 4


def test_consensus_ends_what_was_due():
    def run(rank):
        model = nn.Embedding(100, 4, sparse=True)
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 1.0), ScheduledGroups(ShuffleSchedule(4, 2)))
        sent = []
        for t in range(4):
            model.zero_grad()
            model(torch.tensor([rank])).sum().backward()
            if t < 2:
                sync.step += 1  # not synchronized
            before = sync.statistics.bytes_sent
            if t == 2:
                sync.consensus()
                model.zero_grad()
            sync.synchronize()
            sent.append(sync.statistics.bytes_sent - before)
        return sent

    for sent in run_ranks(run, 4):
        assert sent[0] > 8
        assert sent[2] == 8  # nothing touched since the consensus
        assert sent[3] > 8


def test_rows_touched_after_a_resume_in_the_middle_of_a_round_are_sent():
    def run(rank):
        torch.manual_seed(0)
        model = nn.Embedding(100, 4, sparse=True)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(2, 2)), sync_every=2)
        sync.load_state_dict({"step": 1})
        start = model.weight.detach().clone()
        for t in range(3):
            sync.start()
            optimizer.zero_grad()
            if t == 0:
                model(torch.tensor([rank])).sum().backward()
            sync.finish()
            optimizer.step()
        return model.weight.detach() - start

    for moved in run_ranks(run, 2):
        assert torch.allclose(moved[:2], torch.full((2, 4), -0.5), atol=1e-6)
        assert (moved[2:] == 0).all()


def test_a_dense_gradient_touches_every_row():
    """As of an embedding that is tied to the head."""

    def run(rank):
        model = nn.Embedding(20, 4, sparse=True)
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 1.0), ScheduledGroups(GridSchedule(2, 2)))
        model.weight.data += rank
        model.weight.sum().backward()
        sync.synchronize()
        return model.weight.detach()

    one, two = run_ranks(run, 2)
    assert torch.allclose(one, two, atol=1e-6)


def test_a_forgotten_average_leaves_every_row_due():
    table = nn.Parameter(torch.zeros(7, 2))
    rows = TouchedRows([table], torch.float32, GridSchedule(4, 2), 1)
    rows.touch_all()
    assert rows.due[0].tolist() == [2] * 7
    rows.agreed()
    assert rows.due[0].tolist() == [0] * 7
