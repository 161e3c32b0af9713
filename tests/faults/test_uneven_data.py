"""Ranks with unequal numbers of batches: they stop together, or end with an error."""

import warnings
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ds_lightning import DSSyncStrategy
from tests.ranks import run_ranks
from tests.test_strategy import Net, RankData, trainer_for

LENGTHS = (7, 5, 6, 7)


def fit(rank, data, **options):
    """Steps of each epoch, validations, warnings and a value of the model."""
    ends = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ends.append(trainer.global_step)

        def on_validation_start(self, trainer, pl_module):
            ends.append(f"validation {trainer.global_step}")

    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            pass

    strategy = DSSyncStrategy(timeout=timedelta(seconds=4))
    trainer = trainer_for(rank, [Count()], strategy, max_epochs=2, num_sanity_val_steps=0, **options)
    module = Validated()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data, DataLoader(RankData(rank, 2 + rank), batch_size=None))
    told = [str(w.message) for w in caught if "unequal" in str(w.message)]
    return ends, told, torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("interval", [1.0, 2])
def test_all_ranks_stop_after_the_shortest(interval):
    def run(rank):
        data = DataLoader(RankData(rank, LENGTHS[rank]), batch_size=None)
        return fit(rank, data, val_check_interval=interval)

    ranks = run_ranks(run, 4)
    first = ["validation 2", "validation 4", 5] if interval == 2 else ["validation 5", 5]
    second = ["validation 7", "validation 9", 10] if interval == 2 else ["validation 10", 10]
    assert [ends for ends, *_ in ranks] == [first + second] * 4
    (warning,) = ranks[0][1]
    assert "[7, 5, 6, 7]: all stop an epoch after 5" in warning
    assert all(told == [] for _, told, _ in ranks[1:])
    assert all(torch.equal(values, ranks[0][2]) for *_, values in ranks)


def test_equal_numbers_are_not_told():
    ranks = run_ranks(lambda rank: fit(rank, DataLoader(RankData(rank, 3), batch_size=None)), 2)
    assert [told for _, told, _ in ranks] == [[], []]


class Stream(IterableDataset[object]):
    """Says no length."""

    def __init__(self, rank, length):
        self.data = RankData(rank, length)

    def __iter__(self):
        return iter([self.data[t] for t in range(len(self.data))])


def test_loaders_without_a_length_end_in_an_error_that_says_why():
    def run(rank):
        fit(rank, DataLoader(Stream(rank, 3 + 3 * rank), batch_size=None))

    for error in run_ranks(run, 2, errors=True, collective_timeout=4, timeout=30):
        assert error.type is RuntimeError
        assert "another number of optimizer steps" in error.message or "is elsewhere in its program" in error.message
