"""How the average of a flat tensor travels: all-reduced, or as rounded copies that are added in full precision.

Both give the same thing: ``average - Q(own)``, the *difference* to add to one's own values, where ``Q`` is the rounding
of the wire. Adding it, instead of overwriting, keeps the sum over the members for any ``Q``::

    sum_i (x_i + mean_j Q(x_j) - Q(x_i)) = sum_i x_i

An all-reduce *in* a low precision would add in it as well, and its rounding error hits all members alike: the mean
walks away. So only fp32 and fp64 are all-reduced; anything shorter is exchanged and added up in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ds_lightning.schedule import Group

# torch 2.14 renamed it, and warns of the old name at every call.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

WIRE_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


def as_wire_dtype(wire_dtype: Any) -> torch.dtype | None:
    """The torch dtype that ``wire_dtype`` names, ``None`` for as stored, or a ``ValueError``."""
    dtype = WIRE_DTYPES.get(wire_dtype.removeprefix("torch.")) if isinstance(wire_dtype, str) else wire_dtype
    if isinstance(wire_dtype, str) and dtype is None:
        dtype = getattr(torch, wire_dtype.removeprefix("torch."), None)  # "bfloat16", "torch.float16"
    if wire_dtype is not None and dtype not in WIRE_DTYPES.values():
        names = ", ".join(f"{name!r} (torch.{str(d).removeprefix('torch.')})" for name, d in WIRE_DTYPES.items())
        raise ValueError(f"wire_dtype={wire_dtype!r} is not supported. HINT: use None (as stored), {names}.")
    return dtype


class Codec:
    """Rounds values to the bytes of a floating dtype and back, row by row."""

    block = 1  # rows are a multiple of this long

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, values: Tensor) -> Tensor:
        """Values of shape (..., n) as uint8 of shape (..., m)."""
        if self.dtype == torch.float16:
            # Any rounding keeps the mean, also clipping to what fp16 can hold; infinity would not.
            values = values.clamp(-65504.0, 65504.0)
        return values.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 of shape (..., m) as values of shape (..., n) in ``dtype``."""
        return code.view(self.dtype).to(dtype)


