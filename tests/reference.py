"""The reference: N replicas in one process, mixed by plain matrices. Meant to be short enough to be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_lightning.schedule import Schedule, mixing_matrix


class Reference:
    """``X <- W_t (X - lr U(X))``, or ``X <- W_t X - lr U(X)`` if overlapped, with the very same optimizer code.

    Args:
        make_model: Makes one replica; all must start equal.
        make_optimizer: Makes its optimizer.
        schedule: Gives W_t.
        overlap: Which of the two orders.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        schedule: Schedule,
        overlap: bool,
    ) -> None:
        self.models = [make_model() for _ in range(schedule.world_size)]
        self.optimizers = [make_optimizer(model) for model in self.models]
        self.schedule = schedule
        self.overlap = overlap
        self.t = 0

    def step(
        self, backward: Callable[[nn.Module, int], object], update: Callable[[int], bool] = lambda _: True
    ) -> None:
        """One step: ``backward(model, rank)`` leaves gradients; ranks whose ``update(rank)`` is false do not step."""
        w = torch.from_numpy(mixing_matrix(self.schedule, self.t))
        before = [x.double() for x in self._stacked()]
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            optimizer.zero_grad()
            backward(model, rank)
        if self.overlap:
            self._add([mix(w, x) - x for x in before])
        for rank, optimizer in enumerate(self.optimizers):
            if update(rank):
                optimizer.step()
        if not self.overlap:
            self._add([mix(w, x.double()) - x.double() for x in self._stacked()])
        self.t += 1

    def flat(self, rank: int) -> Tensor:
        """All averaged values of one replica."""
        return torch.cat([x.detach().flatten() for x in averaged(self.models[rank])])

    def _stacked(self) -> list[Tensor]:
        return [torch.stack([x.detach() for x in xs]) for xs in zip(*map(averaged, self.models), strict=True)]

    @torch.no_grad()
    def _add(self, differences: list[Tensor]) -> None:
        for xs, difference in zip(zip(*map(averaged, self.models), strict=True), differences, strict=True):
            for x, d in zip(xs, difference, strict=True):
                x.copy_(x.double() + d)


def mix(w: Tensor, x: Tensor) -> Tensor:
    """``W x`` for x of shape (N, ...)."""
    return (w @ x.flatten(1)).view(x.shape) if x.dim() > 1 else w @ x


def averaged(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and float buffers, each once."""
    yield from model.parameters()
    yield from (b for b in model.buffers() if b.is_floating_point())


def relative_error(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|`` over all values."""
    return float((x.double() - y.double()).norm() / y.double().norm())
