"""The recipes' parts without a command line: data splits, exact evaluation, CIFAR and ImageNet folders, the models."""

from __future__ import annotations

import hashlib
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DistributedSampler, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100

from ds_lightning.shards import shards
from recipes.data import RecipeData, ResumableLoader, Shuffle, even_batch_size
from recipes.images import CIFAR_STATISTICS, Cifar, Digits, ImageNet, rand_augment
from recipes.task import cosine_decay, linear_decay
from recipes.wide_resnet import ImageClassifier, timm_model, wide_resnet
from tests.ranks import fit_and_test_on_two_ranks


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_digits_splits_are_disjoint_complete_and_fixed():
    labels = load_digits().target
    parts = Digits(16).split(labels)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    assert [len(part) for part in parts] == [1167, 270, 360]
    assert all(np.array_equal(a, b) for a, b in zip(parts, Digits(16).split(labels), strict=True))
    assert not np.array_equal(parts[2], Digits(16, split_seed=1).split(labels)[2])
    for part in parts:  # stratified: each class has its share
        assert np.abs(np.bincount(labels[part]) / len(part) - np.bincount(labels) / len(labels)).max() < 0.01


def test_digits_are_normalised_by_the_training_split():
    data = Digits(16)
    data.setup()
    images = data.train_set.tensors[0]
    assert images.shape == (1167, 1, 8, 8)
    assert images.mean().abs() < 1e-5
    assert images.std() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("samples", [4, 7, 33, 360, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 16, 50])
