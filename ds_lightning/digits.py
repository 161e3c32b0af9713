"""What virtual workers learn, unless they are given something else: scikit-learn's digits, by a small MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_lightning.command import require


@dataclass(frozen=True)
class Data:
    """What is learned: samples and their classes, to train on and to test with."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(seed: int = 0) -> Data:
    """scikit-learn's 1,797 real digits of 8x8 pixels, which ship with it: 80% to train on, normalized.

    Raises:
        ModuleNotFoundError: If scikit-learn is missing; says how to install it.
    """
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train, test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    mean, std = train.mean(), train.std()
    return Data((train - mean) / std, torch.tensor(parts[2]), (test - mean) / std, torch.tensor(parts[3]))


def mlp() -> nn.Module:
    """64 inputs, 64 hidden units, 10 classes."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
