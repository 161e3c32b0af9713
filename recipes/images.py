"""The data sets of the vision recipe: digits, CIFAR-10, CIFAR-100 and an ImageNet folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from typing_extensions import override

from recipes.data import RecipeData

# Channel means and standard deviations of the training images; CIFAR's are in units of one (pixel / 255).
CIFAR_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def rand_augment(augmentation: str, size: int, mean: tuple[float, ...]) -> list[Callable[[Any], Any]]:
    """What is done to a training image beside cropping and flipping it, at most one transform.

    Args:
        augmentation: `standard` does nothing more; else a RandAugment in timm's notation, `rand-m9-mstd0.5-inc1`.
        size: side of the image, which a shift is a share of.
        mean: colour that fills the border, in units of one.

    Raises:
        ValueError: If `augmentation` is neither.
    """
    if augmentation == "standard":
        return []
    try:
        if not re.fullmatch(r"rand(-[a-z]+\d+(\.\d+)?)+", augmentation):
            raise ValueError
        fill = tuple(min(255, round(255 * m)) for m in mean)
        transform = rand_augment_transform(augmentation, {"translate_const": int(0.45 * size), "img_mean": fill})
        for op in transform.ops:
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_keep_a_bit, op.level_fn)
        return [transform]
    except (AssertionError, ValueError):
        raise ValueError(
            f"data.augmentation is {augmentation!r}, but must be standard or a RandAugment of timm. "
            "HINT: rand-m9-mstd0.5-inc1"
        ) from None


def _keep_a_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """At its strongest timm would keep no bit of a colour, which Pillow refuses from version 13 on."""
    return (max(1, level_fn(level, hparams)[0]),)


class Digits(RecipeData):
    """scikit-learn's 1,797 real 8x8 images of handwritten digits; they ship with the package, nothing is downloaded.

    The split is stratified and fixed by `split_seed`: 20% test, 15% validation, the rest training. Pixels are
    normalised with the training images' mean and standard deviation.

    Args:
        batch_size: training samples per rank and step.
        num_workers: loader processes per rank; the images are in memory, so 0 is fastest.
        partition: which training images a worker sees; see :class:`RecipeData`.
        split_seed: which images fall into which split, and of the partition.
    """

    num_classes = 10
    channels = 1

    @override
    def setup(self, stage: str | None = None) -> None:
        digits = load_digits()
        images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
        train, val, test = self.split(digits.target)
        images = (images - images[train].mean()) / images[train].std()
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[part], labels[part]) for part in (train, val, test)
        )
        self.labels = digits.target[train]

    def split(self, labels: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Indices of the training, validation and test images."""
        rest, test = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=self.split_seed
        )
        train, val = train_test_split(rest, test_size=0.15 / 0.8, stratify=labels[rest], random_state=self.split_seed)
        return train, val, test


# Of the binary versions: their folder, the files of the training and the test images, and label bytes of a record.
CIFAR_BINARY = {
    10: ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    100: ("cifar-100-binary", ["train.bin"], ["test.bin"], 2),  # coarse, then fine
}


