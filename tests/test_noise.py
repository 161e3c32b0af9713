"""Noise correction: the arithmetic against samples, updates on forked ranks against BSP's and the plain reference."""

import csv
import gc
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from benchmarks import noise as benchmark
from ds_lightning import CyclicSchedule, DSSynchronizer, GridSchedule, ShuffleSchedule
from ds_lightning.cost import rounds
from ds_lightning.groups import ScheduledGroups
from ds_lightning.lanes import Lane
from ds_lightning.noise import (
    DRIFTS,
    RAMP,
    Drift,
    NoiseShare,
    attenuation,
    check_noise_correction,
    corrects_noise,
    deviations,
    full_step,
)
from ds_lightning.payload import Followed, Payload, Stretches, _Base
from ds_lightning.schedule import mixing_matrix
from tests.ranks import run_ranks
from tests.reference import Reference, relative_error
from tests.test_synchronizer import train_model

UNEQUAL = CyclicSchedule([[(0, 1), (2, 3, 4)], [(0,), (1, 2), (3, 4)], [(0, 4), (1, 3), (2,)]])

# ---- the arithmetic --------------------------------------------------------------------------------------------------


def sampled(schedule, momentum, every, in_order):
    """What averages move each rank by, from replicas whose updates are noise: the mean over many values and periods."""
    generator = np.random.default_rng(1)
    n, period = schedule.world_size, len(rounds(schedule))
    noise, replicas = np.zeros((2, n, 4000))
    for _ in range(100):
        noise = momentum * noise + generator.standard_normal(noise.shape)
    square = np.zeros((period, n))
    size = 0.0
    for t in range(8 * period):
        update = np.zeros_like(noise)
        for _ in range(every):
            noise = momentum * noise + generator.standard_normal(noise.shape)
            update += noise
        replicas = replicas + update if in_order else replicas
        moved = mixing_matrix(schedule, t) @ replicas - replicas
        replicas = replicas + moved if in_order else replicas + moved + update
        if t >= 4 * period:
            square[t % period] += (moved**2).mean(1) / 4
            size += (update**2).mean() / (4 * period)
    return square / size


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(
    ("schedule", "momentum", "every"),
    [
        (GridSchedule(2, 2), 0.9, 1),
        (GridSchedule(8, 2), 0.9, 1),
        (GridSchedule(8, 2), 0.9, 4),
        (GridSchedule(9, 3), 0.0, 1),
        (ShuffleSchedule(7, 2), 0.5, 2),
        (UNEQUAL, 0.9, 1),
        (GridSchedule(6, 6), 0.9, 3),
    ],
    ids=repr,
)
def test_deviations_are_those_of_replicas_that_noise_parts(schedule, momentum, every, in_order):
    expected, _ = deviations(rounds(schedule), momentum, every)
    assert expected == pytest.approx(sampled(schedule, momentum, every, in_order), rel=0.08, abs=1e-3)


@pytest.mark.parametrize(("n", "g"), [(4, 2), (16, 4), (64, 8)])
@pytest.mark.parametrize("b", [0.0, 0.9])
def test_deviations_on_a_grid_of_two_axes(n, g, b):
    """An average of the latest two rounds alone: by hand."""
    kappa, settled = deviations(rounds(GridSchedule(n, g)), b)
    assert kappa == pytest.approx(np.full((2, n), (1 - 1 / g) * (1 + (1 + 2 * b) / g)), rel=1e-3)
    assert settled == 2


def test_deviations_of_many_ranks_are_near_those_of_fewer():
    """Above 256 ranks members are taken to have nothing in common."""
    exact, settled = deviations(rounds(GridSchedule(256, 2)), 0.9)
    many, later = deviations(rounds(GridSchedule(512, 2)), 0.9)
    assert many.shape == (9, 512)
    assert many.mean() == pytest.approx(exact.mean(), rel=0.03)
    assert 2 <= settled <= later <= 30


def test_a_rank_that_is_alone_deviates_from_nobody():
    kappa, _ = deviations(rounds(UNEQUAL), 0.9)
    assert kappa[1, 0] == kappa[2, 2] == 0
    assert (kappa > 0).sum() == 13


