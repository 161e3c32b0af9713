"""`ExtendedSWA` against a plain computation from recorded trajectories, in real `Trainer.fit` runs on forked ranks."""

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ds_lightning import DSSyncStrategy, ExtendedSWA
from tests.ranks import QUIET, run_ranks

BATCHES, SIZE = 4, 8
STRATEGIES = {"overlap": {"overlap": True}, "paper": {"overlap": False}, "ddp": "ddp"}


class Small(pl.LightningModule):
    """BatchNorm, and data of each rank's own whose distributions differ."""

    def __init__(self, norm=True, sizes=(BATCHES,) * 4):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Tanh(), nn.Linear(5, 3))
        self.unused = nn.BatchNorm1d(2, affine=False)
        self.sizes = sizes

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)

    def train_dataloader(self):
        return shard(self.global_rank, self.sizes[self.global_rank])


def shard(rank, batches=BATCHES):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(batches * SIZE, 6, generator=generator) * (1 + rank) + 3 * rank
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=SIZE)


class Recorder(pl.Callback):
    """The replica after every step, and what validation and training see."""

    def __init__(self):
        self.steps, self.validated, self.averages = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps[trainer.global_step] = copy.deepcopy(pl_module.state_dict())
        (average,) = [c._average_model for c in trainer.callbacks if isinstance(c, ExtendedSWA)]
        self.averages[trainer.global_step] = copy.deepcopy(average.state_dict())


class Validated(Small):
    def validation_step(self, batch, batch_idx):
        recorder = next(c for c in self.trainer.callbacks if isinstance(c, Recorder))
        recorder.validated[self.trainer.global_step] = copy.deepcopy(self.state_dict())
        self.log("worse", float(self.trainer.global_step), sync_dist=True)

    def val_dataloader(self):
        return shard(0, 1)


def fit(ranks, module, swa, strategy, callbacks=(), ckpt_path=None, **settings):
    recorder = Recorder()
    trainer = pl.Trainer(
        strategy=DSSyncStrategy(**strategy) if isinstance(strategy, dict) else strategy,
        **{
            **QUIET,
            "accelerator": "cpu",
            "devices": ranks,
            "max_epochs": 3,
            "use_distributed_sampler": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "callbacks": [swa, recorder, *callbacks],
            **settings,
        },
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=ckpt_path)
    told = [str(w.message) for w in caught if "ExtendedSWA" in str(w.message)]
    return trainer, recorder, told


def expected(trajectories, shards, norm=True):
    """Parameters averaged over workers and steps, and BatchNorm's statistics with them over all shards."""
    module = Small(norm)
    for name, p in module.named_parameters():
        p.data = torch.stack([state[name].double() for states in trajectories for state in states]).mean(0).float()
    if norm:
        means, variances, batches = [], [], []
        for loader in shards:
            own = copy.deepcopy(module)
            update_bn(loader, own)
            means.append(own.net[1].running_mean.double())
            variances.append(own.net[1].running_var.double())
            batches.append(len(loader))
        weights = torch.tensor(batches).double() / sum(batches)
        mean = sum(w * m for w, m in zip(weights, means, strict=True))
        module.net[1].running_mean.copy_(mean)
        spread = [(m - mean).square() for m in means]
        module.net[1].running_var.copy_(sum(w * (v + s) for w, v, s in zip(weights, variances, spread, strict=True)))
        module.net[1].num_batches_tracked.fill_(sum(batches))
    return module.state_dict()


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-5, atol=1e-6), name


def run(rank, ranks, make, options, strategy, kwargs):
    trainer, recorder, told = fit(ranks, make(), ExtendedSWA(**options), strategy, **kwargs)
    return trainer.lightning_module.state_dict(), recorder, told, trainer.global_step


