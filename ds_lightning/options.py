"""Checks of what a user gave to the strategy, as far as they need no ranks."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from ds_lightning.schedule import as_int

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
