"""Checkpoints and other consensus points, in real `Trainer.fit` runs on forked ranks.

A resumed run is held against the uninterrupted one step by step: on every rank, model, optimizers, schedulers, loss
scale and average model are compared bit for bit, before anything makes the replicas equal again.
"""

import copy
import os
import subprocess
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core import rank_zero
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from ds_lightning import DSSyncStrategy, ShuffleSchedule
from ds_lightning.strategy import CHECKPOINT_KEY
from tests.plain import plain_fit
from tests.ranks import run_ranks
from tests.reference import flat
from tests.test_synchronizer import OPTIMIZERS, batch, make_model

pytestmark = pytest.mark.slow  # each takes seconds; together they would double `make check`

BATCHES, EPOCHS = 5, 3  # an odd number, so that epochs end at odd positions of a period of two


class Net(pl.LightningModule):
    """BatchNorm, a learning rate that changes at every step, and data that depend on rank and step alone.

    Lightning does not wind a plain loader forward when it resumes in the middle of an epoch.
    """

    def __init__(self, optimizer="momentum"):
        super().__init__()
        self.save_hyperparameters()
        self.net = make_model()

    @property
    def t(self):
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    def loss(self):
        x, y = batch(self.global_rank, self.t)
        return cross_entropy(self.net(x), y)

    def training_step(self, _, batch_idx):
        return self.loss()

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.hparams.optimizer](self.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recorder(pl.Callback):
    """All that a step depends on, after every batch and before the checkpoint that may follow it."""

    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states[pl_module.t] = copy.deepcopy(
            {
                "model": {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())},
                "average": [m.state_dict() for m in averages(trainer)],
                "optimizers": [o.state_dict() for o in trainer.optimizers],
                "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
                "precision": trainer.precision_plugin.state_dict(),
            }
        )


def averages(trainer):
    return [c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging) and c._average_model]


