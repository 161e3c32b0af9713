"""Real `Trainer.fit` runs on forked ranks: every Lightning feature that touches an optimizer step, step by step.

Each case compares all parameters and float buffers of every rank after every optimizer step with the reference.
"""

import math
import socket
import warnings
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from ds_lightning import DSSynchronizer, DSSyncStrategy, GridSchedule, ShuffleSchedule, mixing_matrix
from ds_lightning.planner import plan
from ds_lightning.topology import Link, Topology
from tests.ranks import QUIET, run_ranks
from tests.reference import Reference, averaged, flat, mix, relative_error
from tests.test_synchronizer import OPTIMIZERS, batch, make_model

WORLD, BATCHES = 4, 12
SCHEDULE = GridSchedule(WORLD, 2)


class RankData(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Batch t of a rank; a pure function of both."""

    def __init__(self, rank, batches):
        self.rank, self.batches = rank, batches

    def __len__(self):
        return self.batches

    def __getitem__(self, t):
        if t >= self.batches:
            raise IndexError
        return (*batch(self.rank, t), t)


class Net(pl.LightningModule):
    """BatchNorm, and whatever optimizer the case wants."""

    def __init__(self, optimizer="momentum"):
        super().__init__()
        self.net = make_model()
        self.optimizer = optimizer

    def loss(self, x, y, t, rank):
        return cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch, self.global_rank)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](p for p in self.parameters() if p.requires_grad)


class Recorder(pl.Callback):
    """All averaged values after every optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.values):
            self.values.append(flat(pl_module))


def trainer_for(rank, callbacks=(), strategy=None, **kwargs):
    return pl.Trainer(
        strategy=strategy or DSSyncStrategy(timeout=timedelta(seconds=20)),
        **{
            "accelerator": "cpu",
            "devices": dist.get_world_size() if dist.is_initialized() else WORLD,
            "max_epochs": 1,
            "use_distributed_sampler": False,
            **QUIET,
            **kwargs,
        },
        callbacks=list(callbacks),
    )