@pytest.mark.parametrize(("updates", "every"), [(1, 1), (4, 1), (400, 1), (400, 3)])
@pytest.mark.parametrize("b", [0.0, 0.9])
def test_attenuation_is_that_of_a_bias_corrected_momentum(b, updates, every):
    """Against the weights that the sum of updates gives to each gradient."""
    steps = updates + every - 1
    weights = np.zeros(steps)
    for t in range(updates, steps + 1):
        weights[:t] += (1 - b) * b ** np.arange(t)[::-1] / (1 - b**t)
    signal, noise = weights.sum() ** 2, (weights**2).sum()
    assert attenuation(b, every, updates) == pytest.approx(signal / noise, rel=1e-2)


def test_rounds_of_any_length():
    """By closed forms: nobody waits for 10**12 terms."""
    kappa, _ = deviations(rounds(GridSchedule(4, 2)), 0.9, 10**12)
    assert kappa == pytest.approx(deviations(rounds(GridSchedule(4, 2)), 0.0)[0], rel=1e-3)  # rounds are strangers
    assert attenuation(0.9, 10**12, 10**12) == pytest.approx(10**12)  # momentum is nothing to so long a sum


def test_nothing_known_stretches_nothing():
    share = NoiseShare((3,))
    assert share.stretch(19.0, 8, 1000).tolist() == [0, 0, 0]
    share.take(torch.tensor([0.0, 1.0, math.nan]), torch.tensor([1.0, 0.0, 1.0]))
    assert share.stretch(19.0, 8, 1000).tolist() == [0, 0, 0]


