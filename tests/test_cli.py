"""The strategy as LightningCLI and Hydra build it, by class and by name; and its names in processes of their own."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import OmegaConf

from ds_lightning import ConsensusMonitor, DSSyncStrategy, GridSchedule, ShuffleSchedule
from ds_lightning.topology import Topology
from tests.ranks import QUIET, run_ranks

ROOT = Path(__file__).parents[1]
NAMES = {"dssync": "popen", "dssync_spawn": "spawn", "dssync_fork": "fork", "dssync_notebook": "fork"}


@pytest.mark.parametrize(("name", "start_method"), NAMES.items())
def test_names_are_registered(name, start_method):
    assert name in StrategyRegistry.available_strategies()
    strategy = Trainer(strategy=name, devices=4, accelerator="cpu", logger=False).strategy
    assert isinstance(strategy, DSSyncStrategy)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._start_method == start_method
    assert (strategy.num_processes, strategy.group_size, strategy.schedule) == (4, "auto", "auto")


# ---- LightningCLI ---------------------------------------------------------------------------------------------------


def cli(*arguments):
    base = ["--trainer.accelerator=cpu", "--trainer.devices=4", "--trainer.logger=false"]
    return LightningCLI(
        BoringModel,
        BoringDataModule,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,  # it would stay in the environment of the tests that follow
        args=[*base, *arguments],
    ).trainer


def strategy_of(*arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = cli("--trainer.strategy=ds_lightning.DSSyncStrategy", *arguments).strategy
    assert not [w for w in caught if "no effect" in str(w.message)]  # the CLI passes every option at its default
    assert isinstance(strategy, DSSyncStrategy)
    return strategy


@pytest.fixture(autouse=True)
def arguments_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["group_size=4"], "group_size", 4),
        (["group_size=auto"], "group_size", "auto"),
        (["schedule=grid"], "schedule", "grid"),
        (["overlap=false"], "overlap", False),
        (["sync_every=3"], "sync_every", 3),
        (["wire_dtype=bf16"], "wire_dtype", torch.bfloat16),
        (["wire_dtype=null"], "wire_dtype", None),
        (["average_gradients=true"], "average_gradients", True),
        (['average_optimizer_state=["exp_avg_sq"]'], "average_optimizer_state", ("exp_avg_sq",)),
        (["optimizer_state_every=8"], "optimizer_state_every", 8),
        (["noise_correction=auto"], "noise_correction", "auto"),
        (["noise_correction=false"], "noise_correction", False),
        (["seed=7"], "seed", 7),
        (["start_method=fork"], "_start_method", "fork"),
        (["process_group_backend=gloo"], "process_group_backend", "gloo"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_options_on_the_command_line(arguments, name, value):
    assert getattr(strategy_of(*(f"--trainer.strategy.{a}" for a in arguments)), name) == value


def test_many_options_and_a_schedule_by_class():
    prefix = "--trainer.strategy.schedule"
    strategy = strategy_of(
        "--trainer.strategy.sync_every=2",
        f"{prefix}=ds_lightning.ShuffleSchedule",
        f"{prefix}.world_size=4",
        f"{prefix}.group_size=2",
        f"{prefix}.seed=3",
    )
    assert strategy.sync_every == 2
    assert repr(strategy.schedule) == repr(ShuffleSchedule(4, 2, 3))


def test_names_on_the_command_line():
    assert isinstance(cli("--trainer.strategy=dssync_fork").strategy, DSSyncStrategy)


def test_a_printed_configuration_configures(tmp_path, capsys):
    given = ["--trainer.strategy=ds_lightning.DSSyncStrategy", "--trainer.strategy.group_size=4"]
    schedule = ["--trainer.strategy.schedule=ds_lightning.GridSchedule", "--trainer.strategy.schedule.world_size=4"]
    schedule.append("--trainer.strategy.schedule.group_size=2")
    with pytest.raises(SystemExit) as end:
        cli(*given, *schedule, '--trainer.strategy.average_optimizer_state=["exp_avg_sq"]', "--print_config")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    strategy = OmegaConf.create(printed).trainer.strategy
    assert strategy["class_path"] == "ds_lightning.DSSyncStrategy"
    assert strategy["init_args"]["group_size"] == 4
    assert strategy["init_args"]["wire_dtype"] is None
    (tmp_path / "config.yaml").write_text(printed)
    built = cli(f"--config={tmp_path / 'config.yaml'}").strategy
    assert (built.group_size, built.average_optimizer_state) == (4, ("exp_avg_sq",))
    assert repr(built.schedule) == repr(GridSchedule(4, 2))


def test_help_describes_every_option(capsys):
    with pytest.raises(SystemExit):
        cli("--trainer.strategy.help=ds_lightning.DSSyncStrategy")
    text = " ".join(capsys.readouterr().out.split())  # wrapped anywhere
    for option in ("group_size", "schedule", "overlap", "sync_every", "wire_dtype", "average_gradients", "seed"):
        described = text.split(f"--trainer.strategy.{option} ")[-1].split("--trainer", 1)[0]
        assert "(type: " in described
        assert len(described.split("(type: ")[0].split()) > 3, described


def test_the_path_of_a_topology_is_passed_on(tmp_path):
    (tmp_path / "cluster.yaml").write_text("bandwidth: 10\nhosts:\n  n[0-3]:\n")
    path = f"--trainer.strategy.topology={tmp_path / 'cluster.yaml'}"
    strategy = strategy_of("--trainer.strategy.schedule=topology", path)
    assert strategy.topology == Topology.flat(["n0", "n1", "n2", "n3"], 10)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("grop_size=4", "'grop_size' is not accepted"),
        ("overlap=maybe", "overlap"),
        ("sync_every=often", "sync_every"),
        ("average_optimizer_state=exp_avg_sq", "average_optimizer_state"),
        ("group_size=0", "group_size=0 is too small"),
        ("schedule=gird", "schedule='gird' is unknown"),
        ("wire_dtype=bf17", "wire_dtype='bf17' is not supported"),
    ],
)
def test_bad_options_on_the_command_line(argument, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        cli("--trainer.strategy=ds_lightning.DSSyncStrategy", f"--trainer.strategy.{argument}")
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_the_monitor_on_the_command_line():
    trainer = cli("--trainer.callbacks+=ds_lightning.ConsensusMonitor", "--trainer.callbacks.every_n_steps=10")
    assert [c.every_n_steps for c in trainer.callbacks if isinstance(c, ConsensusMonitor)] == [10]


# ---- Hydra ----------------------------------------------------------------------------------------------------------

CONFIG = """
_target_: lightning.pytorch.Trainer
accelerator: cpu
devices: 4
logger: false
strategy:
  _target_: ds_lightning.DSSyncStrategy
  schedule: {_target_: ds_lightning.GridSchedule, world_size: 4, group_size: 2}
  wire_dtype: bf16
  average_optimizer_state: [exp_avg_sq]
  timeout: {_target_: datetime.timedelta, seconds: 60}