def test_evaluation_gives_every_rank_the_same_number_of_batches(samples, world_size, batch_size):
    size = even_batch_size(samples, world_size, batch_size)
    shards = [len(range(rank, samples, world_size)) for rank in range(world_size)]
    assert size >= batch_size
    assert len({-(-shard // size) for shard in shards}) == 1


def test_an_evaluation_split_smaller_than_the_world_is_refused():
    with pytest.raises(ValueError, match="3 samples cannot give each of 4 ranks one"):
        even_batch_size(3, 4, 16)


def test_a_batch_larger_than_the_training_split_is_refused():
    data = Digits(batch_size=2000)
    data.setup()
    with pytest.raises(ValueError, match=r"takes 2000 training samples a step, but there are 1167\. HINT"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="batch_size is 0"):
        Digits(batch_size=0)


LABELS = np.array([f"class {i % 7}" for i in range(203)])


@pytest.mark.parametrize("partition", ["by_label", "dirichlet:0.1", "dirichlet:5"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_shards_are_disjoint_equal_and_fixed_by_the_seed(partition, world_size):
    parts = shards(LABELS, world_size, partition, seed=3)
    assert [len(part) for part in parts] == [203 // world_size] * world_size
    assert len(set(np.concatenate(parts))) == 203 // world_size * world_size
    again, other = (shards(LABELS, world_size, partition, seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert world_size == 1 or not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_shards_by_label_hold_few_labels_and_a_dirichlet_as_many_as_its_parameter_says():
    def labels_per_worker(partition: str) -> list[int]:
        return [len(set(LABELS[part])) for part in shards(LABELS, 7, partition, seed=0)]

    assert labels_per_worker("by_label") == [1] * 7
    assert min(labels_per_worker("dirichlet:100")) >= 6
    # Shares of 1/7 each in the mean, and most of a worker's samples of few labels where the parameter is small.
    largest = [
        max(np.unique(LABELS[part], return_counts=True)[1]) / 29
        for seed in range(20)
        for part in shards(LABELS, 7, "dirichlet:0.05", seed)[:2]  # the last ones get what the first have left
    ]
    assert 0.7 < np.mean(largest) < 1
    # However small the parameter: a label that is used up makes room for another one, not for all.
    assert np.mean(labels_per_worker("dirichlet:1e-9")) < 3


@pytest.mark.parametrize(
    "partition", ["byy_label", "dirichlet", "dirichlet:0", "dirichlet:x", "dirichlet:inf", "iid:1"]
)
def test_a_partition_that_does_not_exist_is_refused(partition):
    with pytest.raises(ValueError, match=r"partition is .*, but must be iid, by_label or dirichlet:ALPHA.*HINT"):
        Digits(16, partition=partition)


@pytest.mark.parametrize("epoch", [0, 1])
def test_samples_are_dealt_out_in_the_order_of_torchs_sampler(epoch):
    dataset = TensorDataset(torch.arange(103))
    dealt = []
    for rank in range(4):
        ours = Shuffle(dataset, 4, rank, seed=3)
        torchs: DistributedSampler[object] = DistributedSampler(dataset, 4, rank, seed=3, drop_last=True)
        for sampler in (ours, torchs):
            sampler.set_epoch(epoch)
        dealt += list(ours)
        assert list(ours) == list(torchs)
        assert len(ours) == 25
    assert len(set(dealt)) == 100


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("limit", "saved"), [(1.0, 3), (1.0, 6), (1.0, 0), (4, 3), (4, 4), (0.5, 3)])
def test_a_resumed_epoch_begins_where_it_was_saved(limit, saved, num_workers):
    dataset = TensorDataset(torch.arange(103))

    def loader():
        return ResumableLoader(dataset, 4, Shuffle(dataset, 4, 1, 3), limit, drop_last=True, num_workers=num_workers)

    def epoch(of, number, batches):
        of.sampler.set_epoch(number)
        iterator = iter(of)
        return [next(iterator)[0].tolist() for _ in range(batches)]

    taken = {1.0: 6, 4: 4, 0.5: 3}[limit]
    whole, resumed = loader(), loader()
    first, second = (epoch(whole, number, taken) for number in range(2))
    before = loader()
    epoch(before, 0, saved)
    resumed.load_state_dict(before.state_dict())
    if saved < taken:
        assert epoch(resumed, 0, taken - saved) == first[saved:]
        assert resumed.state_dict() == whole.state_dict()
    assert epoch(resumed, 1, taken) == second
    assert len(resumed) == 6


@pytest.mark.timeout(60)
def test_each_worker_keeps_its_own_shard_and_shuffles_it():
    def run(rank):
        data = Digits(8, partition="by_label")
        data.setup()
        data.trainer = SimpleNamespace(world_size=4, global_rank=rank, limit_train_batches=1.0)  # type: ignore[assignment]
        loader = data.train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([labels for _, labels in loader]).tolist())
        return epochs

    for rank in range(4):
        first, second = run(rank)
        assert len(first) == 1167 // 4 // 8 * 8
        assert set(first) | set(second) <= set(range(10 * rank // 4 - 1, 10 * (rank + 1) // 4 + 1))
        assert first != second


def test_a_partition_without_other_workers_warns():
    data = Digits(8, partition="by_label")
    data.setup()
    with pytest.warns(UserWarning, match="no effect on a single worker"):
        data.train_dataloader()


def optimizer_at(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=rate)


def test_schedules_warm_up_and_decay_to_zero():
    for make, middle in ((linear_decay, 0.5), (cosine_decay, 0.5)):
        optimizer = optimizer_at(2.0)
        scheduler = make(optimizer, num_training_steps=100, warmup=0.2)
        rates = []
        for _ in range(101):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert 0 < rates[0] < 0.2
        assert rates[:21] == sorted(rates[:21])
        assert rates[20] == pytest.approx(2.0)
        assert rates[20:] == sorted(rates[20:], reverse=True)
        assert rates[60] == pytest.approx(2 * middle)
        assert rates[100] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="warmup is 1"):
        linear_decay(optimizer_at(1.0), 10, warmup=1)


class Uneven(RecipeData):
    """33 images for 2 ranks: shards of 17 and 16, where batches of 4 would be 5 on one rank and 4 on the other."""

    def setup(self, stage=None):
        images = torch.randn(33, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.train_set = self.val_set = self.test_set = TensorDataset(images, torch.arange(33) % 10)


def small_classifier(**kwargs) -> ImageClassifier:
    return ImageClassifier(wide_resnet(10, 1, in_channels=1), 10, partial(torch.optim.SGD, lr=0.01), **kwargs)


@pytest.mark.timeout(60)
def test_metrics_of_two_ranks_equal_those_of_one_process(tmp_path):
    """Exact under DDP, in validation too, where DDP's forward broadcasts buffers on every rank or hangs."""
    torch.manual_seed(0)
    data, model = Uneven(batch_size=4), small_classifier()
    validated, tested = fit_and_test_on_two_ranks(data, model, max_epochs=1, default_root_dir=tmp_path)
    data.setup()
    model.eval()
    images, labels = data.test_set.tensors
    with torch.no_grad():
        logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    loss = nn.functional.cross_entropy(logits, labels)
    for metrics, split in ((validated, "val"), (tested, "test")):
        assert metrics[f"{split}/accuracy"] == pytest.approx(float(accuracy))
        assert metrics[f"{split}/loss"] == pytest.approx(float(loss), rel=1e-4)


def fake_cifar(root: Path, dataset: type[CIFAR10], classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes 10 images per batch file in CIFAR's own format and teaches torchvision their checksums."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    rng = np.random.default_rng(0)

    def write(name: str, entry: dict[str, object]) -> tuple[str, str]:
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        return name, hashlib.md5(content).hexdigest()

    def images(count: int = 10) -> dict[str, object]:
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), key: [i % 5 for i in range(count)]}

    for attribute in ("train_list", "test_list"):
        files = [write(name, images()) for name, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, files)
    meta_name, meta_key = dataset.meta["filename"], dataset.meta["key"]
    name, md5 = write(meta_name, {meta_key: [str(i) for i in range(classes)]})
    monkeypatch.setattr(dataset, "meta", {"filename": name, "key": meta_key, "md5": md5})


@pytest.mark.parametrize(("dataset", "classes", "train"), [(CIFAR10, 10, 50), (CIFAR100, 100, 10)])
def test_cifar_reads_torchvisions_files(dataset, classes, train, tmp_path, monkeypatch):
    fake_cifar(tmp_path, dataset, classes, monkeypatch)
    data = Cifar(str(tmp_path), classes, batch_size=4, num_workers=0)
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (train, 10, 10)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.max() < 5
    # Evaluation sees the images as they are, training an augmented view.
    assert torch.equal(data.test_set[3][0], data.test_set[3][0])
    assert not all(torch.equal(data.train_set[0][0], data.train_set[0][0]) for _ in range(10))

    held_out = Cifar(str(tmp_path), classes, batch_size=4, num_workers=0, val_size=5)
    held_out.setup()
    train_part, val_part = held_out.train_set, held_out.val_set
    assert len(val_part) == 5
    indices = [*train_part.indices, *val_part.indices]
    assert sorted(indices) == list(range(train))
    assert torch.equal(val_part[0][0], val_part[0][0])


@pytest.mark.parametrize(("classes", "fine"), [(10, 1), (100, 2)])
def test_cifar_reads_the_binary_version(classes, fine, tmp_path):
    """Records of one or two label bytes and a red, a green and a blue plane."""
    names = (
        [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        if classes == 10
        else ["train.bin", "test.bin"]
    )
    folder = tmp_path / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = {name: rng.integers(0, 256, (7, fine + 3072), dtype=np.uint8) for name in names}
    for name, record in records.items():
        record[:, fine - 1] %= classes
        (folder / name).write_bytes(record.tobytes())
    data = Cifar(str(tmp_path), classes, batch_size=4, num_workers=0)
    data.setup()
    assert (len(data.train_set), len(data.test_set)) == (7 * (len(names) - 1), 7)
    record = records[names[-1]][3]
    image, label = data.test_set[3]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in CIFAR_STATISTICS[classes])
    assert label == record[fine - 1]
    assert np.allclose(image.numpy() * std + mean, record[fine:].reshape(3, 32, 32) / 255, atol=1e-6)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
    (folder / names[0]).write_bytes(b"123")
    with pytest.raises(ValueError, match=rf"{names[0]} is not of CIFAR-{classes}'s binary version.*HINT"):
        data.setup()
    (folder / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no complete CIFAR-{classes} in .*HINT"):
        data.setup()


def test_missing_data_say_where_they_were_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no complete CIFAR-10 in .*HINT: .*data\.download=true"):
        Cifar(str(tmp_path), 10).setup()
    with pytest.raises(FileNotFoundError, match=r"no folder .*train\. HINT: point data\.root"):
        ImageNet(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="num_classes is 7, but CIFAR has 10 or 100"):
        Cifar(str(tmp_path), 7)


def image_folder(root: Path, train: tuple[str, ...] = ("cat", "dog"), val: tuple[str, ...] = ("cat", "dog")) -> None:
    """Colour JPEGs as ImageNet names them, a grey one and a PNG."""
    rng = np.random.default_rng(0)
    for split, count, names in (("train", 3, train), ("val", 2, val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
                image = Image.fromarray(pixels[:, :, 0] if i == 1 else pixels)
                image.save(root / split / name / (f"{i}.png" if i == 2 else f"n0_{i}.JPEG"))


def test_imagenet_reads_a_folder_of_images(tmp_path):
    image_folder(tmp_path)
    data = ImageNet(str(tmp_path), batch_size=2, num_workers=0, image_size=32)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 32, 32)
    assert len(data.train_dataloader()) == 3
    assert sorted(label for _, labels in data.test_dataloader() for label in labels.tolist()) == [0, 0, 1, 1]


def test_rand_augment_follows_the_usual_augmentation(tmp_path, monkeypatch):
    fake_cifar(tmp_path, CIFAR10, 10, monkeypatch)
    image_folder(tmp_path)
    policy = "rand-m9-mstd0.5-inc1"
    for data in (
        Cifar(str(tmp_path), 10, batch_size=4, num_workers=0, augmentation=policy),
        ImageNet(
            str(tmp_path), batch_size=4, num_workers=0, image_size=32, interpolation="random", augmentation=policy
        ),
    ):
        data.setup()
        view = data.train_set.transform.transforms
        assert [type(t).__name__ for t in view].index("RandAugment") == 2
        assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
        assert "RandAugment" not in repr(data.test_set.transform)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "rand-m15-mstd0.5-mmax30-inc1"])
def test_rand_augment_at_its_strongest(policy):
    (transform,) = rand_augment(policy, 32, (0.5, 0.5, 0.5))
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    for op in transform.ops:
        op.prob = 1.0
        assert op(image).size == (32, 32)


@pytest.mark.parametrize("bad", ["nonsense", "rand", "rand-mx", "rand-m9-foo1", "augmix-m3", "rand-m9-mstd0.5-", ""])
def test_nonsense_is_no_augmentation(bad):
    for make in (lambda **kwargs: Cifar("", 10, **kwargs), lambda **kwargs: ImageNet("", **kwargs)):
        with pytest.raises(ValueError, match=r"data\.augmentation is '.*HINT: rand-m9-mstd0\.5-inc1$"):
            make(augmentation=bad)
    with pytest.raises(ValueError, match=r"data\.interpolation is 'linear'"):
        ImageNet("", interpolation="linear")


def test_broken_folders_and_files_say_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    image_folder(tmp_path / "hole")
    (tmp_path / "hole" / "val" / "emu").mkdir()
    for name in ("empty", "hole"):
        with pytest.raises(FileNotFoundError, match=r"^a folder without classes, or a class without images, in .*HINT"):
            ImageNet(str(tmp_path / name)).setup()
    image_folder(tmp_path / "unlike", val=("cat", "emu"))
    with pytest.raises(ValueError, match=r"has 2 classes in one of train/ and val/ only, the first is 'dog'\. HINT"):
        ImageNet(str(tmp_path / "unlike")).setup()
    fake_cifar(tmp_path, CIFAR10, 10, monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_3", "ab") as file:
        file.write(b"x")
    with pytest.raises(FileNotFoundError, match=r"no complete CIFAR-10 in .*HINT"):
        Cifar(str(tmp_path), 10).setup()


def test_another_number_of_classes_is_refused(tmp_path):
    image_folder(tmp_path)
    data = ImageNet(str(tmp_path), batch_size=2, num_workers=0, image_size=32)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"the data have 2 classes, but model\.num_classes is 10\. HINT: add model"):
        trainer.fit(small_classifier(), data)


def test_another_number_of_channels_is_refused():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    classifier = ImageClassifier(wide_resnet(10, 1), 10, partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(
        ValueError, match=r"have 1 channels, but the network takes 3\. HINT: add model\.net\.in_channels=1"
    ):
        trainer.fit(classifier, Digits(16))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_split_seed_that_none_can_draw_with_is_refused(seed):
    with pytest.raises(ValueError, match=f"data.split_seed is {seed}, but must be at least 0 and below"):
        Digits(16, split_seed=seed)


def test_classifier_options(monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    plain, last = small_classifier(), small_classifier(channels_last=True, label_smoothing=0.2)
    last.load_state_dict(plain.state_dict())
    assert torch.allclose(plain(images), last(images), atol=1e-5)
    kernel = last.net.stages[0].blocks[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(last, "log", lambda *args, **kwargs: None)
    want = nn.functional.cross_entropy(last(images), labels, label_smoothing=0.2)
    assert torch.allclose(last.training_step((images, labels), 0), want)
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        small_classifier(label_smoothing=1)


def test_group_norm_looks_at_one_image():
    net = wide_resnet(10, 1, in_channels=1, norm="group")
    images = torch.randn(4, 1, 8, 8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert torch.allclose(net(images)[:1], net(images[:1]), atol=1e-5)
    with pytest.raises(ValueError, match=r"norm is 'layer', but must be batch or group\. HINT"):
        wide_resnet(10, norm="layer")


@pytest.mark.parametrize(
    ("depth", "width", "num_classes", "count"),
    # 28-10 and 16-4 as published: 36.5 M and 2.7 M; 26 counts 28's layers the other way.
    [(26, 10, 10, 36_479_194), (28, 10, 10, 36_479_194), (26, 10, 100, 36_536_884), (16, 4, 10, 2_748_890)],
)
def test_wide_resnet_has_the_published_size(depth, width, num_classes, count):
    with torch.device("meta"):
        net = wide_resnet(depth, width, num_classes)
    assert parameters(net) == count


def test_wide_resnet_keeps_the_resolution_of_small_images():
    net = wide_resnet(10, 2, num_classes=7, in_channels=1)
    assert net.stages(net.stem(torch.zeros(2, 1, 32, 32))).shape == (2, 128, 8, 8)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("depth", [2, 4, 9, 12, 27, -4])
def test_a_depth_that_no_wide_resnet_has_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth is {depth}, but .* 6n \+ 2 or 6n \+ 4 .*HINT: 10, 16"):
        wide_resnet(depth)


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="width is 0"):
        wide_resnet(10, 0)


def test_timm_model_is_built_by_name():
    with torch.device("meta"):
        assert parameters(timm_model("wide_resnet50_2", 1000)) == 68_883_240


def test_top5_accuracy_is_logged_for_many_classes():
    optimizer = partial(torch.optim.SGD, lr=0.1)
    assert list(ImageClassifier(nn.Identity(), 10, optimizer).test_accuracy) == ["test/accuracy"]
    assert set(ImageClassifier(nn.Identity(), 100, optimizer).val_accuracy) == {"val/accuracy", "val/top5_accuracy"}