def test_shares_and_their_limits():
    share = NoiseShare((3,))
    for _ in range(2):
        share.take(torch.tensor([0.1, 5.0, 0.5]), torch.tensor([1.0, 1.0, 1.0]))
        share.take(torch.full((3,), math.inf), torch.ones(3))  # of an update that overflowed
    noise = 19 * 0.1 / (0.9 + 1.9)
    assert share.of_gradients(19.0) == pytest.approx([noise, 1.0, 0.95])
    expected = [(1 - n * 7 / 8) ** -0.5 - 1 for n in (noise, 1, 0.95)]
    assert share.stretch(19.0, 8, 1000) == pytest.approx(expected, rel=1e-5)
    assert expected[1] == pytest.approx(math.sqrt(8) - 1)  # never more than the root of N
    assert share.stretch(19.0, 8, RAMP // 2) == pytest.approx([e / 2 for e in expected], rel=1e-5)


def test_a_full_step_is_what_agreeing_gradients_move_a_value_by():
    assert full_step(0.9, 1) == 1  # in learning rates
    assert full_step(0.9, 3) == pytest.approx(3)
    assert full_step(0.0, 1) == 4  # without momentum noise moves it by 1 as well


@pytest.mark.parametrize("one_by_one", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_values_that_moved_far_are_stretched_less(dtype, one_by_one):
    """By the kernels for the CPU and by those for a GPU."""
    lr, factors = 1e-4, [1.0, 0.0, 3.0]
    place = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=dtype)
    moves = torch.tensor([0.0, 0.1, 0.2, 1.0, -0.5, 3.0], dtype=torch.float64)
    follow = Followed([0, 1, 2], 3, torch.device("cpu"))
    pieces = [*(place + (lr * moves).to(dtype)).split([3, 1, 2])]
    moved = (torch.cat(pieces) - place).double()
    base = _Base(pieces, place.clone(), [torch.zeros_like(place) for _ in range(2)], follow, [0, 1, 2])
    base._one_by_one = one_by_one
    found = base.stretch(Stretches(factors, [lr / (1 + factor) for factor in factors], [1.0] * 3))
    longer = torch.tensor(factors).double().repeat_interleave(torch.tensor([3, 1, 2]))
    expected = moved + longer * moved.sign() * torch.minimum(moved.abs(), lr / (1 + longer))
    tolerance = 20 * torch.finfo(dtype).eps
    assert torch.allclose(
        torch.cat(pieces).double(), place.double() + expected, rtol=tolerance, atol=2e-7 * (dtype == torch.float16)
    )
    assert torch.equal(pieces[1], place[3:4] + moved[3:4].to(dtype))
    if dtype != torch.float16:  # in which sums of so few squares are nothing
        squares = [part.square().sum().item() for part in expected.split([3, 1, 2])]
        assert [float(of_piece) for of_piece in found] == pytest.approx(squares, rel=1e-3, abs=0)
    # What is small becomes 1 + factor times as long, and nothing becomes longer by more than a full step.
    assert expected[2] == pytest.approx(2 * moved[2])
    assert expected[-1] == pytest.approx(moved[-1] + 0.75 * lr)


def test_runs_of_a_large_tensor_tell_how_far_all_of_it_moved():
    """On a CPU, and of what an average adds and of updates the same values."""
    n = 32 * 1000 + 7
    told = torch.zeros(n, dtype=torch.bool)
    for run in range(32):
        told[1000 * run : 1000 * run + 512] = True
    follow = Followed([0], 1, torch.device("cpu"))
    piece, average, update = torch.zeros(n), *torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    base = _Base([piece], torch.zeros(n), [torch.empty(n) for _ in range(2)], follow, [0])
    piece += average / 2
    base.averaged(average, [average], 0.5, to_base=True)
    piece += update
    (square,) = base.stretch(Stretches([1.0], [math.inf], [1.0]))
    assert torch.allclose(piece, average / 2 + 2 * update, atol=1e-5)  # all of it is stretched
    assert float(square) == pytest.approx(float(4 * update[told].square().sum()), rel=1e-4)
    assert float(follow.squares[0]) == pytest.approx(float(average[told].square().sum() / 4), rel=1e-4)


@pytest.mark.parametrize("g", [2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_drift_is_what_goes_on_in_one_direction(share, g):
    """Of a worker among strangers: its own drift goes on, and momentum lets noise go on for a while."""
    generator = torch.Generator().manual_seed(1)
    flats = [torch.zeros(n) for n in (3, *[1000] * 10)]
    total = sum(flat.numel() for flat in flats)
    own, noise = torch.randn(2, total, generator=generator)
    drift = Drift(flats, 0.9, 1)
    seen, news = [], []
    for t in range(16 * 8):
        noise = 0.9 * noise + 0.19**0.5 * torch.randn(total, generator=generator)
        mine = share**0.5 * own + (1 - share) ** 0.5 * noise
        others = (g - 1) ** 0.5 * torch.randn(total, generator=generator)
        moved = ((1 - g) * mine + others) / g
        if t == 60:
            moved[:] = math.nan
        drift.before()
        kept = [flat.clone() for flat in flats]
        for flat, part in zip(flats, moved.split([flat.numel() for flat in flats]), strict=True):
            flat += part
        drift.after(g)
        if t == 60:
            for flat, before in zip(flats, kept, strict=True):
                flat.copy_(before)
        seen.append(drift.share)
        news.append(drift.news)
    assert seen[: 16 * 6 - 1] == [None] * (16 * 6 - 1)
    assert seen[16 * 6 :] == pytest.approx([share] * len(seen[16 * 6 :]), abs=0.1)
    assert [t for t, new in enumerate(news) if new] == [*range(0, 16 * 8, 16)]


@pytest.mark.parametrize(("momentum", "every", "rounds"), [(0.0, 1, 16), (0.9, 4, 16), (0.99, 1, 160), (0.99, 5, 32)])
def test_drift_is_told_by_blocks_as_long_as_momentum_remembers(momentum, every, rounds):
    flat = torch.zeros(5)
    drift = Drift([flat], momentum, every)
    for t in range(6 * rounds):
        assert drift.share is None, t
        drift.before()
        flat += 1
        drift.after(2)
    assert drift.share == 1


# ---- where it is used ------------------------------------------------------------------------------------------------


class Foreign(torch.optim.Optimizer):
    """Of another library."""


@pytest.mark.parametrize(
    ("make", "automatic"),
    [
        (torch.optim.Adam, True),
        (torch.optim.AdamW, True),
        (torch.optim.NAdam, True),
        (torch.optim.RAdam, True),
        (torch.optim.RMSprop, True),
        (partial(torch.optim.RMSprop, centered=True), False),
        (torch.optim.Adagrad, False),
        (partial(Foreign, defaults={}), False),
    ],
)
def test_which_optimizers_are_corrected(make, automatic):
    optimizer = make([nn.Parameter(torch.ones(3))])
    assert corrects_noise("auto", optimizer) is automatic
    assert corrects_noise("auto", optimizer, average_gradients=True) is False
    assert corrects_noise(True, optimizer) is True
    assert corrects_noise(False, optimizer) is False
    assert corrects_noise("auto", optimizer, wire=torch.float32) is automatic
    assert corrects_noise("auto", optimizer, wire=torch.int8) is False
    assert corrects_noise(True, optimizer, wire=torch.bfloat16) is True


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.Adamax])
def test_optimizers_that_must_not_be_corrected(make):
    optimizer = make([nn.Parameter(torch.ones(3))])
    assert corrects_noise("auto", optimizer) is False
    with pytest.raises(ValueError, match=f"True cannot be used with {make.__name__}, which does not.*HINT: use"):
        corrects_noise(True, optimizer)


@pytest.mark.parametrize("value", [1, None, "yes", "true", [True]])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"is neither a bool nor 'auto'\. HINT"):
        check_noise_correction(value)


