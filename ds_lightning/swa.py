"""Extended SWA: at the end of fit the model is the average over workers and over the last part of their trajectories.

The extension of stochastic weight averaging (Izmailov et al., arXiv 1803.05407) to all workers' trajectories with which
the DS-Sync paper ends its training. Lightning's `WeightAveraging` keeps each worker's average; here is the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ds_lightning.consensus import consensus_of
from ds_lightning.schedule import as_int, positive_int
from ds_lightning.strategy import DSSyncStrategy
from ds_lightning.wire import is_averaged


class ExtendedSWA(WeightAveraging):
    """Ends training with the average over workers and over the steps after ``start``, all of equal weight.

    Each worker averages its own replica, in the model's dtype and without communication. At the end of fit, under any
    single-device strategy, DDP or DS-Sync, the module becomes the exact mean of these averages. Then each worker passes
    once over its own training loader (within ``limit_train_batches``; if that never ends, over as many batches as the
    run took), with the gradients off, to recompute the BatchNorm statistics as ``torch.optim.swa_utils.update_bn``
    does: its mean and variance are the means over batches. Over workers they are put together by the law of total
    variance, the mean of the variances plus the variance of the means, so that shards which differ count in full.
    BatchNorm layers in eval mode keep their statistics. All workers end with the same parameters and buffers.

    Validation shows the average as soon as there is one, with averaged statistics, and the current model before.
    A checkpoint written during training holds the same in its ``state_dict`` (and in ``current_model_state`` what
    training goes on with, bit for bit). At the end of fit, the files that a ``ModelCheckpoint`` wrote at the last step
    (its ``last`` file; without a monitored metric its newest) are written again with the final model; files that it
    chose by a metric stay as they were judged. ``trainer.save_checkpoint`` after fit saves the final model.

    Args:
        start: How many optimizer steps are left out: a number (int), or their share of the run (float in [0, 1)).
        every_n_steps: Optimizer steps from one that counts to the next.

    Raises:
        ValueError: For a bad option; when training starts, if ``start`` is a share of an unknown number of steps, if
            the strategy shards the model, or if the module has BatchNorm but no ``forward``.
    """

    def __init__(self, start: int | float = 0.75, every_n_steps: int = 1) -> None:
        super().__init__(multi_avg_fn=_add_one)
        if isinstance(start, float):
            if not 0 <= start < 1:
                raise ValueError(
                    f"start={start} is no share of the run's steps: at least 0 and below 1. HINT: use 0.75 for the last"
                    " quarter, or an int for a number of steps."
                )
        elif as_int("start", start) < 0:
            raise ValueError(f"start={start} is negative. HINT: use 0 or more steps, or a share such as 0.75.")
        self.start = start
        self.every_n_steps = positive_int("every_n_steps", every_n_steps)
        self._first = 0  # steps that are left out
        # The module is the final model, and the average model what training would go on with.
        self._finished = False

    def forward_batch(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Run the module on a training batch for its BatchNorm statistics; override it for batches of another form.

        Args:
            pl_module: The module, in training mode.
            batch: What the training loader gave, on the module's device. Its first element, if it is a tuple or list,
                else the whole is passed to ``forward``.
        """
        pl_module(batch[0] if isinstance(batch, list | tuple) else batch)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
                raise ValueError(
                    f"ExtendedSWA cannot be used with {type(trainer.strategy).__name__}, which may shard the model."
                    " HINT: use Trainer(strategy='dssync') or 'ddp'."
                )
            self._latest_update_step, self._finished = 0, False  # those of an earlier fit
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._finished:  # says the checkpoint: if nothing is left to train, the module must be the final model
            self._swap_models(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._finished:
            self._swap_models(pl_module)
            self._finished = False
        if not self._begun:  # else the checkpoint says where it began
            self._first = self._steps_left_out(trainer)
        passes = is_overridden("forward", pl_module) or is_overridden("forward_batch", self, ExtendedSWA)
        if _batch_norms(pl_module) and not passes:
            name = type(pl_module).__name__
            raise ValueError(
                f"ExtendedSWA recomputes BatchNorm statistics by {name}.forward, which is not defined. HINT: define it,"
                " or override ExtendedSWA.forward_batch."
            )

    def _steps_left_out(self, trainer: pl.Trainer) -> int:
        if not isinstance(self.start, float):
            return self.start
        total = trainer.estimated_stepping_batches
        one_step_each = trainer.lightning_module.automatic_optimization or len(trainer.optimizers) == 1
        if not 0 <= total < math.inf or not one_step_each:
            why = "is unknown" if one_step_each else "depends on how often each of several optimizers steps"
            raise ValueError(
                f"start={self.start} is a share of the run's optimizer steps, whose number {why}. HINT: give start as"
                " a number of steps, such as start=10000."
            )
        return int(self.start * total)

    @property
    def _begun(self) -> bool:
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the step counts. With several optimizers steps are not seen one by one, so it may come late."""
        if step_idx is None:
            return False
        return step_idx + 1 - max(self._first, self._latest_update_step) >= self.every_n_steps

    # ---- evaluation and checkpoints ---------------------------------------------------------------------------------

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_shown(trainer):
            self._swap_models(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_shown(trainer):
            self._swap_models(pl_module)

    def _is_shown(self, trainer: pl.Trainer) -> bool:
        """A validation after fit looks at the module as it is, which may be another one."""
        return trainer.state.fn == TrainerFn.FITTING and self._begun and not self._finished

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "first": self._first, "finished": self._finished}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._first, self._finished = state_dict["first"], state_dict["finished"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is None:
            return
        module = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        average = checkpoint["state_dict"]
        if self._finished:
            checkpoint.update(state_dict=module, current_model_state=average)
        elif not self._begun:  # the average model is what training began with
            checkpoint["state_dict"] = module

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # a test wants the average, which is what the module has loaded
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    # ---- the end of fit ---------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        if not self._begun:
            rank_zero_warn(
                f"ExtendedSWA had no effect: the run ended at step {trainer.global_step}, before the first to average"
                f" ({self._first + self.every_n_steps}). HINT: use a smaller start or every_n_steps."
            )
            return
        if isinstance(trainer.strategy, DSSyncStrategy):
            trainer.strategy.consensus()
        elif trainer.world_size > 1:
            consensus_of([self._average_model])  # DDP's parameters are equal, its buffers are not
        self._swap_models(pl_module)
        self._finished = True
        self._recompute_statistics(trainer, pl_module)
        _save_again(trainer)

    @torch.no_grad()
    def _recompute_statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        norms = _batch_norms(pl_module)
        if not norms:
            return
        earlier = [(n.momentum, [b.clone() for b in _statistics(n)]) for n in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over batches
            if isinstance(norm, SyncBatchNorm):  # its exchange would wait for a worker whose loader is shorter
                norm.__dict__["forward"] = partial(_BatchNorm.forward, norm)
        try:
            for batch in _batches(trainer):
                with trainer.precision_plugin.forward_context():
                    self.forward_batch(pl_module, batch)
        finally:
            for norm, (momentum, _) in zip(norms, earlier, strict=True):
                norm.momentum = momentum
                norm.__dict__.pop("forward", None)
        if trainer.world_size > 1:
            _put_together(norms, trainer.strategy.root_device)
        for norm, (_, values) in zip(norms, earlier, strict=True):
            if norm.num_batches_tracked == 0:  # nobody's forward pass used it
                for buffer, value in zip(_statistics(norm), values, strict=True):
                    buffer.copy_(value)


def _add_one(averages: Any, values: Any, count: Tensor | int) -> None:
    """``count`` values are in the averages; tensors of one dtype, in which whole numbers are counts: the latest."""
    for average, value in zip(averages, values, strict=True):
        if is_averaged(average):
            average.lerp_(value, torch.as_tensor(1 / (count + 1), dtype=average.dtype, device=average.device))
        else:
            average.copy_(value)


def _batch_norms(module: Module) -> list[_BatchNorm]:
    """Those that gather statistics in training."""
    found = (m for m in module.modules() if isinstance(m, _BatchNorm))
    return [m for m in found if m.training and m.running_mean is not None]


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _batches(trainer: pl.Trainer) -> Iterator[Any]:
    """One pass over this worker's training data as a training step gets them."""
    loop, module = trainer.fit_loop, trainer.lightning_module
    most = loop.epoch_loop.batch_progress.total.ready if math.isinf(loop.max_batches) else loop.max_batches
    assert loop._combined_loader is not None
    for batch, _, _ in islice(loop._combined_loader, int(most)):
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _put_together(norms: list[_BatchNorm], device: torch.device) -> None:
    """Give all ranks the statistics over all their batches, each of which counts the same."""
    sums = []
    for norm in norms:
        mean, var, batches = (b.double() for b in _statistics(norm))
        sums.append(torch.cat([batches.view(1), batches * mean, batches * (var + mean.square())]))
    total = torch.cat(sums).to(device)
    dist.all_reduce(total)
    for norm, sums_of_one in zip(norms, total.split([len(s) for s in sums]), strict=True):
        running_mean, running_var, num_batches_tracked = _statistics(norm)
        batches, means = sums_of_one[0], sums_of_one[1:] / sums_of_one[0]
        mean, square = means.chunk(2)
        running_mean.copy_(mean)
        running_var.copy_((square - mean.square()).clamp_min(0))
        num_batches_tracked.copy_(batches)


def _save_again(trainer: pl.Trainer) -> None:
    """Put the final model into the files that `ModelCheckpoint`s wrote at this step, before it was there."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback._last_global_step_saved != trainer.global_step:
            continue
        newest = [callback.best_model_path] if callback.monitor is None and callback.save_top_k != 0 else []
        last = [callback.last_model_path] if callback.save_last is True else []  # a link needs no second file
        for path in filter(None, [*newest, *last]):
            trainer.save_checkpoint(path, callback.save_weights_only)