def fit(rank, make, strategy, kwargs, batches=BATCHES):
    recorder = Recorder()
    module = make()
    strategy = DSSyncStrategy(timeout=timedelta(seconds=20), **strategy)
    kwargs = kwargs(rank) if callable(kwargs) else kwargs
    callbacks = [recorder, *kwargs.pop("callbacks", ())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(rank, callbacks, strategy, **kwargs)
        trainer.fit(module, DataLoader(RankData(rank, batches), batch_size=None))
    return recorder.values


def reference_run(make, backward, overlap, update=None, steps=BATCHES, **options):
    """Values of every rank after every step: ``[step][rank]``."""
    reference = Reference(make, lambda m: m.configure_optimizers(), SCHEDULE, overlap, **options)
    values = []
    for t in range(steps):
        reference.step(partial(backward, t), partial(update, reference, t) if update else None)
        values.append([reference.flat(rank) for rank in range(WORLD)])
    return values


def compare(make, backward, strategy=None, kwargs=None, update=None, steps=BATCHES, tolerance=1e-6):
    """Fit on four ranks, in both orders, against the reference."""
    for overlap in (True, False):
        options = {"overlap": overlap, **(strategy or {})}
        ranks = run_ranks(fit, WORLD, make, options, kwargs or {})
        own = {k: v for k, v in options.items() if k in ("sync_every", "average_gradients")}
        own["correct_noise"] = options.get("noise_correction") == "auto"
        expected = reference_run(make, backward, overlap, update, steps, **own)
        for rank, values in enumerate(ranks):
            assert len(values) == steps
            for t, value in enumerate(values):
                assert relative_error(value, expected[t][rank]) < tolerance, (overlap, rank, t)


def backward(t, model, rank):
    model.loss(*batch(rank, t), t, rank).backward()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_plain(optimizer):
    compare(partial(Net, optimizer), backward)


@pytest.mark.parametrize("sync_every", [1, 3])
def test_noise_is_corrected(sync_every):
    compare(partial(Net, "adamw"), backward, {"noise_correction": "auto", "sync_every": sync_every})


class Clamped(Net):
    """A hook keeps parameters within bounds."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()

        def clamp(*_):
            for p in self.parameters():
                p.data.clamp_(-0.2, 0.2)

        optimizer.register_step_post_hook(clamp)
        return optimizer


def test_hooks_see_the_average():
    compare(partial(Clamped, "sgd"), backward)


@pytest.mark.parametrize(
    ("optimizer", "events"), [("adamw", ["update", "finish"]), ("momentum", ["finish", "update"])], ids=repr
)
def test_averages_travel_during_updates_that_read_no_parameters(optimizer, events, monkeypatch):
    seen = []

    def noting(name, call):
        def noted(self):
            seen.append(name)
            call(self)

        return noted

    monkeypatch.setattr(DSSynchronizer, "after_update", noting("update", DSSynchronizer.after_update))
    monkeypatch.setattr(DSSynchronizer, "finish", noting("finish", DSSynchronizer.finish))

    def run(rank):
        fit(rank, partial(Net, optimizer), {}, {})
        return seen

    assert run_ranks(run, WORLD) == [events * BATCHES] * WORLD


class WithoutNorm(Net):
    """DDP keeps no average of running statistics to compare with."""

    def __init__(self):
        super().__init__("sgd")
        self.net = make_model(norm=False)


def test_one_group_of_everybody_with_sgd_is_ddp():
    def run(rank, strategy):
        recorder = Recorder()
        trainer = trainer_for(rank, [recorder], strategy)
        trainer.fit(WithoutNorm(), DataLoader(RankData(rank, BATCHES), batch_size=None))
        return recorder.values

    dssync = DSSyncStrategy(group_size=WORLD, overlap=False, timeout=timedelta(seconds=20))
    for one, other in zip(run_ranks(run, WORLD, dssync), run_ranks(run, WORLD, DDPStrategy()), strict=True):
        assert all(relative_error(x, y) < 1e-6 for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("strategy", [{"sync_every": 2}, {"average_gradients": True}], ids=repr)
def test_options(strategy):
    compare(Net, backward, strategy)


def test_gradient_accumulation():
    def accumulate(t, model, rank):
        for i in (3 * t, 3 * t + 1, 3 * t + 2):
            (model.loss(*batch(rank, i), i, rank) / 3).backward()

    compare(Net, accumulate, kwargs={"accumulate_grad_batches": 3}, steps=BATCHES // 3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(algorithm):
    def clipped(t, model, rank):
        backward(t, model, rank)
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        else:
            nn.utils.clip_grad_value_(model.parameters(), 0.01)

    value = 0.05 if algorithm == "norm" else 0.01
    compare(Net, clipped, kwargs={"gradient_clip_val": value, "gradient_clip_algorithm": algorithm})


def test_bf16_mixed():
    def mixed(t, model, rank):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = model.loss(*batch(rank, t), t, rank)
        loss.backward()

    compare(Net, mixed, kwargs={"precision": "bf16-mixed"})


class Overflowing(Net):
    """Some ranks overflow at some steps: their GradScaler skips the step, the others' do not."""

    def loss(self, x, y, t, rank):
        loss = super().loss(x, y, t, rank)
        return loss * float("inf") if (t + rank) % 3 == 0 else loss


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])  # what is skipped has no decay either
@pytest.mark.parametrize("strategy", [{}, {"average_gradients": True}], ids=repr)
def test_16_mixed_with_steps_skipped_on_some_ranks(strategy, optimizer):
    scalers = {(order, rank): torch.amp.GradScaler("cpu") for order in range(2) for rank in range(WORLD)}
    calls = iter(range(10**6))
    order = 0

    def mixed(t, model, rank):
        nonlocal order
        order = next(calls) // (WORLD * BATCHES)  # compare() runs both orders, one after the other
        scaler = scalers[order, rank]
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = model.loss(*batch(rank, t), t, rank)
        scaler.scale(loss).backward()
        for p in model.parameters():
            p.grad /= scaler.get_scale()

    def update(reference, t, rank):
        scaler = scalers[order, rank]
        for p in reference.models[rank].parameters():
            p.grad *= scaler.get_scale()
        scaler.step(reference.optimizers[rank])
        scaler.update()

    def kwargs(rank):
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}

    # Of an average after the update the last bit is another, which fp16 makes larger; without its share it is 2e-5.
    tolerance = 5e-6 if optimizer == "adamw" else 1e-6
    compare(partial(Overflowing, optimizer), mixed, strategy, kwargs, update, tolerance=tolerance)