callbacks:
  - {_target_: ds_lightning.ConsensusMonitor, every_n_steps: 10}
"""


def hydra(**strategy):
    config = OmegaConf.create(CONFIG)
    config.strategy.update(strategy)
    return config


@pytest.mark.parametrize("convert", ["none", "partial", "all"])
def test_hydra_instantiates_it(convert):
    strategy = instantiate(hydra(_convert_=convert)).strategy
    assert isinstance(strategy, DSSyncStrategy)
    assert repr(strategy.schedule) == repr(GridSchedule(4, 2))
    assert strategy.wire_dtype == torch.bfloat16
    assert strategy.average_optimizer_state == ("exp_avg_sq",)
    assert type(strategy.average_optimizer_state) is tuple
    assert strategy._timeout.total_seconds() == 60


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"grop_size": 4}, "did you mean 'group_size'"),
        ({"overlap": "no"}, "overlap='no' is not a bool"),
        ({"wire_dtype": "bf17"}, "wire_dtype='bf17' is not supported"),
        ({"average_optimizer_state": "exp_avg_sq"}, "is not a sequence of names"),
        ({"model_averaging_period": 4}, "model_averaging_period=4 cannot be used"),
    ],
)
def test_hydra_shows_what_is_wrong(option, message):
    with pytest.raises(InstantiationException, match=message):
        instantiate(hydra(**option))


def test_a_strategy_of_hydra_trains():
    """What came out of ListConfig and interpolations also survives the agreement of ranks and the first steps."""

    def run(rank):
        config = OmegaConf.create({"strategy": hydra().strategy, "n": "${strategy.schedule.group_size}"})
        config.strategy.sync_every = "${n}"
        trainer = Trainer(
            strategy=instantiate(config.strategy),
            accelerator="cpu",
            devices=4,
            max_steps=4,
            limit_val_batches=0,
            **QUIET,
        )
        model = BoringModel()
        trainer.fit(model)
        return trainer.strategy.statistics.synchronizations, model.layer.weight.data

    ranks = run_ranks(run, 4, init=False)
    assert [n for n, _ in ranks] == [2] * 4
    assert all(torch.equal(weight, ranks[0][1]) for _, weight in ranks)


# ---- real processes -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
import ds_lightning
torch.set_num_threads(1)

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch + self.global_rank, batch_idx)
    def on_train_end(self):
        print(f"rank {self.global_rank} steps {self.trainer.global_step}", flush=True)
    def teardown(self, stage):
        print(f"sum {self.layer.weight.double().sum().item():.12f}", flush=True)

if __name__ == "__main__":
    seed_everything(0)
    model = Model()
    before = model.layer.weight.detach().clone()
    trainer = Trainer(strategy=eval(sys.argv[1]), devices=2, accelerator="cpu", max_steps=2, limit_val_batches=1,
                      num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)
    trainer.fit(model)
    assert not torch.equal(model.layer.weight, before)
    print(f"main sum {model.layer.weight.double().sum().item():.12f}", flush=True)
"""


def script(tmp_path, strategy):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(path), strategy],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dssync", "dssync_spawn", "dssync_fork"])
def test_every_name_trains_in_processes_of_its_own(name, tmp_path):
    done = script(tmp_path, repr(name))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"rank 0 steps 2", "rank 1 steps 2"} <= set(lines)
    sums = [line.split("sum ")[1] for line in lines if "sum " in line]
    assert len(sums) == (4 if name == "dssync" else 3)  # two ranks, and the main process gets the weights of a fork
    assert len(set(sums)) == 1
    (told,) = [line for line in done.stderr.splitlines() if "dssync: " in line]
    assert "GridSchedule(world_size=2, group_size=2), groups of 2, exact consensus after 1 step. Start-up: " in told


@pytest.mark.slow
def test_a_bad_option_ends_all_processes(tmp_path):
    done = script(tmp_path, 'ds_lightning.DSSyncStrategy(group_size=3, start_method="fork")')
    assert done.returncode != 0
    assert "group_size=3 is larger than the world size 2. HINT: use 2 to 2" in done.stderr
