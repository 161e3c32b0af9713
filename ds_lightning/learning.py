"""N virtual workers in one process: how a schedule learns, at N = 64 to 512 on a laptop. No process group, no network.

Row i of a matrix X (N, D) is worker i's model, flattened. ``vmap`` computes all workers' gradients at once, a torch
optimizer steps on X itself (SGD and Adam are element-wise, so that one of them is N of them), and averaging is
arithmetic on the rows of each group::

    X <- W_t (X - lr U(X))      overlap=False
    X <- W_t X - lr U(X)        overlap=True

No N x N matrix is built: of a partition only the members of its groups are kept, one index array per group size. Of a
schedule in parts the columns of X are cut into that many, as equal as can be, each averaged in its own partition.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam, Optimizer

from ds_lightning.cost import rounds
from ds_lightning.digits import Data, mlp
from ds_lightning.noise import REACH, NoiseShare, attenuation, check_noise_correction, deviations, full_step
from ds_lightning.options import check_bool
from ds_lightning.schedule import (
    GridSchedule,
    Partition,
    Schedule,
    as_int,
    check_group_size,
    check_schedule,
    make_schedule,
    positive_int,
    schedule_parts,
    schedule_period,
)
from ds_lightning.shards import concentration, shards
from ds_lightning.synchronizer import check_state_names
from ds_lightning.wire import Code, Codec, as_wire_dtype, codec_for

# Beside the schedules of `make_schedule`: what DS-Sync is compared with.
BASELINES = ("bsp", "local")
# In one process: each has parameters and states of its own.
MOST_WORKERS = 4096
_MOMENTUM = 0.9  # of both optimizers
_STATES = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Experiment:
    """One training run. The options of averaging are those of :class:`~ds_lightning.DSSyncStrategy`.

    Args:
        world_size: Number of workers N.
        schedule: ``"grid"``, ``"shuffle"``, ``"auto"``, a Schedule; ``"bsp"``: every step the gradients of all are
            averaged, as DDP does, so that replicas stay equal; ``"local"``: local SGD, every ``sync_every`` steps the
            models of all are averaged after the step. These two never overlap.
        group_size: Target group size, or ``"auto"``.
        overlap: ``X <- W X - lr U(X)``; ``False``: ``X <- W (X - lr U(X))``.
        sync_every: Steps between averages.
        wire_dtype: In which dtype models are sent: ``None`` (as stored), ``"bf16"``, ``"fp16"``, ``"int8"``.
        average_gradients: Average gradients in the group as well.
        average_optimizer_state: Optimizer states to average as well.
        optimizer_state_every: In one period of the schedule out of so many.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adam"``.
        lr: Learning rate.
        batch_size: Samples per worker and step.
        steps: Optimizer steps.
        seed: Of the model's first values, the order of samples, shards and shuffles.
        partition: Which samples a worker sees: ``"iid"`` (all, dealt out anew), ``"by_label"`` or
            ``"dirichlet:ALPHA"`` (its own, see ``shards.py``).
        noise_correction: Make Adam's updates as long as BSP's, see ``noise.py``; ``"auto"``: with Adam at a wire of 32
            bits, where workers average parameters and not also gradients.

    Raises:
        ValueError: If a value is out of range.
    """

    world_size: int
    schedule: str | Schedule = "auto"
    group_size: int | str = "auto"
    overlap: bool = True
    sync_every: int = 1
    wire_dtype: str | torch.dtype | None = None
    average_gradients: bool = False
    average_optimizer_state: Sequence[str] = ()
    optimizer_state_every: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    batch_size: int = 2
    steps: int = 300
    seed: int = 0
    partition: str = "iid"
    noise_correction: bool | str = False

    def __post_init__(self) -> None:
        for name in ("world_size", "sync_every", "optimizer_state_every", "batch_size", "steps"):
            positive_int(name, getattr(self, name))
        if self.world_size > MOST_WORKERS:
            raise ValueError(f"world_size={self.world_size} is too large. HINT: use at most {MOST_WORKERS:,} workers.")
        if self.group_size != "auto":
            check_group_size(self.group_size, self.world_size)
        if isinstance(self.schedule, str) and self.schedule not in (names := ("grid", "shuffle", "auto", *BASELINES)):
            raise ValueError(
                f"schedule={self.schedule!r} is unknown. HINT: use one of {', '.join(names)} or a Schedule."
            )
        if not isinstance(self.schedule, str):
            make_schedule(self.schedule, self.world_size)  # refuses what is none
            check_schedule(self.schedule)
        self.make_schedule()
        check_bool("overlap", self.overlap)
        check_bool("average_gradients", self.average_gradients)
        as_wire_dtype(self.wire_dtype)
        if self.optimizer not in _STATES:
            raise ValueError(f"optimizer={self.optimizer!r} is unknown. HINT: use one of {', '.join(_STATES)}.")
        known = _STATES[self.optimizer]
        if unknown := [name for name in check_state_names(self.average_optimizer_state) if name not in known]:
            raise ValueError(
                f"average_optimizer_state={tuple(self.average_optimizer_state)!r}: {self.optimizer} has no state"
                f" {unknown[0]!r}. HINT: it has {', '.join(known)}."
            )
        if check_noise_correction(self.noise_correction) is True and not self._has_noise_to_correct():
            raise ValueError(
                f"noise_correction=True cannot be used with optimizer={self.optimizer!r}, schedule={self.schedule!r},"
                f" average_gradients={self.average_gradients} and {self.world_size} workers. HINT: use 'auto', which"
                " knows where it can be."
            )
        if isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr!r} is not a positive number. HINT: 0.1 suits SGD, 0.003 Adam.")
        as_int("seed", self.seed)
        concentration(self.partition)

    @property
    def corrects_noise(self) -> bool:
        """What ``noise_correction`` comes to."""
        wire = as_wire_dtype(self.wire_dtype)
        if self.noise_correction == "auto":
            return self._has_noise_to_correct() and (wire is None or wire.itemsize >= 4)
        return bool(self.noise_correction)

    def _has_noise_to_correct(self) -> bool:
        alone = self.schedule in BASELINES or self.average_gradients or self.world_size == 1
        return self.optimizer == "adam" and not alone

    def make_schedule(self) -> Schedule:
        """Who averages at every synchronization."""
        if self.schedule in BASELINES:
            return GridSchedule(self.world_size, self.world_size)
        return make_schedule(self.schedule, self.world_size, self.group_size, self.seed)


@dataclass(frozen=True)
class Point:
    """Of a curve.

    Attributes:
        step: Optimizer steps so far.
        accuracy: Of the mean model on the test samples.
        loss: Of the workers' own models on their batches, mean since the point before.
        train_loss: Of the mean model on all training samples.
        distance: Consensus distance after a step, root mean square since the point before: at a single step it depends
            on where in its period the schedule is.
    """

    step: int
    accuracy: float
    loss: float
    train_loss: float
    distance: float


@dataclass(frozen=True)
class Result:
    """What came out: points at even distances, the last of them at the end."""

    experiment: Experiment
    curve: tuple[Point, ...]
    seconds: float

    @property
    def final(self) -> Point:
        """The end."""
        return self.curve[-1]


def run(
    experiment: Experiment,
    data: Data,
    on_step: Callable[[int, Tensor], object] | None = None,
    make_model: Callable[[], nn.Module] = mlp,
    points: int = 30,
) -> Result:
    """Train; the same experiment gives the same result.

    Args:
        experiment: What to do.
        data: What to learn.
        on_step: Called after every step with the number of steps so far and X, to look at and not to change.
        make_model: Makes the model that all workers start from, after seeding torch. It must not have buffers, and all
            of its parameters are trained.
        points: Of the curve.

    Raises:
        ValueError: If the model has buffers, or there are fewer training samples than workers that keep their own.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(experiment.seed)
        model = make_model().to(data.train.dtype)
        curve = tuple(_train(experiment, data, model, on_step, positive_int("points", points)))
    return Result(experiment, curve, time.perf_counter() - start)


