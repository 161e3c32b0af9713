"""The synchronizer without Lightning, on forked gloo ranks, against the plain reference."""

import gc
import itertools
import os
import socket
import time
from datetime import timedelta
from functools import partial
from statistics import median

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ds_lightning import CyclicSchedule, DSSynchronizer, GridSchedule, ShuffleSchedule
from ds_lightning.groups import ScheduledGroups, exchange, own_store
from tests.ranks import run_ranks
from tests.reference import Reference, flat, relative_error

STEPS = 50
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
}
ORDERS = (True, "late", False)  # of `overlap`; see train_model


def make_model(norm=True):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(10, 16, bias=False), *middle, nn.Tanh(), nn.Linear(16, 3))


def make_optimizer(name, model):
    return OPTIMIZERS[name](model.parameters())


def batch(rank, t):
    generator = torch.Generator().manual_seed(1000 * t + rank)
    return torch.randn(8, 10, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def backward(t, model, rank):
    x, y = batch(rank, t)
    cross_entropy(model(x), y).backward()


def train(rank, groups, name, overlap, steps=STEPS, **options):
    model = make_model()
    return train_model(rank, model, make_optimizer(name, model), groups, backward, overlap, steps, **options)


def train_model(rank, model, optimizer, groups, backward, overlap, steps, seen=None, **options):
    """The plain loop, in either order; what is there after each step is appended to ``seen``.

    Overlapped ``"late"``, averages are applied after an update that allows it.
    """
    sync = DSSynchronizer(model, optimizer, groups, **options)
    for t in range(steps):
        if overlap:
            sync.start()
        optimizer.zero_grad()
        backward(t, model, rank)
        late = overlap == "late" and not sync.finishes_first
        if overlap and not late:
            sync.finish()
        optimizer.step()
        if late:
            sync.finish()
        if not overlap:
            sync.synchronize()
        if seen is not None:
            seen.append(flat(model))
    return flat(model)


def train_all(rank, schedule):
    groups = ScheduledGroups(schedule)
    keys = itertools.product(OPTIMIZERS, ORDERS)
    return {key: train(rank, groups, *key, noise_correction="auto") for key in keys}


@pytest.mark.parametrize(
    "schedule",
    [
        GridSchedule(4, 2),
        ShuffleSchedule(4, 2, seed=1),
        CyclicSchedule([[(0, 1), (2,), (3,)], [(0, 2, 3), (1,)], [(1, 2), (0, 3)]], parts=3),
        pytest.param(GridSchedule(4, 4), marks=pytest.mark.slow),
        pytest.param(ShuffleSchedule(5, 2), marks=pytest.mark.slow),
        pytest.param(GridSchedule(8, 2), marks=pytest.mark.slow),
        pytest.param(GridSchedule(8, 4), marks=pytest.mark.slow),
        pytest.param(GridSchedule(8, 8), marks=pytest.mark.slow),
        pytest.param(ShuffleSchedule(8, 2, seed=2), marks=pytest.mark.slow),
        pytest.param(ShuffleSchedule(8, 3), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_equals_the_reference(schedule):
    """Every rank, every optimizer, both orders: 1e-6 relative after 50 steps."""
    ranks = run_ranks(train_all, schedule.world_size, schedule)
    for name, overlap in itertools.product(OPTIMIZERS, ORDERS):
        corrected = name.startswith("adam")
        reference = Reference(
            make_model, partial(make_optimizer, name), schedule, bool(overlap), correct_noise=corrected
        )
        for t in range(STEPS):
            reference.step(partial(backward, t))
        for rank, result in enumerate(ranks):
            assert relative_error(result[name, overlap], reference.flat(rank)) < 1e-6, (name, overlap, rank)


def make_sgd(**options):
    return partial(torch.optim.SGD, lr=0.1, **options)


def make_adamw(**options):
    return partial(torch.optim.AdamW, **{"lr": 0.1, "weight_decay": 0.1, **options})


def with_a_hook(kind):
    def make(parameters):
        optimizer = torch.optim.SGD(parameters, 0.1)
        getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: None)
        return optimizer

    return make


def with_one_group_decayed(make):
    def make_groups(parameters):
        matrix, *others = parameters
        return make([{"params": [matrix], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])

    return make_groups


class Derived(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "options", "first"),
    [
        (make_sgd(), {}, False),
        (make_sgd(momentum=0.9, nesterov=True), {"sync_every": 3, "wire_dtype": "int8"}, False),
        (torch.optim.Adam, {"noise_correction": True}, False),
        (torch.optim.RMSprop, {}, False),
        (torch.optim.Adagrad, {}, False),
        (make_adamw(), {"noise_correction": True}, False),
        (with_one_group_decayed(torch.optim.AdamW), {}, False),
        (partial(torch.optim.RAdam, weight_decay=0.1, decoupled_weight_decay=True), {}, False),
        # They read parameters, or may.
        (make_sgd(weight_decay=0.1), {}, True),
        (with_one_group_decayed(torch.optim.Adam), {}, True),
        (partial(torch.optim.RAdam, weight_decay=0.1), {}, True),
        (torch.optim.LBFGS, {}, True),
        (torch.optim.ASGD, {}, True),
        (partial(Derived, lr=0.1), {}, True),
        # What they leave of the parameters is not known, or not the same for all that travels.
        (make_adamw(), {"sync_every": 2}, True),
        (make_adamw(lr=torch.tensor(0.1)), {}, True),
        (make_adamw(fused=True), {}, True),
        # Others look at parameters, or averages are of what the update changes.
        (with_a_hook("pre"), {}, True),
        (with_a_hook("post"), {}, True),
        (torch.optim.Adam, {"average_optimizer_state": ["exp_avg_sq"]}, True),
    ],
)
def test_which_updates_may_come_first(make, options, first):
    def run(rank):
        model = make_model()
        groups = ScheduledGroups(GridSchedule(2, 2))
        optimizer = make(model.parameters())
        stale = DSSynchronizer(model, optimizer, groups)
        sync = DSSynchronizer(model, optimizer, groups, **options)
        sync.start()
        found = sync.finishes_first
        sync.discard()
        return found, stale.step

    assert run_ranks(run, 2) == [(first, 0)] * 2


@pytest.mark.parametrize("what", ["states", "rows"])
def test_what_updates_change_too_cannot_be_applied_after_them(what):
    def run(rank):
        model = nn.ModuleList([nn.Embedding(10, 3, sparse=what == "rows")])
        optimizer = torch.optim.Adagrad(model.parameters()) if what == "rows" else torch.optim.Adam(model.parameters())
        states = () if what == "rows" else ("exp_avg_sq",)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(2, 2)), average_optimizer_state=states)
        for late in (False, True):
            sync.start()
            model[0](torch.tensor([1])).sum().backward()
            if not late:
                sync.finish()
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"came after optimizer\.step\(\), but .*HINT: call it before"):
            sync.finish()

    run_ranks(run, 2)


