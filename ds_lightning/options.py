"""Checks of what a user gave to the strategy, as far as they need no ranks."""

from __future__ import annotations

import inspect
import math
import multiprocessing
from datetime import timedelta
from difflib import get_close_matches
from numbers import Real
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from ds_lightning.schedule import as_int
from ds_lightning.topology import Topology

# What DDPStrategy takes to change how gradients travel, which is what DSSyncStrategy replaces.
_REPLACED = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")


def check_ddp_kwargs(ddp_kwargs: dict[str, Any], own: set[str]) -> None:
    """Raise a ``ValueError`` for what cannot be used or is unknown, and warn of what has no effect.

    Args:
        ddp_kwargs: What DSSyncStrategy was given besides its own options.
        own: The names of those, to suggest in the place of a misspelt one.
    """
    if given := [name for name in _REPLACED if ddp_kwargs.get(name) is not None]:
        raise ValueError(
            f"{given[0]}={ddp_kwargs[given[0]]!r} cannot be used with DSSyncStrategy, which averages parameters in the"
            " place of DDP's gradients. HINT: for fewer bytes use wire_dtype, for averages further apart sync_every,"
            " or use Lightning's DDPStrategy."
        )
    strategy = set(inspect.signature(DDPStrategy.__init__).parameters) - {"self", "kwargs"}
    module = {k: p.default for k, p in inspect.signature(DistributedDataParallel).parameters.items() if k != "module"}
    # LightningCLI passes every option that it knows, at its default.
    if idle := sorted(k for k, value in ddp_kwargs.items() if k in module and value != module[k]):
        rank_zero_warn(
            f"dssync: {', '.join(idle)} of DistributedDataParallel {'has' if len(idle) == 1 else 'have'} no effect:"
            " gradients stay local, so nothing is wrapped. Unused parameters need no option."
        )
    if unknown := sorted(set(ddp_kwargs) - strategy - set(module)):
        close = get_close_matches(unknown[0], sorted(own | strategy), n=1)
        raise ValueError(
            f"{unknown[0]}={ddp_kwargs[unknown[0]]!r} is no option of DSSyncStrategy or DDPStrategy. HINT: "
            + (f"did you mean {close[0]!r}?" if close else f"its own options are {', '.join(sorted(own))}.")
        )


def check_topology(topology: Any, schedule: Any) -> Topology | str | None:
    """The description that ``topology`` is or names, "probe", or a ``ValueError``; warns where nothing uses it."""
    wanted = isinstance(schedule, str) and schedule == "topology"
    if topology is None:
        if wanted:
            raise ValueError(
                "schedule='topology' needs a description of the network, but topology=None. HINT: pass the path of a"
                " YAML file, a Topology such as Topology.flat(hosts, bandwidth=25), or 'probe' to measure it."
            )
        return None
    if not wanted:
        rank_zero_warn(f"dssync: topology={topology!r:.60} has no effect with schedule={schedule!r}.")
    if isinstance(topology, Topology):
        return topology
    if not isinstance(topology, str | PathLike):
        raise ValueError(f"topology={topology!r} is no path and no Topology. HINT: pass the path of a YAML file.")
    if topology == "probe":
        return "probe"
    try:
        return Topology.from_yaml(str(topology))
    except OSError as error:
        hint = "" if "HINT: " in str(error) else ". HINT: name a YAML file."
        raise ValueError(f"topology={str(topology)!r} cannot be read: {error}{hint}") from None


def check_compute(compute: Any, schedule: Any) -> float | None:
    """``compute`` if it is a number of seconds or ``None``, else a ``ValueError``; warns where nothing uses it."""
    if compute is None:
        return None
    is_number = isinstance(compute, Real) and not isinstance(compute, bool)
    if not is_number or not 0 <= compute < math.inf:
        raise ValueError(
            f"compute={compute!r} is no number of seconds of at least 0. HINT: give the seconds that forward and"
            " backward of a step take, or None where that is not known."
        )
    if not (isinstance(schedule, str) and schedule == "topology"):
        rank_zero_warn(f"dssync: compute={compute!r} has no effect with schedule={schedule!r}.")
    return float(compute)


def check_timeout(timeout: Any) -> None:
    """A ``ValueError`` for what torch cannot wait for: it counts milliseconds, and overflows at a few centuries."""
    if timeout is None:
        return
    if not isinstance(timeout, timedelta) or not timedelta(milliseconds=1) <= timeout <= timedelta(days=36500):
        raise ValueError(
            f"timeout={timeout!r} is not a timedelta of 1 ms to 100 years. HINT: use timedelta(minutes=30), or None for"
            " the backend's own."
        )


def check_start_method(start_method: Any) -> None:
    """A ``ValueError`` for one that there is not, also where another launcher starts the processes."""
    known = ["popen", *multiprocessing.get_all_start_methods()]
    if start_method not in known:
        raise ValueError(f"start_method={start_method!r} is unknown. HINT: use one of {', '.join(map(repr, known))}.")


def check_backend(backend: Any, device: torch.device) -> None:
    """A ``ValueError`` for a ``process_group_backend`` that is not to be had, or not for tensors on ``device``."""
    if not backend:
        return  # the device's own
    parts = [part.rpartition(":") for part in str(backend).lower().split(",")]  # "gloo", "cpu:gloo,cuda:nccl"
    for_device = [name for kind, _, name in parts if kind in ("", device.type)]
    unavailable = [
        name
        for _, _, name in parts
        if name == "undefined"
        or not dist.is_backend_available(name)
        or (name == "nccl" and not torch.cuda.is_available())
    ]
    why = ""
    if unavailable:
        why = f"there is no {unavailable[0]!r} here"
    elif not for_device or (for_device == ["nccl"] and device.type != "cuda"):
        why = f"it has nothing for {device.type} tensors"
    elif for_device == ["gloo"] and backend.lower() != "gloo":
        why = "Lightning averages metrics by gloo only under its plain name 'gloo'"
    if why:
        raise ValueError(
            f"process_group_backend={backend!r} cannot be used: {why}. HINT: use None (nccl on GPUs, gloo on CPUs)."
        )


def check_group_size_alone(group_size: Any) -> int:
    """What can be said before the world size is known."""
    if isinstance(group_size, str):
        raise ValueError(
            f"group_size={group_size!r} is neither an int nor 'auto'. HINT: use 'auto' or 2 to world size."
        )
    size = as_int("group_size", group_size)
    if size < 1:
        raise ValueError(f"group_size={size} is too small: groups have members. HINT: use 2 or more, or 'auto'.")
    return size


def check_bool(name: str, value: Any) -> bool:
    """``value`` if it is a bool (a string such as "false" would count as true), else a ``ValueError``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a bool. HINT: use {name}=True or {name}=False.")
    return value
