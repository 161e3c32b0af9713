"""The reference: N replicas in one process, mixed by plain matrices. Meant to be short enough to be believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_lightning.cost import rounds
from ds_lightning.noise import RAMP, attenuation, deviations
from ds_lightning.schedule import Schedule, mixing_matrix, schedule_parts


class Reference:
    """``X <- W_t (X - lr U(X))``, or ``X <- W_t X - lr U(X)`` if overlapped, with the very same optimizer code.

    With ``sync_every = k``, U is k updates.

    Args:
        make_model: Makes one replica; all must start equal.
        make_optimizer: Makes its optimizer.
        schedule: Gives W_t.
        overlap: Which of the two orders.
        sync_every: Only every so manieth step mixes; the schedule counts those. If overlapped, what it mixes is what
            there was before the first of them.
        average_gradients: Whether W_t also mixes the gradients; a missing one counts as zero, where others have one.
        correct_noise: Whether updates are stretched as :class:`Noise` says.
        average_states: Names of the optimizer's states that W_t mixes too, without parts.
        states_every: In one period of the schedule out of so many.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        schedule: Schedule,
        overlap: bool,
        sync_every: int = 1,
        average_gradients: bool = False,
        correct_noise: bool = False,
        average_states: Sequence[str] = (),
        states_every: int = 1,
    ) -> None:
        self.models = [make_model() for _ in range(schedule.world_size)]
        self.optimizers = [make_optimizer(model) for model in self.models]
        self.schedule = schedule
        self.overlap = overlap
        self.sync_every = sync_every
        self.average_gradients = average_gradients
        self.average_states = average_states
        self.states_every = states_every
        self.before: list[Tensor] = []
        self.t = 0
        self.noise = [Noise(self, rank) for rank in range(len(self.models))] if correct_noise else []

    def step(self, backward: Callable[[nn.Module, int], object], update: Callable[[int], object] | None = None) -> None:
        """One step.

        Args:
            backward: ``backward(model, rank)`` leaves the rank's gradients.
            update: ``update(rank)`` in the place of ``optimizer.step()``.
        """
        ws = [torch.eye(len(self.models), dtype=torch.float64)] * schedule_parts(self.schedule)
        if (self.t + 1) % self.sync_every == 0:
            ws = [
                torch.from_numpy(mixing_matrix(self.schedule, self.t // self.sync_every + part))
                for part in range(len(ws))
            ]
        w = ws[0]
        if self.t % self.sync_every == 0:
            self.before = [x.double() for x in self._stacked()]
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            optimizer.zero_grad()
            backward(model, rank)
        if self.average_gradients:
            self._mix_gradients(w)
        if self.overlap:
            self._average(ws, self.before)
            self._mix_states(w)
        for rank, optimizer in enumerate(self.optimizers):
            update(rank) if update else optimizer.step()
        if (self.t + 1) % self.sync_every == 0:
            for noise in self.noise:
                noise.stretch()
        if not self.overlap:
            self._average(ws, [x.double() for x in self._stacked()])
            self._mix_states(w)
        self.t += 1

    def flat(self, rank: int) -> Tensor:
        """All averaged values of one replica."""
        return flat(self.models[rank])

    def _stacked(self) -> list[Tensor]:
        return [torch.stack([x.detach() for x in xs]) for xs in zip(*map(averaged, self.models), strict=True)]

    def _mixed(self, ws: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        """What mixing adds: to value v of the n parameters by the matrix of part v * parts // n, to buffers by W_t."""
        differences, at = [], 0
        total = sum(p.numel() for p in self.models[0].parameters())
        for x in before:
            values = torch.arange(at, at + x[0].numel())
            part = torch.where(values < total, values * len(ws) // total, 0)
            rows = x.flatten(1)
            mixed = sum((w @ rows) * (part == q) for q, w in enumerate(ws))
            differences.append((mixed - rows).view_as(x))
            at += x[0].numel()
        return differences

    def _average(self, ws: list[Tensor], before: list[Tensor]) -> None:
        differences = self._mixed(ws, before)
        self._add(differences)
        if (self.t + 1) % self.sync_every == 0:
            for noise in self.noise:
                noise.averaged(before, differences)

    @torch.no_grad()
    def _add(self, differences: list[Tensor]) -> None:
        for xs, difference in zip(zip(*map(averaged, self.models), strict=True), differences, strict=True):
            for x, d in zip(xs, difference, strict=True):
                x.copy_(x.double() + d)

    def _mix_states(self, w: Tensor) -> None:
        round_, left = divmod(self.t + 1, self.sync_every)
        if left or (round_ - 1) // len(rounds(self.schedule)) % self.states_every:
            return
        for ps in zip(*(model.parameters() for model in self.models), strict=True):
            states = [optimizer.state.get(p, {}) for p, optimizer in zip(ps, self.optimizers, strict=True)]
            for name in self.average_states if states[0] else ():
                for state, mixed in zip(states, mix(w, torch.stack([s[name] for s in states]).double()), strict=True):
                    state[name].copy_(mixed)

    def _mix_gradients(self, w: Tensor) -> None:
        for ps in zip(*(model.parameters() for model in self.models), strict=True):
            gradients = [p.grad for p in ps]
            for p, row in zip(ps, w, strict=True):
                group = [gradients[rank] for rank in row.nonzero().flatten()]  # an overflow outside it must not count
                there = [g.double() for g in group if g is not None]
                p.grad = (sum(there) / len(group)).to(p.dtype) if there else None


class Noise:
    """The correction of one replica's updates, as `ds_lightning/noise.py` derives it, tensor by tensor."""

    def __init__(self, reference: Reference, rank: int) -> None:
        self.reference, self.rank = reference, rank
        self.parameters = [*reference.models[rank].parameters()]
        self.base = [p.detach().double() for p in self.parameters]  # what a round's updates are added to
        self.moved: list[Tensor] | None = None  # by the latest average
        self.round = 0  # whose average that was
        self.rounds = 0
        self.factors = [1.0] * len(self.parameters)
        self.deviation, self.update = ([0.0] * len(self.parameters) for _ in range(2))

    def begin_anew(self) -> None:
        """The schedule is another."""
        self.moved, self.rounds = None, 0

    def averaged(self, before: list[Tensor], differences: list[Tensor]) -> None:
        self.moved = [d[self.rank] for d in differences[: len(self.parameters)]]
        mixed = zip(self.parameters, before, self.moved, strict=False)
        self.base = [(x[self.rank] + d).to(p.dtype).double() for p, x, d in mixed]
        self.round = self.reference.t // self.reference.sync_every

    @torch.no_grad()
    def stretch(self) -> None:
        r = self.reference
        (group,) = r.optimizers[self.rank].param_groups
        b, k, n = group["betas"][0], r.sync_every, len(r.models)
        kept = (1 - group["lr"] * group["weight_decay"] * group["decoupled_weight_decay"]) ** k
        kappas, settling = deviations(rounds(r.schedule), b, k)
        parts, total, at = schedule_parts(r.schedule), sum(p.numel() for p in self.parameters), 0
        self.rounds += self.moved is not None
        for i, (p, base) in enumerate(zip(self.parameters, self.base, strict=True)):
            update = p.double() - kept * base
            step = k * group["lr"] * max(1, 4 * attenuation(b, k, 10_000) ** -0.5)
            within = torch.full_like(update, math.inf if r.average_states else 1.5 * step / self.factors[i])
            update += (self.factors[i] - 1) * update.sign() * torch.minimum(update.abs(), within)
            p.copy_(kept * base + update)
            if self.moved is not None and self.rounds > settling:
                part = torch.arange(at, at + p.numel()) * parts // total
                kappa = torch.from_numpy(kappas[:, self.rank])[(self.round + part) % len(kappas)]
                self.deviation[i] = 0.9 * self.deviation[i] + 0.1 * float(self.moved[i].square().sum())
                self.update[i] = 0.9 * self.update[i] + 0.1 * float((kappa * update.flatten().square()).sum())
            at += p.numel()
            share = min(self.deviation[i] / self.update[i], 1.0) if self.update[i] else 0.0
            noise = attenuation(b, k, r.t + 1 + k) * share
            gradients = noise / (1 - share + noise) if noise else 0.0
            stretch = max(1 - gradients * (1 - 1 / n), 1 / n) ** -0.5 - 1
            self.factors[i] = 1 + stretch * min(1, (r.t + 1 + k) / RAMP)


def mix(w: Tensor, x: Tensor) -> Tensor:
    """``W x`` for x of shape (N, ...)."""
    return (w @ x.flatten(1)).view(x.shape) if x.dim() > 1 else w @ x


def averaged(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and float buffers, each once."""
    yield from model.parameters()
    yield from (b for b in model.buffers() if b.is_floating_point())


def flat(model: nn.Module) -> Tensor:
    """All of them in one fp64 vector."""
    return torch.cat([x.detach().flatten().double() for x in averaged(model)])


def relative_error(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|`` over all values."""
    return float((x - y).norm() / y.norm())
