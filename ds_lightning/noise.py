"""HOW MUCH of an update is noise, told by how far a worker is from its group when they average; nothing is sent for it.

An adaptive optimizer divides by the root of its second moment. A worker's own second moment has the noise of its small
batch in it, of which averaging over N workers would leave an N-th, so that the averaged update is too short. With s the
square of what all workers' gradients have in common and n that of what is a worker's own (its noise), per tensor::

    second moment of a worker  s + n,    of BSP  s + n / N,    ratio  R = 1 - share (1 - 1/N),    share = n / (s + n)

and ``update / sqrt(R)`` has BSP's length. The share follows from two norms that a worker has anyway, in three steps.

1. *Deviation.* What parts the replicas is noise alone: with Y the replicas less their mean, E the noise of a round's
   updates and W the mixing matrix, ``Y' = W Y + E`` in both orders. An average moves rank i by ``d = (W - I) Y``.
   Momentum b correlates E in time: an update's noise is an autoregressive process of coefficient b, and the sum of k
   updates (`sync_every`) has the covariances ``c_m`` below. So ``C = cov(Y)`` and ``H = cov(Y, E)`` follow ::

       C' = W C W^T + W H + (W H)^T + J,    H' = b^k W H + (c_1 / c_0) J,    J = I - 1 1^T / N

   in units of the noise ``c_0``, and ``kappa = ((I - W) C (I - W)^T)_ii`` is what rank i's ``|d|^2`` is in them.
   :func:`deviations` computes it from any schedule. With b = 0.9 it is 1.2 on a grid of two axes of 8, and 2.6 for
   pairs of a large grid, which keep the deviations of many rounds.
2. *Share of the update.* ``|d|^2 / (kappa |u|^2)``, as means over the latest rounds, u being the sum of the updates.
3. *Share of the gradient.* Momentum averages noise and keeps what is common, by which the update's share is smaller
   than the gradient's: in the gradient, noise to the rest is :func:`attenuation` times as large.

R is a mean over values that differ. The update tells of each how near its worker's second moment is to BSP's: ``|u|``
is a full step (the learning rate) where gradients agree, ``m^2 = v``, and a fraction of it where they are noise. So
only the beginning of a value is stretched, to 1.5 full steps at most, and what is more of it stays as it is::

    u + (1 / sqrt(R) - 1) clamp(u, -1.5 sqrt(R), 1.5 sqrt(R))        in full steps

What nearly took a full step would part replicas most; so they stay nearer to each other. With averaged second moments
``m^2 / v`` says nothing of a worker's own, and it is ``u / sqrt(R)`` for all values.

The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162), in samples, is the batch of a worker times n / s.

Where workers have shards of their own, the pull of a shard counts as noise in all of this. :class:`Drift` tells it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from ds_lightning.consensus import average_exactly
from ds_lightning.cost import Floats, Round, rounds
from ds_lightning.groups import ScheduledGroups
from ds_lightning.payload import Payload, Stretches, in_memory_order
from ds_lightning.wire import flatten

# Of the mean of the latest rounds, the share that the next one leaves.
_KEPT = 0.9
# Up to here all ranks' covariances, and those of a whole period; beyond, members of a group are taken to be strangers.
_EXACT_RANKS, _EXACT_VALUES = 256, 1 << 22
# torch's optimizers that "auto" corrects, and those that must not be.
_ADAPTIVE = (Adam, AdamW, NAdam, RAdam, RMSprop)
_OTHERS = (SGD, ASGD, Adadelta, Adamax, LBFGS, Rprop)
# Full steps to which a value is stretched: 2 are BSP's progress at small rates, and at large ones part replicas more.
REACH = 1.5
# Above this share of drift, workers seem to have shards of their own: of iid ones fewer than one in a hundred had more.
DRIFTS = 0.2
# Updates over which the correction grows to its full size: the first ones are unlike those that follow.
RAMP = 50
# Updates after which the beginning does not count.
_LATE = 10_000
# Above, momentum forgets too slowly to follow, and nobody uses it.
_LARGEST_MOMENTUM = 0.99
# Which values tell drift: up to so many of each of the largest tensors.
_WATCHED_TENSORS, _WATCHED_VALUES = 8, 256
# Rounds of a block of them, and how many times longer than momentum remembers it is: a block later noise is forgotten.
_BLOCK, _MEMORIES = 16, 1.6
# Blocks after which drift is known, and of the mean of blocks, the share that the next one leaves.
_BLOCKS, _KEPT_OF_BLOCKS = 6, 0.8


def deviations(period: Sequence[Round], momentum: float, every: int = 1) -> tuple[Floats, int]:
    """What an average moves each rank by, per unit of noise in the updates of a round.

    Args:
        period: One period of a schedule.
        momentum: Coefficient b with which an update's noise is part of the next update's.
        every: Updates between averages.

    Returns:
        The mean square, shape (rounds, N), 0 where a rank is alone; and after how many rounds it is that, if all
        replicas were equal before.
    """
    n = len(period[0].group_of)
    b = min(momentum, _LARGEST_MOMENTUM)
    own, shared = _covariances(b, every)
    next_one = shared / own
    exact = n <= _EXACT_RANKS and n * n * len(period) <= _EXACT_VALUES
    noise = np.eye(n) - 1 / n if exact else np.full(n, 1 - 1 / n)
    sizes = [groups.sizes[groups.group_of] for groups in period]
    covariance, with_update = np.zeros_like(noise), np.zeros_like(noise)
    before, seen = np.zeros((len(period), n)), 0
    settled: list[float] = []
    while True:
        now = np.empty_like(before)
        for t, (groups, size) in enumerate(zip(period, sizes, strict=True)):
            if exact:
                mixed = groups.means(covariance)
                both = groups.means(mixed.T)
                now[t] = np.diag(covariance) - 2 * np.diag(mixed) + np.diag(both)
                carried = groups.means(with_update)
                covariance = both + carried + carried.T + noise
            else:
                mean, carried = groups.means(covariance) / size, groups.means(with_update) / size
                now[t] = covariance * (1 - 2 / size) + mean
                covariance = mean + 2 * carried + noise
            with_update = b**every * carried + next_one * noise
        seen += len(period)
        settled.append(float(now.mean()))
        if (now.any() and np.abs(now - before).max() <= 1e-4 * now.max()) or seen > 20_000:
            break
        before = now
    periods = next(i for i, mean in enumerate(settled) if mean >= 0.98 * settled[-1])
    return np.where(np.array(sizes) > 1, np.maximum(now, 0.0), 0.0), max(periods * len(period), 2)


def attenuation(momentum: float, every: int, updates: int) -> float:
    """How many times larger the ratio of noise to the rest is in a gradient than in the sum of ``every`` updates.

    After so many ``updates`` from the beginning, where a momentum is the mean of few gradients.
    """
    b = min(momentum, _LARGEST_MOMENTUM)
    begun = (1 - b**updates) / (1 + b**updates)
    return (1 + b) / (1 - b) * begun * every**2 / _covariances(b, every)[0]


def full_step(momentum: float, every: int) -> float:
    """Of the sum of ``every`` updates, what a value moves by if its gradients agree, in learning rates.

    Without much momentum noise moves it as far: then four times what noise alone moves it by.
    """
    return every * max(1.0, 4 / math.sqrt(attenuation(momentum, every, _LATE)))


def _covariances(b: float, every: int) -> tuple[float, float]:
    """Of the sum of ``every`` values of an autoregressive process, and of that sum and the next (``c_0`` and ``c_1``).

    In units of a value's variance: the sums of ``b**|i - j|`` over i and j of one sum, and of one and the next.
    """
    geometric = (1 - b**every) / (1 - b)
    return every + 2 * b * (every - geometric) / (1 - b), b * geometric**2


class NoiseShare:
    """Of tensors, the share of noise in the updates: running means that any number of them can have, in one tensor.

    Args:
        shape: Of what has a share each.
        device: Where it is computed.
        dtype: In which.
    """

    def __init__(
        self, shape: Sequence[int], device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        # Of |d|^2, and of kappa |u|^2: in this ratio rounds weigh by what they tell.
        self.squares = torch.zeros(2, *shape, device=device, dtype=dtype)

    def take(self, deviation: Tensor, update: Tensor) -> None:
        """Of a round, the squares of what the average moved each of them by, and of their updates, times kappa."""
        latest = torch.stack([deviation, update])
        kept = torch.lerp(latest, self.squares, _KEPT)
        self.squares = torch.where(kept.isfinite().all(0), kept, self.squares)

    def of_gradients(self, attenuation: float | Tensor) -> Tensor:
        """The share of noise in the gradients, from 0 to 1; 0 where there was no update."""
        deviation, update = self.squares
        share = torch.where(update > 0, deviation / update, 0.0).clamp_(0, 1)
        noise = attenuation * share
        return (noise / (1 - share + noise)).nan_to_num_(0.0)

    def stretch(self, attenuation: float | Tensor, world_size: int, updates: int) -> Tensor:
        """``1 / sqrt(R) - 1``: what is to be added of each update, of which there have been so many with it."""
        ratio = 1 - self.of_gradients(attenuation) * (1 - 1 / world_size)
        return ratio.clamp_min_(1 / world_size).rsqrt_().sub_(1).mul_(min(1.0, updates / RAMP))


class _OnHost:
    """A copy of a tensor for the host to read later: nobody waits for a GPU at a step."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> list[float]:
        """Its values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Drift:
    """Of what parts a worker from its group, the share that goes on in one direction.

    Noise forgets itself: what an average moves a worker by has nothing in common with what one moved it by tens of
    rounds before. The pull of a shard of its own goes on (client drift, Karimireddy et al. 2020, arXiv 1910.06378). Of
    a sample of values the mean over a block of rounds is multiplied by that of earlier blocks, without the latest one.
    Members whose drifts are strangers leave ``1 - 1/g`` of a square to go on, by which it is divided: 1 says that all
    is drift.

    It is known six blocks after the beginning, which checkpoints do not keep.

    Args:
        flats: The parameters, flat.
        momentum: Of the optimizer.
        every: Updates between averages.
    """

    def __init__(self, flats: Sequence[Tensor], momentum: float, every: int) -> None:
        largest = sorted(flats, key=Tensor.numel, reverse=True)[:_WATCHED_TENSORS]
        self._watched = [flat[:: max(1, -(-flat.numel() // _WATCHED_VALUES))] for flat in largest]
        self._length = max(_BLOCK, round(_MEMORIES / (1 - min(momentum, _LARGEST_MOMENTUM)) / every))
        self._before = flatten(self._watched)
        self._sum, self._square = torch.zeros_like(self._before), self._before.new_zeros(())
        self._means: deque[Tensor] = deque(maxlen=3)  # of the latest blocks
        self._earlier = torch.zeros_like(self._before)  # mean of those before the latest two
        self.squares = torch.zeros(2, device=self._before.device)  # what goes on, and all
        self._on_host = _OnHost(self.squares)
        self._rounds = 0

    @torch.no_grad()
    def before(self) -> None:
        """An average is about to be applied."""
        self._before = flatten(self._watched)

    @torch.no_grad()
    def after(self, size: int) -> None:
        """It has been, in a group of that size."""
        moved = flatten(self._watched) - self._before
        self._sum += moved
        self._square += moved.square().sum() * (1 - 1 / size)
        self._rounds += 1
        if self._rounds % self._length:
            return
        finite = self._square.isfinite()
        self._means.append(torch.where(finite, self._sum / self._length, self._earlier))
        if (block := self._rounds // self._length - 2) > 0:
            weight = max(1 - _KEPT_OF_BLOCKS, 1 / block)
            self._earlier.lerp_(self._means[0], weight)
            latest = torch.stack([self._earlier @ self._means[2], self._square / self._length])
            self.squares = self.squares.lerp(torch.where(finite, latest, 0.0).float(), weight)
            self.agreed()
        self._sum, self._square = torch.zeros_like(self._sum), torch.zeros_like(self._square)

    def agreed(self) -> None:
        """``squares`` are others now."""
        self._on_host = _OnHost(self.squares)

    @property
    def news(self) -> bool:
        """Whether a block ended a round ago, whose share a GPU has computed by now."""
        return self._rounds % self._length == 1

    @property
    def share(self) -> float | None:
        """From 0 to 1; None if it is not known."""
        along, all_ = self._on_host.tolist() if self._rounds >= _BLOCKS * self._length else (0.0, 0.0)
        return min(max(along / all_, 0.0), 1.0) if all_ > 0 else None


class NoiseCorrection:
    """Makes the updates of one optimizer as long as BSP's: what the synchronizer asks, round by round.

    It takes a few numbers for each tensor, some copies of 2,048 values (:class:`Drift`), and one more copy of the
    parameters where averages do not keep one (:class:`~ds_lightning.payload.Payload`).

    Args:
        optimizer: Whose updates are corrected. Its momentum is its first beta, or RMSprop's momentum.
        groups: Of the schedule.
        every: Updates between averages.
        own_moments: Whether second moments are this worker's own, or averaged as well.
    """

    def __init__(self, optimizer: Optimizer, groups: ScheduledGroups, every: int, own_moments: bool) -> None:
        self._optimizer, self._groups, self._every = optimizer, groups, every
        self._own_moments = own_moments
        self._parameters: list[Tensor] = []
        self._share = NoiseShare((0,))
        self._kappas: dict[float, list[float]] = {}  # of this rank by round of a period, by momentum
        self._settling = 0  # rounds until replicas that were equal are apart as usual
        self._rounds = 0  # since they were
        self.updates = 0  # since the optimizer began
        self._told: tuple[Tensor, Tensor] | None = None  # by the latest round, if that counts
        self._learnt = True  # and has been taken in
        self._factors = torch.zeros(0)  # of the next updates, less 1
        self._on_host = _OnHost(self._factors)
        self.drift: Drift | None = None  # once there are parameters that are averaged
        self._watched: list[tuple[int, int]] = []  # where these are

    def lay_out(self, parameters: list[Tensor]) -> None:
        """Take over the optimizer's parameters, and what is known of those that it had before."""
        if [*map(id, parameters)] == [*map(id, self._parameters)]:
            return
        self._take()
        known = {id(p): i for i, p in enumerate(self._parameters)}
        share = NoiseShare((len(parameters),), parameters[0].device if parameters else None)
        for i, p in enumerate(parameters):
            if id(p) in known:
                share.squares[:, i] = self._share.squares[:, known[id(p)]]
        self._parameters, self._share = parameters, share
        self._prepare()

    def watch(self, averaged: Sequence[Tensor]) -> None:
        """Those of the parameters that are averaged, as reals: some of them tell drift from here on."""
        flats = [flat for flat in map(in_memory_order, averaged) if flat is not None and flat.numel()]
        where = [(flat.data_ptr(), flat.numel()) for flat in flats]
        if where != self._watched:
            momentum = max((_momentum(group) for group in self._optimizer.param_groups), default=0.0)
            self.drift, self._watched = Drift(flats, momentum, self._every) if flats else None, where

    def regroup(self) -> None:
        """The schedule is another."""
        self._kappas, self._settling, self._rounds = {}, 0, 0

    def agreed(self) -> None:
        """All replicas are equal, and so is what ranks know of their noise from here on. Collective."""
        self._take()
        updates = torch.tensor([float(self.updates)], dtype=torch.float64)
        drift = self._share.squares.new_zeros(2) if self.drift is None else self.drift.squares
        average_exactly([self._share.squares, updates, drift])
        if self.drift is not None:
            self.drift.agreed()
        self._rounds, self.updates = 0, round(updates.item())
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """What the next rounds depend on."""
        self._take()
        return {"squares": self._share.squares.cpu().clone(), "rounds": self._rounds, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, after :meth:`lay_out`; from the start if parameters are others."""
        self._told, self._learnt = None, True
        if state["squares"].shape == self._share.squares.shape:
            self._share.squares.copy_(state["squares"])
            self._rounds, self.updates = state["rounds"], state["updates"]
            self._prepare()

    @torch.no_grad()
    def correct(self, payloads: Sequence[tuple[int, Payload]]) -> None:
        """Stretch the updates that were made since the base was.

        Args:
            payloads: Of the parameters, with their parts.
        """
        self.learn()
        groups = self._optimizer.param_groups
        factors = self._on_host.tolist()
        steps = self._of_parameters([self._step(group) for group in groups])
        stretches = Stretches(
            factors=factors,
            limits=[REACH * step / (1 + factor) for step, factor in zip(steps, factors, strict=True)],
            kept=self._of_parameters([kept_by_decay(self._optimizer, group, self._every) for group in groups]),
        )
        for _, payload in payloads:
            payload.stretch(stretches)

    @torch.no_grad()
    def tell(self, payloads: Sequence[tuple[int, Payload]], average: int | None) -> None:
        """Hold the updates of :meth:`correct` against what the average of that round moved this worker by.

        Args:
            payloads: Of the parameters, with their parts.
            average: Round of the average; None if there was none.
        """
        groups, device = self._optimizer.param_groups, self._factors.device
        deviation, update = torch.zeros_like(self._factors), torch.zeros_like(self._factors)
        for part, payload in payloads:
            if average is not None:
                kappas = [self._kappas_of(group)[(average + part) % self._groups.period] for group in groups]
                deviation += payload.squares
                one = kappas[0] if len({*kappas}) == 1 else torch.tensor(self._of_parameters(kappas), device=device)
                update += payload.updates * one
        self._rounds += average is not None
        settled = average is not None and self._rounds > self._settling
        self._told, self._learnt = (deviation, update) if settled else None, False

    @torch.no_grad()
    def learn(self) -> None:
        """Take in what the latest round told, at the latest before the next; meanwhile its average may travel."""
        if not self._learnt:
            self._take()
            self._learnt = True
            self._prepare()

    def _take(self) -> None:
        if self._told is not None:
            self._share.take(*self._told)
            self._told = None

    @torch.no_grad()
    def noise_and_signal(self) -> tuple[Tensor, Tensor]:
        """Of the gradient that this rank computes, the squares of its noise and of the rest, summed over parameters.

        Of those whose noise is known, in the units of the latest gradients.
        """
        self._take()
        share, known = self._share.of_gradients(self._attenuations(self.updates)), self._share.squares[1] > 0
        dense = [None if p.grad is None or p.grad.is_sparse else p.grad for p in self._parameters]
        gradients = [share.new_zeros(()) if grad is None else grad.norm() for grad in dense]
        squares = torch.stack([share.new_zeros(()), *(g.to(share) for g in gradients)])[1:].square() * known
        return (share * squares).sum(), ((1 - share) * squares).sum()

    def _prepare(self) -> None:
        """The factors of the next round's updates."""
        updates = self.updates + self._every
        each, ranks = self._attenuations(updates), self._groups.schedule.world_size
        self._factors = self._share.stretch(each, ranks, updates)
        self._on_host = _OnHost(self._factors)

    def _attenuations(self, updates: int) -> Tensor | float:
        each = [attenuation(_momentum(group), self._every, updates) for group in self._optimizer.param_groups]
        if len({*each}) == 1:
            return each[0]
        return torch.tensor(self._of_parameters(each), device=self._share.squares.device)

    def _step(self, group: dict[str, Any]) -> float:
        """A full one; infinite where nobody knows."""
        known = self._own_moments and "lr" in group
        return full_step(_momentum(group), self._every) * float(group["lr"]) if known else math.inf

    def _of_parameters(self, values: list[float]) -> list[float]:
        """What is one for each of the optimizer's groups, for each parameter."""
        groups = self._optimizer.param_groups
        return [value for value, group in zip(values, groups, strict=True) for _ in group["params"]]

    def _kappas_of(self, group: dict[str, Any]) -> list[float]:
        momentum = round(_momentum(group), 2)  # a schedule may change it at every step
        if momentum not in self._kappas:
            of_all, settling = deviations(rounds(self._groups.schedule), momentum, self._every)
            self._kappas[momentum] = of_all[:, self._groups.rank].tolist()
            self._settling = max(self._settling, settling)
        return self._kappas[momentum]


def _momentum(group: dict[str, Any]) -> float:
    """The coefficient with which a gradient's noise is part of the next update."""
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum", 0.0))


def kept_by_decay(optimizer: Optimizer, group: dict[str, Any], every: int = 1) -> float:
    """The share of the parameters that so many updates leave there: beside the gradients, AdamW takes its decay."""
    if not group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)):
        return 1.0
    return float((1 - float(group["lr"]) * group["weight_decay"]) ** every)