@pytest.mark.parametrize("wire", [None, "bf16", "int8"])
@pytest.mark.parametrize("g", [2, 4])
def test_decay_takes_its_share_of_a_late_average(g, wire):
    """Of some tensors, in several dtypes and with gaps; of what has no gradient it takes nothing."""

    def run(rank, overlap):
        torch.manual_seed(0)
        gaps = nn.Parameter(torch.randn(20, 30)[:, ::2])
        model = nn.ParameterList([torch.randn(30, 40), torch.randn(30), gaps, torch.randn(9), torch.randn(5).double()])
        groups = [{"params": [*model][::2]}, {"params": [*model][1::2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 0.1, weight_decay=2.0)
        assert not model[2].is_contiguous()

        def backward(t, model, rank):
            generator = torch.Generator().manual_seed(1000 * t + rank)
            for i, p in enumerate(model):
                p.grad = None if (t + rank + i) % 3 == 0 else torch.randn(p.shape, generator=generator).to(p)

        seen: list[torch.Tensor] = []
        schedule = ScheduledGroups(GridSchedule(4, g))
        train_model(rank, model, optimizer, schedule, backward, overlap, 12, seen=seen, wire_dtype=wire)
        return seen

    ranks = zip(run_ranks(partial(run, overlap="late"), 4), run_ranks(partial(run, overlap=True), 4), strict=True)
    for late, early in ranks:
        # A rounding that falls to the other side is the next value of the wire.
        assert all(relative_error(a, b) < (1e-6 if wire is None else 1e-3) for a, b in zip(late, early, strict=True))


def change_amid(rank, before, after, overlap):
    """Train; what process groups there are beforehand, in the middle, and at the end."""
    groups = ScheduledGroups(before)
    model = make_model()
    optimizer = make_optimizer("adam", model)
    sync = DSSynchronizer(model, optimizer, groups, noise_correction="auto")
    held = [set(groups.members)]
    for t in range(STEPS):
        if t == STEPS // 2:
            kept = {members: groups.members[members] for members in groups.members}
            groups.change(after)
            sync.regroup()
            held.append(set(groups.members))
            assert all(groups.members[m] is kept[m] for m in held[0] & held[1])
            for members in held[0] - held[1]:
                with pytest.raises(ValueError, match=r"not registered|not initialized|[Ii]nvalid"):
                    dist.get_backend(kept[members])
        if overlap:
            sync.start()
        optimizer.zero_grad()
        backward(t, model, rank)
        if overlap:
            sync.finish()
        optimizer.step()
        if not overlap:
            sync.synchronize()
    return flat(model), held


@pytest.mark.parametrize("overlap", [True, False])
def test_another_schedule_from_some_step_on(overlap):
    """Groups that both have stay, the others are destroyed, and the run equals the reference."""
    before = GridSchedule(4, 2)
    after = CyclicSchedule([[(0, 1), (2,), (3,)], [(1, 2, 3), (0,)], [(0, 3), (1,), (2,)]], parts=2)
    ranks = run_ranks(change_amid, 4, before, after, overlap)
    reference = Reference(make_model, partial(make_optimizer, "adam"), before, overlap, correct_noise=True)
    for t in range(STEPS):
        if t == STEPS // 2:
            reference.schedule = after
            for noise in reference.noise:
                noise.begin_anew()
        reference.step(partial(backward, t))
    for rank, (values, held) in enumerate(ranks):
        assert relative_error(values, reference.flat(rank)) < 1e-6
        for groups, schedule in zip(held, (before, after), strict=True):
            assert groups == {schedule.group(rank, t) for t in range(3)} - {(rank,)}


def train_ddp(rank, steps):
    model = DistributedDataParallel(make_model(norm=False))
    optimizer = make_optimizer("sgd", model)
    for t in range(steps):
        optimizer.zero_grad()
        backward(t, model, rank)
        optimizer.step()
    return flat(model.module)


def train_in_one_group(rank, steps):
    model = make_model(norm=False)
    optimizer = make_optimizer("sgd", model)
    sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 4)))
    for t in range(steps):
        optimizer.zero_grad()
        backward(t, model, rank)
        optimizer.step()
        sync.synchronize()
    return flat(model)