class Skipping(Net):
    """No loss on some ranks at some steps."""

    def training_step(self, batch, batch_idx):
        return None if (batch_idx + self.global_rank) % 3 == 0 else super().training_step(batch, batch_idx)


def backward_unless_skipped(t, model, rank):
    if (t + rank) % 3:
        backward(t, model, rank)


@pytest.mark.parametrize("strategy", [{}, {"average_gradients": True}], ids=repr)
def test_training_step_returns_none_on_some_ranks(strategy):
    compare(Skipping, backward_unless_skipped, strategy)


def test_training_step_returns_none_under_a_grad_scaler():
    def fit_mixed(rank):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        return fit(rank, Skipping, {}, {"plugins": [plugin]})

    for values in run_ranks(fit_mixed, WORLD):
        assert len(values) == BATCHES
        assert all(v.isfinite().all() for v in values)


class TwoOptimizers(Net):
    """Manual optimization; the second optimizer steps every other batch, so that one shared count would starve it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.net[0].parameters(), 1e-2),
            torch.optim.SGD([*self.net[1].parameters(), *self.net[3].parameters()], 0.1, momentum=0.9),
        ]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss(*batch, self.global_rank))
        first.step()
        if batch_idx % 2:
            second.step()


class EveryBatch(Recorder):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(flat(pl_module))


@pytest.mark.parametrize("overlap", [True, False])
def test_several_optimizers_each_meet_every_group(overlap):
    def run(rank):
        recorder, module = EveryBatch(), TwoOptimizers()
        strategy = DSSyncStrategy(overlap=overlap, timeout=timedelta(seconds=20))
        trainer_for(rank, [recorder], strategy).fit(module, DataLoader(RankData(rank, BATCHES), batch_size=None))
        return recorder.values

    ranks = run_ranks(run, WORLD)
    models = [TwoOptimizers() for _ in range(WORLD)]
    optimizers = [m.configure_optimizers() for m in models]
    sets = [lambda m: [*m.net[0].parameters(), m.net[1].running_mean, m.net[1].running_var]]
    sets += [lambda m: [*m.net[1].parameters(), *m.net[3].parameters()]]

    def mixed_difference(which, step):
        w = torch.from_numpy(mixing_matrix(SCHEDULE, step))
        xs = [torch.stack([x.detach().double() for x in same]) for same in zip(*map(sets[which], models), strict=True)]
        return [mix(w, x) - x for x in xs]

    @torch.no_grad()
    def add(which, differences):
        for same, difference in zip(zip(*map(sets[which], models), strict=True), differences, strict=True):
            for x, d in zip(same, difference, strict=True):
                x.copy_(x.double() + d)

    for t in range(BATCHES):
        # Packed before the forward pass; the parameters of the second, which steps later, do not change until it does.
        early = [mixed_difference(0, t), mixed_difference(1, t // 2)]
        for rank, model in enumerate(models):
            for o in optimizers[rank]:
                o.zero_grad()
            model.loss(*batch(rank, t), t, rank).backward()
        for which, step in [(0, t)] + [(1, t // 2)] * (t % 2):
            if overlap:
                add(which, early[which])
            for o in optimizers:
                o[which].step()
            if not overlap:
                add(which, mixed_difference(which, step))
        for rank, values in enumerate(ranks):
            assert relative_error(values[t], flat(models[rank])) < 1e-6, (rank, t)


def test_manual_optimization_overlaps():
    def run(rank):
        started = []

        class Watched(TwoOptimizers):
            def training_step(self, batch, batch_idx):
                started.append([s.started for s in self.trainer.strategy.synchronizers])
                super().training_step(batch, batch_idx)

        strategy = DSSyncStrategy(timeout=timedelta(seconds=20))
        trainer_for(rank, strategy=strategy).fit(Watched(), DataLoader(RankData(rank, 4), batch_size=None))
        return started

    assert run_ranks(run, 2) == [[[True, True]] * 4] * 2


class WithLBFGS(Net):
    def __init__(self):
        super().__init__()
        self.net = make_model(norm=False).double()  # its quotients of small differences amplify the last bit

    def loss(self, x, y, t, rank):
        return super().loss(x.double(), y, t, rank)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("overlap", [True, False])
def test_lbfgs_calls_its_closure_several_times(overlap):
    ranks = run_ranks(fit, WORLD, WithLBFGS, {"overlap": overlap}, {})
    reference = Reference(WithLBFGS, lambda m: m.configure_optimizers(), SCHEDULE, overlap=False)

    def update(rank, t, differences=None):
        model, optimizer = reference.models[rank], reference.optimizers[rank]

        def closure():
            nonlocal differences
            optimizer.zero_grad()
            loss = model.loss(*batch(rank, t), t, rank)
            loss.backward()
            if differences is not None:  # the average arrives after the first evaluation
                with torch.no_grad():
                    for x, d in zip(averaged(model), differences, strict=True):
                        x.copy_(x.double() + d[rank])
                differences = None
            return loss

        optimizer.step(closure)

    for t in range(BATCHES):
        if overlap:
            w = torch.from_numpy(mixing_matrix(SCHEDULE, t))
            differences = [mix(w, x.double()) - x.double() for x in reference._stacked()]
            for rank in range(WORLD):
                update(rank, t, differences)
        else:
            reference.step(lambda model, rank: None, partial(update, t=t))
        for rank, values in enumerate(ranks):
            assert relative_error(values[t], reference.flat(rank)) < 1e-6, (rank, t)


class Odd(Net):
    """Parameters unused on some ranks, frozen, tied, of other dtypes, and integer buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.sometimes = nn.Parameter(torch.ones(3))
        self.never = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.full((4,), 1 / 3), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def loss(self, x, y, t, rank):
        self.count += rank
        out = self.second(self.first(self.net(x))) * self.wide.float()
        return cross_entropy(out + self.sometimes if (t + rank) % 2 else out, y)