def different(a, b, path=""):
    """Where two nested states differ by a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [] if a.keys() == b.keys() else [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return keys + [d for k in a.keys() & b.keys() for d in different(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in different(x, y, f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} {b}"]


def trainer_for(folder, callbacks=(), strategy=None, **kwargs):
    return pl.Trainer(
        strategy=DSSyncStrategy(timeout=timedelta(seconds=30), **(strategy or {}))
        if strategy is None or isinstance(strategy, dict)
        else strategy,
        **{
            "accelerator": "cpu",
            "devices": int(os.environ.get("WORLD_SIZE", 1)),
            "max_epochs": EPOCHS,
            "limit_train_batches": BATCHES,
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            **kwargs,
        },
        callbacks=list(callbacks),
    )


def loader(batches=BATCHES):
    return DataLoader(torch.zeros(batches, 1), batch_size=1)


def savers(folder):
    """Within epochs and at their ends."""
    return [
        ModelCheckpoint(folder, "batch{step}", every_n_train_steps=3, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "epoch{step}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False),
    ]


def fit(folder, make, strategy=None, kwargs=None, ckpt_path=None):
    """States of this rank after every batch, and the trainer."""
    kwargs = dict(kwargs() if callable(kwargs) else kwargs or {})
    recorder = Recorder()
    callbacks = [recorder, *kwargs.pop("callbacks", ()), *savers(folder)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(folder, callbacks, strategy, **kwargs)
        trainer.fit(make(), loader(), ckpt_path=ckpt_path)
    recorder.states["end"] = copy.deepcopy(trainer.lightning_module.state_dict())
    return recorder.states, trainer


def resume(rank, folder, make, names, strategy=None, kwargs=None, edit=None):
    """What differs between an uninterrupted run and those resumed from the files that it left."""
    whole, _ = fit(f"{folder}/whole", make, strategy, kwargs)
    differences = {}
    for name in names:
        path = f"{folder}/whole/{name}.ckpt"
        if edit:
            if rank == 0:
                edited = torch.load(path, weights_only=True)
                edit(edited)
                torch.save(edited, f"{folder}/edited.ckpt")
            path = f"{folder}/edited.ckpt"
            dist.barrier()
        resumed, _ = fit(f"{folder}/{name}", make, strategy, kwargs, path)
        done = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        steps = [t for t in whole if t == "end" or t >= done]
        assert list(resumed) == steps, (name, list(resumed), steps)
        assert len(steps) > 3
        differences[name] = [(t, d) for t in steps for d in different(whole[t], resumed[t])][:5]
    return differences


def assert_resumes(folder, make, names=("batch3", "epoch5"), strategy=None, kwargs=None, ranks=4):
    for rank, found in enumerate(run_ranks(resume, ranks, str(folder), make, names, strategy, kwargs)):
        assert found == {name: [] for name in names}, rank


# ---- a resumed run equals the uninterrupted one, bit for bit --------------------------------------------------------

CORRECT = {"noise_correction": "auto"}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_resumes_bit_for_bit_within_and_at_the_end_of_an_epoch(tmp_path, optimizer, overlap):
    assert_resumes(tmp_path, partial(Net, optimizer), ("batch3", "epoch5", "batch9"), {"overlap": overlap, **CORRECT})


def lose_position(checkpoint):
    del checkpoint[CHECKPOINT_KEY]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_lost_position_shows(tmp_path, overlap):
    """The tests around this one can fail."""
    strategy = {"overlap": overlap}
    for found in run_ranks(resume, 4, str(tmp_path), Net, ("batch3", "epoch5"), strategy, None, lose_position):
        assert all(found.values())


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ({"schedule": "shuffle"}, 3),
        ({"schedule": ShuffleSchedule(5, 2, seed=3), "overlap": False, **CORRECT}, 5),
        ({"wire_dtype": "int8"}, 4),
        ({"wire_dtype": "int8", "group_size": 4, "overlap": False}, 4),
        ({"sync_every": 2, **CORRECT}, 4),
        ({"sync_every": 2, "average_optimizer_state": ("exp_avg_sq",)}, 4),  # saved in the middle of a round
        ({"average_gradients": True, "average_optimizer_state": ("exp_avg_sq",)}, 4),
    ],
    ids=repr,
)
def test_resumes_with_any_option(tmp_path, strategy, ranks):
    assert_resumes(tmp_path, partial(Net, "adamw"), strategy=strategy, ranks=ranks)


class Unused(Net):
    """Layers that only some ranks ever use, or only one of them until the checkpoint; one that nobody uses."""

    def __init__(self, optimizer="momentum"):
        super().__init__(optimizer)
        self.more = nn.ModuleList(nn.Linear(10, 3) for _ in range(5))

    def loss(self):
        x, y = batch(self.global_rank, self.t)
        logits = self.net(x)
        if self.t > 1:
            logits = logits + self.more[self.global_rank](x)
        if self.t == 2 and self.global_rank == 3:
            return cross_entropy(self.more[3](x), y)
        return cross_entropy(logits, y)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_resumes_where_ranks_use_different_parameters(tmp_path, optimizer):
    assert_resumes(tmp_path, partial(Unused, optimizer), ("batch3",))


class Two(Net):
    """Two optimizers of different kinds; the second in the list steps first, and more often."""

    def __init__(self, every=2):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def training_step(self, _, batch_idx):
        x, y = batch(self.global_rank, self.t)
        slow, fast = self.optimizers()
        due = [fast, slow] if self.t % self.hparams.every == 0 else [fast]
        for optimizer in due:
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.net(x) + self.other(x), y))
            optimizer.step()

    def configure_optimizers(self):
        return [
            OPTIMIZERS["momentum"](self.net.parameters()),
            OPTIMIZERS["adamw"](self.other.parameters()),
        ]


class SlowFirst(Two):
    """The first in the list steps first, but is not the first to step after the resume."""

    def training_step(self, _, batch_idx):
        x, y = batch(self.global_rank, self.t)
        slow, fast = self.optimizers()
        for optimizer in [slow, fast] if self.t % self.hparams.every == 0 else [fast]:
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.net(x) + self.other(x), y))
            optimizer.step()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("make", [Two, SlowFirst])
def test_resumes_with_several_optimizers(tmp_path, make, overlap):
    assert_resumes(tmp_path, make, ("batch3", "epoch8"), {"overlap": overlap})


def two_fits(rank, folder):
    trainer = trainer_for(folder, max_epochs=1)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(Two(), loader())
            found.append({type(s.optimizer).__name__: (s.step, s.index) for s in trainer.strategy.synchronizers})
    return found


def test_a_second_fit_goes_on_with_each_optimizers_position(tmp_path):
    """The second in Lightning's list was the first to step."""
    for found in run_ranks(two_fits, 4, str(tmp_path)):
        assert found == [{"AdamW": (5, 1), "SGD": (3, 0)}, {"AdamW": (10, 1), "SGD": (5, 0)}]