def test_one_group_of_everybody_with_sgd_is_ddp():
    for ddp, dssync in zip(run_ranks(train_ddp, 4, STEPS), run_ranks(train_in_one_group, 4, STEPS), strict=True):
        assert relative_error(dssync, ddp) < 1e-6


@pytest.mark.parametrize("overlap", [True, False])
def test_sync_every_skips_steps_but_no_partition(overlap):
    """With 2 steps between and a period of 2, counting steps instead of rounds would never use one axis."""
    schedule = GridSchedule(4, 2)
    ranks = run_ranks(lambda rank: train(rank, ScheduledGroups(schedule), "momentum", overlap, sync_every=2), 4)
    reference = Reference(make_model, partial(make_optimizer, "momentum"), schedule, overlap, sync_every=2)
    for t in range(STEPS):
        reference.step(partial(backward, t))
    for rank, result in enumerate(ranks):
        assert relative_error(result, reference.flat(rank)) < 1e-6


def backward_on_some(t, model, rank):
    """One rank has no gradients at all, and nobody ever for the last bias."""
    model[-1].bias.requires_grad_(True)
    if (rank + t) % 4:
        x, y = batch(rank, t)
        (cross_entropy(model[:-1](x) @ model[-1].weight.T, y)).backward()


def train_with_gradients(rank, schedule):
    model = make_model(norm=False)
    optimizer = make_optimizer("momentum", model)
    sync = DSSynchronizer(model, optimizer, ScheduledGroups(schedule))
    scale = 2.0 ** (rank + 3)  # every rank has a loss scale of its own
    for t in range(STEPS):
        sync.start()
        optimizer.zero_grad()
        backward_on_some(t, model, rank)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(scale)
        sync.average_gradients(scale)
        sync.finish()
        assert model[-1].bias.grad is None
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(scale)
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("schedule", [GridSchedule(4, 2), ShuffleSchedule(5, 2)], ids=repr)
def test_gradients_are_averaged_beside_parameters(schedule):
    ranks = run_ranks(train_with_gradients, schedule.world_size, schedule)
    reference = Reference(
        lambda: make_model(norm=False), partial(make_optimizer, "momentum"), schedule, True, average_gradients=True
    )
    for model in reference.models:
        model[-1].bias.requires_grad_(False)  # weight decay must not touch what has no gradient
    for optimizer in reference.optimizers:
        optimizer.param_groups[0]["params"].pop()
    for t in range(STEPS):
        reference.step(partial(backward_on_some, t))
    for rank, result in enumerate(ranks):
        assert relative_error(result, reference.flat(rank)) < 1e-6


