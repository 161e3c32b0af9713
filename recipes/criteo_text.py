"""Criteo's text format: a line per row, 40 columns between tabs, where a missing value is empty.

The columns are the label (0 or 1), 13 integers and 26 categories of 8 hexadecimal digits. Files are cut into chunks of
equal numbers of rows, counted over all files, so that neither where a file ends nor who reads a chunk matters.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import csv

NUMBERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
COLUMNS = ["label", *NUMBERS, *CATEGORIES]
CHARACTERS = b"0123456789abcdefABCDEF-\t\r\n"
BLOCK = 1 << 22

_RULES = (
    ("label", r"[01]", "0 or 1"),
    *((name, r"(-?0*\d{1,18})?", "an integer of at most 18 digits or empty") for name in NUMBERS),
    *((name, r"([0-9a-fA-F]{8})?", "8 hexadecimal digits or empty") for name in CATEGORIES),
)


class Segment(NamedTuple):
    """A stretch of whole lines of a file, and the number of its first line."""

    path: str
    start: int
    end: int
    line: int


Chunk = list[Segment]


def check(path: Path) -> None:
    """Refuses what cannot be read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty or compressed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.resolve()}. HINT: name Criteo's text files, then a folder to write.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. HINT: leave it out, or copy or unpack it again.")
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"{path} is compressed. HINT: gunzip it.")


def cut(files: list[Path], rows: int, progress: Callable[[int], object] = lambda size: None) -> list[Chunk]:
    """Cuts files that count as one into chunks of `rows` rows, reading them block by block.

    Args:
        files: in this order.
        rows: of a chunk; the last has the rest.
        progress: is told of every block's bytes.
    """
    chunks: list[Chunk] = [[]]
    left = rows  # until the present chunk is full
    for path in files:
        size = path.stat().st_size
        start, line, position, seen = 0, 1, 0, 0
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                ends = block.count(b"\n")
                if ends >= left:  # a chunk ends in this block: where?
                    newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
                    done = 0
                    while ends - done >= left:
                        done += left
                        end = position + int(newlines[done - 1]) + 1
                        chunks[-1].append(Segment(str(path), start, end, line))
                        chunks.append([])
                        seen += left
                        start, line, left = end, seen + 1, rows
                    ends -= done
                left -= ends
                seen += ends
                position += len(block)
                progress(len(block))
                last = block[-1:]
        if start < size:
            chunks[-1].append(Segment(str(path), start, size, line))
            if last != b"\n":
                left -= 1
                if left == 0:
                    chunks.append([])
                    left = rows
    return [chunk for chunk in chunks if chunk]


def read(chunk: Chunk) -> pa.Table:
    """Parses a chunk.

    Returns:
        The columns as they are: the label as int8, integers as int64, categories as strings, missing values as nulls.

    Raises:
        ValueError: If a row is not of the format; names file, line and column.
    """
    text = b"".join(_lines(segment) for segment in chunk)
    kinds = {"label": pa.string()} | dict.fromkeys(NUMBERS, pa.int64()) | dict.fromkeys(CATEGORIES, pa.string())
    try:
        table = csv.read_csv(
            pa.BufferReader(text),
            csv.ReadOptions(use_threads=False, column_names=COLUMNS),
            csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            csv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=True),
        )
        # pyarrow trims blanks, and reads 0x1F and what is beyond 18 digits, which are none of Criteo's.
        valid = len(table) == text.count(b"\n") and not text.translate(None, CHARACTERS)
        valid = valid and pc.all(pc.is_in(table["label"], pa.array(["0", "1"]))).as_py()
        bounds = (pc.min_max(table[name]).as_py() for name in NUMBERS)
        valid = valid and all(abs(x or 0) < 10**18 for bound in bounds for x in bound.values())
        valid = valid and all(_hexadecimal(array) for name in CATEGORIES for array in table[name].chunks)
    except pa.ArrowInvalid:
        valid = False
    if not valid:
        raise ValueError(_fault(chunk))
    return table.set_column(0, "label", table["label"].cast(pa.int8()))


def identifiers(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """The categories of a column that :func:`read` has read as numbers below 2 ** 32, -1 where missing."""
    array = column.combine_chunks()
    numbers = np.full(len(array), -1, np.int64)
    numbers[array.is_valid().to_numpy(zero_copy_only=False)] = np.frombuffer(binascii.unhexlify(_digits(array)), ">u4")
    return numbers


def _lines(segment: Segment) -> bytes:
    with open(segment.path, "rb") as file:
        file.seek(segment.start)
        text = file.read(segment.end - segment.start)
    return text if text.endswith(b"\n") else text + b"\n"


def _digits(array: pa.StringArray) -> bytes:
    """The characters of all strings, one after the other; missing ones have none."""
    _, offsets, characters = array.buffers()
    ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    return b"" if characters is None else characters.to_pybytes()[ends[0] : ends[-1]]


def _hexadecimal(array: pa.StringArray) -> bool:
    lengths = np.diff(np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1])
    if not np.isin(lengths, (0, 8)).all():
        return False
    try:
        binascii.unhexlify(_digits(array))
    except binascii.Error:
        return False
    return True


def _fault(chunk: Chunk) -> str:
    """Says what is wrong with the first row that is not of the format."""
    for segment in chunk:
        for number, line in enumerate(_lines(segment).split(b"\n")[:-1], start=segment.line):
            values = line.decode("latin-1").removesuffix("\r").split("\t")
            where = f"{segment.path}, line {number}:"
            if len(values) != len(COLUMNS):
                return (
                    f"{where} {len(values)} columns, but a row has {len(COLUMNS)} (label, 13 integers, 26 categories) "
                    "with tabs between them. HINT: repair or delete the line, then run the same command again."
                )
            for (name, pattern, rule), value in zip(_RULES, values, strict=True):
                if not re.fullmatch(pattern, value, re.ASCII):
                    return (
                        f"{where} {name} is {value[:40]!r}, but must be {rule}. "
                        "HINT: repair or delete the line, then run the same command again."
                    )
    first = chunk[0]
    return f"{first.path} from line {first.line} on cannot be read. HINT: has it changed? Start with a new folder."