def _train(
    e: Experiment, data: Data, model: nn.Module, on_step: Callable[[int, Tensor], object] | None, points: int
) -> Iterator[Point]:
    row, logits = _flat(model)
    x = row.repeat(e.world_size, 1)
    optimizer: Optimizer = SGD([x], e.lr, momentum=_MOMENTUM) if e.optimizer == "sgd" else Adam([x], e.lr)
    wire = as_wire_dtype(e.wire_dtype)
    codec = None if wire is None or wire == x.dtype else codec_for(wire)
    schedule = e.make_schedule()
    table = [index_arrays(schedule.partition(t)) for t in range(schedule_period(schedule))]
    parts = schedule_parts(schedule)
    overlap = e.overlap and e.schedule not in BASELINES
    gradients = vmap(
        grad_and_value(lambda row, images, labels: F.cross_entropy(logits(row, images), labels)), randomness="different"
    )
    correction = _Correction(e, schedule, model) if e.corrects_noise else None
    pending = x  # what is under way, with overlap
    base = x.clone()  # what the updates of a round are added to
    loss, square, last = 0.0, 0.0, 0  # since the last point
    for step, batch in enumerate(islice(batches(e, data.train_labels), e.steps)):
        round_, place = divmod(step, e.sync_every)
        due = place == e.sync_every - 1 and e.schedule != "bsp"
        groups = [table[(round_ + part) % len(table)] for part in range(parts)]
        if overlap and place == 0:
            pending = _differences(x, groups, codec)
            base = x + pending
        x.grad, losses = gradients(x, data.train[batch], data.train_labels[batch])
        if e.schedule == "bsp":
            x.grad = x.grad.mean(0).expand_as(x)
        elif e.average_gradients and due:
            x.grad += _differences(x.grad, groups)
        # Before the first update there are no states.
        averaged = due and round_ // len(table) % e.optimizer_state_every == 0
        states = [name for name in e.average_optimizer_state if averaged]
        if overlap and due:
            x += pending
            _average_states(optimizer, states, groups)
            if correction is not None:
                correction.averaged(round_, pending)
        optimizer.step()
        if due and correction is not None:
            correction.correct(x, base, step + 1)
        if due and not overlap:
            pending = _differences(x, groups, codec)
            x += pending
            base = x.clone()
            _average_states(optimizer, states, groups)
            if correction is not None:
                correction.averaged(round_, pending)
        loss += float(losses.mean())
        square += consensus_distance(x) ** 2
        done = step + 1
        if on_step is not None:
            on_step(done, x)
        if done * points // e.steps > step * points // e.steps:
            model.eval()
            accuracy = (logits(x.mean(0), data.test).argmax(1) == data.test_labels).double().mean()
            train_loss = F.cross_entropy(logits(x.mean(0), data.train), data.train_labels)
            model.train()
            since = done - last
            yield Point(done, float(accuracy), loss / since, float(train_loss), math.sqrt(square / since))
            loss, square, last = 0.0, 0.0, done