def test_sparse_gradients_are_refused():
    def sparse(rank):
        model = nn.Embedding(5, 3, sparse=True)
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1), ScheduledGroups(GridSchedule(2, 2)))
        model(torch.tensor([rank])).sum().backward()
        with pytest.raises(ValueError, match="cannot average sparse gradients"):
            sync.average_gradients()
        sync.synchronize()  # parameters are dense all the same

    run_ranks(sparse, 2)


def train_with_state(rank, schedule, every):
    model = make_model(norm=False)
    optimizer = make_optimizer("adam", model)
    options = {"average_optimizer_state": ("exp_avg_sq",), "optimizer_state_every": every}
    sync = DSSynchronizer(model, optimizer, ScheduledGroups(schedule), **options)
    for t in range(STEPS):
        sync.start()
        optimizer.zero_grad()
        backward(t, model, rank)
        if rank == 1 and t < 5:
            model[0].weight.grad = None  # its state begins later here
        sync.finish()
        optimizer.step()
    return flat(model), [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]


@pytest.mark.parametrize("every", [1, 3])
def test_optimizer_states_are_averaged_over_those_who_have_them(every):
    """In one period out of so many: on a grid of two axes in the steps 0, 1, 6, 7, 12 and so on."""
    schedule = GridSchedule(4, 2)
    ranks = run_ranks(train_with_state, 4, schedule, every)
    reference = Reference(lambda: make_model(norm=False), partial(make_optimizer, "adam"), schedule, True)

    def backward_and_mix(t, model, rank):
        backward(t, model, rank)
        if rank == 1 and t < 5:
            model[0].weight.grad = None
        if rank == 3 and t // 2 % every == 0:  # after the last rank's backward, before anyone's update
            for ps in zip(*(m.parameters() for m in reference.models), strict=True):
                states = [o.state.get(p, {}).get("exp_avg_sq") for o, p in zip(reference.optimizers, ps, strict=True)]
                for group in schedule.partition(t):
                    there = [states[r] for r in group if states[r] is not None]
                    mean = torch.stack(there).mean(0) if there else None
                    for state in there:
                        state.copy_(mean)

    for t in range(STEPS):
        reference.step(partial(backward_and_mix, t))
    for rank, (values, states) in enumerate(ranks):
        assert relative_error(values, reference.flat(rank)) < 1e-6
        for p, state in zip(reference.models[rank].parameters(), states, strict=True):
            assert relative_error(state, reference.optimizers[rank].state[p]["exp_avg_sq"]) < 1e-6


# ---- boundedness --------------------------------------------------------------------------------------------------


