"""One real training run of the digits WideResNet as a rank sees it: its steps, and its accuracy against a clock."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from timm.models.resnetv2 import PreActBasic
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from benchmarks.arms import COMPUTE, Pace, Paced, make_strategy, prepare
from ds_lightning.consensus import consensus_of
from recipes.images import Digits
from recipes.wide_resnet import wide_resnet

RAMP = 5  # steps in which the learning rate rises to its full value
ENOUGH = 2  # evaluations in a row that must reach the target


@dataclass(frozen=True)
class Training:
    """What is trained and how; the same for all arms.

    Attributes:
        width: Of the WideResNet.
        depth: Of it.
        batch_size: Images per worker and step.
        lr: The highest learning rate: it rises over the first steps, then falls along a cosine to 0 at the last one.
        steps: Most of them.
        eval_every: Steps between two evaluations.
        target: Test accuracy to reach.
        stop_at_target: Whether a run ends where two evaluations in a row have reached it.
        compute: Seconds that forward and backward take at least, as on an accelerator of that speed: plans are made
            for it. None: as long as they take here, which plans do not know.
    """

    width: int
    depth: int
    batch_size: int
    lr: float
    steps: int
    eval_every: int
    target: float
    stop_at_target: bool
    compute: float | None = None

    def net(self) -> nn.Module:
        """The network, with new weights. Raises ValueError for a depth or width of no network."""
        return wide_resnet(self.depth, self.width, Digits.num_classes, Digits.channels)


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: Steps before it.
        seconds: On the clock: since the first step, with the consensus that evaluations need, without evaluating.
        accuracy: On the whole test split.
    """

    step: int
    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Learned:
    """What one rank saw.

    Attributes:
        curve: Its evaluations.
        ends: Seconds on the clock at the end of each step.
        start: Of the first step, by `time.monotonic`.
        pauses: When the clock stood still, by the same: from, to.
    """

    curve: list[Point]
    ends: list[float]
    start: float
    pauses: list[tuple[float, float]]

    def clock(self, moment: float) -> float:
        """What the clock shows at a moment of `time.monotonic`.

        >>> Learned([], [], start=100, pauses=[(110, 115)]).clock(120)
        15
        """
        paused = sum(max(0, min(end, moment) - begin) for begin, end in self.pauses)
        return moment - self.start - paused


class Classifier(LightningModule):
    """Trains by SGD with momentum and weight decay, as the recipe does.

    Each rank evaluates its share of the test split. All hold the same model then (see :class:`Curve`; a forward pass of
    DDP begins with rank 0's buffers), so that the sum of their hits is that of the whole split.
    """

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training_options = training
        self.net = training.net()
        self.pace = Pace()
        if training.compute is not None:
            blocks = [block for block in self.net.modules() if isinstance(block, PreActBasic)]
            for block in blocks:
                block.register_forward_hook(partial(self._wait, training.compute / len(blocks)))
        self.hits = torch.zeros(2, dtype=torch.long)  # and images
        self.accuracy = 0.0

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def _wait(self, seconds: float, block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        waited: Tensor = Paced.apply(output, self.pace, seconds) if self.training else output
        return waited

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        self.pace.restart()
        return F.cross_entropy(self(images), labels)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.hits += torch.tensor([int((self(images).argmax(1) == labels).sum()), len(labels)])

    @override
    def on_validation_epoch_end(self) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.hits)
        hits, images = self.hits.tolist()
        self.accuracy = hits / images
        self.hits.zero_()

    @override
    def configure_optimizers(self) -> Any:
        options = self.training_options
        optimizer = torch.optim.SGD(self.parameters(), lr=options.lr, momentum=0.9, weight_decay=1e-4)
        scheduler = LambdaLR(optimizer, partial(lr_share, steps=options.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lr_share(step: int, steps: int) -> float:
    """Of the highest learning rate, at a step.

    >>> [round(lr_share(step, 20), 2) for step in (0, 4, 10, 20)]
    [0.2, 0.9, 0.5, 0.0]
    """
    return min(1.0, (step + 1) / RAMP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def reached(curve: list[Point], target: float) -> Point | None:
    """The first of the first two evaluations in a row that reach the target, if there are any."""
    good = 0
    for i, point in enumerate(curve):
        good = good + 1 if point.accuracy >= target else 0
        if good == ENOUGH:
            return curve[i + 1 - ENOUGH]
    return None


class Curve(Callback):
    """Accuracies against a clock that stands still while ranks evaluate, but not while replicas become one.

    DS-Sync's strategy averages all replicas before every evaluation. Post-local SGD, which would evaluate rank 0's
    replica, gets the same average, at the same cost: it is the method's model, and training goes on from it. Replicas
    of the other arms are equal anyway.
    """

    def __init__(self, arm: str, training: Training, begun: Event | None) -> None:
        self.averages = arm == "post-local-sgd"
        self.training = training
        self.begun = begun
        self.learned = Learned([], [], 0.0, [])

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 0:
            self.learned = Learned([], [], time.monotonic(), [])
            if self.begun is not None:
                self.begun.set()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.learned.ends.append(self.learned.clock(time.monotonic()))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.averages:  # the strategies' turn, in which DS-Sync does it, comes right after
            consensus_of([pl_module])

    @override
    def on_validation_epoch_start(self, *args: Any) -> None:
        self.paused = time.monotonic()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        learned = self.learned
        learned.curve.append(Point(trainer.global_step, learned.clock(self.paused), pl_module.accuracy))
        learned.pauses.append((self.paused, time.monotonic()))
        # Accuracies are sums over ranks: all ranks have the same, and stop at the same step.
        if self.training.stop_at_target and reached(learned.curve, self.training.target):
            trainer.should_stop = True


def learn(
    rank: int,
    arm: str,
    training: Training,
    seed: int,
    world_size: int,
    topology: str | None,
    timeout: float,
    begun: Event | None = None,
) -> Learned:
    """Runs one `Trainer.fit`, as the rank that the environment says.

    Args:
        rank: This one.
        arm: How to synchronize, or `compute`: each rank alone.
        training: What to train.
        seed: Of the weights and of the order of the images; arms of one seed begin and go on alike.
        world_size: Number of ranks.
        topology: The description of the cluster, for plans and racks.
        timeout: Seconds that collectives wait.
        begun: Set by rank 0 when its first step begins.
    """
    prepare(arm)
    alone = arm == COMPUTE
    data = Digits(training.batch_size)
    data.setup()
    seed_everything(seed, verbose=False)
    module = Classifier(training)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    curve = Curve(arm, training, begun if rank == 0 else None)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1 if alone else world_size,
        strategy=make_strategy(arm, size, timeout, topology, training.compute),
        max_epochs=-1,
        max_steps=training.steps,
        val_check_interval=training.eval_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[curve],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images, tests = data.train_set, data.test_set
    # Lightning tells it the epoch. The last, smaller batch is dropped: a gradient must weigh the same in every mean.
    order: Any = DistributedSampler(images, world_size, rank, seed=seed, drop_last=True)
    share: Any = UnrepeatedDistributedSampler(tests, num_replicas=world_size, rank=rank, shuffle=False)
    trainer.fit(
        module,
        DataLoader(images, training.batch_size, sampler=order, drop_last=True),
        # One batch, so that all ranks take as many forward passes, in each of which DDP broadcasts buffers.
        DataLoader(tests, len(share), sampler=share),
    )
    return curve.learned
