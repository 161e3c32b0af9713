"""The one entry point for training: `python -m recipes.train recipe=wide_resnet`.

Everything is chosen by Hydra groups and overrides; `python -m recipes.train --help` lists them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import ds_lightning
from recipes.checks import check

# Lightning cannot know that our evaluation shards are exact, nor that 0 loader workers are right for data in memory;
# the others are between Lightning or ds_lightning and newer torch.
EXPECTED_WARNINGS = (
    "Using `DistributedSampler` with the dataloaders",
    "The '.*_dataloader' does not have many workers",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)

# What a mistake in the configuration or the data raises.
MISTAKES = (ValueError, FileNotFoundError, MisconfigurationException, MissingMandatoryValue)


def train(cfg: DictConfig) -> dict[str, float]:
    """Fits and tests what `cfg` describes.

    Returns:
        The last training and validation metrics and the test metrics.
    """
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if cfg.strategy.get("start_method") == "fork":
        # Forked ranks inherit this. A parent that has run OpenMP threads must not fork, and ranks share the cores.
        torch.set_num_threads(1)
    check(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    if cfg.compile:
        cast(nn.Module, model.net).compile()  # in place: the names in a checkpoint stay
    callbacks: list[Callback] = [
        instantiate(callback) for callback in (cfg.get("callbacks") or {}).values() if callback
    ]
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=instantiate(cfg.logger) if cfg.get("logger") else False,
        # Else Lightning adds a bar of its own.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    if trainer.world_size == 1 or not isinstance(
        trainer.strategy, ds_lightning.DSSyncStrategy
    ):  # else it does so itself
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # The last weights, not the best: nothing that is tested was chosen by a metric.
    trainer.test(model, data, verbose=False)
    results |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    gradients = [p for p in model.parameters() if p.requires_grad]
    results["train/world_size"] = float(trainer.world_size)
    results["model/gradient_bytes"] = float(sum(p.numel() * p.element_size() for p in gradients))
    results["model/buffer_bytes"] = float(sum(b.numel() * b.element_size() for b in model.buffers()))
    return results


def one_line(error: Exception) -> str | None:
    """What a mistake in the configuration or the data says, also where a forked rank found it; None for a defect."""
    if isinstance(error, ProcessRaisedException):
        last = str(error).strip().splitlines()[-1]
        kind, _, message = last.partition(": ")
        return message if kind.rpartition(".")[2] in [mistake.__name__ for mistake in MISTAKES] else None
    if isinstance(error, InstantiationException):  # Hydra's, about a constructor; it names the key
        error = error.__cause__ if isinstance(error.__cause__, MISTAKES) else error
    if isinstance(error, MissingMandatoryValue):
        key = str(error.full_key)
        return f"{key} is missing. HINT: add {key}=..."
    return " ".join(str(error).split()) if isinstance(error, (*MISTAKES, InstantiationException)) else None


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Trains, prints the results and writes them to `results.json` in the run's output directory."""
    try:
        results = train(cfg)
    except ProcessExitedException as error:
        if error.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGUSR1):  # forked ranks have saved, and said so
            sys.exit(error.exit_code)
        raise
    except Exception as error:
        if "HYDRA_FULL_ERROR" in os.environ or not (message := one_line(error)):
            raise
        sys.exit(f"error: {message}" if _global_rank() == 0 else 1)
    if _global_rank() == 0:
        for name, value in sorted(results.items()):
            print(f"{name:34s} {value:.4f}")
        path = Path(cfg.output_dir) / "results.json"
        path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        print(f"outputs in {path.parent}")
    return results.get(f"val/{cfg.metric}", float("nan"))  # what a Hydra sweeper maximises


def _global_rank() -> int:
    """This process's rank where torchrun, Slurm or Lightning's launcher has set one, else 0."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


if __name__ == "__main__":
    if _global_rank() > 0:
        # One output directory per run: the ranks that torchrun or Slurm started beside rank 0 write none of their own.
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun has started the ranks, after a restart perhaps on fewer nodes.
        sys.argv += [
            "strategy.start_method=popen",
            f"trainer.devices={os.environ['LOCAL_WORLD_SIZE']}",
            f"trainer.num_nodes={os.environ['GROUP_WORLD_SIZE']}",
        ]
    main()