class BinaryCifar(Dataset[Any]):
    """The binary version of CIFAR-10 or CIFAR-100, which torchvision does not read.

    Args:
        root: folder of the version's folder.
        num_classes: 10 or 100.
        train: the training images, or the test images.
        transform: of an image.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is not of the format.
    """

    def __init__(self, root: str, num_classes: int, train: bool, transform: Callable[[Any], Any] | None) -> None:
        self.transform = transform
        folder, training, test, labels = CIFAR_BINARY[num_classes]
        records = []
        for path in (Path(root) / folder / name for name in (training if train else test)):
            content = np.fromfile(path, np.uint8)
            rows = content[: len(content) // (labels + 3072) * (labels + 3072)].reshape(-1, labels + 3072)
            if rows.size != content.size or not rows.size or rows[:, labels - 1].max() >= num_classes:
                raise ValueError(
                    f"{path} is not of CIFAR-{num_classes}'s binary version: records of {labels + 3072} bytes, number "
                    f"{labels} of which is the class. HINT: unpack the archive again."
                )
            records.append(rows)
        rows = np.concatenate(records)
        self.targets = rows[:, labels - 1].tolist()
        self.data = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(np.ascontiguousarray(self.data[index]))
        return self.transform(image) if self.transform else image, self.targets[index]


class Cifar(RecipeData):
    """CIFAR-10 or CIFAR-100 with the usual augmentation (pad by 4, crop 32x32, flip), or a RandAugment after it.

    Args:
        root: folder in which the unpacked Python version (`cifar-10-batches-py`, `cifar-100-python`) or binary version
            (`cifar-10-batches-bin`, `cifar-100-binary`) lies.
        num_classes: 10 or 100.
        download: fetch the archive into `root` if it is not there.
        batch_size: training samples per rank and step.
        num_workers: loader processes per rank.
        val_size: training images held out for validation, drawn with `split_seed`. 0, as in the paper's runs, trains
            on all of them and validates on the test images: read such a validation curve, choose nothing by it.
        augmentation: of training images; see :func:`rand_augment`.
        partition: which training images a worker sees; see :class:`RecipeData`.
        split_seed: which images are held out, and of the partition.
    """

    channels = 3

    def __init__(
        self,
        root: str,
        num_classes: int,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 4,
        val_size: int = 0,
        augmentation: str = "standard",
        partition: str = "iid",
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, partition, split_seed)
        if num_classes not in CIFAR_STATISTICS:
            raise ValueError(f"data.num_classes is {num_classes}, but CIFAR has 10 or 100 classes")
        mean, _ = CIFAR_STATISTICS[num_classes]
        self.more = rand_augment(augmentation, 32, mean)
        self.root = root
        self.num_classes = num_classes
        self.download = download
        self.val_size = val_size

    @override
    def prepare_data(self) -> None:
        if self.download:
            self._dataset(train=True, transform=None, download=True)

    @override
    def setup(self, stage: str | None = None) -> None:
        to_tensor = [transforms.ToTensor(), transforms.Normalize(*CIFAR_STATISTICS[self.num_classes])]
        plain = transforms.Compose(to_tensor)
        augmented = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *self.more, *to_tensor]
        )
        train_set = self._dataset(train=True, transform=augmented)
        self.train_set, self.labels = train_set, np.array(train_set.targets)
        self.test_set = self.val_set = self._dataset(train=False, transform=plain)
        if self.val_size:
            held_in = self._dataset(train=True, transform=plain)
            train, val = train_test_split(
                np.arange(len(held_in)), test_size=self.val_size, stratify=held_in.targets, random_state=self.split_seed
            )
            self.train_set, self.val_set = Subset(self.train_set, train), Subset(held_in, val)
            self.labels = self.labels[train]

    def _dataset(self, train: bool, transform: Callable[[Any], Any] | None, download: bool = False) -> Any:
        dataset = CIFAR10 if self.num_classes == 10 else CIFAR100
        binary, python = (Path(self.root) / name for name in (CIFAR_BINARY[self.num_classes][0], dataset.base_folder))
        try:
            if binary.is_dir() and not python.is_dir() and not download:
                return BinaryCifar(self.root, self.num_classes, train, transform)
            return dataset(self.root, train=train, transform=transform, download=download)
        except (RuntimeError, FileNotFoundError) as error:
            # torchvision's own message names an argument that the user cannot see
            raise FileNotFoundError(
                f"no complete CIFAR-{self.num_classes} in {Path(self.root).resolve()}. "
                "HINT: point data.root at it, or add data.download=true."
            ) from error


class ImageNet(RecipeData):
    """An image folder with `train/<class>/*` and `val/<class>/*`, such as ImageNet's; `val` also serves as test split.

    Views are timm's: a random crop and flip in training, the central 7/8 of the image (224 of 256) in evaluation.

    Args:
        root: the folder that holds `train` and `val`.
        batch_size: training samples per rank and step.
        num_workers: loader processes per rank.
        image_size: side of the square the network sees.
        interpolation: how images are resized: bilinear, bicubic or random (in training).
        augmentation: of training images; see :func:`rand_augment`.
        partition: which training images a worker sees; see :class:`RecipeData`.
        split_seed: of the partition.
    """

    channels = 3

    def __init__(
        self,
        root: str,
        batch_size: int = 30,
        num_workers: int = 8,
        image_size: int = 224,
        interpolation: str = "bilinear",
        augmentation: str = "standard",
        partition: str = "iid",
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, partition, split_seed)
        if interpolation not in ("bilinear", "bicubic", "random"):
            raise ValueError(f"data.interpolation is {interpolation!r}, but must be bilinear, bicubic or random")
        mean, std = IMAGENET_STATISTICS
        rand_augment(augmentation, image_size, mean)  # says what is wrong with it
        self.root = Path(root)
        views: dict[str, Any] = {"mean": mean, "std": std}
        self.train_view = create_transform(
            image_size,
            is_training=True,
            color_jitter=None,
            auto_augment=None if augmentation == "standard" else augmentation,
            interpolation=interpolation,
            **views,
        )
        fixed = "bilinear" if interpolation == "random" else interpolation
        self.test_view = create_transform(image_size, crop_pct=0.875, interpolation=fixed, **views)

    @override
    def setup(self, stage: str | None = None) -> None:
        train_set, test_set = self._folder("train", self.train_view), self._folder("val", self.test_view)
        if train_set.classes != test_set.classes:
            only = sorted(set(train_set.classes) ^ set(test_set.classes))
            raise ValueError(
                f"{self.root.resolve()} has {len(only)} classes in one of train/ and val/ only, the first is "
                f"{only[0]!r}. HINT: both must hold a folder of each class."
            )
        self.train_set, self.labels = train_set, np.array(train_set.targets)
        self.val_set = self.test_set = test_set
        self.num_classes = len(train_set.classes)

    def _folder(self, name: str, view: Callable[[Any], Any]) -> Any:
        folder = (self.root / name).resolve()
        problem = f"no folder {folder}"
        if folder.is_dir():
            try:
                return ImageFolder(folder, view)
            except FileNotFoundError:  # torchvision's own message lists all file endings
                problem = f"a folder without classes, or a class without images, in {folder}"
        raise FileNotFoundError(
            f"{problem}. HINT: point data.root at a folder that holds train/ and val/, each with one folder of images "
            "per class."
        )