# ---- on real ranks ---------------------------------------------------------------------------------------------------

SIGNALS = (1.0, 0.3, 0.0)  # of three tensors, beside noise of 1
STEPS = 240


def make_tensors():
    return nn.ParameterList([torch.zeros(40, 50) for _ in SIGNALS])


def gradients(rank, t, signals=SIGNALS):
    generator = torch.Generator().manual_seed(10_000 * t + rank)
    return [s + torch.randn(40, 50, generator=generator) for s in signals]


def travelled(rank, overlap, correct, *, schedule, **options):
    """How far the mean of the replicas has moved since the first half of the steps, and bytes sent."""
    model = make_tensors()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    sync = DSSynchronizer(model, optimizer, ScheduledGroups(schedule), noise_correction=correct, **options)
    for t in range(STEPS):
        if overlap:
            sync.start()
        for p, grad in zip(model, gradients(rank, t), strict=True):
            p.grad = grad
        if overlap is True:
            sync.finish()
        optimizer.step()
        if overlap == "late":
            sync.finish()
        if not overlap:
            sync.synchronize()
        if t == STEPS // 2 - 1:
            sync.consensus()
            begun = [p.detach().clone() for p in model]
    sync.consensus()
    return [(p - b).norm().item() for p, b in zip(model, begun, strict=True)], sync.statistics.bytes_sent


def travelled_by_bsp(n):
    model = make_tensors()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for t in range(STEPS):
        everyones = [gradients(rank, t) for rank in range(n)]
        for p, *grads in zip(model, *everyones, strict=True):
            p.grad = torch.stack(grads).mean(0)
        optimizer.step()
        if t == STEPS // 2 - 1:
            begun = [p.detach().clone() for p in model]
    return [(p - b).norm().item() for p, b in zip(model, begun, strict=True)]


@pytest.mark.parametrize("overlap", [True, "late", False], ids=["overlap", "late", "paper"])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (GridSchedule(4, 2), {}),
        (GridSchedule(4, 4), {}),
        (GridSchedule(4, 2), {"sync_every": 4}),
        pytest.param(GridSchedule(8, 2), {}, marks=pytest.mark.slow),
        pytest.param(UNEQUAL, {}, marks=pytest.mark.slow),
        pytest.param(CyclicSchedule([[(0, 1), (2, 3)], [(0, 3), (1,), (2,)]], parts=2), {}, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_updates_are_as_long_as_bsps(schedule, options, overlap):
    n = schedule.world_size
    run = partial(travelled, schedule=schedule, **options)
    corrected, plain = (run_ranks(run, n, overlap, on)[0] for on in (True, False))
    bsp = travelled_by_bsp(n)
    for i, expected in enumerate(bsp):
        assert corrected[0][i] == pytest.approx(expected, rel=0.1), (i, plain)
        assert plain[0][i] < 0.85 * expected
    assert corrected[1] == plain[1]  # bytes


def regression(rank, t, size=8):
    generator = torch.Generator().manual_seed(1000 * t + rank)
    return torch.randn(size, 10, generator=generator), torch.randn(size, 3, generator=generator)


def backward(t, model, rank):
    x, y = regression(rank, t)
    mse_loss(model(x), y).backward()


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3))
    model[3].requires_grad_(False)
    return model


def make_adamw(model, decay=0.5):
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=decay)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "paper"])
def test_averaged_second_moments_say_nothing_of_a_workers_own(overlap):
    """Then all of a tensor is stretched alike."""
    schedule, states = GridSchedule(4, 2), ("exp_avg_sq",)
    options = {"average_optimizer_state": states, "optimizer_state_every": 3}
    ranks = run_ranks(partial(trained, **options), 4, schedule, overlap, 60)
    reference = Reference(make_model, make_adamw, schedule, overlap, 1, False, True, states, 3)
    for t in range(60):
        reference.step(partial(backward, t))
        for rank, seen in enumerate(ranks):
            assert relative_error(seen[t], reference.flat(rank)) < 1e-5, (t, rank)


