"""HOW replicas are averaged: pack, average inside the group, add the difference. Knows nothing of Lightning.

In matrix form, with row i of X the parameters of rank i, U the optimizer's updates and W_t the mixing matrix of step t
(DS-Sync, arXiv 2007.03298, section 3)::

    X <- W_t (X - lr U(X))      the paper's order: `optimizer.step()`, then `synchronize()`
    X <- W_t X - lr U(X)        overlapped: `start()`, forward, backward, `finish()`, `optimizer.step()`

An update that reads gradients and its own states alone is the same before and after an average is applied. So the last
two may change places, and the average has the update to travel in as well; of AdamW's decay it is given its share,
``1 - lr * weight_decay``.

With ``sync_every=k`` one overlapped average has k steps to travel in: it is packed at the beginning of the first and
applied before the update of the last, ``X <- W X - lr (U_1 + ... + U_k)``.

Four phases, in these words everywhere (the profiler shows them as ``dssync: pack`` and so on): **pack** the tensors
into the wire's dtype, **average** in the group, **wait** for it, **apply** the difference ``average - packed copy``.
"""

from __future__ import annotations

import warnings
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter, methodcaller
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from ds_lightning.consensus import broadcast_from_rank_0, consensus_of, consensus_of_optimizer_state
from ds_lightning.groups import ScheduledGroups, gather_hosts, name_ranks, name_timeout
from ds_lightning.lanes import Clock, Lane, make_lanes
from ds_lightning.noise import DRIFTS, Drift, NoiseCorrection, corrects_noise, kept_by_decay
from ds_lightning.payload import Arrivals, Followed, Payload, in_parts
from ds_lightning.rows import TouchedRows, is_table
from ds_lightning.schedule import MOST_PARTS, Group, make_schedule, positive_int
from ds_lightning.wire import as_real, as_wire_dtype, by_dtype, flatten, is_averaged, split

T = TypeVar("T")

# Loops over all parameters run at every step: in C.
_PARAMETERS, _TRAINABLE, _VALUES = itemgetter("params"), attrgetter("requires_grad"), methodcaller("values")

# Channels of the payloads that may be under way together; parameters have those from MOST_PARTS: parts of each dtype.
_BUFFERS, _GRADIENTS, _ROWS, _STATES = 1 << 8, 1 << 9, 1 << 10, 1 << 11

# torch's optimizers whose updates, without coupled decay, read no parameters. Those derived from them may be others.
_READ_NO_PARAMETERS = {SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop}