class OddDecayed(Odd):
    """By a lot, and not everywhere."""

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": trained[::2], "weight_decay": 5.0}, {"params": trained[1::2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, 0.02)


def test_parameters_unused_on_some_ranks_frozen_tied_and_of_several_dtypes():
    compare(Odd, backward)
    compare(Odd, backward, {"average_gradients": True})
    compare(OddDecayed, backward)


class BFloat16(Net):
    def __init__(self):
        super().__init__()
        self.half_scale = nn.Parameter(torch.ones(3).bfloat16())

    def loss(self, x, y, t, rank):
        return cross_entropy(self.net(x) * self.half_scale.float(), y)


def test_parameters_stored_in_bf16():
    compare(BFloat16, backward, tolerance=1e-3)


class Growing(Net):
    """The last layer joins the optimizer at step 4, and is frozen again at step 8."""

    def configure_optimizers(self):
        self.net[3].requires_grad_(False)
        return torch.optim.SGD(self.net[:3].parameters(), 0.1, momentum=0.9)

    def change(self, t, optimizer):
        if t == 4:
            self.net[3].requires_grad_(True)
            optimizer.add_param_group({"params": self.net[3].parameters()})
        if t == 8:
            self.net[3].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        self.change(batch_idx, self.optimizers().optimizer)


def test_parameters_added_to_the_optimizer_and_frozen_later():
    def changing(t, model, rank):
        model.change(t, optimizer_of[model])
        if t == 8:
            for p in model.net[3].parameters():
                p.grad = None
        backward(t, model, rank)

    optimizer_of = {}

    class Tracked(Growing):
        def configure_optimizers(self):
            optimizer_of[self] = super().configure_optimizers()
            return optimizer_of[self]

    compare(Tracked, changing)


def test_weight_averaging_sees_the_consensus():
    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            self.seen = flat(self)

    def run(rank, callback, epochs):
        module = Validated()
        trainer = trainer_for(rank, [callback], max_epochs=epochs)
        data = DataLoader(RankData(rank, 5), batch_size=None)
        trainer.fit(module, data, data)
        return module.seen, flat(module)

    for callback, epochs in ((EMAWeightAveraging(decay=0.8), 1), (StochasticWeightAveraging(1e-2, 1), 3)):
        ranks = run_ranks(run, WORLD, callback, epochs)
        for seen, final in ranks:
            assert torch.equal(seen, ranks[0][0])
            assert torch.equal(final, ranks[0][1])