def trained(rank, schedule, overlap, steps, make=make_adamw, **options):
    model = make_model()
    seen: list[torch.Tensor] = []
    groups = ScheduledGroups(schedule)
    options = {"noise_correction": True, "seen": seen, **options}
    train_model(rank, model, make(model), groups, backward, overlap, steps, **options)
    return seen


@pytest.mark.parametrize("overlap", [True, "late", False], ids=["overlap", "late", "paper"])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(
    "schedule", [GridSchedule(4, 2), GridSchedule(3, 3), pytest.param(UNEQUAL, marks=pytest.mark.slow)], ids=repr
)
def test_corrected_updates_equal_the_reference(schedule, every, overlap):
    """With decay, which is not stretched, and with frozen parameters, step by step."""
    # An average that travels for several updates comes before the last one if there is decay.
    make = partial(make_adamw, decay=0.0) if overlap == "late" and every > 1 else make_adamw
    ranks = run_ranks(partial(trained, make=make, sync_every=every), schedule.world_size, schedule, overlap, 60)
    reference = Reference(make_model, make, schedule, bool(overlap), every, correct_noise=True)
    for t in range(60):
        reference.step(partial(backward, t))
        for rank, seen in enumerate(ranks):
            assert relative_error(seen[t], reference.flat(rank)) < 1e-5, (t, rank)
    assert max(max(noise.factors) for noise in reference.noise) > 1.2


def drifting(rank, pull, overlap, **options):
    """What warned, and drift before and after a consensus point, of ranks that pull in directions of their own."""
    model = make_tensors()
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
    sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 2)), **options)
    own = torch.randn(40, 50, generator=torch.Generator().manual_seed(rank))
    known = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(140):
            if overlap:
                sync.start()
            for p, grad in zip(model, gradients(rank, t), strict=True):
                p.grad = grad + pull * own
            if overlap:
                sync.finish()
            optimizer.step()
            if not overlap:
                sync.synchronize()
            if t == 119:
                known.append(sync.drift)
                sync.consensus()
                known.append(sync.drift)
    return [str(w.message) for w in caught if "noise_correction" in str(w.message)], known


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "paper"])
def test_ranks_with_samples_of_their_own_are_warned_of(overlap):
    said, known = zip(*run_ranks(partial(drifting, noise_correction=True), 4, 1.0, overlap), strict=True)
    assert [len(messages) for messages in said] == [1, 0, 0, 0]
    (message,) = said[0]
    assert re.match(r"noise_correction: .* \(\d+% of what parts rank 0 .* HINT: use .*\('square_avg',\)", message)
    assert all(own > DRIFTS for own, _ in known)
    means = {mean for _, mean in known}
    assert len(means) == 1
    assert min(own for own, _ in known) < means.pop() < max(own for own, _ in known)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "paper"])
def test_nobody_is_warned_where_nothing_is_wrong(overlap):
    alike = run_ranks(partial(drifting, noise_correction=True), 4, 0.0, overlap)
    assert all(not said and own < 0.1 and mean < 0.1 for said, (own, mean) in alike)
    averaged = run_ranks(
        partial(drifting, noise_correction=True, average_optimizer_state=["square_avg"]), 4, 1.0, overlap
    )
    assert all(not said and own > DRIFTS for said, (own, _) in averaged)
    assert run_ranks(drifting, 4, 1.0, overlap) == [([], [None, None])] * 4


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "paper"])
def test_no_learning_rate_and_no_gradient_move_nothing(overlap):
    def run(rank):
        model = make_tensors()
        still = model[2].detach().clone()
        optimizer = torch.optim.Adam([{"params": [model[0]], "lr": 0.0}, {"params": [*model][1:], "betas": (0.8, 0.9)}])
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 2)), noise_correction="auto")
        for t in range(60):
            if overlap:
                sync.start()
            model[0].grad, model[1].grad, _ = gradients(rank, t)
            model[1].grad[0] = 0
            if t == 55:  # its inverse is not a number in fp32
                optimizer.param_groups[1]["lr"] = 1e-45
            if overlap:
                sync.finish()
            optimizer.step()
            if not overlap:
                sync.synchronize()
        return torch.equal(model[0], still), torch.equal(model[2], still), bool(model[1].isfinite().all())

    assert run_ranks(run, 4) == [(True, True, True)] * 4