class Int8Codec(Codec):
    """Rounds to 8 bits with one fp32 scale for every block of 64 values (8.5 bits per value)."""

    block = 64

    def __init__(self) -> None:
        super().__init__(torch.int8)

    @override
    def encode(self, values: Tensor) -> Tensor:
        blocks = values.float().unflatten(-1, (-1, self.block))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        # A block of zeros has scale 0 and stays zero. A NaN or infinity makes its block NaN, as it should be seen.
        levels = torch.where(scale == 0, 0.0, blocks / scale).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([levels.flatten(-2).view(torch.uint8), scale.flatten(-2).contiguous().view(torch.uint8)], -1)

    @override
    def decode(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = code.shape[-1] // (self.block + 4)
        levels, scale = code.split([blocks * self.block, blocks * 4], -1)
        scale = scale.contiguous().view(torch.float32).unsqueeze(-1)
        values: Tensor = levels.contiguous().view(torch.int8).unflatten(-1, (-1, self.block)) * scale
        return values.flatten(-2).to(dtype)


def codec_for(dtype: torch.dtype) -> Codec | None:
    """The codec of a wire dtype, or ``None`` where an all-reduce in that dtype adds precisely enough."""
    if dtype in (torch.float32, torch.float64):
        return None
    return Int8Codec() if dtype == torch.int8 else Codec(dtype)


class RunningAverage:
    """The average of ``flat`` over a group, under way. Created on all members; :meth:`wait` gives the difference.

    Args:
        flat: 1-d values, fp32 or fp64, of the same length on all members; must not change before :meth:`wait`.
        members: Ranks of the group.
        group: Their process group.
        wire: dtype to send in: ``flat.dtype`` or one of ``WIRE_DTYPES``.
        timed: Whether :meth:`seconds` will be asked for.
    """

    def __init__(
        self, flat: Tensor, members: Group, group: dist.ProcessGroup, wire: torch.dtype, timed: bool = False
    ) -> None:
        self._flat, self._members, self._group = flat, members, group
        self._size = len(members)
        self._codec = codec_for(wire)
        self.bytes_sent = 0
        if self._codec is None:
            self._received = flat.to(wire, copy=True)
            work: Any = dist.all_reduce(self._received, group=group, async_op=True)
            self.bytes_sent = 2 * (self._size - 1) * self._received.nbytes // self._size
        else:
            # Pairs swap whole copies. Larger groups cut them into one shard per member, whose owner averages it: twice
            # as many messages, but the bytes of a ring all-reduce instead of g - 1 copies.
            shards = 1 if self._size == 2 else self._size
            row = -(-flat.numel() // (shards * self._codec.block)) * self._codec.block
            padded = torch.nn.functional.pad(flat, (0, shards * row - flat.numel())).view(shards, row)
            self._own = self._codec.encode(padded)
            if shards == 1:
                self._received = self._own.new_empty((self._size, self._own.shape[1]))
                work = _all_gather(self._received.view(-1), self._own.view(-1), group=group, async_op=True)
                self.bytes_sent = self._own.nbytes
            else:
                self._received = torch.empty_like(self._own)
                work = dist.all_to_all_single(self._received, self._own, group=group, async_op=True)
                self.bytes_sent = 2 * (self._size - 1) * self._own.nbytes // self._size
        self._work = work
        on_device = flat.device.type == "cuda" and dist.get_backend(group) == "nccl"
        self._clock: _Clock = _DeviceClock(work) if timed and on_device else _HostClock(work) if timed else _Clock()

    def wait(self) -> Tensor:
        """``average - Q(own)``: shape and dtype of ``flat``. On CUDA the current stream waits, not the host."""
        self._clock.wait_begins()
        self._work.wait()
        self._clock.wait_ends()
        dtype, n = self._flat.dtype, self._flat.numel()
        if self._codec is None:
            return self._received.to(dtype).div_(self._size).sub_(self._flat)
        mean = self._codec.decode(self._received, dtype).sum(0).div_(self._size)
        if self._own.shape[0] == 1:
            return mean.sub_(self._codec.decode(self._own, dtype).view(-1))[:n]
        rounded = self._codec.encode(mean)
        everyones = torch.empty_like(self._own)
        self._clock.wait_begins()
        _all_gather(everyones.view(-1), rounded.view(-1), group=self._group)
        self._clock.wait_ends()
        difference = self._codec.decode(everyones, dtype).sub_(self._codec.decode(self._own, dtype))
        # Rounding the mean of a shard moves all g copies of it: the owner takes g times the residual back.
        residual = mean.sub_(self._codec.decode(rounded, dtype)).mul_(self._size)
        difference[self._members.index(dist.get_rank())].add_(residual)
        return difference.view(-1)[:n]

    def seconds(self) -> tuple[float, float]:
        """Seconds that somebody waited for the average, and seconds that it ran in all; after :meth:`wait`."""
        return self._clock.waited(), self._clock.ran()


def exact_mean_(flat: Tensor) -> Tensor:
    """Replace ``flat`` by its mean over all ranks, added in fp64 and rounded once.

    Equal values stay as they are, bit for bit, at any number of ranks, so a second call changes nothing. The bytes are
    those of a ring all-reduce in ``flat``'s dtype.

    Args:
        flat: 1-d floating values of the same length on all ranks; changed in place.
    """
    ranks = dist.get_world_size()
    row = -(-flat.numel() // ranks)
    padded = torch.nn.functional.pad(flat, (0, ranks * row - flat.numel())).view(ranks, row)
    raw = padded.view(torch.uint8)
    received = torch.empty_like(raw)
    dist.all_to_all_single(received, raw)
    mean = received.view(flat.dtype).sum(0, dtype=torch.float64).div_(ranks).to(flat.dtype)
    everyones = torch.empty_like(padded)
    _all_gather(everyones.view(-1).view(torch.uint8), mean.view(torch.uint8))
    return flat.copy_(everyones.view(-1)[: flat.numel()])


def is_averaged(tensor: Tensor) -> bool:
    """Whether a tensor holds floating (or complex) values, stored densely."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout == torch.strided


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached strided tensors without repetition: of tied ones, which share memory, only the first.

    A tensor that was expanded (stride 0) appears as the elements that it really has, so that it can be written to.
    """
    seen: dict[object, Tensor] = {}
    for t in tensors:
        if t.layout == torch.strided and t.numel():
            t = t.detach()
            for dim, stride in enumerate(t.stride()):
                t = t.narrow(dim, 0, 1) if stride == 0 else t
            seen.setdefault((t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()), t)
    return list(seen.values())


def by_dtype(tensors: Iterable[Tensor]) -> list[tuple[torch.dtype, list[Tensor]]]:
    """Distinct tensors by dtype, in order of appearance, as reals."""
    result: dict[torch.dtype, list[Tensor]] = {}
    for t in distinct(tensors):
        result.setdefault(as_real(t).dtype, []).append(as_real(t))
    return list(result.items())


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of twice as many reals."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A flat copy of tensors, in fp32 (fp64 if they are), in which sums are precise enough."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(split(flat, tensors), list(tensors))
    return flat


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the flat tensor in the shapes of ``like``."""
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in like]), like, strict=True)]


class _Clock:
    """No time is taken."""

    def wait_begins(self) -> None:
        """The average is needed from here on."""

    def wait_ends(self) -> None:
        """Whatever needed it goes on."""

    def waited(self) -> float:
        """Seconds between the two, in all."""
        return 0.0

    def ran(self) -> float:
        """Seconds from the start of the collective to its end, waited for or not."""
        return 0.0


class _HostClock(_Clock):
    """Times a collective whose `wait` blocks the host (gloo)."""

    def __init__(self, work: Any) -> None:
        self._start = self._begun = self._ended = time.perf_counter()
        self._done: float | None = None
        self._waited = 0.0
        work.get_future().add_done_callback(self._on_done)

    def _on_done(self, _: Any) -> None:
        self._done = time.perf_counter()

    @override
    def wait_begins(self) -> None:
        self._begun = time.perf_counter()

    @override
    def wait_ends(self) -> None:
        self._ended = time.perf_counter()
        self._waited += self._ended - self._begun

    @override
    def waited(self) -> float:
        return self._waited

    @override
    def ran(self) -> float:
        done = self._ended if self._done is None else min(self._done, self._ended)
        return max(done - self._start, self._waited)


class _DeviceClock(_Clock):
    """Times a collective that runs on a CUDA stream of its own (NCCL), without blocking the host."""

    def __init__(self, work: Any) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._done = torch.cuda.Event(enable_timing=True)
        self._intervals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start.record()
        # Only a side stream waits here, so that its event marks the end of the collective and nothing else is held up.
        with torch.cuda.stream(torch.cuda.Stream()):
            work.wait()
            self._done.record()

    @override
    def wait_begins(self) -> None:
        self._intervals.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._intervals[-1][0].record()

    @override
    def wait_ends(self) -> None:
        self._intervals[-1][1].record()

    @override
    def waited(self) -> float:
        self._intervals[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._intervals) / 1000)

    @override
    def ran(self) -> float:
        self._done.synchronize()
        return max(float(self._start.elapsed_time(self._done)) / 1000, self.waited())