def check_noise_correction(value: Any, average_gradients: bool = False) -> bool | str:
    """``noise_correction`` itself, or a ``ValueError``."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f"noise_correction={value!r} is neither a bool nor 'auto'. HINT: use 'auto', True or False.")
    if value is True and average_gradients:
        raise ValueError(
            "noise_correction=True cannot be used with average_gradients=True, whose gradients' noise members share,"
            " so that their distance does not tell it. HINT: use noise_correction='auto' or False."
        )
    return value if isinstance(value, bool) else "auto"


def corrects_noise(
    choice: bool | str, optimizer: Optimizer, average_gradients: bool = False, wire: torch.dtype | None = None
) -> bool:
    """What ``noise_correction`` comes to with an optimizer.

    ``"auto"`` leaves it out at a wire of few bits: where replicas are nearer to each other than its steps, what
    averages add is mostly rounding, which looks like noise of the updates.

    Raises:
        ValueError: If it is True, and the optimizer does not divide by the root of a second moment.
    """
    if choice == "auto":
        centered = isinstance(optimizer, RMSprop) and any(group["centered"] for group in optimizer.param_groups)
        exact = wire is None or wire.itemsize >= 4
        return isinstance(optimizer, _ADAPTIVE) and not centered and not average_gradients and exact
    if choice and isinstance(optimizer, _OTHERS):
        raise ValueError(
            f"noise_correction=True cannot be used with {type(optimizer).__name__}, which does not divide by the root"
            " of a second moment, so that noise does not shorten its steps. HINT: use noise_correction='auto' or False."
        )
    return bool(choice)