def noise_run(rank, groups, steps, optimizer, overlap, gradients_only=False, average_gradients=False, **options):
    """Gradients of pure noise: nothing but averaging holds the replicas together. Returns the consensus distances.

    The noise has no mean over the ranks, so that the mean of the replicas stays where it is: what an 8-bit wire rounds
    away is relative to it.
    """
    torch.manual_seed(0)
    model = nn.Linear(80, 1, bias=False)
    opt = OPTIMIZERS[optimizer](model.parameters(), lr=0.01)
    sync = DSSynchronizer(model, opt, groups, **options)
    generator = torch.Generator().manual_seed(0)
    distances = []
    for t in range(steps):
        if overlap and not gradients_only:
            sync.start()
        noise = torch.randn(dist.get_world_size(), 1, 80, generator=generator)
        model.weight.grad = noise[rank] - noise.mean(0)
        if average_gradients or gradients_only:
            sync.average_gradients()
        if overlap and not gradients_only:
            sync.finish()
        opt.step()
        if gradients_only:
            sync.step += 1
        elif not overlap:
            sync.synchronize()
        if t % 9 == 8:  # prime to the schedules' periods
            x = flat(model)
            mean = x.clone()
            dist.all_reduce(mean)
            square = (x - mean / dist.get_world_size()).square().sum()
            dist.all_reduce(square)
            distances.append((square / dist.get_world_size()).sqrt().item())
    return distances


CONFIGURATIONS = [
    dict(zip(("sync_every", "wire_dtype", "average_gradients", "average_optimizer_state"), c, strict=True))
    for c in itertools.product((1, 3), (None, "bf16", "fp16", "int8"), (False, True), ((), True))
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "paper"])
@pytest.mark.parametrize(
    ("schedule", "optimizer"), [(GridSchedule(4, 2), "adam"), (ShuffleSchedule(4, 2), "momentum")], ids=repr
)
def test_consensus_distance_stays_bounded_in_every_configuration(schedule, optimizer, overlap):
    """500 steps of pure gradient noise, all combinations of the other options."""
    state = ("momentum_buffer",) if optimizer == "momentum" else ("exp_avg_sq",)

    def run(rank):
        groups = ScheduledGroups(schedule)
        results = []
        for c in CONFIGURATIONS:
            options = {**c, "average_optimizer_state": state if c["average_optimizer_state"] else ()}
            options["optimizer_state_every"] = 1 if overlap else 4
            results.append(noise_run(rank, groups, 500, optimizer, overlap, **options))
        return results, noise_run(rank, groups, 500, optimizer, overlap=False, gradients_only=True)

    results, gradients_only = run_ranks(run, schedule.world_size, timeout=280)[0]
    for configuration, distances in zip(CONFIGURATIONS, results, strict=True):
        assert growth(distances) < 1.1, (configuration, distances)
        assert distances[-1] < 0.1 * gradients_only[-1], configuration
    # The trap: averaging gradients alone lets the replicas walk apart, as the root of time.
    assert growth(gradients_only) > 1.4


def test_averaged_gradients_never_stand_in_for_parameters():
    """With `average_gradients`, parameters are averaged all the same: a short version of the test above."""
    schedule = GridSchedule(4, 2)

    def run(rank):
        groups = ScheduledGroups(schedule)
        both = noise_run(rank, groups, 500, "momentum", True, average_gradients=True)
        return both, noise_run(rank, groups, 500, "momentum", True, gradients_only=True)

    both, gradients_only = run_ranks(run, 4)[0]
    assert growth(both) < 1.1
    assert growth(gradients_only) > 1.4
    assert gradients_only[-1] > 10 * max(both)


def growth(distances):
    """Typical distance in the second half of 500 steps over that of steps 50 to 180."""
    return median(distances[28:]) / median(distances[5:20])


def test_a_forgotten_average_counts_its_bytes_and_not_its_time():
    def run(rank):
        model = nn.Linear(100, 100, bias=False)
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1), ScheduledGroups(GridSchedule(2, 2)))
        sync.timed = True
        sync.start()
        sync.consensus()
        time.sleep(2)
        sync.start()
        sync.finish()
        return sync.statistics

    for statistics in run_ranks(run, 2):
        assert statistics.bytes_sent == 2 * 4 * 100 * 100
        assert statistics.seconds_running < 2