def check(found, steps, norm=True, sizes=(BATCHES,) * 4):
    """All ranks end alike, with what the plain computation says."""
    want = expected(
        [[recorder.steps[step] for step in steps] for _, recorder, *_ in found],
        [shard(rank, sizes[rank]) for rank in range(len(found))],
        norm,
    )
    for state, *_ in found:
        assert_close(state, want)
        assert all(torch.equal(value, found[0][0][name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("overlap", {}, [10, 11, 12]),  # the last quarter of 12
        pytest.param("paper", {"start": 0.5}, range(7, 13), marks=pytest.mark.slow),
        pytest.param("overlap", {"start": 5, "every_n_steps": 3}, [8, 11], marks=pytest.mark.slow),
        pytest.param("ddp", {"start": 0}, range(1, 13), marks=pytest.mark.slow),
    ],
)
def test_it_is_the_mean_over_workers_and_steps(name, options, steps):
    found = run_ranks(run, 4, 4, Small, options, STRATEGIES[name], {}, init=False)
    check(found, steps)
    if name != "ddp":  # else the mean over workers would show nothing
        assert not torch.equal(*(recorder.steps[12]["net.0.weight"] for _, recorder, *_ in found[:2]))


@pytest.mark.parametrize("strategy", ["auto", {}])
def test_one_process_does_as_torchs_update_bn(strategy):
    check(run_ranks(run, 1, 1, Small, {"start": 0.5}, strategy, {}, init=False), range(7, 13))


def test_the_variance_is_that_of_all_samples():
    """One batch per rank: but for Bessel's correction, the statistics of the first layer are those of the union."""
    found = run_ranks(run, 2, 2, Small, {"start": 0}, {}, {"limit_train_batches": 1}, init=False)
    state = found[0][0]
    x = torch.cat([next(iter(shard(rank)))[0] for rank in range(2)])
    seen = x @ state["net.0.weight"].T + state["net.0.bias"]
    assert torch.allclose(state["net.1.running_mean"], seen.mean(0), atol=1e-5)
    assert torch.allclose(state["net.1.running_var"], seen.var(0, correction=0), rtol=1 / (SIZE - 1))
    assert state["net.1.num_batches_tracked"] == 2


@pytest.mark.slow
def test_workers_may_pass_over_unequally_much():
    """Under DDP: DS-Sync's ranks stop together."""
    settings = {"max_steps": 4, "max_epochs": -1}
    found = run_ranks(run, 2, 2, lambda: Small(sizes=(6, 5)), {"start": 0.5}, STRATEGIES["ddp"], settings, init=False)
    check(found, [3, 4], sizes=(6, 5))


class Endless(IterableDataset[Any]):
    def __init__(self, rank):
        self.samples = shard(rank, 6).dataset

    def __iter__(self):
        while True:
            yield from self.samples


class Streamed(Small):
    def train_dataloader(self):
        return DataLoader(Endless(self.global_rank), batch_size=SIZE)


@pytest.mark.slow
def test_a_loader_that_never_ends_is_passed_over_as_far_as_training_went():
    settings = {"max_steps": 6, "max_epochs": -1}
    found = run_ranks(run, 2, 2, Streamed, {"start": 0.5}, {}, settings, init=False)
    check(found, [4, 5, 6], sizes=(6, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overlap", "ddp"])
def test_without_batch_norm(name):
    found = run_ranks(run, 2, 2, lambda: Small(norm=False), {"start": 0.5}, STRATEGIES[name], {}, init=False)
    check(found, range(7, 13), norm=False)


def test_batch_norm_in_eval_mode_keeps_its_statistics():
    class Frozen(Small):
        def on_train_epoch_start(self):
            self.net[1].eval()

    state, *_ = run(0, 1, Frozen, {"start": 0.5}, "auto", {})
    assert torch.equal(state["net.1.running_mean"], torch.zeros(5))
    assert torch.equal(state["net.1.running_var"], torch.ones(5))


def test_layers_get_their_own_momentum_back():
    class Slow(Small):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.BatchNorm1d(5, momentum=0.3)

    module = Slow()
    fit(1, module, ExtendedSWA(), "auto")
    assert module.net[1].momentum == 0.3
    assert module.training


def test_a_run_that_ends_too_early_keeps_its_model_and_warns():
    found = run_ranks(run, 2, 2, Small, {"start": 100}, {}, {}, init=False)
    for state, recorder, _, _ in found:
        steps = [r.steps[12]["net.0.weight"] for _, r, *_ in found]
        assert torch.allclose(state["net.0.weight"], torch.stack(steps).mean(0), atol=1e-7)
        assert not torch.equal(state["net.0.weight"], recorder.averages[12]["module.net.0.weight"])
    told = "ExtendedSWA had no effect: the run ended at step 12, before the first to average (101). HINT: use a smaller"
    assert found[0][2][0].startswith(told)
    assert found[1][2] == []


@pytest.mark.slow
def test_validation_sees_the_current_model_then_the_average_and_may_stop_the_run():
    stop = {"callbacks": [EarlyStopping("worse", patience=2)], "max_epochs": 9}
    found = run_ranks(run, 4, 4, Validated, {"start": 6}, {}, stop, init=False)
    assert found[0][3] == 12
    check(found, range(7, 13))
    for _, recorder, *_ in found:
        for step, state in recorder.validated.items():
            if step:
                seen = [[r.steps[s] for s in (range(7, step + 1) if step > 6 else [step])] for _, r, *_ in found]
                weights = [state["net.0.weight"] for states in seen for state in states]
                assert torch.allclose(state["net.0.weight"], torch.stack(weights).mean(0), atol=1e-6), step
        assert set(recorder.validated) == {0, 4, 8, 12}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def train_with_files(rank, ranks, strategy, folder):
    """A whole run, one resumed in the middle of the average, and what files hold at the end."""

    def savers(folder):
        """The same in each run: every file that is saved under DS-Sync is a consensus."""
        named = {"save_top_k": -1, "auto_insert_metric_name": False}
        return [
            ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, **named),
            ModelCheckpoint(folder, "newest", save_last=True),
        ]

    trainer, whole, _ = fit(ranks, Ordered(), ExtendedSWA(0.5), strategy, savers(folder))
    after = f"{folder}/after.ckpt"
    trainer.save_checkpoint(after)
    end = copy.deepcopy(trainer.lightning_module.state_dict())
    files = {name: torch.load(f"{folder}/{name}.ckpt", weights_only=True) for name in ("newest", "last", "after")}

    resumed_ends, differences = [], []
    for step in (3, 8):  # before and after the average began, at the end of an epoch and within one
        path, again = f"{folder}/step{step}.ckpt", savers(f"{folder}/{step}")
        trainer, resumed, _ = fit(ranks, Ordered(), ExtendedSWA(0.5), strategy, again, path)
        resumed_ends.append(trainer.lightning_module.state_dict())
        for s in range(step + 1, 13):
            differences += [(s, n) for n, v in whole.steps[s].items() if not torch.equal(v, resumed.steps[s][n])]
            same = {} if s < 7 else whole.averages[s]
            if strategy == "ddp":  # whose buffers are each rank's own, in a file rank 0's
                same = {n: v for n, v in same.items() if "running" not in n}
            differences += [(s, n) for n, v in same.items() if not torch.equal(v, resumed.averages[s][n])]
    over, _, _ = fit(ranks, Small(), ExtendedSWA(0.5), strategy, ckpt_path=after)
    longer, more, _ = fit(ranks, Small(), ExtendedSWA(0.5), strategy, ckpt_path=after, max_epochs=4)
    states = [trainer.lightning_module.state_dict() for trainer in (over, longer)]
    return end, files, differences, resumed_ends, states[0], whole.steps, more.steps, states[1]


class Ordered(Small):
    """Takes a step's batch by its number: Lightning begins an ordinary loader anew when it resumes within an epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(list(shard(self.global_rank))[batch_idx], batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overlap", "ddp"])
def test_files_hold_the_final_model_and_a_resumed_run_goes_on(name, tmp_path):
    found = run_ranks(train_with_files, 2, 2, STRATEGIES[name], str(tmp_path), init=False)
    steps = [[*(whole[s] for s in range(7, 13)), *(more[s] for s in range(13, 17))] for *_, whole, more, _ in found]
    for end, files, differences, resumed_ends, over, _, _, longer in found:
        now = torch.stack([whole[12]["net.0.weight"] for *_, whole, _, _ in found]).mean(0)
        for file in files.values():
            assert file["state_dict"].keys() == end.keys()
            assert all(torch.equal(file["state_dict"][n], end[n]) for n in end)
            assert torch.allclose(file["current_model_state"]["net.0.weight"], now, atol=1e-6)
        assert differences == []
        for state in [*resumed_ends, over]:  # after `over`'s file nothing was left to train
            assert all(torch.equal(state[n], end[n]) for n in end)
        # Four more steps go on from the trajectory, and with the average from step 7 on.
        want = torch.stack([state["net.0.weight"] for each in steps for state in each]).mean(0)
        assert torch.allclose(longer["net.0.weight"], want, atol=1e-6)


def test_a_file_from_before_the_average_holds_the_current_model(tmp_path):
    save = ModelCheckpoint(tmp_path, "early", every_n_train_steps=2)
    _, recorder, _ = fit(1, Small(), ExtendedSWA(100), "auto", [save], max_steps=2)
    saved = torch.load(tmp_path / "early.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(saved[key][name], value) for name, value in recorder.steps[2].items())


def test_a_test_of_a_file_sees_its_average(tmp_path):
    class Tested(Small):
        def test_step(self, batch, batch_idx):
            self.seen = copy.deepcopy(self.state_dict())

        def test_dataloader(self):
            return shard(0, 1)

    module = Tested()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer, recorder, _ = fit(1, module, ExtendedSWA(0), "auto", [save])
    trainer.test(module, ckpt_path=str(tmp_path / "step=8.ckpt"), verbose=False)
    assert torch.equal(module.seen["net.0.weight"], recorder.averages[8]["module.net.0.weight"])


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0}, r"start=1\.0 is no share .*HINT: use 0\.75"),
        ({"start": -0.1}, r"start=-0\.1 is no share"),
        ({"start": float("nan")}, "start=nan is no share"),
        ({"start": -1}, "start=-1 is negative. HINT"),
        ({"start": True}, "start=True is not an int but a bool"),
        ({"start": "late"}, "start='late' is not an int but a str"),
        ({"every_n_steps": 0}, "every_n_steps=0 is too small. HINT"),
        ({"every_n_steps": 1.5}, r"every_n_steps=1\.5 is not an int"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExtendedSWA(**options)


def test_a_share_of_an_unknown_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"start=0\.5 .*whose number is unknown\. HINT: give start as a number"):
        fit(1, Small(), ExtendedSWA(0.5), "auto", max_epochs=-1, max_time={"minutes": 1})

    class Two(Small):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(self.net.parameters(), 0.1)]

    with pytest.raises(ValueError, match="each of several optimizers steps"):
        fit(1, Two(), ExtendedSWA(0.5), "auto")


def test_batch_norm_needs_a_forward():
    class Without(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Small()

        def training_step(self, batch, batch_idx):
            return self.net.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return shard(0)

    with pytest.raises(ValueError, match=r"by Without\.forward, which is not defined\. HINT"):
        fit(1, Without(), ExtendedSWA(), "auto")

    class Mine(ExtendedSWA):
        def forward_batch(self, pl_module, batch):
            pl_module.net(batch[0])

    module = Without()
    fit(1, module, Mine(), "auto")
    assert module.net.net[1].num_batches_tracked == BATCHES