SPARSE_GRADIENTS = (
    "average_gradients=True cannot average sparse gradients. HINT: use average_gradients=False (parameters are averaged"
    " all the same), or sparse=False in the embedding."
)


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

    Where ``sync.finishes_first`` is False, ``finish`` may as well follow ``optimizer.step()``: averages travel longer.

    For the paper's order call ``sync.synchronize()`` after ``optimizer.step()`` instead of these two. All ranks must
    call these methods equally often; which parameters had gradients, or whether a step was skipped, does not matter.

    Sent are the optimizer's parameters that require gradients (or did since the last consensus point) and all float
    buffers of ``module``; of embeddings with ``sparse=True`` only the rows that somebody touched (``rows.py``).
    Parameters may be added to the optimizer at any time, on all ranks alike. The buffers of a submodule that is added
    later are averaged from the next change of the parameters or consensus point on.

    Args:
        module: The model.
        optimizer: Its optimizer. With several optimizers make one synchronizer for each, with the same ``groups``:
            each counts its own steps, so that every set of parameters meets every group of the schedule.
        groups: Process groups of a schedule; default: those of ``make_schedule("auto", world_size)`` on the hosts of
            the ranks.
        sync_every: Optimizer steps between synchronizations; between :meth:`start` and :meth:`finish` one travels for
            all of them.
        wire_dtype: dtype in which parameters are sent: ``None`` (as stored), ``"fp32"``, ``"bf16"``, ``"fp16"``,
            ``"int8"`` or the torch dtype. Buffers, gradients and optimizer states always travel as stored: rounding
            could turn a small variance negative.
        average_optimizer_state: Names of optimizer states that are averaged too, such as ``("exp_avg_sq",)``.
        optimizer_state_every: In one period of the schedule out of so many; a second moment changes slowly.
        noise_correction: Make updates as long as BSP's, at the end of each of the optimizer's steps (``noise.py``).
            ``"auto"``: with torch's Adam, AdamW, NAdam, RAdam and RMSprop at a wire of 32 bits; False together with
            :meth:`average_gradients`.
        index: Which one it is of several optimizers of ``module``; the first (0) averages the float buffers, too.
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
        optimizer_state_every: int = 1,
        noise_correction: bool | str = False,
        index: int = 0,
        broadcast: bool = True,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.sync_every = positive_int("sync_every", sync_every)
        self.wire_dtype = as_wire_dtype(wire_dtype)
        self.average_optimizer_state = check_state_names(average_optimizer_state)
        self.optimizer_state_every = positive_int("optimizer_state_every", optimizer_state_every)
        if groups is None:
            hosts = gather_hosts()
            groups = ScheduledGroups(make_schedule("auto", dist.get_world_size(), nodes=hosts), hosts=hosts)
        self.groups = groups
        self.index = index
        self.step = 0
        self.started = False
        self.timed = False
        self.arrivals: deque[tuple[int, int, Arrivals]] = deque(maxlen=256)  # of the latest averages: round, part, when
        self._synchronizations = self._bytes_sent = 0
        self._seconds_waiting = self._seconds_running = 0.0
        self._lanes: list[Lane] = []  # one for each part of the parameters: none waits for another part's members
        self._clock: Clock | None = None  # of what is under way
        self._running: list[tuple[int, _Average, Callable[[], None] | None]] = []  # part, average, and what follows
        self._clocks: deque[Clock] = deque()  # not read yet: that may block a CUDA host
        self._laid_out: object = None
        self._parameters: list[Tensor] = []
        self._values: list[tuple[int, _Average]] = []
        self._numbers: dict[Payload, list[int]] = {}  # of each tensor of these, the parameter that it is, or is part of
        self._rows: list[TouchedRows] = []
        self._sent_since_consensus: set[Tensor] = set()
        self._warned: set[str] = set()
        self._correction: NoiseCorrection | None = None
        self._based: list[tuple[int, Payload]] = []  # payloads that hold what updates are added to
        self._average: int | None = None  # the round whose average made it
        self._launched = False  # the averages of this round's parameters
        self._overlapped = False
        self._begins = True  # the coming update is the first of a round
        self._ends = False  # overlapped: it is the last
        self._updated = False  # since `start`
        self._kept: list[float] | None = None  # of each parameter, the share that this update left; None: all of all
        if self.groups.schedule.world_size > 1 and corrects_noise(noise_correction, optimizer, wire=self.wire_dtype):
            self._correction = NoiseCorrection(
                optimizer, self.groups, self.sync_every, own_moments=not self.average_optimizer_state
            )
        if self._correction is not None or type(optimizer) in _READ_NO_PARAMETERS:
            _hook(self, optimizer)
        if broadcast:
            broadcast_from_rank_0(module)

    # ---- one step ---------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the current step applies an average: every ``sync_every``-th does."""
        return (self.step + 1) % self.sync_every == 0

    @property
    def round(self) -> int:
        """Synchronizations so far, and so the schedule's step: with ``sync_every > 1`` steps would skip partitions."""
        return self.step // self.sync_every

    @property
    def finishes_first(self) -> bool:
        """Whether :meth:`finish` belongs before ``optimizer.step()``, where it always may come; known after ``start``.

        It does for optimizers that read parameters, as those with coupled weight decay do, or that nobody knows; where
        hooks of others wait for an optimizer's steps; and for averages of its states, or of touched rows.
        """
        optimizer = self.optimizer
        if self._must_finish_first or type(optimizer) not in _READ_NO_PARAMETERS:
            return True
        hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
        others = any(getattr(hook, "__module__", None) != __name__ for hook in hooks)
        return others or any(map(self._reads_parameters, optimizer.param_groups))

    @property
    def _must_finish_first(self) -> bool:
        """Averages under way are of what updates change, too."""
        return bool(self.average_optimizer_state or self._rows)

    def _reads_parameters(self, group: dict[str, Any]) -> bool:
        """Whether updates of a group of the optimizer do, or leave a share of the parameters that nobody knows."""
        if not group.get("weight_decay"):
            return False
        # A fused update may be skipped on the device, and a learning rate be there: nobody waits for these.
        known = not group.get("fused") and not isinstance(group["lr"], Tensor) and self.sync_every == 1
        return not known or kept_by_decay(self.optimizer, group) == 1.0

    def start(self) -> None:
        """Pack, and start the averages of this step's group; returns at once. Of a round, the first step does it."""
        first = self.step % self.sync_every == 0
        if first and self._running:
            self.discard()
        self.started, self._overlapped, self._begins = True, True, first
        self._updated, self._kept = False, None
        if not self._running:  # a round that a consensus point or a resume cut may begin in its middle, too
            self._lay_out()
        if first:
            self._launch_values()
        if self.due:
            self._launch_others()

    def finish(self) -> None:
        """Wait for the averages that :meth:`start` began, apply them, and go on to the next step.

        Of a round, the last step does it.

        Raises:
            RuntimeError: If a member failed or did not come within the groups' timeout; names step and ranks. Or if it
                must come before ``optimizer.step()`` and does not.
        """
        if self._updated and self._must_finish_first:
            raise RuntimeError(
                "DSSynchronizer.finish() came after optimizer.step(), but averages of optimizer states and of touched"
                " rows must be applied before the update. HINT: call it before, or average_optimizer_state=()."
            )
        self._ends = self.due and not self._updated
        if self.due:
            self._finish()
        for rows in self._rows:
            rows.touch(self.optimizer)  # by the update that follows
        self.step, self.started = self.step + 1, False
        self._updated, self._kept = False, None

    def synchronize(self) -> None:
        """Average now, in the paper's order: call it after ``optimizer.step()``."""
        self._lay_out()
        for rows in self._rows:
            rows.touch(self.optimizer)
        if self.due:
            self._launch_values()
            self._launch_others()
            if self._clock is not None:
                self._clock.exposed = True
            self._finish()
        self._overlapped, self._begins = False, self.due
        self.step, self.started = self.step + 1, False

    def discard(self) -> None:
        """Forget averages under way, after an exception or because all replicas become equal, and free the buffers."""
        for rows in self._rows:
            rows.touch_all()
        self._bytes_sent += sum(average.bytes_sent for _, average, _ in self._running)
        self._clock = None
        self._running, self._values, self._laid_out, self.started = [], [], None, False
        self._based, self._launched, self._ends = [], False, False
        self._updated, self._kept = False, None
        self._begins = self.step % self.sync_every == 0

    @torch.no_grad()
    def _launch_values(self) -> None:
        """Parameters and buffers: what the first step of a round sends."""
        self._based = []
        for part, average in self._values:
            self._launch(average, part=part)
        self._launched = True
        self._synchronizations += bool(self._running)
        if self._correction is not None:
            self._correction.learn()

    @torch.no_grad()
    def _launch_others(self) -> None:
        """What every update changes in its own way, and so is sent and applied in one step: states and touched rows."""
        if self.groups.at(self.round)[1] is None:
            return
        if self.round // self.groups.period % self.optimizer_state_every == 0:
            for name in self.average_optimizer_state:
                for _, same in _same_dtype(self._averaged()):
                    self._launch_state(name, same)
        for rows in self._rows:
            self._launch(rows)

    def _launch(self, average: _Average, then: Callable[[], None] | None = None, part: int = 0) -> None:
        members, group = self.groups.at(self.round, part)
        if group is None:
            if isinstance(average, Payload) and average.followed:
                average.note_base()
            return
        if not self._lanes:
            tensors = chain(_parameters(self.optimizer), self.module.parameters(), self.module.buffers())
            device = next((t.device for t in tensors), torch.device("cpu"))
            self._lanes = make_lanes(device, group, self.groups.parts)
        lane = self._lanes[part]
        if self.timed and self._clock is None:
            self._clock = lane.new_clock()
        lane.clock = self._clock
        self._or_explain(partial(average.start, members, group, lane))
        self._running.append((part, average, then))

    @torch.no_grad()
    def _finish(self) -> None:
        """Of what is under way."""
        running, self._running = self._running, []
        drift = self._correction.drift if self._correction is not None and self._launched and running else None
        if drift is not None:
            drift.before()
        largest: dict[int, Arrivals] = {}  # of each part
        for part, average, then in running:
            if isinstance(average, Payload) and self._updated and self._kept is not None:
                kept = [self._kept[number] for number in self._numbers[average]]
                self._or_explain(partial(average.finish, kept))
            else:
                self._or_explain(average.finish)
            self._bytes_sent += average.bytes_sent
            arrivals = average.arrivals if isinstance(average, Payload) else None
            if arrivals is not None and (part not in largest or largest[part].size < arrivals.size):
                largest[part] = arrivals
            if then is not None:
                then()
        self.arrivals += [(self.round, part, arrivals) for part, arrivals in largest.items()]
        if self._clock is not None:
            self._clocks.append(self._clock)
            self._clock = None
        if self._launched:
            looked = self.groups.look is not None and self.groups.look[0] == self.round
            self._based, self._average = self._followed(), None if looked else self.round
            if self._correction is not None and self._updated:
                self._correction.tell(self._based, self._average)
                self._based = []
            if drift is not None and not looked:
                drift.after(max(len(self.groups.at(self.round, part)[0]) for part, _, _ in running))
                self._look_for_drift(drift)
        self._launched = False

    # ---- noise correction -------------------------------------------------------------------------------------------

    def _followed(self) -> list[tuple[int, Payload]]:
        return [(part, p) for part, p in self._values if isinstance(p, Payload) and p.followed]

    def _note_base(self, average: int | None) -> None:
        """Let parameters as they are now be what updates are added to, as that average left them."""
        self._based, self._average = self._followed(), average
        for _, payload in self._based:
            payload.note_base()

    def noise_and_signal(self) -> tuple[float, float]:
        """Of the gradient that this rank computes, the squares of its noise and of the rest; zeros if not known."""
        if self._correction is None:
            return 0.0, 0.0
        noise, signal = self._correction.noise_and_signal()
        return float(noise), float(signal)

    @property
    def drift(self) -> float | None:
        """Of what parts this rank from its groups, the share that goes on in one direction; None if not known.

        Near 0 where ranks draw from the same samples, see :class:`~ds_lightning.noise.Drift`.
        """
        known = None if self._correction is None else self._correction.drift
        return None if known is None else known.share

    def _look_for_drift(self, drift: Drift) -> None:
        if self.average_optimizer_state or "drift" in self._warned or not drift.news:
            return
        if (share := drift.share or 0.0) > DRIFTS:
            self._warned.add("drift")
            second = "exp_avg_sq" if "betas" in self.optimizer.param_groups[0] else "square_avg"
            self._warn_once(
                f"noise_correction: ranks seem to have samples of their own ({share:.0%} of what parts rank 0 from its"
                " groups goes on in one direction, as noise does not). The correction alone may lose accuracy there."
                f" HINT: use average_optimizer_state=({second!r},), best with overlap=False, or noise_correction=False."
            )

    def before_update(self) -> None:
        """The optimizer's step begins. In the paper's order nobody knows the base after a consensus point."""
        if self._correction is not None and self._begins and not self._launched and not self._based:
            self._lay_out()
            self._note_base(None)
        self._begins = False

    def after_update(self) -> None:
        """The optimizer's step ends: correct the updates of a round."""
        if self._correction is not None:
            self._correction.updates += 1
            if self._based and (self._ends if self._overlapped else self.due):
                self._correction.correct(self._based)
                self._correction.tell(self._based, self._average)
                self._based = []
            elif self.started and self._launched and self.due and not self._updated:
                self._correction.correct(self._followed())  # while the average is under way
        self._ends = False
        if self.started:
            self._updated, self._kept = True, self._kept_by_update()

    def _kept_by_update(self) -> list[float] | None:
        groups = self.optimizer.param_groups
        shares = [kept_by_decay(self.optimizer, group) for group in groups]
        if all(share == 1.0 for share in shares):
            return None
        # What has no gradient has no update, and so no decay.
        each = zip(shares, groups, strict=True)
        return [share if p.grad is not None else 1.0 for share, group in each for p in group["params"]]

    def _lay_out(self) -> None:
        """Make the buffers anew if parameters are others than before, were frozen, or lie elsewhere in memory."""
        now = [*chain.from_iterable(map(_PARAMETERS, self.optimizer.param_groups))]
        laid_out = [*map(id, now)], [*map(_TRAINABLE, now)], [*map(Tensor.data_ptr, now)]
        if laid_out == self._laid_out:
            return
        self._laid_out, self._parameters, self._based = laid_out, now, []
        if self._correction is not None:
            self._correction.lay_out(now)
        averaged = self._averaged()
        self._sent_since_consensus.update(averaged)
        row_wise = {m.weight for m in self.module.modules() if is_table(m)}
        dense = by_dtype(p for p in averaged if p not in row_wise)
        if self._correction is not None:
            self._correction.watch([*chain.from_iterable(same for _, same in dense)])
        self._values, self._numbers = [], {}
        for i, (dtype, same) in enumerate(dense, 1):
            for part, values in enumerate(in_parts(same, self.groups.parts)):
                if values:
                    channel, wire = self._channel(i * MOST_PARTS + part), self.wire_dtype or dtype
                    numbers, follow = self._numbers_of(values), None
                    if self._correction is not None:
                        follow = Followed(numbers, len(now), values[0].device)
                    payload = Payload(values, wire, channel, follow)
                    self._values.append((part, payload))
                    self._numbers[payload] = numbers
        if self.index == 0:
            self._values.append((0, _Buffers(self.module, self._channel(_BUFFERS))))
        tables = _same_dtype(p for p in dict.fromkeys(averaged) if p in row_wise)
        if [*map(id, chain.from_iterable(same for _, same in tables))] != [id(t) for r in self._rows for t in r.tables]:
            known, self._rows = bool(self._rows), []
            for i, (dtype, same) in enumerate(tables):
                rows = TouchedRows(same, self.wire_dtype or dtype, self.groups.schedule, self._channel(_ROWS + i))
                if known:
                    rows.touch_all()
                self._rows.append(rows)

    def _numbers_of(self, values: list[Tensor]) -> list[int]:
        """The parameters that they are, or are parts of."""
        starts = sorted((p.data_ptr(), i) for i, p in enumerate(self._parameters) if p.layout == torch.strided)
        return [starts[bisect_left(starts, (v.data_ptr() + 1,)) - 1][1] for v in values]

    def _channel(self, kind: int) -> int:
        """Optimizers may be under way together."""
        return (self.index % 16 << 12) + kind

    def _averaged(self) -> list[Tensor]:
        return [p for p in self._parameters if p.requires_grad or p in self._sent_since_consensus]

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
                raise ValueError(SPARSE_GRADIENTS)
            gradients = [as_real(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
            own = flatten(gradients).div_(scale)
            here = own.new_tensor([p.grad is not None for p in parameters])
            average = self._average_now(torch.cat([own, here]), dtype)
            averages = split(average[: own.numel()].mul_(scale), gradients)
            anywhere = average[own.numel() :].tolist()
            for p, mean, share in zip(parameters, averages, anywhere, strict=True):
                if share > 0.5 / len(members):
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    as_real(p.grad).copy_(mean)

    def _average_now(self, flat: Tensor, wire: torch.dtype) -> Tensor:
        """Average gradients, while parameters may be under way."""
        running, self._running = self._running, []
        self._launch(Payload([flat], wire, self._channel(_GRADIENTS)))
        _, average, _ = self._running.pop()
        self._running = running
        self._or_explain(average.finish)
        self._bytes_sent += average.bytes_sent
        return flat

    def _launch_state(self, name: str, parameters: list[Tensor]) -> None:
        """Average the optimizer's state ``name`` over those members that have it (an unused parameter has none)."""
        states: list[Tensor | None] = [self.optimizer.state.get(p, {}).get(name) for p in parameters]
        # Before the first update there are no states; a GradScaler may skip the first few, and some never have any.
        told = self.optimizer.state or self._synchronizations >= 10
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
        flat = torch.cat([own, own.new_tensor([state is not None for state in states])])

        def apply() -> None:
            averages, shares = split(flat[: own.numel()], values), flat[own.numel() :]
            for state, value, average, share in zip(states, values, averages, shares, strict=True):
                if state is not None:
                    value.copy_(average / share)

        self._launch(Payload([flat], flat.dtype, self._channel(_STATES + len(self._running))), apply)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and self.groups.rank == 0:
            warnings.warn(message, stacklevel=2)
        self._warned.add(message)

    def _or_explain(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            members = {rank for part in range(self.groups.parts) for rank in self.groups.at(self.round, part)[0]}
            others = sorted(members - {self.groups.rank})
            raise RuntimeError(
                f"Rank {self.groups.rank} could not average step {self.step} with"
                f" {name_ranks(others, self.groups.hosts)} within {name_timeout(self.groups.timeout)}: {error}. HINT:"
                " one of them ended, stopped or took another number of optimizer steps; its own log says more. A longer"
                " `timeout` helps where steps differ a lot in length."
            ) from error

    # ---- consensus points -------------------------------------------------------------------------------------------

    def consensus(self, *more: Module) -> None:
        """Replace every replica by the exact global average: float parameters and buffers, frozen ones included.

        Values that are equal on all ranks do not change by a bit. Other buffers become rank 0's. Collective over all
        ranks; it belongs before whatever looks at *the* model: an evaluation, a checkpoint, the end.

        Args:
            more: Further modules to average, such as an EMA of the model; they must be there on all ranks.
        """
        self.discard()
        consensus_of([self.module, *more])
        self.on_consensus()

    def on_consensus(self) -> None:
        """All replicas are equal now, after :meth:`discard`: what was frozen since need not be averaged any more.

        Collective over all ranks.
        """
        for rows in self._rows:
            rows.agreed()
        self._sent_since_consensus.clear()
        if self._correction is not None:
            self._correction.lay_out(_parameters(self.optimizer))  # on ranks that have not begun yet, too
            self._correction.agreed()

    def consensus_of_optimizer_state(self) -> None:
        """Replace the optimizer's floating state by its average over the ranks that have it; the rest is rank 0's."""
        consensus_of_optimizer_state(self.optimizer)

    # ---- this rank's own ---------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """What differs between ranks, between two rounds: which rows of sparse embeddings are to be sent."""
        frozen = [i for i, p in enumerate(_parameters(self.optimizer)) if p in self._sent_since_consensus]
        noise = None if self._correction is None else self._correction.state_dict()
        # By the latest average; in the paper's order the next update is yet to be held against it.
        moved = [payload.squares.cpu().clone() for _, payload in self._based]
        state = {"sent": frozen, "rows": [rows.due for rows in self._rows]}
        return state | {"noise": noise, "moved": moved, "average": self._average}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`own_state` was taken."""
        parameters = _parameters(self.optimizer)
        self._sent_since_consensus = {parameters[i] for i in state["sent"]}
        self._laid_out = None
        self._lay_out()
        for rows, due in zip(self._rows, state["rows"], strict=False):  # none before the first average
            for mine, saved in zip(rows.due, due, strict=True):
                mine.copy_(saved)
        if self._correction is not None and state.get("noise") is not None:
            self._correction.load_state_dict(state["noise"])
            if state["moved"]:
                self._note_base(state["average"])
                for (_, payload), squares in zip(self._based, state["moved"], strict=True):
                    payload.squares.copy_(squares)

    # ---- position and cost ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule, and what is known of noise; at a consensus point the same on all ranks."""
        return {"step": self.step} | ({} if self._correction is None else {"noise": self._correction.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.step = int(state["step"])
        self._begins = self.step % self.sync_every == 0
        if self._correction is not None and "noise" in state:
            self._correction.lay_out(_parameters(self.optimizer))
            self._correction.load_state_dict(state["noise"])

    @property
    def statistics(self) -> Statistics:
        """What it cost so far. Reading it waits for the running collectives on CUDA."""
        self._read_clocks(wait=True)
        return Statistics(self._synchronizations, self._bytes_sent, self._seconds_waiting, self._seconds_running)

    def seconds_waited(self) -> float:
        """Of averages that have ended, while ``timed`` is set; does not wait for others."""
        self._read_clocks(wait=False)
        return self._seconds_waiting

    def _read_clocks(self, wait: bool) -> None:
        while self._clocks and (wait or self._clocks[0].ended):
            waited, ran = self._clocks.popleft().seconds()
            self._seconds_waiting += waited
            self._seconds_running += ran

    # ---- changes of the schedule ------------------------------------------------------------------------------------

    @property
    def between(self) -> bool:
        """Whether this is between two rounds, with nothing under way; the same on all ranks."""
        return self.step % self.sync_every == 0 and not self.started

    def regroup(self) -> None:
        """The groups were changed (:meth:`ScheduledGroups.change`), between two rounds: make the messages anew."""
        self._laid_out, self._lanes, self._based = None, [], []
        self.arrivals.clear()
        if self._correction is not None:
            self._correction.regroup()


def _hook(synchronizer: DSSynchronizer, optimizer: Optimizer) -> None:
    """Tell it when the optimizer's steps begin and end, as long as it lives."""
    me = weakref.ref(synchronizer)

    def before(*_: object) -> None:
        if (synchronizer := me()) is not None:
            synchronizer.before_update()

    def after(*_: object) -> None:
        if (synchronizer := me()) is not None:
            synchronizer.after_update()

    for handle in (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)):
        weakref.finalize(synchronizer, handle.remove).atexit = False


def check_state_names(names: Any) -> tuple[str, ...]:
    """``average_optimizer_state`` as a tuple, or a ``ValueError`` if it is none or must not be averaged alone."""
    # A set has another order on every rank, and an iterator is used up by the first look.
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"average_optimizer_state={names!r} is not a sequence of names."
            " HINT: average_optimizer_state=('exp_avg_sq',)."
        )
    if "exp_avg" in names and not {"exp_avg_sq", "exp_inf"} & set(names):
        raise ValueError(
            f"average_optimizer_state={tuple(names)!r} averages 'exp_avg' without the second moment, which diverges: a"
            " small second moment divides a large mean. HINT: use ('exp_avg_sq',) or ('exp_avg', 'exp_avg_sq')."
        )
    if "step" in names:
        raise ValueError(
            f"average_optimizer_state={tuple(names)!r} names 'step', which counts updates and is no average."
            " HINT: name states of the parameters' shape such as 'exp_avg_sq'."
        )
    return tuple(dict.fromkeys(names))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _same_dtype(parameters: Iterable[Tensor]) -> list[tuple[torch.dtype, list[Tensor]]]:
    """The parameters themselves by the dtype of their (real) values; :func:`by_dtype` gives detached views."""
    result: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        result.setdefault(as_real(p).dtype, []).append(p)
    return list(result.items())


class _Average(Protocol):
    """What is averaged, of whatever kind."""

    bytes_sent: int

    def start(self, members: Group, group: dist.ProcessGroup, lane: Lane) -> None:
        """Pack, and start the average."""

    def finish(self) -> None:
        """Wait for it and apply it."""


class _Buffers:
    """The float buffers of a module, which a forward pass may update meanwhile, or replace by others."""

    def __init__(self, module: Module, channel: int) -> None:
        self._owners = [m._buffers for m in module.modules()]
        self._channel = channel
        self._now: list[Tensor | None] = []
        self._floats: list[Tensor] = []
        self._seen: object = None
        self._by_dtype: list[tuple[torch.dtype, list[Tensor]]] = []
        self._variances: list[Tensor] = []
        self._packed: list[list[torch.Size]] = []
        self._flat: list[tuple[Tensor, list[Tensor], Payload]] = []
        self.bytes_sent = 0

    def start(self, members: Group, group: dist.ProcessGroup, lane: Lane) -> None:
        if self._look() != self._packed:
            self._packed, self._flat = self._look(), []
            for i, (dtype, tensors) in enumerate(self._by_dtype):
                flat = flatten(tensors)
                self._flat.append((flat, split(flat, tensors), Payload([flat], dtype, self._channel + i)))
        self.bytes_sent = 0
        for (_, tensors), (_, views, payload) in zip(self._by_dtype, self._flat, strict=True):
            torch._foreach_copy_(views, tensors)
            payload.start(members, group, lane)
            self.bytes_sent += payload.bytes_sent

    def finish(self) -> None:
        if self._look() != self._packed:
            raise ValueError(
                f"Buffers changed size between start and finish of a synchronization ({self._packed} to"
                f" {self._look()}). HINT: use overlap=False, or register buffers before training."
            )
        for (_, tensors), (flat, views, payload) in zip(self._by_dtype, self._flat, strict=True):
            flat.zero_()  # it is packed: what comes back is the difference alone
            payload.finish()
            # Where everybody has the same infinity (a mask), the difference is NaN and there is nothing to add.
            flat.nan_to_num_(0.0, torch.inf, -torch.inf)
            torch._foreach_add_(tensors, views)
        # A variance that shrank meanwhile must not be pushed below zero by the difference of its older value.
        if self._variances:
            torch._foreach_clamp_min_(self._variances, 0.0)

    def _look(self) -> list[list[torch.Size]]:
        """Take note of the buffers as they are now; returns their shapes, by dtype."""
        now = [*chain.from_iterable(map(_VALUES, self._owners))]
        seen = [*map(id, now)], [*map(Tensor.data_ptr, self._floats)]
        if seen != self._seen:
            self._now = now  # an id is one's own as long as its object lives
            self._floats = [b for b in now if b is not None and is_averaged(b)]
            self._by_dtype = by_dtype(self._floats)
            named = chain.from_iterable(owner.items() for owner in self._owners)
            self._variances = [b for name, b in named if name.endswith("running_var") and b is not None]
            self._seen = seen[0], [*map(Tensor.data_ptr, self._floats)]
        return [[t.shape for t in tensors] for _, tensors in self._by_dtype]
