"""Rows in Criteo's format from a planted model, so that the AUC that no other model can beat is known.

A row's logit is the sum of its categories' weights, the products of the vectors of some pairs of fields, and slopes
times the logarithms of its numbers. Categories follow Zipf's law, and the rare ones of a field share weight and vector:
no model could learn them. Each row takes a fixed number of draws from one stream, so rows depend on the seed and their
number only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv
from rich.progress import track

from recipes.criteo_text import CATEGORIES, COLUMNS, NUMBERS

Array = np.ndarray[Any, Any]

ROWS = 50_000  # at a time
DRAWS = 1 + 2 * len(NUMBERS) + 2 * len(CATEGORIES)  # of a row
# Fields of a few and of up to 100,000 categories.
VOCABULARY = np.geomspace(4, 100_000, len(CATEGORIES)).astype(int)
OWN = 20  # most frequent categories of a field with a weight of their own
PAIRS = [(i, i + 3) for i in range(6)]
LENGTH = 4  # of the vectors
MISSING = np.linspace(0, 0.4, len(CATEGORIES))[::-1]  # shares of missing values, small fields more often
BINS = 200_000  # of logits between -20 and 20, for the AUC


class Planted:
    """The model.

    Args:
        seed: of weights, vectors and slopes.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        fields = len(CATEGORIES)
        self.weights = rng.normal(0, 0.25, (fields, OWN + 1))
        self.vectors = rng.normal(0, 0.4, (fields, OWN + 1, LENGTH))
        self.slopes = rng.normal(0, 0.1, len(NUMBERS))
        self.scales = rng.uniform(0.5, 2.5, len(NUMBERS))  # of the numbers' logarithms

    def rows(self, seed: int, first: int, count: int) -> tuple[Array, Array, Array, Array]:
        """Draws rows `first` to `first + count`.

        Returns:
            Labels, integers with NaN where missing, categories from 0 on with -1 where missing, and the logits.
        """
        draws = np.random.Generator(np.random.PCG64([seed, 2]).advance(first * DRAWS)).random((count, DRAWS))
        label, numbers, gaps, categories, absent = np.split(
            draws, np.cumsum([1, len(NUMBERS), len(NUMBERS), len(CATEGORIES)]), axis=1
        )
        numbers = np.floor(np.expm1(-np.log1p(-numbers) * self.scales).clip(max=1e6))
        centred = np.log1p(numbers) - self.scales
        missing = gaps < 0.1
        centred[missing], numbers[missing] = 0.0, np.nan
        drawn = np.floor((VOCABULARY + 1.0) ** categories).astype(np.int64) - 1  # Zipf's law with exponent 1
        drawn = np.minimum(drawn, VOCABULARY - 1)
        own = np.minimum(drawn, OWN)
        gone = absent < MISSING
        drawn[gone], own[gone] = -1, OWN  # a missing one is as a rare one
        fields = np.arange(len(CATEGORIES))
        logits = -1.3 + self.weights[fields, own].sum(1) + (centred * self.slopes).sum(1)
        for left, right in PAIRS:
            logits += (self.vectors[left, own[:, left]] * self.vectors[right, own[:, right]]).sum(1)
        return (label[:, 0] < 1 / (1 + np.exp(-logits))).astype(np.int8), numbers, drawn, logits


def synthesize(out: Path, rows: int, seed: int) -> dict[str, float]:
    """Writes rows to a text file.

    Returns:
        The AUC and the log-loss that the planted probabilities of these rows are expected to have, over the labels.

    Raises:
        ValueError: If there are no rows to be written.
    """
    if rows < 1:
        raise ValueError(f"--rows is {rows}, but must be at least 1")
    planted = Planted(seed)
    clicks, others = np.zeros(BINS), np.zeros(BINS)
    loss = 0.0
    unfinished = Path(out).with_name(f"{Path(out).name}.{os.getpid()}.tmp")
    form = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with open(unfinished, "wb") as file:
        for first in track(range(0, rows, ROWS), "writing rows", transient=True, disable=not sys.stdout.isatty()):
            labels, numbers, categories, logits = planted.rows(seed, first, min(ROWS, rows - first))
            columns = [pa.array(labels), *(pa.array(x, pa.int64(), from_pandas=True) for x in numbers.T)]
            columns += [_names(field, categories[:, field]) for field in range(len(CATEGORIES))]
            csv.write_csv(pa.table(columns, COLUMNS), file, form)
            probabilities = 1 / (1 + np.exp(-logits))
            places = ((logits.clip(-20, 19.999) + 20) / 40 * BINS).astype(int)
            clicks += np.bincount(places, probabilities, BINS)
            others += np.bincount(places, 1 - probabilities, BINS)
            loss += float(np.sum(np.logaddexp(0, logits) - probabilities * logits))
    os.replace(unfinished, out)
    below = np.cumsum(others) - others / 2  # rows of the same bin count half
    return {"auc": float(clicks @ below / (clicks.sum() * others.sum())), "logloss": loss / rows}


def _names(field: int, categories: Array) -> pa.StringArray:
    """Categories as 8 hexadecimal digits: a product with an odd number is one to one modulo 2 ** 32."""
    present = categories >= 0
    hashes = (categories[present] * 2654435761 + field * 40503) % 2**32
    ends = np.concatenate([[0], 8 * np.cumsum(present)]).astype(np.int32)
    digits = hashes.astype(">u4").tobytes().hex().encode()
    valid = np.packbits(present, bitorder="little").tobytes()
    return pa.StringArray.from_buffers(len(categories), pa.py_buffer(ends), pa.py_buffer(digits), pa.py_buffer(valid))
