"""The Hydra application: every choice composes and instantiates, misspelt ones are rejected, short runs end to end."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

import ds_lightning
from recipes.checks import check
from recipes.wide_resnet import ImageClassifier

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
DATA = ("digits", "cifar10", "cifar100", "imagenet")
STRATEGIES = ("ddp", "dssync")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["recipe=wide_resnet", "output_dir=unused", "data.root=unused", *overrides])


def digits(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["recipe=wide_resnet", "output_dir=unused", *overrides])


def test_every_recipe_names_its_command():
    for path in (CONF / "recipe").rglob("*.yaml"):
        comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert comments[0] == "# @package _global_"
        assert comments[1].startswith("# python -m recipes.train recipe="), path
        assert (ROOT / "recipes" / f"{comments[1].split('recipe=')[1].split()[0]}.py").exists()


@pytest.mark.parametrize("data", DATA)
def test_every_recipe_and_data_set_instantiate(data):
    cfg = (
        digits() if data == "digits" else composed(f"data={data}", "model.net.width=1" if "cifar" in data else "seed=0")
    )
    assert isinstance(instantiate(cfg.data), LightningDataModule)
    model = instantiate(cfg.model)
    assert isinstance(model, ImageClassifier)
    assert model.configure_optimizers()["optimizer"].param_groups[0]["lr"] == 0.1
    assert OmegaConf.missing_keys(cfg) == set()


def test_recipes_are_the_papers_runs():
    cifar10, cifar100, imagenet = (composed(f"data={name}") for name in DATA[1:])
    for cfg, batch_size, epochs, milestones, gamma in (
        (cifar10, 256, 200, [60, 120, 160], 0.2),
        (cifar100, 128, 200, [60, 120, 160], 0.2),
        (imagenet, 30, 90, [30, 60], 0.1),
    ):
        assert cfg.data.batch_size == batch_size
        assert cfg.trainer.max_epochs == epochs
        assert (cfg.model.scheduler.milestones, cfg.model.scheduler.gamma) == (milestones, gamma)
        optimizer = cfg.model.optimizer
        assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 1e-4)
    for cfg, classes in ((cifar10, 10), (cifar100, 100)):
        assert (cfg.model.net.depth, cfg.model.net.width, cfg.model.net.num_classes) == (26, 10, classes)
    assert (imagenet.model.net.name, imagenet.model.net.num_classes) == ("wide_resnet50_2", 1000)


def test_modern_training_replaces_the_schedule():
    for data in DATA:
        cfg = (digits if data == "digits" else composed)(f"data={data}", "+training=modern")
        assert set(cfg.model.scheduler) == {"_target_", "_partial_", "warmup"}
        assert (cfg.model.label_smoothing, cfg.model.optimizer.nesterov) == (0.1, True)
        assert cfg.data.get("augmentation", "none") == ("none" if data == "digits" else "rand-m9-mstd0.5-inc1")
        assert isinstance(instantiate(cfg.data), LightningDataModule)
        assert type(instantiate(cfg.callbacks.ema)).__name__ == "EMAWeightAveraging"
    assert composed("data=cifar10").data.augmentation == "standard"
    assert composed("data=cifar10", "+training=modern", "data.augmentation=standard").data.augmentation == "standard"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "overrides",
    [
        ("+training=modern", "model.net.norm=group", "model.channels_last=true", "trainer.precision=bf16-mixed"),
        ("callbacks=swa", "callbacks.swa.start=1"),
        # One small process: on two busy cores this takes a minute.
        ("compile=true", "trainer.devices=1", "model.net.width=1", "trainer.limit_val_batches=0")
        + ("trainer.limit_test_batches=0", "callbacks.checkpoint=null", "callbacks.last=null"),
    ],
    ids=["modern", "swa", "compile"],
)
def test_application_trains_with(overrides, tmp_path):
    if "compile=true" in overrides and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    done = command("-m", "recipes.train", "recipe=wide_resnet", "trainer=smoke", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "wide_resnet").iterdir()
    assert json.loads((run / "results.json").read_text())["train/loss"] > 0


@pytest.mark.parametrize("trainer", sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")))
@pytest.mark.parametrize("strategy", [*STRATEGIES, "dssync_adam", "dssync_corrected"])
def test_every_trainer_and_strategy_instantiate(strategy, trainer, tmp_path, monkeypatch):
    if trainer == "slurm":
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")
        monkeypatch.setenv("SLURM_NNODES", "2")
    cfg = digits(f"strategy={strategy}", f"trainer={trainer}", f"output_dir='{tmp_path}'")
    built = instantiate(cfg.trainer, logger=False)
    assert isinstance(built, Trainer)
    assert isinstance(built.strategy, DDPStrategy)
    assert built.strategy._start_method == ("popen" if trainer in ("default", "slurm") else "fork")
    if trainer == "slurm":
        assert (built.num_devices, built.num_nodes) == (3, 2)


@pytest.mark.parametrize("logger", sorted(path.stem for path in (CONF / "logger").glob("*.yaml")))
def test_every_logger_composes_and_instantiates(logger, tmp_path):
    cfg = digits(f"logger={logger}", f"output_dir='{tmp_path}'")
    if logger == "wandb" and importlib.util.find_spec("wandb") is None:
        with pytest.raises(Exception, match="wandb"):
            instantiate(cfg.logger)
    else:
        assert str(tmp_path) in instantiate(cfg.logger).log_dir


@pytest.mark.parametrize("callbacks", sorted(path.stem for path in (CONF / "callbacks").glob("*.yaml")))
def test_every_callback_instantiates(callbacks, tmp_path):
    cfg = digits(f"callbacks={callbacks}", f"output_dir='{tmp_path}'")
    assert all(instantiate(callback) for callback in cfg.callbacks.values())


def test_every_option_of_dssync_is_an_override():
    cfg = digits(
        "strategy=dssync",
        "strategy.group_size=4",
        "strategy.schedule=shuffle",
        "strategy.overlap=false",
        "strategy.sync_every=2",
        "strategy.wire_dtype=bf16",
        "strategy.average_gradients=true",
        "strategy.average_optimizer_state=[exp_avg_sq]",
        "strategy.optimizer_state_every=8",
        "strategy.noise_correction=auto",
        "strategy.seed=1",
        "strategy.timeout.seconds=60",
        "strategy.process_group_backend=gloo",
    )
    assert cfg.trainer.strategy.group_size == 4
    assert cfg.trainer.strategy.average_optimizer_state == ["exp_avg_sq"]
    assert cfg.trainer.strategy._target_ == "ds_lightning.DSSyncStrategy"


def test_options_of_dssync_have_the_strategys_own_defaults():
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(ds_lightning.DSSyncStrategy).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
    configured = digits("strategy=dssync").strategy
    for name, default in defaults.items():
        assert name in configured, f"conf/strategy/dssync.yaml lacks {name}"
        assert configured[name] == default


@pytest.mark.parametrize(
    "override",
    [
        "strategy.grop_size=4",
        "strategy.group_size=4",  # not an option of ddp
        "trainer.max_epoch=3",
        "data.batchsize=3",
        "model.optimizer.lrate=3",
        "model.net.dept=10",
        "modle=wide_resnet",
        "strategy=dsync",
        "recipe=wide_restnet",
        "data=mnist",
    ],
)
def test_misspelt_overrides_are_rejected(override):
    with pytest.raises(ConfigCompositionException):
        digits("strategy=ddp", override)


def test_a_misspelt_option_of_dssync_is_rejected():
    with pytest.raises(ConfigCompositionException, match="grop_size"):
        digits("strategy=dssync", "strategy.grop_size=4")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_epochs=many", "int or null"),
        ("trainer.max_steps=1.5", "int"),
        ("trainer.gradient_clip_val=true", "int or float or null"),
        ("trainer.deterministic=maybe", "bool or 'warn' or null"),
        ("trainer.accumulate_grad_batches=0", "at least 1"),
        ("strategy.process_group_backend=3", "str or null"),
        ("data.batch_size=abc", "int"),
        ("model.net.width=1.5", "int"),
        ("model.channels_last=maybe", "bool"),
        ("model.optimizer.lr=abc", "float or Tensor"),
        ("model.optimizer.lr=null", "float or Tensor"),
        ("model.scheduler.milestones=3", "a list"),
        ("model.scheduler.gamma=[1]", "float"),
        ("callbacks.learning_rate.logging_interval=hour", "'step' or 'epoch' or null"),
        ("logger.save_dir=3", "str or "),
        ("seed=abc", "int or null"),
        ("compile=maybe", "bool"),
        ("ckpt_path=3", "str or null"),
    ],
)
def test_values_of_other_types_are_refused(override, expected):
    with pytest.raises(ValueError, match=f"^{override.split('=')[0]} is .*, but must be {expected}"):
        check(digits("strategy=ddp", override))


GROUPS = ("strategy", "trainer", "callbacks", "logger")


@pytest.mark.parametrize(
    "overrides",
    [
        *((f"recipe={path.parent.name}", f"data={path.stem}") for path in sorted((CONF / "recipe").glob("*/*.yaml"))),
        *((f"{group}={path.stem}",) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))),
        ("+profiler=trace",),
        ("+training=modern",),
        ("recipe=deepfm", "model=deepfm_sparse"),
        ("trainer.devices=[0,1]", "trainer.devices=auto", "trainer.limit_val_batches=0.5", "trainer.precision=16"),
        ("callbacks.checkpoint=null", "model.scheduler=null", "+trainer.max_time='00:01:00:00'"),
    ],
    ids=" ".join,
)
def test_values_of_right_types_are_not_refused(overrides, monkeypatch):
    for name in ("SLURM_NNODES", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    check(digits("++data.root=unused", *overrides))


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the application as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_application_trains_and_tests_on_forked_ranks(strategy, tmp_path):
    done = command("-m", "recipes.train", "recipe=wide_resnet", f"strategy={strategy}", "trainer=smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in done.stdout
    (run,) = (tmp_path / "outputs" / "wide_resnet").iterdir()  # one folder per run, not per rank
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["test/accuracy"] <= 1
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (run / ".hydra" / "config.yaml").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_application_runs_under_torchrun_and_by_popen(tmp_path):
    overrides = ("recipe=wide_resnet", "trainer=smoke", "strategy.start_method=popen")
    launchers = {
        "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "recipes.train"),
        "popen": ("-m", "recipes.train"),
    }
    for name, launcher in launchers.items():
        folder = tmp_path / name
        folder.mkdir()
        done = command(*launcher, *overrides, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test/accuracy") == 1
        (run,) = (folder / "outputs" / "wide_resnet").iterdir()
        assert (run / "results.json").exists()
        assert {path.name for path in folder.iterdir()} == {"outputs"}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_application_sweeps(tmp_path):
    overrides = ("recipe=wide_resnet", "trainer=smoke", "seed=0,1", "logger=tensorboard")
    done = command("-m", "recipes.train", "--multirun", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/*/results.json"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_demo_prints_its_table_and_draws_the_curves(tmp_path):
    done = command("-m", "recipes.demo", "--workers", "2", "--epochs", "2", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row[0].strip(): row[1:] for line in done.stdout.splitlines() if len(row := line.strip("│").split("│")) == 3}
    assert [value.strip() for value in rows["steps"]] == ["72", "72"]
    assert all(0.5 < float(value) <= 1 for value in rows["test accuracy"])
    assert float(rows["consensus distance"][0]) == 0
    # Two workers: a ring sends the gradients once, and a pair its parameters once.
    ddp, dssync = (int(value.replace(",", "")) for value in rows["bytes sent per worker per step"])
    assert 0.9 < dssync / ddp < 1.1
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "1"], "at least 2"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "-1"], "must be positive"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, message, capsys):
    from recipes.demo import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(message, capsys.readouterr().err)