# ---- what is sent -------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Tied, frozen, complex, half-precision, double and gappy parameters; masks, integers and expanded buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(5) / 3, requires_grad=False)
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.short = nn.Parameter(torch.randn(7).bfloat16())
        self.long_ = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("mask", torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf))
        self.register_buffer("wide", torch.ones(1, 4).expand(3, 4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("secret", torch.zeros(2), persistent=False)
        self.gappy = nn.Parameter(torch.randn(4, 8)[:, ::2])
        self.register_buffer("one", torch.ones(1).expand(4))


def disturbed(rank, steps, wire_dtype=None):
    model = Everything()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 2)), wire_dtype=wire_dtype)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))
        model.mean.add_(rank)
        model.secret.add_(rank)
        model.count.add_(rank)
    for _ in range(steps):
        sync.synchronize()
    return model, sync


@pytest.mark.parametrize("wire_dtype", [None, "bf16", "int8"])
def test_every_kind_of_tensor_is_averaged_as_it_should(wire_dtype):
    ranks = run_ranks(lambda rank: disturbed(rank, 2, wire_dtype)[0], 4)
    start = run_ranks(lambda rank: disturbed(rank, 0)[0], 4)
    rounding = {None: 1e-6, "bf16": 3e-2, "int8": 8e-2}[wire_dtype]
    for rank, model in enumerate(ranks):
        for name, p in model.named_parameters():
            mean = torch.stack([dict(m.named_parameters())[name].data for m in start]).to(torch.complex128).mean(0)
            tolerance = max(rounding, 2e-2) if name == "short" else rounding  # stored in bf16
            assert torch.allclose(p.data.to(torch.complex128), mean, atol=tolerance, rtol=tolerance), name
        assert torch.equal(model.frozen, Everything().frozen)
        assert torch.equal(model.mask, Everything().mask)
        assert torch.equal(model.wide, Everything().wide)
        assert torch.equal(model.one, Everything().one)
        assert model.mean.tolist() == model.secret.tolist() == [1.5, 1.5]
        assert model.count.item() == rank  # integers wait for a consensus point
        assert model.head.weight is model.embedding.weight


def test_buffers_of_8_bits_become_rank_0s():
    """There is no sum of them in torch."""

    def run(rank):
        model = nn.Linear(2, 1)
        model.register_buffer("codes", torch.full((3,), 1.0).to(torch.float8_e4m3fn))
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1))
        model.codes.copy_(torch.full((3,), 2.0 + rank))
        sync.synchronize()
        mine = model.codes.float().tolist()
        sync.consensus()
        return mine, model.codes.float().tolist()

    assert run_ranks(run, 2) == [([2.0] * 3, [2.0] * 3), ([3.0] * 3, [2.0] * 3)]


def test_consensus_is_exact_and_changes_nothing_twice():
    def run(rank):
        model, sync = disturbed(rank, 0)
        sync.consensus()
        once = [t.clone() for t in (*model.parameters(), *model.buffers())]
        sync.consensus()
        assert all(torch.equal(a, b) for a, b in zip(once, (*model.parameters(), *model.buffers()), strict=True))
        return model

    for model in (ranks := run_ranks(run, 4)):
        for t, first in zip(
            (*model.parameters(), *model.buffers()), (*ranks[0].parameters(), *ranks[0].buffers()), strict=True
        ):
            assert torch.equal(t, first)
        assert torch.equal(model.frozen, Everything().frozen)
        assert model.count.item() == 0  # rank 0's
        assert model.mean.tolist() == [1.5, 1.5]


