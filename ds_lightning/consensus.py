"""Consensus points: every replica becomes the exact global average, and whatever cannot be averaged becomes rank 0's.

Used where something looks at *the* model: evaluation, checkpoint, end of training. Chunked, so that the memory it takes
is bounded; not on the hot path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from ds_lightning.groups import require_agreement
from ds_lightning.wire import by_dtype, distinct, exact_mean_, is_averaged, split

# Of all values, the share that travels at a time, at least and at most so many: bounds the memory to a few times this
# (or the largest tensor).
_CHUNKS, _SMALLEST_CHUNK, _LARGEST_CHUNK = 32, 1 << 18, 1 << 23

_OTHER, _HISTORY = "other", "history"


@torch.no_grad()
def broadcast_from_rank_0(module: Module) -> None:
    """Give every rank the parameters and buffers of rank 0, after checking that the models are alike.

    Raises:
        ValueError: On every rank alike, if names, shapes, dtypes or ``requires_grad`` differ between ranks, or a
            parameter has no shape yet.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, t in named if isinstance(t, UninitializedParameter | UninitializedBuffer)]
    error = f"parameters {lazy} have no shape yet. HINT: run one batch through the model first." if lazy else None
    # Values travel as they lie in memory, for instance in channels-last order.
    layout = (
        [] if lazy else [f"{n} {[*t.shape]} {t.dtype} requires_grad={t.requires_grad}{_order(t)}" for n, t in named]
    )
    require_agreement("the model's parameters and buffers", layout, error)
    _broadcast(t for _, t in named)


def _order(tensor: Tensor) -> str:
    ordinary = tensor.layout != torch.strided or tensor.is_contiguous()
    return "" if ordinary else f" strides={[*tensor.stride()]}"


@torch.no_grad()
def consensus_of(modules: Iterable[Module]) -> None:
    """Exact global average of all float parameters and buffers of ``modules``; other tensors become rank 0's."""
    tensors = list(chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules))
    average_exactly(t for t in tensors if is_averaged(t))
    _broadcast(t for t in tensors if not is_averaged(t))


@torch.no_grad()
def consensus_of_optimizer_state(optimizer: Optimizer) -> None:
    """Make the state of ``optimizer`` the same on all ranks, as a checkpoint holds it.

    Floating tensors become their mean over the ranks that have them, and are made where they are missing (on a rank
    that never used the parameter). Counts and other values come from the lowest rank that has them; so does the whole
    state of a parameter that holds a history of unlike length per rank, such as LBFGS's.
    """
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    mine = [{name: _kind(value) for name, value in optimizer.state.get(p, {}).items()} for p in parameters]
    ranks = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)

    averaged: list[tuple[Tensor, int]] = []
    taken: dict[int, list[tuple[int, str]]] = {}
    for i, p in enumerate(parameters):
        states = [rank[i] for rank in ranks]
        kinds: dict[str, set[Any]] = {}
        for state in states:
            for name, kind in state.items():
                kinds.setdefault(name, set()).add(kind)
        whole = any(_HISTORY in k or len(k) > 1 for k in kinds.values())
        for name, (kind, *_) in kinds.items():
            owners = [rank for rank, state in enumerate(states) if name in state]
            if whole:
                first = next(rank for rank, state in enumerate(states) if state)
                taken.setdefault(first, []).append((i, name))
            elif kind == _OTHER:
                taken.setdefault(owners[0], []).append((i, name))
            else:
                shape, dtype, on_cpu = kind
                device = torch.device("cpu") if on_cpu else p.device
                value = optimizer.state[p].setdefault(name, torch.zeros(shape, dtype=dtype, device=device))
                averaged.append((value, len(owners)))

    average_exactly(value for value, _ in averaged)
    for value, count in averaged:
        if count < len(ranks):
            value.mul_(len(ranks) / count)  # missing ones counted as zero
    for owner, places in sorted(taken.items()):
        values = [{place: optimizer.state[parameters[place[0]]].get(place[1]) for place in places}]
        dist.broadcast_object_list(values, src=owner)
        for (i, name), value in values[0].items():
            if owner != dist.get_rank():
                optimizer.state[parameters[i]][name] = _to(value, parameters[i].device)


def _kind(value: Any) -> Any:
    """How an optimizer's state value is made the same everywhere; comparable between ranks."""
    if isinstance(value, Tensor) and is_averaged(value):
        return (*value.shape,), value.dtype, value.device.type == "cpu"
    return _HISTORY if isinstance(value, list | tuple | dict | set) else _OTHER


def _to(value: Any, device: torch.device) -> Any:
    """What another rank's pickle says lies on *its* device, on this rank's."""
    if isinstance(value, Tensor):
        return value if value.device.type == "cpu" else value.to(device)
    return [_to(v, device) for v in value] if isinstance(value, list) else value


def average_exactly(tensors: Iterable[Tensor]) -> None:
    """Replace floating tensors by their exact means over all ranks. Collective."""
    for _, same_dtype in by_dtype(tensors):
        for chunk in chunks(same_dtype):
            flat = torch.cat([t.reshape(-1).to(_device()) for t in chunk])
            for t, mean in zip(chunk, split(exact_mean_(flat), chunk), strict=True):
                t.copy_(mean)


def _broadcast(tensors: Iterable[Tensor]) -> None:
    for chunk in chunks(distinct(tensors)):
        # Only values without gaps can be seen as bytes, and a single one of stride 0 counts as contiguous.
        flat = torch.cat([_copy(t.reshape(-1)).view(torch.uint8).to(_device()) for t in chunk])
        dist.broadcast(flat, src=0)
        sizes = [t.numel() * t.element_size() for t in chunk]
        for t, value in zip(chunk, flat.split(sizes), strict=True):
            t.copy_(value.clone().view(t.dtype).view(t.shape))  # cloned: a view must be aligned


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of tensors that travel together, so that the memory for it is bounded."""
    most = min(max(sum(t.numel() for t in tensors) // _CHUNKS, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    chunk: list[Tensor] = []
    for t in tensors:
        if chunk and sum(c.numel() for c in chunk) + t.numel() > most:
            yield chunk
            chunk = []
        chunk.append(t)
    if chunk:
        yield chunk


def _device() -> torch.device:
    """Where the default process group's collectives run: also what lies on the CPU must travel there (NCCL)."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
