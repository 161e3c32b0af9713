"""Shards of their own: which training samples each worker keeps for a whole run, where they are not iid."""

from __future__ import annotations

from typing import Any

import numpy as np


def concentration(partition: str) -> float | None:
    """The parameter of a `dirichlet:` partition, None for the others.

    Raises:
        ValueError: If `partition` is not iid, by_label or dirichlet: and a positive number.
    """
    kind, _, alpha = str(partition).partition(":")
    if kind in ("iid", "by_label") and not alpha:
        return None
    try:
        if kind == "dirichlet" and 0 < float(alpha) < float("inf"):
            return float(alpha)
    except ValueError:
        pass
    raise ValueError(
        f"partition is {partition!r}, but must be iid, by_label or dirichlet:ALPHA with ALPHA > 0."
        " HINT: dirichlet:0.1 is strongly skewed, dirichlet:10 nearly iid."
    )


def shards(labels: np.ndarray[Any, Any], world_size: int, partition: str, seed: int) -> list[np.ndarray[Any, Any]]:
    """Each worker's own training samples, disjoint and of equal number, so that all take the same number of steps.

    Args:
        labels: one label per sample, of any type that sorts.
        world_size: number of workers.
        partition: `by_label` sorts the samples by label and cuts; `dirichlet:ALPHA` draws for each worker the shares
            of the labels from a symmetric Dirichlet distribution, and gives it other labels when one is used up.
        seed: of the draws.

    Returns:
        For each worker the sorted indices of its samples. Up to `world_size - 1` samples are nobody's.
    """
    alpha = concentration(partition)
    rng = np.random.default_rng(seed)
    size = len(labels) // world_size
    shuffled = rng.permutation(len(labels))
    _, classes = np.unique(labels[shuffled], return_inverse=True)
    by_label = shuffled[np.argsort(classes, kind="stable")]
    if alpha is None:
        return [np.sort(by_label[rank * size : (rank + 1) * size]) for rank in range(world_size)]
    pools = np.split(by_label, np.cumsum(np.bincount(classes))[:-1])
    used = np.zeros(len(pools), dtype=int)
    result = []
    for _ in range(world_size):
        shares = rng.dirichlet([alpha] * len(pools))
        mine: list[np.ndarray[Any, Any]] = []
        needed = size
        while needed:
            left = np.array([len(pool) for pool in pools]) - used
            wanted = np.where(left > 0, shares, 0.0)
            if wanted.sum() < 1e-9:  # all that this worker was to hold is used up: draw anew among what is left
                shares = np.zeros(len(pools))
                shares[left > 0] = rng.dirichlet([alpha] * int((left > 0).sum()))
                wanted = shares
            taken = np.minimum(rng.multinomial(needed, wanted / wanted.sum()), left)
            mine += [pool[a : a + n] for pool, a, n in zip(pools, used, taken, strict=True)]
            used += taken
            needed -= int(taken.sum())
        result.append(np.sort(np.concatenate(mine)))
    return result