def test_variances_stay_positive_and_forward_updates_survive():
    """In the overlap a forward pass may shrink what was packed; the difference of the old values is added later."""

    def run(rank):
        model = nn.BatchNorm1d(2)
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1), ScheduledGroups(GridSchedule(2, 2)))
        model.running_var.fill_(100.0 if rank == 0 else 1e-3)
        sync.start()
        model.running_var.mul_(0.01)  # the statistics of a batch, with a momentum of 0.99
        model.running_mean = model.running_mean + 1.0 + rank  # a forward pass that replaces its buffer
        sync.finish()
        return model.running_var.tolist(), model.running_mean.tolist()

    (v0, m0), (v1, m1) = run_ranks(run, 2)
    assert min(v0 + v1) >= 0
    assert v1 == pytest.approx([1e-5 + 50 - 5e-4] * 2)
    assert (m0, m1) == ([1.0, 1.0], [2.0, 2.0])


def test_parameters_frozen_later_are_sent_until_replicas_agree():
    def run(rank):
        model = nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 2)), index=1)
        model.weight.data += rank
        sync.synchronize()
        model.weight.requires_grad_(False)
        sync.synchronize()
        sent = sync.statistics.bytes_sent
        sync.consensus()
        sync.synchronize()
        return model.weight.data - nn.Linear(2, 1).weight.data * 0, sync.statistics.bytes_sent - sent

    ranks = run_ranks(run, 4)
    assert all(torch.equal(weight, ranks[0][0]) for weight, _ in ranks)
    assert all(later == 0 for _, later in ranks)


def test_parameters_added_to_the_optimizer_are_averaged_from_then_on():
    def run(rank):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        optimizer = torch.optim.SGD(model[0].parameters(), 1.0)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(2, 2)))
        model[1].weight.data += rank
        sync.synchronize()
        apart = model[1].weight.data.clone()
        optimizer.add_param_group({"params": model[1].parameters()})
        sync.synchronize()
        return apart, model[1].weight.data

    (apart0, w0), (apart1, w1) = run_ranks(run, 2)
    assert not torch.equal(apart0, apart1)
    assert torch.allclose(w0, w1)
    assert torch.allclose(w0, (apart0 + apart1) / 2)


def test_models_start_from_rank_0():
    def run(rank):
        torch.manual_seed(rank)
        model = nn.Linear(3, 3)
        model.register_buffer("count", torch.tensor(rank + 5))
        DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1))
        return model.weight.data, model.count.item()

    ranks = run_ranks(run, 3)
    assert all(torch.equal(w, ranks[0][0]) and count == 5 for w, count in ranks)


# ---- optimizer state at a consensus point ---------------------------------------------------------------------------


def test_optimizer_state_becomes_the_same_everywhere():
    def run(rank):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 2)))
        for t in range(3):
            optimizer.zero_grad()
            used = model[0] if rank < 2 else model  # ranks 0 and 1 never use the second layer
            sum((p * (rank + 1)).sum() for p in used.parameters()).backward()
            if (rank, t) != (3, 0):  # a skipped step
                optimizer.step()
        own = {i: s["exp_avg"].clone() for i, s in optimizer.state_dict()["state"].items()}
        sync.consensus_of_optimizer_state()
        return own, optimizer.state_dict()["state"]

    ranks = run_ranks(run, 4)
    for i in range(4):
        there = [own[i] for own, _ in ranks if i in own]
        for _, state in ranks:
            assert torch.allclose(state[i]["exp_avg"], torch.stack(there).mean(0))
            assert all(torch.equal(state[i][k], ranks[0][1][i][k]) for k in state[i])
    assert [len(own) for own, _ in ranks] == [2, 2, 4, 4]


def test_histories_come_whole_from_one_rank():
    def run(rank):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2 + rank)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(2, 2)))
        x, y = batch(rank, 0)

        def closure():
            optimizer.zero_grad()
            loss = (model(x[:, :3]) - y[:, None]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        before = optimizer.state_dict()["state"][0]
        lengths = len(before["old_dirs"])
        d = before["d"].clone()
        sync.consensus_of_optimizer_state()
        return lengths, d, optimizer.state_dict()["state"][0]

    (n0, d0, s0), (n1, _, s1) = run_ranks(run, 2)
    assert n0 != n1
    assert torch.equal(s0["d"], d0)
    assert torch.equal(s1["d"], d0)
    assert s1["n_iter"] == s0["n_iter"]
    assert all(torch.equal(a, b) for a, b in zip(s0["old_dirs"], s1["old_dirs"], strict=True))


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_models_that_differ_are_refused_on_all_ranks():
    def run(rank):
        model = nn.Linear(3, 4 if rank == 2 else 3)
        DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1))

    for error in run_ranks(run, 4, errors=True, timeout=20):
        assert error.type is ValueError
        assert "Ranks do not agree on the model's parameters and buffers: rank 2 differs from rank 0" in error.message
        assert "weight [4, 3]" in error.message


