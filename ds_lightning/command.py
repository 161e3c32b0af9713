"""What the commands of ``python -m ds_lightning`` share. Imports nothing that is not Python's own."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import Self, override

# Where there is no bar: seconds between lines that say how far it is.
_EVERY = 10.0
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_MOST_PARAMETERS = 10**15
_LONGEST_COMPUTE = 1e6


class Parser(argparse.ArgumentParser):
    """Wrong input is one line on stderr and exit code 2. Abbreviations would break with the next option."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            prog=f"python -m ds_lightning {name}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parameters(text: str) -> int:
    """A number of parameters as people write it, for argparse."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(e[0-9]{1,2})?([kmbgt]?)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters; write one like 110M, 1.5B or 123456")
    number = round(Fraction(match[1].rstrip(".") + (match[2] or "")) * _SUFFIXES[match[3]])
    if not 1 <= number <= _MOST_PARAMETERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and {_MOST_PARAMETERS:g} parameters")
    return number


def seconds(text: str) -> float:
    """A number of seconds, for argparse."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; write one like 0.35") from None
    if not 0 <= number <= _LONGEST_COMPUTE:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and {_LONGEST_COMPUTE:g} seconds")
    return number


def check_output(output: Path, name: str) -> None:
    """A ``ValueError`` if no folder of that name can be made there: now, not when all is done."""
    place = output / name
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--output {output}: {place} is a file. HINT: name a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output}: {place} is not writable. HINT: name another folder.")


def require(module: str) -> Any:
    """A module that only the ``recipes`` extra brings.

    Raises:
        ModuleNotFoundError: If it cannot be imported; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{module.partition('.')[0]} cannot be imported ({error})."
            " HINT: pip install 'ds_lightning[recipes]' brings what pictures and data need.",
            name=module,
        ) from None


def dated_folder(parent: Path) -> Path:
    """A new folder below ``parent``, named by the time."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for i in range(1, 1000):
        folder = parent / (name if i == 1 else f"{name}_{i}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
        else:
            return folder
    raise FileExistsError(f"{parent} has 999 folders named {name}")


class Progress:
    """How far a long command is, on stderr: rich's bar on a terminal where rich is installed, else lines.

    Args:
        total: Units of work.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, doing: str, units: int = 1) -> None:
        """So many more units are done, of what ``doing`` names."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=doing)
        elif time.monotonic() - self._said > _EVERY:
            self.line(doing)

    def line(self, text: str) -> None:
        """Say something worth a line, where there is no bar."""
        if self._bar is None:
            print(f"{self._done / self._total:4.0%}  {text}", file=sys.stderr, flush=True)
            self._said = time.monotonic()
