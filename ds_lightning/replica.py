"""A rank's own replica in a file: a stopped run goes on bit for bit as if it had not been stopped.

A checkpoint holds the average over ranks, and saving one makes all replicas equal. That is a consensus point like those
of the run that is not stopped, unless a signal asked for it. Then, with ``save_replicas=True``, every rank first writes
what is its own beside the checkpoint ``hpc_ckpt_1.ckpt``, in ``replicas_1/rank_0.ckpt`` and so on, and takes it back
before the first batch of the resumed run.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module

from ds_lightning.checkpoint import AtomicCheckpointIO

if TYPE_CHECKING:
    from ds_lightning.strategy import DSSyncStrategy


def save_replica(strategy: DSSyncStrategy, checkpoint: str) -> str | None:
    """Write this rank's replica beside ``checkpoint``, which is saved next. Collective.

    Returns:
        What the checkpoint must be told, so that no other's replicas are taken for its own; None if a rank could not
        write.
    """
    mark = [f"{random.SystemRandom().getrandbits(64):x}"]
    dist.broadcast_object_list(mark, src=0)
    state = {"mark": mark[0], "random": _random_states(), "values": [*_tensors(strategy.averaged_modules())]}
    state["own"] = [each.state_dict() for each in strategy.of_each_rank()]
    state["synchronizers"] = [synchronizer.own_state() for synchronizer in strategy.synchronizers_in_order()]
    problem = None
    try:
        AtomicCheckpointIO().save_checkpoint(state, _folder(checkpoint) / f"rank_{strategy.global_rank}.ckpt")
    except OSError as error:  # the checkpoint is saved all the same
        problem = str(error)
    problem = _first(problem)
    if problem is not None:
        rank_zero_warn(f"dssync: a replica could not be saved, so that no run can go on bit for bit: {problem}.")
        return None
    return mark[0]


def remove_older(checkpoint: str) -> None:
    """Replicas beside earlier checkpoints of the same folder, which a whole newer one has made useless."""
    keep = _folder(checkpoint)
    for file in keep.parent.glob("replicas_*/rank_0.ckpt"):
        if file.parent != keep:
            shutil.rmtree(file.parent, ignore_errors=True)


def load_replica(strategy: DSSyncStrategy, checkpoint: Any, mark: str) -> dict[str, Any] | None:
    """Read this rank's replica; None, on all ranks alike, if one of them has none. Collective."""
    path = _folder(checkpoint) / f"rank_{strategy.global_rank}.ckpt"
    state, problem = None, None
    try:
        state = AtomicCheckpointIO().load_checkpoint(path)
        if state.get("mark") != mark:
            problem = f"{path} belongs to another checkpoint"
    except (OSError, ValueError) as error:
        problem = str(error)
    problem = _first(problem)
    if problem is not None:
        rank_zero_warn(f"dssync: going on from the average of all replicas, not bit for bit: {problem}.")
        return None
    return state


@torch.no_grad()
def restore_replica(strategy: DSSyncStrategy, state: dict[str, Any]) -> None:
    """Make this rank what it was when ``state`` was saved."""
    for tensor, value in zip(_tensors(strategy.averaged_modules()), state["values"], strict=True):
        tensor.copy_(value)
    for each, own in zip(strategy.of_each_rank(), state["own"], strict=True):
        each.load_state_dict(own)
    for synchronizer, own in zip(strategy.synchronizers_in_order(), state["synchronizers"], strict=True):
        synchronizer.load_own_state(own)
    numpy = state["random"]["numpy"]
    _set_rng_states(state["random"] | {"numpy": (numpy[0], np.asarray(numpy[1], dtype=np.uint32), *numpy[2:])})
    rank_zero_info("dssync: every rank goes on with its own replica.")


def _first(problem: str | None) -> str | None:
    """The first that any rank has."""
    problems = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p is not None), None)


def _random_states() -> dict[str, Any]:
    states = _collect_rng_states()
    kind, keys, *rest = states["numpy"]
    return states | {"numpy": (kind, keys.tolist(), *rest)}  # no array: it could not be loaded with weights_only


def _tensors(modules: Iterable[Module]) -> Iterable[Tensor]:
    return chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)


def _folder(checkpoint: Any) -> Path:
    # Lightning takes whatever has "hpc_ckpt_" in its name for a checkpoint.
    path = Path(checkpoint)
    return path.with_name(path.stem.replace("hpc_ckpt", "replicas"))