class _Correction:
    """Noise correction (``noise.py``) of all workers: a share for each worker and tensor."""

    def __init__(self, e: Experiment, schedule: Schedule, model: nn.Module) -> None:
        self._e, self._sizes = e, [p.numel() for p in model.parameters()]
        period = rounds(schedule)
        kappas, self._settling = deviations(period, _MOMENTUM, e.sync_every)
        dtype = next(model.parameters()).dtype
        self._kappas = torch.from_numpy(kappas).to(dtype)
        # Pieces that belong to one tensor and to one part, which has partitions of its own.
        ends = torch.tensor(self._sizes).cumsum(0)
        part_ends = torch.tensor(
            [len(part) for part in torch.arange(sum(self._sizes)).tensor_split(period.parts)]
        ).cumsum(0)
        stops = torch.cat([ends, part_ends]).unique()
        self._pieces = torch.diff(stops, prepend=stops.new_zeros(1)).tolist()
        self._tensors, self._parts = (torch.searchsorted(of, stops) for of in (ends, part_ends))
        self._share = NoiseShare((e.world_size, len(self._sizes)), dtype=dtype)
        self._factors = torch.zeros(e.world_size, len(self._sizes), dtype=dtype)
        self._average: tuple[int, Tensor] | None = None  # the latest: its round, and what it added

    def averaged(self, round_: int, difference: Tensor) -> None:
        """What an average has added."""
        self._average = round_, difference

    def correct(self, x: Tensor, base: Tensor, updates: int) -> None:
        """Stretch a round's updates, after so many in all."""
        e, update = self._e, x - base
        step = math.inf if e.average_optimizer_state else full_step(_MOMENTUM, e.sync_every) * e.lr
        for u, factor in zip(update.split(self._sizes, 1), self._factors.split(1, 1), strict=True):
            limit = REACH * step / (1 + factor)
            u += factor * u.clamp(-limit, limit)
        x.copy_(base + update)
        if self._average is not None:
            round_, difference = self._average
            self._settling -= 1
            if self._settling < 0:
                kappas = self._kappas[(round_ + self._parts) % len(self._kappas)].T
                self._share.take(self._squares(difference), self._squares(update, kappas))
        updates += e.sync_every
        each = attenuation(_MOMENTUM, e.sync_every, updates)
        self._factors = self._share.stretch(each, e.world_size, updates)

    def _squares(self, values: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        """Of each worker's tensors, shape (N, tensors)."""
        squares = torch.stack([piece.square().sum(1) for piece in values.split(self._pieces, 1)], 1) * weights
        return squares.new_zeros(len(squares), len(self._sizes)).index_add_(1, self._tensors, squares)


def _flat(model: nn.Module) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """A model's parameters in one row, and what computes its logits by such a row."""
    if names := [name for name, _ in model.named_buffers()]:
        raise ValueError(
            f"make_model() has the buffer {names[0]!r}, and workers in one process have only parameters of their own."
            " HINT: use layers without buffers, such as GroupNorm in the place of BatchNorm."
        )
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def logits(row: Tensor, inputs: Tensor) -> Tensor:
        parts = zip(parameters.items(), row.split(sizes), strict=True)
        result: Tensor = functional_call(model, {name: part.view(p.shape) for (name, p), part in parts}, (inputs,))
        return result

    return torch.cat([p.detach().flatten() for p in parameters.values()]), logits


def batches(experiment: Experiment, labels: Tensor) -> Iterator[Tensor]:
    """For every step the indices (N, batch_size) of each worker's samples: all once in random order, then all again.

    Raises:
        ValueError: If workers keep samples of their own and there is not one for each.
    """
    e = experiment
    pools, taken = torch.arange(len(labels)).unsqueeze(0), e.world_size * e.batch_size
    if e.partition != "iid":
        if len(labels) < e.world_size:
            raise ValueError(
                f"partition={e.partition!r}: {len(labels)} training samples are not one for each of {e.world_size}"
                " workers. HINT: use fewer workers, or partition='iid'."
            )
        own = shards(labels.numpy(), e.world_size, e.partition, e.seed)
        pools, taken = torch.stack([torch.from_numpy(part) for part in own]), e.batch_size
    generator = torch.Generator().manual_seed(e.seed)
    queue = pools[:, :0]
    while True:
        while queue.shape[1] < taken:
            order = torch.rand(pools.shape, generator=generator).argsort(1)
            queue = torch.cat([queue, pools.gather(1, order)], 1)
        yield queue[:, :taken].reshape(e.world_size, e.batch_size)
        queue = queue[:, taken:]


def index_arrays(partition: Partition) -> list[Tensor]:
    """The members of all groups that average: for every group size g one tensor (groups, g)."""
    by_size: dict[int, list[tuple[int, ...]]] = {}
    for group in partition:
        by_size.setdefault(len(group), []).append(group)
    return [torch.tensor(groups) for size, groups in by_size.items() if size > 1]


def differences(x: Tensor, groups: list[Tensor], codec: Codec | None = None) -> Tensor:
    """What an average adds to each row of ``x``: ``W x - x``, or with a wire of few bits what ``payload.py`` adds.

    Pairs exchange rounded copies. In larger groups the values are cut into a shard for each member, who averages the
    others' rounded copies of it with its own exact one, sends the rounded mean, and itself takes back g times what
    that lost. (``payload.py`` cuts each of its buckets so; up to 262,144 values it has one.)

    Args:
        x: One row per worker.
        groups: Of :func:`index_arrays`.
        codec: Of the wire; ``None``: nothing is rounded.
    """
    result = torch.zeros_like(x)
    for members in groups:
        own = x[members]  # (groups, g, D)
        size, n = own.shape[1:]
        if codec is None:
            result[members] = own.mean(1, keepdim=True) - own
            continue
        cuts = 1 if size == 2 else size
        shard = -(-n // (cuts * codec.block)) * codec.block
        own = F.pad(own, (0, cuts * shard - n))
        sent = rounded(own, codec)
        change = sent.mean(1, keepdim=True) - sent
        if size > 2:
            mine = torch.arange(size * shard) // shard == torch.arange(size).unsqueeze(1)  # (g, D): who averages what
            sent = torch.where(mine, own, sent)
            mean = sent.mean(1, keepdim=True)
            back = rounded(mean, codec)
            change = back - sent + mine * size * (mean - back)
        result[members] = change[..., :n]
    return result


def _differences(x: Tensor, parts: Sequence[list[Tensor]], codec: Codec | None = None) -> Tensor:
    """Those of each part of the columns, by its own groups."""
    columns = zip(x.tensor_split(len(parts), dim=1), parts, strict=True)
    return torch.cat([differences(part, groups, codec) for part, groups in columns], dim=1)


def rounded(x: Tensor, codec: Codec) -> Tensor:
    """``Q(x)``: each row to the wire's dtype and back; rows are of whole blocks."""
    values, out = x.flatten().clone(), torch.empty_like(x).flatten()
    code = Code(codec, torch.empty(codec.nbytes(values.numel()), dtype=torch.uint8), values.numel())
    codec.encode(values, code)
    codec.decode(code, out)
    return out.view_as(x)


def consensus_distance(x: Tensor) -> float:
    """``sqrt(mean_i ||x_i - mean||^2)`` over the rows of ``x``."""
    from_first = x - x[0]  # of equal rows exactly zero, which a rounded mean would not give
    return math.sqrt(float((from_first - from_first.mean(0)).square().sum()) / len(x))


def _average_states(optimizer: Optimizer, names: Sequence[str], parts: Sequence[list[Tensor]]) -> None:
    for state in optimizer.state.values():
        for name in names:
            state[name] += _differences(state[name], parts)
