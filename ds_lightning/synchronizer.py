"""HOW replicas are averaged: pack, average inside the group, add the difference. Knows nothing of Lightning.

In matrix form, with row i of X the parameters of rank i, U the optimizer's updates and W_t the mixing matrix of step t
(DS-Sync, arXiv 2007.03298, section 3)::

    X <- W_t (X - lr U(X))      the paper's order: `optimizer.step()`, then `synchronize()`
    X <- W_t X - lr U(X)        overlapped: `start()`, forward, backward, `finish()`, `optimizer.step()`

Three phases, in these words everywhere: **pack** the tensors into a flat copy, **average** it in the group,
**apply** the difference ``average - packed copy``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ds_lightning.consensus import broadcast_from_rank_0, consensus_of, consensus_of_optimizer_state
from ds_lightning.groups import ScheduledGroups
from ds_lightning.schedule import make_schedule, positive_int
from ds_lightning.wire import RunningAverage, as_real, as_wire_dtype, by_dtype, flatten, is_averaged, split

T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """What a synchronizer cost this rank so far; seconds only while ``timed`` is set.

    Bytes are those that the algorithm hands to the network, without the network's own headers.
    """

    synchronizations: int
    bytes_sent: int
    seconds_waiting: float
    seconds_running: float

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class DSSynchronizer:
    """Averages the parameters of one optimizer, and float buffers, inside groups that change at every step.

    A plain training loop needs three lines of it (the constructor, ``start`` and ``finish``)::

        sync = DSSynchronizer(model, optimizer)  # every replica is rank 0's from here on
        for x, y in loader:
            sync.start()                         # the average runs while forward and backward do
            loss_fn(model(x), y).backward()
            sync.finish()                        # add `average - packed copy`
            optimizer.step()
            optimizer.zero_grad()
        sync.consensus()                         # before evaluating or saving: the exact global average

    For the paper's order call ``sync.synchronize()`` after ``optimizer.step()`` instead of these two. All ranks must
    call these methods equally often; which parameters had gradients, or whether a step was skipped, does not matter.

    Sent are the optimizer's parameters that require gradients (or did since the last consensus point) and all float
    buffers of ``module``. Parameters may be added to the optimizer at any time, on all ranks alike.

    Args:
        module: The model.
        optimizer: Its optimizer. With several optimizers make one synchronizer for each, with the same ``groups``:
            each counts its own steps, so that every set of parameters meets every group of the schedule.
        groups: Process groups of a schedule; default: those of ``make_schedule("auto", world_size)``.
        sync_every: Optimizer steps between synchronizations.
        wire_dtype: dtype in which parameters are sent: ``None`` (as stored), ``"fp32"``, ``"bf16"``, ``"fp16"``,
            ``"int8"`` or the torch dtype. Buffers, gradients and optimizer states always travel as stored: rounding
            could turn a small variance negative.
        average_optimizer_state: Names of optimizer states that are averaged too, such as ``("exp_avg_sq",)``.
        buffers: Whether this synchronizer averages the float buffers; of several, one does.
        broadcast: Whether to check that all ranks have the same model, and to start from rank 0's.

    Raises:
        ValueError: If an argument is out of range, or the models of the ranks differ (then on every rank alike).
    """

    def __init__(
        self,
        module: Module,
        optimizer: Optimizer,
        groups: ScheduledGroups | None = None,
        *,
        sync_every: int = 1,
        wire_dtype: str | torch.dtype | None = None,
        average_optimizer_state: Sequence[str] = (),
        buffers: bool = True,
        broadcast: bool = True,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.sync_every = positive_int("sync_every", sync_every)
        self.wire_dtype = as_wire_dtype(wire_dtype)
        self.average_optimizer_state = check_state_names(average_optimizer_state)
        if groups is None:
            groups = ScheduledGroups(make_schedule("auto", dist.get_world_size()))
        self.groups = groups
        self.buffers = buffers
        self.step = 0
        self.started = False
        self.timed = False
        self._synchronizations = self._bytes_sent = 0
        self._seconds_waiting = self._seconds_running = 0.0
        self._running: list[tuple[RunningAverage, Callable[[Tensor], None]]] = []
        self._finished: list[RunningAverage] = []  # timed, but the time not read yet: that may block a CUDA host
        self._sent_since_consensus: set[Tensor] = set()
        self._warned: set[str] = set()
        if broadcast:
            broadcast_from_rank_0(module)

    # ---- one step ---------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the current step synchronizes: every ``sync_every``-th does."""
        return (self.step + 1) % self.sync_every == 0

    @property
    def round(self) -> int:
        """Synchronizations so far, and so the schedule's step: with ``sync_every > 1`` steps would skip partitions."""
        return self.step // self.sync_every

    @torch.no_grad()
    def start(self) -> None:
        """Pack, and start the averages of this step's group; returns at once."""
        self.discard()
        self.started = True
        if not self.due or self.groups.at(self.round)[1] is None:
            return
        parameters = [p for p in _parameters(self.optimizer) if p.requires_grad or p in self._sent_since_consensus]
        self._sent_since_consensus.update(parameters)
        for dtype, tensors in by_dtype(parameters):
            self._launch(flatten(tensors), self.wire_dtype or dtype, partial(_add_to_tensors, tensors))
        if self.buffers:
            for dtype, tensors in by_dtype(_float_buffers(self.module)):
                packed = flatten(tensors)
                self._launch(packed, dtype, partial(_add_to_buffers, self.module, dtype, packed))
        for name in self.average_optimizer_state:
            for _, same in _same_dtype(parameters):
                self._launch_state(name, same)
        self._synchronizations += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the averages that :meth:`start` began, apply them, and go on to the next step.

        Raises:
            RuntimeError: If a member failed or did not come within the groups' timeout; names step and ranks.
        """
        running = self._running
        self.discard()
        for average, apply in running:
            apply(self._or_explain(average.wait))
            if self.timed:
                self._finished.append(average)
        self.step += 1

    def synchronize(self) -> None:
        """Average now, in the paper's order: call it after ``optimizer.step()``."""
        self.start()
        self.finish()

    def discard(self) -> None:
        """Forget averages under way: after an exception, or because all replicas have become equal meanwhile."""
        self._running, self.started = [], False

    @torch.no_grad()
    def average_gradients(self, scale: float = 1.0) -> None:
        """Average the gradients in this step's group as well. In addition to the parameters, never instead of them.

        A member without a gradient counts as zero and receives the average, as under DDP; where no member has one it
        stays ``None``. Call it after backward and before clipping, once per step, before :meth:`finish`.

        Args:
            scale: This rank's loss scale (GradScaler). Ranks may have different ones: averaged is ``grad / scale``.

        Raises:
            ValueError: If a gradient is sparse.
        """
        members, group = self.groups.at(self.round)
        if not self.due or group is None:
            return
        for dtype, parameters in _same_dtype(p for p in _parameters(self.optimizer) if p.requires_grad):
            if any(p.grad is not None and p.grad.layout != torch.strided for p in parameters):
                raise ValueError(
                    "average_gradients=True cannot average sparse gradients. HINT: use average_gradients=False"
                    " (parameters are averaged all the same), or sparse=False in the embedding."
                )
            gradients = [as_real(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
            own = flatten(gradients).div_(scale)
            here = own.new_tensor([p.grad is not None for p in parameters])
            difference = self._average_now(torch.cat([own, here]), dtype)
            averages = split((own + difference[: own.numel()]).mul_(scale), gradients)
            anywhere = (here + difference[own.numel() :]).tolist()
            for p, average, share in zip(parameters, averages, anywhere, strict=True):
                if share > 0.5 / len(members):
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    as_real(p.grad).copy_(average)

    def _launch(self, flat: Tensor, wire: torch.dtype, apply: Callable[[Tensor], None]) -> None:
        members, group = self.groups.at(self.round)
        assert group is not None
        average = self._or_explain(lambda: RunningAverage(flat, members, group, wire, self.timed))
        self._bytes_sent += average.bytes_sent
        self._running.append((average, apply))

    def _average_now(self, flat: Tensor, wire: torch.dtype) -> Tensor:
        self._launch(flat, wire, lambda _: None)
        average, _ = self._running.pop()
        difference = self._or_explain(average.wait)
        if self.timed:
            self._finished.append(average)
        return difference

    def _launch_state(self, name: str, parameters: list[Tensor]) -> None:
        """Average the optimizer's state ``name`` over those members that have it (an unused parameter has none)."""
        states: list[Tensor | None] = [self.optimizer.state.get(p, {}).get(name) for p in parameters]
        # Before the first update there are no states; a GradScaler may skip the first few, and some never have any.
        told = self.optimizer.state or self._synchronizations == 10
        if told and not any(name in state for state in self.optimizer.state.values()):
            known = sorted({key for state in self.optimizer.state.values() for key in state})
            self._warn_once(
                f"average_optimizer_state={self.average_optimizer_state!r} has no effect for {name!r}:"
                f" {type(self.optimizer).__name__} has the states {known}.",
            )
        for p, state in zip(parameters, states, strict=True):
            if state is not None and (not isinstance(state, Tensor) or state.shape != p.shape):
                raise ValueError(
                    f"average_optimizer_state={self.average_optimizer_state!r}: {name!r} is not of its parameter's"
                    " shape and cannot be averaged value by value. HINT: name states such as 'exp_avg_sq'."
                )
        values = [as_real(torch.zeros_like(p) if s is None else s) for p, s in zip(parameters, states, strict=True)]
        own = flatten(values)
        here = own.new_tensor([state is not None for state in states])

        def apply(difference: Tensor) -> None:
            shares = here + difference[own.numel() :]
            averages = split(own + difference[: own.numel()], values)
            for state, value, average, share in zip(states, values, averages, shares, strict=True):
                if state is not None:
                    value.copy_(average / share)

        self._launch(torch.cat([own, here]), own.dtype, apply)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and self.groups.rank == 0:
            warnings.warn(message, stacklevel=2)
        self._warned.add(message)

    def _or_explain(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            members, _ = self.groups.at(self.round)
            others = [rank for rank in members if rank != self.groups.rank]
            limit = "the backend's default timeout" if self.groups.timeout is None else f"{self.groups.timeout}"
            raise RuntimeError(
                f"Rank {self.groups.rank} could not average step {self.step} with ranks {others} within {limit}:"
                f" {error}. HINT: one of them ended, stopped or took another number of optimizer steps; its own log"
                " says more. A longer `timeout` helps where steps differ a lot in length."
            ) from error

    # ---- consensus points -------------------------------------------------------------------------------------------

    def consensus(self, *more: Module) -> None:
        """Replace every replica by the exact global average: float parameters and buffers, frozen ones included.

        Values that are equal on all ranks do not change by a bit. Other buffers become rank 0's. Collective over all
        ranks; it belongs before whatever looks at *the* model: an evaluation, a checkpoint, the end.

        Args:
            more: Further modules to average, such as an EMA of the model; they must be there on all ranks.
        """
        consensus_of([self.module, *more])
        self.on_consensus()

    def on_consensus(self) -> None:
        """All replicas are equal now: what was packed before, or frozen since, need not be averaged any more."""
        self.discard()
        self._sent_since_consensus.clear()

    def consensus_of_optimizer_state(self) -> None:
        """Replace the optimizer's floating state by its average over the ranks that have it; the rest is rank 0's."""
        consensus_of_optimizer_state(self.optimizer)

    # ---- position and cost ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The position in the schedule; the same on all ranks."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.step = int(state["step"])

    @property
    def statistics(self) -> Statistics:
        """What it cost so far. Reading it waits for the running collectives on CUDA."""
        for average in self._finished:
            waited, ran = average.seconds()
            self._seconds_waiting += waited
            self._seconds_running += ran
        self._finished = []
        return Statistics(self._synchronizations, self._bytes_sent, self._seconds_waiting, self._seconds_running)


def check_state_names(names: Sequence[str]) -> tuple[str, ...]:
    """``average_optimizer_state`` as a tuple, or a ``ValueError`` if it is none or must not be averaged alone."""
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"average_optimizer_state={names!r} is not a sequence of names."
            " HINT: average_optimizer_state=('exp_avg_sq',)."
        )
    if "exp_avg" in names and not {"exp_avg_sq", "exp_inf"} & set(names):
        raise ValueError(
            f"average_optimizer_state={tuple(names)!r} averages 'exp_avg' without the second moment, which diverges: a"
            " small second moment divides a large mean. HINT: use ('exp_avg_sq',) or ('exp_avg', 'exp_avg_sq')."
        )
    return tuple(names)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _same_dtype(parameters: Iterable[Tensor]) -> list[tuple[torch.dtype, list[Tensor]]]:
    """The parameters themselves by the dtype of their (real) values; :func:`by_dtype` gives detached views."""
    result: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        result.setdefault(as_real(p).dtype, []).append(p)
    return list(result.items())


def _float_buffers(module: Module) -> list[Tensor]:
    return [buffer for buffer in module.buffers() if is_averaged(buffer)]


def _add_to_tensors(tensors: list[Tensor], difference: Tensor) -> None:
    torch._foreach_add_(tensors, split(difference, tensors))


def _add_to_buffers(module: Module, dtype: torch.dtype, packed: Tensor, difference: Tensor) -> None:
    """Add the difference to float buffers, which a forward pass may meanwhile have updated, or replaced."""
    tensors = dict(by_dtype(_float_buffers(module)))[dtype]
    current = flatten(tensors)
    if current.shape != packed.shape:
        raise RuntimeError(
            f"The {dtype} buffers changed size between start and finish of a synchronization ({packed.numel()} to"
            f" {current.numel()} values). HINT: use overlap=False, or register buffers before training."
        )
    # Where everybody has the same infinity (a mask), the difference is NaN and there is nothing to add.
    result = torch.where(current.isinf() & difference.isnan(), current, current + difference)
    torch._foreach_copy_(tensors, split(result, tensors))
    # A variance that shrank meanwhile must not be pushed below zero by the difference of its older value.
    variances = [b for name, b in module.named_buffers() if name.endswith("running_var") and b.dtype == dtype]
    if variances:
        torch._foreach_clamp_min_(variances, 0.0)