@pytest.mark.slow
def test_compiled_modules():
    def run(rank):
        recorder = Recorder()
        module = torch.compile(Net(), backend="eager")
        data = DataLoader(RankData(rank, BATCHES), batch_size=None)
        trainer_for(rank, [recorder]).fit(module, data)
        return recorder.values

    expected = reference_run(Net, backward, True)
    for rank, values in enumerate(run_ranks(run, WORLD)):
        for t, value in enumerate(values):
            assert relative_error(value, expected[t][rank]) < 1e-6


def test_learning_rate_schedulers():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def update(reference, t, rank):
        reference.optimizers[rank].step()
        reference.optimizers[rank].param_groups[0]["lr"] = 0.05 * 0.5 ** ((t + 1) // 3)

    for overlap in (True, False):
        ranks = run_ranks(fit, WORLD, Scheduled, {"overlap": overlap}, {})
        expected = reference_run(Net, backward, overlap, update)
        for rank, values in enumerate(ranks):
            for t, value in enumerate(values):
                assert relative_error(value, expected[t][rank]) < 1e-6


def test_validate_test_and_predict_alone():
    class Evaluated(Net):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.loss(*batch, self.global_rank), sync_dist=True)

        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0]).sum().item()

    def run(rank):
        torch.manual_seed(rank)
        module = Evaluated()
        data = DataLoader(RankData(rank, 3), batch_size=None)
        for p in module.parameters():
            p.data.add_(rank)  # as under DDP, rank 0's model is evaluated
        losses = [getattr(trainer_for(rank), name)(module, data, verbose=False) for name in ("validate", "test")]
        return losses, len(trainer_for(rank).predict(module, data)), flat(module)

    ranks = run_ranks(run, WORLD)
    assert all(losses == ranks[0][0] and n == 3 and torch.equal(x, ranks[0][2]) for losses, n, x in ranks)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_two_fits_in_a_row(same_trainer, planned):
    def run(rank):
        module, recorder = Net("sgd"), EveryBatch()
        data = DataLoader(RankData(rank, 5), batch_size=None)
        options = {"schedule": "topology", "topology": racks("abcd")} if planned else {}
        strategy = DSSyncStrategy(timeout=timedelta(seconds=20), **options)
        trainer = trainer_for(rank, [recorder], strategy)
        trainer.fit(module, data)
        first = flat(module)
        if same_trainer:
            trainer.fit_loop.max_epochs = 2
        else:
            trainer = trainer_for(rank, [recorder], DSSyncStrategy(timeout=timedelta(seconds=20), **options))
        trainer.fit(module, data)
        return first, recorder.values, flat(module)

    ranks = run_ranks(run, WORLD)
    for first, values, last in ranks:
        assert torch.equal(first, ranks[0][0])
        assert torch.equal(last, ranks[0][2])
        assert len(values) == 10
    # The second fit goes on from the consensus of the first.
    assert relative_error(torch.stack([v[4] for _, v, _ in ranks]).mean(0), ranks[0][0]) < 1e-6
    assert relative_error(torch.stack([v[9] for _, v, _ in ranks]).mean(0), ranks[0][2]) < 1e-6