def test_schedules_that_differ_are_refused_on_all_ranks():
    for error in run_ranks(lambda rank: ScheduledGroups(ShuffleSchedule(4, 2, seed=rank // 3)), 4, errors=True):
        assert error.type is ValueError
        assert "do not agree on the schedule's partitions: rank 3 differs from rank 0" in error.message


class Overlapping:
    world_size, period = 4, 1

    def __init__(self, rank):
        self.rank = rank

    def partition(self, step):
        return ((0, 1), (1, 2, 3)) if self.rank == 1 else ((0, 1), (2, 3))

    def group(self, rank, step):
        return next(g for g in self.partition(step) if rank in g)


def test_a_schedule_malformed_on_one_rank_is_refused_on_all():
    for error in run_ranks(lambda rank: ScheduledGroups(Overlapping(rank)), 4, errors=True, timeout=20):
        assert error.type is ValueError
        assert "rank 1 in two groups of step 0" in error.message
        assert "found on ranks [1]" in error.message


def test_a_lost_rank_ends_its_group_with_an_error_that_names_it():
    def run(rank):
        groups = ScheduledGroups(GridSchedule(4, 2), timeout=timedelta(seconds=3))
        model = nn.Linear(3, 3)
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1), groups)
        sync.synchronize()
        if rank == 3:
            raise KeyboardInterrupt
        sync.synchronize()

    results = run_ranks(run, 4, errors=True, timeout=30)
    assert results[2].type is RuntimeError
    assert f"Rank 2 could not average step 1 with rank 3 ({socket.gethostname()}) within 0:00:03" in results[2].message


class Alone:
    """Rank 0 never averages. Groups come one by one, and as lists."""

    world_size, period = 3, 1

    def partition(self, step):
        yield from ([0], [2, 1])

    def group(self, rank, step):
        return next(g for g in self.partition(step) if rank in g)


def test_a_rank_may_be_alone():
    def run(rank):
        model = nn.Linear(2, 1)
        model.weight.data.fill_(0.0)
        groups = ScheduledGroups(Alone())
        sync = DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1), groups)
        assert sync.groups is groups
        model.weight.data.fill_(float(rank))
        sync.synchronize()
        return model.weight.data[0, 0].item()

    assert run_ranks(run, 3) == [0.0, 1.5, 1.5]


def test_stores_discarded_in_a_fork_do_no_harm():
    """A loader's worker is one. A copy of a ``FileStore`` would remove its file there."""

    def run(rank):
        mine = [own_store("mine", None)]
        mine.append(mine)  # for the garbage collector
        del mine
        if (pid := os.fork()) == 0:
            gc.collect()
            os._exit(0)
        os.waitpid(pid, 0)
        gc.collect()
        return exchange(str(rank), ",".join)

    assert run_ranks(run, 2, collective_timeout=5) == ["0,1"] * 2


def test_groups_are_bounded():
    assert run_ranks(lambda rank: len(ScheduledGroups(GridSchedule(8, 2))), 8) == [3] * 8
    counts = run_ranks(lambda rank: len(ScheduledGroups(ShuffleSchedule(7, 2))), 7)
    assert max(counts) <= ShuffleSchedule.POOL_SIZE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 0}, "sync_every=0 is too small"),
        ({"wire_dtype": "bf17"}, "wire_dtype='bf17' is not supported"),
        ({"average_optimizer_state": ("exp_avg",)}, "averages 'exp_avg' without the second moment, which diverges"),
        ({"average_optimizer_state": "exp_avg_sq"}, "is not a sequence of names"),
    ],
)
def test_bad_options(options, message):
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message):
        DSSynchronizer(model, torch.optim.SGD(model.parameters(), 0.1), **options)
