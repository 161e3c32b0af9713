"""The dtypes of the wire and how values are rounded to them; the exact average; lists of tensors as flat ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

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
    if wire_dtype is None:
        return None
    dtype = wire_dtype
    if isinstance(wire_dtype, str):
        name = wire_dtype.removeprefix("torch.")
        dtype = WIRE_DTYPES.get(name, getattr(torch, name, None))  # also "bfloat16", "torch.float16"
    if not isinstance(dtype, torch.dtype) or dtype not in WIRE_DTYPES.values():
        names = ", ".join(f"{name!r} (torch.{str(d).removeprefix('torch.')})" for name, d in WIRE_DTYPES.items())
        raise ValueError(f"wire_dtype={wire_dtype!r} is not supported. HINT: use None (as stored), {names}.")
    return dtype


def wire_bytes(values: int, dtype: torch.dtype) -> float:
    """Bytes of so many values on the wire: with int8, one fp32 scale for each 64 of them as well."""
    return values * (1 + 4 / 64 if dtype == torch.int8 else dtype.itemsize)


class Code:
    """Rounded values in raw bytes: one part for each thing a codec stores, with so many elements per value.

    Args:
        codec: Says what is stored.
        raw: uint8 of ``codec.nbytes(n)``.
        n: Number of values, a multiple of ``codec.block``.
    """

    def __init__(self, codec: Codec, raw: Tensor, n: int) -> None:
        self.parts = codec.parts(raw, n)
        self._n = n

    def part(self, start: int, stop: int) -> Code:
        """The code of the values from ``start`` to ``stop``, both multiples of the block."""
        code = Code.__new__(Code)
        code.parts = tuple(
            part[start * part.numel() // self._n : stop * part.numel() // self._n] for part in self.parts
        )
        code._n = stop - start
        return code


class Codec:
    """Rounds values to a floating dtype and back, into buffers that are there already.

    Values and codes may lie on different devices (gloo sends from the host).
    """

    block = 1  # values that are rounded together

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # A plain copy rounds; but fp16 would make infinities of large values.
        self.direct = dtype != torch.float16

    def nbytes(self, n: int) -> int:
        """Bytes of the code of ``n`` values."""
        return n * self.dtype.itemsize

    def parts(self, raw: Tensor, n: int) -> tuple[Tensor, ...]:
        """Typed views of a code's bytes."""
        return (raw.view(self.dtype),)

    def encode(self, values: Tensor, code: Code) -> None:
        """Round 1-d values into ``code``; what they are afterwards is undefined."""
        if not self.direct:
            # Any rounding keeps the mean, also clipping to what fp16 can hold; infinity would not.
            values.clamp_(-65504.0, 65504.0)
        code.parts[0].copy_(values)

    def decode(self, code: Code, out: Tensor) -> None:
        """The rounded values."""
        out.copy_(code.parts[0])


class Int8Codec(Codec):
    """Rounds to 8 bits with one fp32 scale for every block of 64 values (8.5 bits per value)."""

    block = 64

    def __init__(self) -> None:
        super().__init__(torch.int8)
        self.direct = False
        self._scratch = torch.empty(0)

    @override
    def nbytes(self, n: int) -> int:
        return n + n // self.block * 4

    @override
    def parts(self, raw: Tensor, n: int) -> tuple[Tensor, ...]:
        return raw[:n].view(torch.int8), raw[n:].view(torch.float32)

    @override
    def encode(self, values: Tensor, code: Code) -> None:
        levels, scales = code.parts
        scale, magnitudes = self._room(values)
        blocks = values.view(-1, self.block)
        torch.amax(torch.abs(values, out=magnitudes).view(-1, self.block), 1, out=scale)
        scales.copy_(scale.div_(127))
        # A block of zeros stays zero. A NaN or infinity makes its block's scale one, as it should be seen.
        blocks.mul_(scale.clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_().unsqueeze(-1))
        levels.copy_(values.round_())

    @override
    def decode(self, code: Code, out: Tensor) -> None:
        levels, scales = code.parts
        scale, _ = self._room(out)
        out.copy_(levels).view(-1, self.block).mul_(scale.copy_(scales).unsqueeze(-1))

    def _room(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scratch for the scales and magnitudes of so many values, made once."""
        n, blocks = values.numel(), values.numel() // self.block
        if self._scratch.numel() < n + blocks:
            self._scratch = values.new_empty(n + blocks)
        return self._scratch[:blocks], self._scratch[blocks : blocks + n]


def codec_for(dtype: torch.dtype) -> Codec:
    """The codec of a wire dtype."""
    return Int8Codec() if dtype == torch.int8 else Codec(dtype)


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
    """Whether a tensor holds floating (or complex) values, stored densely; torch cannot add those of 8 bits."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    return floating and tensor.dtype.itemsize > 1 and tensor.layout == torch.strided


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