def test_what_a_user_changes_between_steps_is_not_stretched():
    """Weights that are clamped stay where they were clamped to."""

    def run(rank):
        model = make_tensors()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        sync = DSSynchronizer(model, optimizer, ScheduledGroups(GridSchedule(4, 2)), noise_correction="auto")
        largest = 0.0
        for t in range(100):
            for p, grad in zip(model, gradients(rank, t), strict=True):
                p.grad = grad
            optimizer.step()
            for p in model:
                p.data.clamp_(-0.02, 0.02)
            sync.synchronize()
            largest = max(largest, *(float(p.abs().max()) for p in model))
        return largest

    assert max(run_ranks(run, 4)) <= 0.02 + 1e-8


def test_the_optimizers_hooks_end_with_the_synchronizer():
    def run(rank):
        model = make_tensors()
        optimizer = torch.optim.Adam(model.parameters())
        groups = ScheduledGroups(GridSchedule(2, 2))
        counts = []
        for correct in (True, False):
            sync = DSSynchronizer(model, optimizer, groups, noise_correction=correct)
            counts.append(len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks))
            del sync
            gc.collect()
            counts.append(len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks))
        return counts

    assert run_ranks(run, 2) == [[2, 0, 2, 0]] * 2


def memory(rank, wire, follow):
    """Of the buffers, in fp32 copies of the tensors."""
    tensors = [torch.randn(300, 1000), torch.randn(4096)]
    followed = Followed([0, 1], 2, torch.device("cpu")) if follow else None
    payload = Payload(tensors, wire, follow=followed)
    ScheduledGroups(GridSchedule(dist.get_world_size(), dist.get_world_size()))
    payload.start(tuple(range(dist.get_world_size())), dist.group.WORLD, Lane())
    payload.finish()
    return sum(t.nbytes for t in payload._room._held.values()) / sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("wire", "g", "more"),
    [(torch.float32, 2, 0.0), (torch.float32, 4, 0.25), (torch.bfloat16, 2, 1.0), (torch.int8, 2, 1.0)],
)
def test_memory_is_what_is_stated(wire, g, more):
    followed, plain = (max(run_ranks(memory, g, wire, follow)) for follow in (True, False))
    assert followed - plain == pytest.approx(more, abs=0.01)


# ---- the comparison with BSP -----------------------------------------------------------------------------------------


def test_the_benchmark_compares_all_three(tmp_path, capfd):
    sizes = ["--world-sizes", "4", "12", "--lr", "0.004", "0.016", "--seeds", "2", "--steps", "30"]
    assert benchmark.main([*sizes, "--output", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "noise").iterdir()
    assert (folder / "noise.png").stat().st_size > 10_000
    with (folder / "noise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * ((1 + 2 * 2) + (1 + 2 * 2 * 2))
    assert {row["kind"] for row in rows} == {"bsp", "plain", "corrected"}
    assert {(row["workers"], row["group_size"]) for row in rows if row["kind"] == "plain"} == {
        ("4", "2"),
        ("12", "2"),
        ("12", "3"),
    }
    assert "overlapped" in capfd.readouterr().out


def test_the_best_rate_is_bsps():
    bsp, plain = benchmark.Case(4, 4, False, "bsp"), benchmark.Case(4, 2, True, "plain")
    finals = {(bsp, 0.1): [(0.75, 0.5), (0.25, 0.3)], (bsp, 0.2): [(0.5, 0.1), (0.5, 0.3)], (plain, 0.3): [(1.0, 0.0)]}
    assert benchmark.best_rate(finals, 4) == 0.2
    assert benchmark.of_seeds(finals[bsp, 0.1]) == pytest.approx((0.5, 0.4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-sizes", "1"], "python -m benchmarks.noise: error: world_sizes has 1. HINT"),
        (["--lr", "-1"], "lr=-1.0 is not a positive number"),
        (["--seeds", "0"], "seeds=0 is too small"),
        (["--processes", "0"], "processes=0 is too small"),
        (["--partition", "by_colour"], "by_colour"),
    ],
)
def test_the_benchmark_refuses_what_makes_no_sense(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*arguments, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