@pytest.mark.parametrize("callback", [partial(EMAWeightAveraging, decay=0.7), WeightAveraging])
def test_resumes_with_an_average_model(tmp_path, callback):
    assert_resumes(tmp_path, Net, kwargs=lambda: {"callbacks": [callback()]})


class Unseeded(Net):
    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(rank)
        self.net[0].reset_parameters()


def fit_with_a_late_average(rank, folder):
    callbacks = [EMAWeightAveraging(update_starting_at_step=99), ModelCheckpoint(folder, "late")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_for(folder, callbacks, max_epochs=1).fit(Unseeded(rank), loader())


def test_an_average_model_starts_from_rank_0(tmp_path):
    run_ranks(fit_with_a_late_average, 4, str(tmp_path))
    saved = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.0.weight"], Unseeded(0).net[0].weight)
    assert not torch.equal(saved["current_model_state"]["net.0.weight"], Unseeded(0).net[0].weight)


class Overflowing(Net):
    """Under 16-mixed: at some steps some ranks overflow, skip their update and shrink their own loss scale."""

    def training_step(self, _, batch_idx):
        overflow = self.t == self.global_rank or (self.t == 4 and self.global_rank < 2)
        return self.loss() * (torch.inf if overflow else 1.0)


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_resumes_with_loss_scales_of_their_own(tmp_path, optimizer):
    assert_resumes(tmp_path, partial(Overflowing, optimizer), kwargs=scaled)


@pytest.mark.parametrize("overlap", [True, False])
def test_resumes_after_the_last_batch_of_an_epoch(tmp_path, overlap):
    """Saved before Lightning has counted the epoch as done."""
    assert_resumes(tmp_path, Net, ("batch15",), {"overlap": overlap}, {"max_epochs": 4})


# ---- the order of data after a resume (Lightning issue 21938) -------------------------------------------------------


def epoch_of(order):
    """The epoch for which rank 0 of two draws this order."""
    sampler: DistributedSampler[int] = DistributedSampler(range(2 * BATCHES), 2, 0)
    for epoch in range(EPOCHS + 1):
        sampler.set_epoch(epoch)
        if list(sampler)[: len(order)] == order:
            return epoch
    return None


class Ordered(Net):
    def on_train_start(self):
        self.seen = {}

    def training_step(self, x, batch_idx):
        self.seen.setdefault(self.trainer.current_epoch, []).append(int(x))
        return self.loss()

    def validation_step(self, _, batch_idx):
        pass


def fit_ordered(folder, cured, ckpt_path=None):
    own_name = {"save_top_k": -1, "auto_insert_metric_name": False}
    callbacks = [
        *savers(folder),
        ModelCheckpoint(folder, "last{step}", every_n_train_steps=BATCHES, **own_name),
        ModelCheckpoint(folder, "val{step}", monitor="step", save_on_train_epoch_end=False, **own_name),
    ]
    trainer = trainer_for(folder, callbacks, use_distributed_sampler=True)
    if not cured:
        trainer.strategy.process_dataloader = partial(DDPStrategy.process_dataloader, trainer.strategy)
    module = Ordered()
    data: DataLoader[int] = DataLoader(range(2 * BATCHES), batch_size=1, shuffle=True, num_workers=1)
    trainer.fit(module, data, DataLoader(range(4)), ckpt_path=ckpt_path)
    return module.seen


def resume_ordered(rank, folder, names, cured):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_ordered(f"{folder}/whole", cured)
        return {n: fit_ordered(f"{folder}/{n}", cured, f"{folder}/whole/{n}.ckpt") for n in names}


@pytest.mark.parametrize(
    ("cured", "names"),
    [
        (False, ("epoch5",)),
        (True, ("batch6", "epoch5")),
        pytest.param(True, ("last5", "val5", "batch3", "epoch10"), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_epoch_has_the_order_of_its_number(tmp_path, cured, names):
    for name, seen in run_ranks(resume_ordered, 2, str(tmp_path), names, cured)[0].items():
        epochs = {number: epoch_of(order) for number, order in seen.items()}
        right = all(number == epoch for number, epoch in epochs.items())
        # Lightning alone is wrong. Should it ever be right: the cure can go.
        assert right == cured, (name, epochs)
        assert max(epochs) == EPOCHS - 1


def resume_again(rank, folder):
    """The epochs of a run and of two more, each resumed from what the one before saved after its first epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [None, f"{folder}/0/last{BATCHES}.ckpt", f"{folder}/1/last{2 * BATCHES}.ckpt"]
        return [fit_ordered(f"{folder}/{i}", True, path) for i, path in enumerate(runs)]


def test_a_run_resumed_after_an_epoch_can_be_resumed_after_the_next(tmp_path):
    """Lightning does not count the resumed epoch as begun, and would then train it twice."""
    runs = run_ranks(resume_again, 2, str(tmp_path))[0]
    assert [list(seen) for seen in runs] == [[0, 1, 2], [1, 2], [2]]
    assert all(epoch_of(order) == number for seen in runs for number, order in seen.items())


# ---- one portable file ----------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
sys.modules["ds_lightning"] = None
import torch
from tests.plain import Plain, plain_fit
from tests.plain import plain_fit
from tests.ranks import run_ranks
path, folder = sys.argv[1:]

state = torch.load(path, weights_only=True)["state_dict"]
model = Plain.load_from_checkpoint(path)
assert model.hparams.width == 5
assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

def go_on(rank, devices, strategy):
    trainer = plain_fit(folder, devices, strategy, 4, path)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.current_epoch == 4
    return trainer.global_step, int(trainer.optimizers[0].state_dict()["state"][0]["step"])

print(go_on(0, 1, "auto"), *run_ranks(go_on, 2, 2, "ddp", init=False))
"""


def plain_fit_told(rank, *args):
    """What was said of resuming, the number of steps and the values at the end."""
    lines = []

    def keep(record):
        lines.append(record.getMessage())
        return True

    rank_zero.log.addFilter(keep)
    rank_zero.log.setLevel("INFO")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = plain_fit(*args)
    return [line for line in lines if "resuming" in line], trainer.global_step, flat(trainer.lightning_module)


def plain_checkpoint(folder, ranks, strategy):
    run_ranks(plain_fit_told, ranks, f"{folder}/first", ranks, strategy, 2)
    return f"{folder}/first/plain.ckpt"


@pytest.mark.slow
def test_loads_and_trains_on_without_ds_lightning(tmp_path):
    path = plain_checkpoint(tmp_path, 4, "dssync")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, path, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    # 6 steps on 4 ranks, then 2 epochs of 12 batches, or of 6 on each of two ranks.
    assert done.stdout.splitlines()[-1] == "(30, 30) (18, 18) (18, 18)"


def test_resumes_at_another_world_size_with_one_info_line(tmp_path):
    path = plain_checkpoint(tmp_path, 4, "dssync")
    ranks = run_ranks(plain_fit_told, 2, str(tmp_path), 2, "dssync", 4, path)
    assert [line for lines, *_ in ranks for line in lines] == [
        "dssync: resuming a checkpoint of 4 ranks with GridSchedule(world_size=4, group_size=2) on 2 with"
        " GridSchedule(world_size=2, group_size=2), which goes on at the same step."
    ]
    for _, steps, values in ranks:
        assert steps == 6 + 2 * 6
        assert torch.equal(values, ranks[0][2])
    # Nothing is said where nothing changed.
    assert all(lines == [] for lines, *_ in run_ranks(plain_fit_told, 4, str(tmp_path), 4, "dssync", 3, path))
    ((lines, steps, _),) = run_ranks(plain_fit_told, 1, str(tmp_path), 1, "dssync", 4, path)
    assert steps == 6 + 2 * 12
    assert lines == [
        "dssync: resuming a checkpoint of 4 ranks with GridSchedule(world_size=4, group_size=2) on 1 with"
        " nothing to synchronize."
    ]


def test_a_checkpoint_of_ddp_resumes_under_dssync(tmp_path):
    path = plain_checkpoint(tmp_path, 2, "ddp")
    ranks = run_ranks(plain_fit_told, 4, str(tmp_path), 4, "dssync", 4, path)
    for lines, steps, values in ranks:
        assert (lines, steps) == ([], 12 + 2 * 3)
        assert torch.equal(values, ranks[0][2])


# ---- consensus points -----------------------------------------------------------------------------------------------


class Watched(Net):
    """Keeps its values before and at each consensus point, and an integer buffer that differs between ranks."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.before, self.at = {}, {}

    def values(self):
        return flat(self), self.count.clone()

    def training_step(self, _, batch_idx):
        self.count.add_(self.global_rank + 1)
        return self.loss()

    def validation_step(self, x, batch_idx):
        self.at["validation", self.trainer.global_step] = self.values()
        self.log("local", x.mean() * 0 + self.global_rank, sync_dist=False)
        self.log("seen", self.net(torch.ones(2, 10)).sum(), sync_dist=False)

    def test_step(self, x, batch_idx):
        self.at["test", self.trainer.global_step] = self.values()


class Before(pl.Callback):
    def on_validation_start(self, trainer, pl_module):
        pl_module.before["validation", trainer.global_step] = pl_module.values()

    def on_test_start(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net[0].weight += trainer.global_rank
            pl_module.count += trainer.global_rank
        pl_module.before["test", trainer.global_step] = pl_module.values()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.before["checkpoint", trainer.global_step] = pl_module.values()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        pl_module.at["checkpoint", trainer.global_step] = pl_module.values()
        for name, value in pl_module.state_dict().items():
            assert torch.equal(value, checkpoint["state_dict"][name])

    def on_train_end(self, trainer, pl_module):
        pl_module.before["end", trainer.global_step] = pl_module.values()


def run_watched(rank, folder, overlap):
    torch.manual_seed(rank)
    module = Watched()
    callbacks = [Before(), ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)]
    trainer = trainer_for(folder, callbacks, {"overlap": overlap}, max_epochs=2, val_check_interval=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), DataLoader(torch.zeros(2, 1)))
        module.at["end", trainer.global_step] = module.values()
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        trainer.test(module, DataLoader(torch.zeros(2, 1)), verbose=False)
    return module.before, module.at, metrics


@pytest.mark.parametrize("overlap", [True, False])
def test_all_ranks_become_the_mean_of_the_replicas(tmp_path, overlap):
    ranks = run_ranks(run_watched, 4, str(tmp_path), overlap)
    points = set(ranks[0][1])
    assert points == {
        *(("validation", step) for step in (0, 2, 4, 7, 9)),  # 0 is the sanity check
        *(("checkpoint", step) for step in (3, 6, 9)),
        ("end", 10),
        ("test", 10),
    }
    for point in points:
        befores = [before[point][0] for before, _, _ in ranks]
        mean = torch.stack(befores).mean(0)
        equal = torch.equal(befores[0], befores[-1])
        assert equal == (point in {("validation", 0), ("validation", 9)}), point  # fresh; just after a checkpoint
        for _, at, _ in ranks:
            assert torch.equal(at[point][0], ranks[0][1][point][0]), point
            assert torch.allclose(at[point][0], mean, rtol=1e-7, atol=1e-9), point
            assert at[point][1] == ranks[0][0][point][1], point  # rank 0's
    assert [metrics["local"] for *_, metrics in ranks] == [0, 1, 2, 3]
    assert len({metrics["seen"] for *_, metrics in ranks}) == 1  # same model, same data


# ---- decisions on metrics -------------------------------------------------------------------------------------------


class Judged(Net):
    """A metric that gets worse early on rank 0, late on the others; ranks also order epochs differently."""

    def __init__(self, sync_dist, plateau=False):
        super().__init__()
        self.sync_dist, self.plateau = sync_dist, plateau

    def validation_step(self, x, batch_idx):
        epoch, rank = self.trainer.current_epoch, self.global_rank
        metric = float(epoch if rank == 0 else (7 - epoch if rank < 3 else (epoch - 3) ** 2))
        self.log("metric", metric, sync_dist=self.sync_dist)

    def configure_optimizers(self):
        if not self.plateau:
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "metric"}}


def run_judged(rank, folder, sync_dist, top_k, patience):
    save = ModelCheckpoint(folder, "{epoch}", monitor="metric", save_top_k=top_k, save_last=True)
    stop = EarlyStopping("metric", patience=patience, check_on_train_epoch_end=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(folder, [stop, save], max_epochs=8)
        trainer.fit(Judged(sync_dist), loader(), DataLoader(torch.zeros(2, 1)))
        kept = sorted(Path(path).name for path in save.best_k_models)
        files = sorted(path.name for path in Path(folder).glob("epoch*"))
        names = [Path(path).name for path in (save.best_model_path, save.last_model_path)]
        decisions = stop.stopped_epoch, trainer.global_step, names, kept, files
        trainer.validate(ckpt_path="best", dataloaders=DataLoader(torch.zeros(2, 1)), verbose=False)
    return decisions


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("sync_dist", [True, False])
def test_checkpoints_and_early_stops_are_the_same_on_all_ranks(tmp_path, sync_dist, top_k):
    ranks = run_ranks(run_judged, 4, str(tmp_path), sync_dist, top_k, 3 if sync_dist else 4)
    assert all(rank == ranks[0] for rank in ranks), ranks
    stopped, _, names, kept, files = ranks[0]
    assert 0 < stopped < 7
    assert names[0] in kept
    assert kept == files


class Rates(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run_plateau(rank, folder, sync_dist):
    rates = Rates()
    save = ModelCheckpoint(folder, every_n_epochs=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_for(folder, [rates, save], max_epochs=6)
        trainer.fit(Judged(sync_dist, plateau=True), loader(), DataLoader(torch.zeros(2, 1)))
    told = [str(w.message) for w in caught if "different learning rates" in str(w.message)]
    return rates.rates, told


@pytest.mark.parametrize("sync_dist", [True, False])
def test_learning_rates_follow_a_metric(tmp_path, sync_dist):
    ranks = run_ranks(run_plateau, 4, str(tmp_path), sync_dist)
    rates = [rates for rates, _ in ranks]
    assert all(told == [] for _, told in ranks[1:])
    if sync_dist:
        assert ranks[0][1] == []
        assert all(r == rates[0] for r in rates)
        assert rates[0][0] > rates[0][-1]
    else:
        assert any("log the metric with sync_dist=True" in told for told in ranks[0][1])
        assert rates[1][3] > rates[0][3]
        # The checkpoint of epoch 3 gave everybody rank 0's rate and best value, which nobody beat in that epoch.
        assert all(r[4] == rates[0][3] / 2 for r in rates)


# ---- other ways to save ---------------------------------------------------------------------------------------------


class Hooked(Net):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = flat(self)

    def on_load_checkpoint(self, checkpoint):
        self.mine = checkpoint["mine"]


class SaveNow(pl.Callback):
    """In the middle of an accumulation: after the first of two batches."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")


def run_saves(rank, folder, overlap):
    save = ModelCheckpoint(folder, "best", save_last=True, save_weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = {"overlap": overlap}
        trainer = trainer_for(folder, [SaveNow(), save], strategy, accumulate_grad_batches=2, max_epochs=1)
        trainer.fit(Hooked(), loader())
        trainer.save_checkpoint(f"{folder}/after.ckpt")
        again = trainer_for(folder, (), strategy, accumulate_grad_batches=2, max_epochs=3)
        resumed = Hooked()
        again.fit(resumed, loader(), ckpt_path=f"{folder}/after.ckpt")
        third = trainer_for(folder, (), strategy, accumulate_grad_batches=2, max_epochs=1)
        third.fit(Hooked(), loader(), ckpt_path=f"{folder}/middle.ckpt")
    return flat(trainer.lightning_module), resumed.mine, again.global_step, third.global_step


@pytest.mark.parametrize("overlap", [True, False])
def test_other_ways_to_save(tmp_path, overlap):
    ranks = run_ranks(run_saves, 4, str(tmp_path), overlap)
    files = {n: torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("best", "last", "after", "middle")}
    for name in ("best", "last"):
        assert "optimizer_states" not in files[name]
        assert {"state_dict", "mine"} <= files[name].keys()
    assert files["after"][CHECKPOINT_KEY]["positions"][0]["step"] == 3
    assert files["middle"][CHECKPOINT_KEY]["positions"][0]["step"] == 1
    for end, mine, steps, middle_steps in ranks:
        assert torch.equal(end, files["after"]["mine"])
        assert torch.equal(mine, end)
        assert (steps, middle_steps) == (9, 3)
        for name in ("best", "last"):
            assert torch.equal(files[name]["mine"], end)
