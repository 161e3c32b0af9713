"""Finds values of a wrong type before anything is built from them."""

from __future__ import annotations

import collections.abc
import inspect
import os
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor


def check(cfg: DictConfig) -> None:
    """Compares values with what the signatures that they are meant for say of their types.

    Raises:
        ValueError: For a value of another type, which would be found deep inside a library, in training, or never.
    """
    for name, types in (("seed", int | None), ("compile", bool), ("metric", str), ("ckpt_path", str | None)):
        _check_type(name, cfg[name], types)
    for group in ("data", "model", "strategy", "callbacks", "logger", "trainer"):
        if OmegaConf.is_dict(cfg.get(group)):
            _check_types(group, cfg[group])
    batches = cfg.trainer.get("accumulate_grad_batches", 1)
    if batches < 1:  # Lightning would divide by it
        raise ValueError(f"trainer.accumulate_grad_batches is {batches}, but must be at least 1")


def _check_types(path: str, cfg: DictConfig) -> None:
    hints: dict[str, Any] = {}
    target = str(cfg.get("_target_", ""))
    if target and not target.startswith("ds_lightning."):  # which looks for itself
        try:
            called = get_object(target)
            # torch imports these for type checkers only.
            names = {**vars(collections.abc), "Any": Any, "Literal": Literal}
            hints = get_type_hints(called.__init__ if inspect.isclass(called) else called, localns=names)
            defaults = inspect.signature(called).parameters
        except Exception:  # there is no such target, or it says nothing: Hydra will see
            hints = {}
    for name in map(str, cfg):
        value, key = cfg[name], f"{path}.{name}"
        if OmegaConf.is_dict(value):
            if key != "trainer.strategy":  # that is the group of this name
                _check_types(key, value)
        elif name in hints and not (value is None and defaults[name].default is None):
            _check_type(key, value, hints[name])


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        expected = " or ".join(dict.fromkeys(_names(hint)))
        raise ValueError(f"{key} is {value!r}, but must be {expected}. HINT: `--cfg job` shows what it is by default.")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(hint))
    kind = get_origin(hint) or hint
    if kind in (Any, object) or isinstance(kind, TypeVar) or not inspect.isclass(kind):
        return True
    if isinstance(value, int) and not isinstance(value, bool):
        return kind in (int, float)
    if isinstance(value, str):
        return kind is str or issubclass(kind, os.PathLike)
    if value is None or isinstance(value, bool | float):
        return kind is type(value)
    return kind not in (bool, int, float, str, type(None))  # lists


def _names(hint: Any) -> list[str]:
    if get_origin(hint) in (Union, UnionType):
        return [name for one in get_args(hint) for name in _names(one)]
    if get_origin(hint) is Literal:
        return [repr(value) for value in get_args(hint)]
    kind = get_origin(hint) or hint
    if inspect.isclass(kind) and issubclass(kind, collections.abc.Iterable) and kind not in (str, Tensor):
        return ["a list"]
    return ["null" if kind is type(None) else getattr(kind, "__name__", str(kind))]