def test_without_an_optimizer():
    """Nor any float buffer: there is nothing to average."""

    class Without(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return None

    def run(rank):
        model = Without()
        trainer_for(rank).fit(model, DataLoader(torch.randn(8, 2), batch_size=2))
        return model.net.weight.data

    one, other = run_ranks(run, 2)
    assert torch.equal(one, other)


def test_sync_batch_norm_warns():
    """It works on GPUs only (torch raises on a CPU), where it brings its own collectives back."""

    def run(rank):
        module = Net()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
                trainer_for(rank, sync_batchnorm=True).fit(module, DataLoader(RankData(rank, 1), batch_size=None))
        return [str(w.message) for w in caught if "SyncBatchNorm exchanges statistics" in str(w.message)]

    assert [len(messages) for messages in run_ranks(run, 2)] == [1, 0]


# ---- which collectives run ------------------------------------------------------------------------------------------


def communication(rank, strategy, options, steps):
    """What goes out in so many optimizer steps: messages of groups, and collectives as torch's profiler sees them."""
    strategy = strategy(timeout=timedelta(seconds=20), **options)
    messages: list[dist.P2POp] = []
    send = dist.batch_isend_irecv

    def watched(operations):
        messages.extend(o for o in operations if o.op is dist.isend)
        return send(operations)

    class Profiled(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:  # DDP rebuilds its buckets at first
                dist.batch_isend_irecv = watched
                self.profiler = torch.profiler.profile(record_shapes=True)
                self.profiler.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1 + steps:
                self.profiler.__exit__(None, None, None)
                dist.batch_isend_irecv = send

    profiled = Profiled()
    trainer_for(rank, [profiled], strategy).fit(Net(), DataLoader(RankData(rank, steps + 3), batch_size=None))
    found = {"messages": (len(messages), sum(m.tensor.nbytes for m in messages))}
    for event in profiled.profiler.events():
        if event.name.startswith("gloo:") and event.input_shapes:
            values = sum(math.prod(shape) for shape in event.input_shapes)
            if (event.name, values) == ("gloo:broadcast", 1):
                continue  # Lightning's own, under every strategy: has rank 0 received SIGTERM?
            count, size = found.get(event.name, (0, 0))
            found[event.name] = (count + 1, size + values)
    return found


def test_nothing_but_group_averages_runs():
    """No gradient all-reduce and no buffer broadcast; DDP shows that the test would see them."""
    steps = 4
    parameters = sum(p.numel() for p in Net().parameters())
    buffers = sum(b.numel() for b in Net().buffers() if b.is_floating_point())
    for found in run_ranks(communication, WORLD, DSSyncStrategy, {}, steps):
        assert found == {"messages": (2 * steps, 4 * steps * (parameters + buffers))}
    for found in run_ranks(communication, WORLD, DSSyncStrategy, {"sync_every": 2}, steps):
        assert found == {"messages": (steps, 4 * steps // 2 * (parameters + buffers))}
    for found in run_ranks(communication, WORLD, DDPStrategy, {}, steps):
        assert found["messages"] == (0, 0)
        assert found["gloo:broadcast"][0] >= steps
        assert found["gloo:all_reduce"][1] == steps * parameters


def test_accumulation_sends_nothing_between_optimizer_steps():
    def run(rank):
        strategy = DSSyncStrategy(timeout=timedelta(seconds=20))
        trainer = trainer_for(rank, strategy=strategy, accumulate_grad_batches=4)
        trainer.fit(Net(), DataLoader(RankData(rank, 8), batch_size=None))
        return strategy.statistics.synchronizations

    assert run_ranks(run, 2) == [2, 2]


@pytest.mark.parametrize("schedule", ["shuffle", ShuffleSchedule(4, 3, seed=5)], ids=repr)
def test_no_group_is_made_while_training(schedule, monkeypatch):
    def run(rank):
        class Guard(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                monkeypatch.setattr(dist, "new_group", None)

        strategy = DSSyncStrategy(schedule=schedule, timeout=timedelta(seconds=20))
        trainer_for(rank, [Guard()], strategy).fit(Net(), DataLoader(RankData(rank, BATCHES), batch_size=None))
        return strategy.statistics.synchronizations

    assert run_ranks(run, WORLD) == [BATCHES] * WORLD


@pytest.mark.parametrize("hosts", ["abab", "aabb", "abcd"])
def test_groups_within_hosts_however_ranks_are_dealt_out(hosts, monkeypatch):
    def run(rank):
        monkeypatch.setattr(socket, "gethostname", lambda: hosts[rank])
        strategy = DSSyncStrategy(timeout=timedelta(seconds=20))
        trainer_for(rank, strategy=strategy).fit(Net(), DataLoader(RankData(rank, 2), batch_size=None))
        model = nn.Linear(1, 1)
        alone = DSSynchronizer(model, torch.optim.SGD(model.parameters()))
        return [[g.at(t)[0] for t in range(2)] for g in (strategy._groups, alone.groups)]

    expected = GridSchedule(4, 2, hosts)
    groups = [[expected.group(rank, t) for t in range(2)] for rank in range(4)]
    assert run_ranks(run, 4) == [[mine, mine] for mine in groups]
    if hosts == "abab":
        assert groups[0] == [(0, 1), (0, 2)]


def racks(names):
    """Two racks whose trunk carries what one host sends; the third host is slow."""
    link = {name: Link(0.1, 0.1) for name in (*names, "r0", "r1")} | {names[2]: Link(0.02, 0.02)}
    above = {names[0]: "r0", names[1]: "r1", names[2]: "r0", names[3]: "r1", "r0": "top", "r1": "top"}
    return Topology(above, link, {name: (rank,) for rank, name in enumerate(names)})


@pytest.mark.parametrize("hosts", ["dbca", None])
def test_a_schedule_planned_for_a_network(hosts, tmp_path, monkeypatch):
    """Ranks are found by the names of their hosts, or else as the file numbers them; all follow one plan."""
    file = tmp_path / "cluster.yaml"
    file.write_text(racks("abcd").to_yaml())

    def run(rank, overlap):
        if hosts:
            monkeypatch.setattr(socket, "gethostname", lambda: hosts[rank])
        recorder = Recorder()
        strategy = DSSyncStrategy(schedule="topology", topology=file, overlap=overlap, timeout=timedelta(seconds=20))
        trainer = trainer_for(rank, [recorder], strategy)
        trainer.fit(Net(), DataLoader(RankData(rank, BATCHES), batch_size=None))
        size = sum(4 * t.numel() for t in averaged(trainer.lightning_module))
        schedule = strategy._groups.schedule
        return recorder.values, [schedule.partition(t) for t in range(schedule.period)], size

    network = racks("abcd").with_ranks(hosts or "abcd")
    for overlap in (True, False):
        ranks = run_ranks(run, WORLD, overlap)
        planned = plan(network, ranks[0][2], overlap=overlap).schedule
        for _, partitions, _ in ranks:
            assert partitions == [planned.partition(t) for t in range(planned.period)]
        slow = network.ranks["c"][0]
        assert any((slow,) in partition for partition in ranks[0][1])
        reference = Reference(Net, lambda m: m.configure_optimizers(), planned, overlap)
        for t in range(BATCHES):
            reference.step(partial(backward, t))
            for rank, (values, _, _) in enumerate(ranks):
                assert relative_error(values[t], reference.flat(rank)) < 1e-6


@pytest.mark.parametrize("compute", [None, 0.5])
def test_the_first_plan_is_for_the_time_of_compute_that_is_given(compute):
    """And for that of all steps between two averages."""

    def run(rank):
        strategy = DSSyncStrategy(schedule="topology", topology=racks("abcd"), compute=compute, sync_every=3)
        trainer_for(rank, strategy=strategy).fit(Net(), DataLoader(RankData(rank, 3), batch_size=None))
        return strategy._leader.found.compute if rank == 0 else None

    assert run_ranks(run, WORLD)[0] == (None if compute is None else 1.5)
    with pytest.warns(UserWarning, match="compute=0.5 has no effect with schedule='auto'"):
        DSSyncStrategy(compute=0.5)
    for wrong in (-1, float("inf"), "0.5", True):
        with pytest.raises(ValueError, match=f"compute={wrong!r} is no number of seconds of at least 0. HINT: "):
            DSSyncStrategy(schedule="topology", topology=racks("abcd"), compute=wrong)


def test_a_topology_without_the_schedule_for_it_warns():
    with pytest.warns(UserWarning, match="topology=.* has no effect with schedule='auto'"):
        DSSyncStrategy(topology=racks("abcd"))


def test_a_group_size_beside_a_plan_warns():
    def run(rank):
        strategy = DSSyncStrategy(schedule="topology", topology=racks("abcd"), group_size=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_for(rank, strategy=strategy).fit(Net(), DataLoader(RankData(rank, 2), batch_size=None))
        return [str(warning.message) for warning in caught]

    assert any("group_size=2 has no effect: CyclicSchedule(" in message for message in run_ranks(run, WORLD)[0])
