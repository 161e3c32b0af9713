"""The comparison of arms: its arithmetic, its report, what it refuses, and that an interrupted one continues."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from torch.multiprocessing.spawn import ProcessRaisedException

from recipes import compare
from recipes.compare import (
    Arm,
    Run,
    Study,
    alone,
    best_rate,
    bytes_per_step,
    interval,
    main,
    parse,
    table,
    tune,
    tuning_table,
)
from recipes.train import one_line
from tests.test_configs import command


def test_arms_are_strategies_or_names_with_overrides():
    assert Arm.parse("ddp") == Arm("ddp", ["strategy=ddp"])
    assert Arm.parse("int8=strategy=dssync strategy.wire_dtype=int8") == Arm(
        "int8", ["strategy=dssync", "strategy.wire_dtype=int8"]
    )
    assert Arm.parse("states=strategy.average_optimizer_state='[exp_avg, exp_avg_sq]'").overrides == [
        "strategy.average_optimizer_state=[exp_avg, exp_avg_sq]"
    ]


def test_the_interval_is_students():
    # Five differences of mean 1 and standard deviation 1: 2.776 / sqrt(5) to either side.
    low, high = interval([1 - math.sqrt(2), 1, 1, 1, 1 + math.sqrt(2)])
    assert (low, high) == pytest.approx((1 - 2.7764 / math.sqrt(5), 1 + 2.7764 / math.sqrt(5)), abs=1e-3)
    assert interval([3.0]) == (-math.inf, math.inf)
    assert all(map(math.isnan, interval([1.0, math.nan])))


def finished(accuracy: float, loss: float, **more: float) -> Run:
    results = {
        "test/accuracy": accuracy,
        "test/loss": loss,
        "train/steps": 180.0,
        "train/seconds": 2.0,
        "bytes": 1000.0,
    }
    return Run({**results, **more}, Path("unused"))


def test_the_table_pairs_seeds():
    distance = {"dssync/consensus_distance": 0.02, "bytes": 500.0}
    runs = {
        "ddp": [finished(0.98, 0.1), finished(0.97, 0.1), finished(0.99, 0.1)],
        "dssync": [finished(0.985, 0.2, **distance), finished(0.97, 0.1, **distance), finished(0.98, 0.3, **distance)],
    }
    rows = {line.split(" | ")[0].strip("| "): line for line in table(runs, {"ddp": 0.1, "dssync": 0.2}, "accuracy")}
    accuracy = rows["test/accuracy (%), mean ± sd of 3 seeds"]
    # Differences 0.5, 0 and -1: mean -1/6, standard deviation 0.764, Student's factor 4.303.
    assert accuracy.endswith("98.00 ± 1.00 | 97.83 ± 0.76 | -0.17 (-2.06 to +1.73) |")
    assert rows["test/loss, mean ± sd of 3 seeds"].split(" | ")[1:3] == ["0.1000 ± 0.0000", "0.2000 ± 0.1000"]
    assert rows["learning rate"].split(" | ")[1:3] == ["0.1", "0.2"]
    assert rows["steps"].split(" | ")[1:3] == ["180", "180"]
    assert rows["bytes sent per worker per step"].split(" | ")[1:] == ["1,000", "500", "x 0.50 |"]
    assert rows["last consensus distance"].split(" | ")[1:3] == ["0", "0.02"]
    assert not [line for line in rows.values() if "equal steps" in line]
    runs["dssync"][1].results["train/steps"] = 90.0
    assert table(runs, {"ddp": 0.1, "dssync": 0.2}, "accuracy")[-1] == "**The arms did not take equal steps.**"


def test_a_run_that_diverged_is_in_the_table():
    runs = {"ddp": [finished(0.9, 0.1, bytes=0.0)] * 2, "dssync": [finished(math.nan, math.inf), finished(0.8, 0.2)]}
    lines = table(runs, {"ddp": 0.1, "dssync": 0.1}, "accuracy")
    assert "90.00 ± 0.00 | nan ± nan | +nan (+nan to +nan)" in lines[2]
    assert [line for line in lines if line.startswith("| bytes") and line.endswith("| 0 | 1,000 |  |")]


def test_a_rate_at_the_edge_of_the_grid_is_reported():
    tuned = {"ddp": {0.1: 0.9, 0.2: 0.95, 0.4: 0.9}, "dssync": {0.1: 0.9, 0.2: 0.95, 0.4: 0.96}}
    lines = tuning_table(tuned, {"ddp": 0.2, "dssync": 0.4}, "accuracy", 2)
    assert "| 0.2 | 95.00 (taken) | 95.00 |" in lines
    assert "| 0.4 | 90.00 | 96.00 (taken) |" in lines
    assert [line for line in lines if line.startswith("At the edge of the grid: dssync.")]
    assert tuning_table({}, {"ddp": 0.2}, "accuracy", 2) == []


def test_among_equal_rates_the_middle_one_is_taken():
    assert best_rate({0.05: 0.9, 0.1: 0.9, 0.2: 0.8}) == 0.1
    assert best_rate({0.05: 0.9, 0.1: 0.8, 0.2: 0.9}) in (0.05, 0.2)
    assert best_rate({0.05: 0.7, 0.1: 0.8, 0.2: 0.9}) == 0.2
    assert best_rate({0.05: math.nan, 0.1: 0.8, 0.2: 0.9}) == 0.2  # it diverged


def test_bytes_are_counted_or_computed_or_unknown():
    def configured(target: str) -> object:
        return OmegaConf.create({"strategy": {"_target_": target}, "trainer": {"devices": "auto"}})

    sizes = {"model/gradient_bytes": 800.0, "model/buffer_bytes": 80.0, "train/world_size": 8.0}
    ddp = configured("lightning.pytorch.strategies.DDPStrategy")
    assert bytes_per_step(ddp, sizes) == 7 / 8 * (2 * 800 + 80)
    assert bytes_per_step(ddp, {**sizes, "dssync/bytes_sent": 5.0}) == 5
    assert math.isnan(bytes_per_step(configured("lightning.pytorch.strategies.FSDPStrategy"), sizes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.devices=2"], "no recipe is chosen"),
        (["recipe=wide_resnet", "--arms", "ddp"], "at least two"),
        (["recipe=wide_resnet", "--arms", "ddp", "ddp=strategy=dssync"], "of different names"),
        (["recipe=wide_resnet", "--arms", "ddp", "a/b=strategy=dssync"], "name 'a/b', but folders are called by it"),
        (["recipe=wide_resnet", "--seeds", "0"], "--seeds is 0, but must be at least 1"),
        (["recipe=wide_resnet", "--seeds", "1001"], "seeds from 1000 on tune"),
        (["recipe=wide_resnet", "--tuning-seeds", "0"], "--tuning-seeds is 0"),
        (["recipe=wide_resnet", "--monitor-every", "0"], "--monitor-every is 0"),
        (["recipe=wide_resnet", "--lrs", "0.1", "0.1"], "different positive numbers"),
        (["recipe=wide_resnet", "--lrs", "-1"], "different positive numbers"),
        (["recipe=wide_resnet", "--arms", "ddp", "a=model.optimizer.lr=x"], "a learning rate is a positive number"),
        (["recipe=wide_resnet", "--arms", "ddp", "a=model.optimizer.lr=0"], "a learning rate is a positive number"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=wide_resnet", "--arms", "ddp", "dsync"], "dsync"),
        (["recipe=wide_restnet"], "wide_restnet"),
        (["recipe=wide_resnet", "trainer.max_epoch=3"], "max_epoch"),
    ],
)
def test_a_configuration_that_does_not_exist_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as stop:
        main(arguments)
    assert "\n" not in str(stop.value)
    assert list(tmp_path.iterdir()) == []


def test_a_users_mistake_is_one_line_and_a_defect_is_not():
    assert one_line(ValueError("data.x is 3. HINT: 4")) == "data.x is 3. HINT: 4"
    assert one_line(FileNotFoundError("no folder")) == "no folder"
    assert one_line(KeyError("x")) is None
    assert one_line(MisconfigurationException("`devices`\nis 0")) == "`devices` is 0"
    forked = "Traceback...\nlightning.fabric.utilities.exceptions.MisconfigurationException: `max_steps` is -2"
    assert one_line(ProcessRaisedException(forked, 0, 1)) == "`max_steps` is -2"
    with pytest.raises(InstantiationException) as unknown:
        instantiate({"_target_": "datetime.timedelta", "hour": 1})
    message = one_line(unknown.value)
    assert message is not None
    assert message.startswith("Error in call to target 'datetime.timedelta': TypeError(")
    assert "\n" not in message
    with pytest.raises(MissingMandatoryValue) as missing:
        _ = OmegaConf.create({"data": {"root": "???"}}).data.root
    assert one_line(missing.value) == "data.root is missing. HINT: add data.root=..."


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    trained: list[list[str]] = []

    def fake_run(cfg):
        trained.append([cfg.strategy._target_, cfg.model.optimizer.lr, cfg.seed, cfg.callbacks.get("consensus")])
        return {"val/accuracy": 0.5, "model/gradient_bytes": 8.0, "model/buffer_bytes": 0.0, "train/world_size": 4.0}

    monkeypatch.setattr("recipes.compare.run", fake_run)
    for _ in range(2):
        study = Study(tmp_path, ["recipe=wide_resnet"], total=2)
        for arm in (Arm.parse("ddp"), Arm.parse("dssync")):
            study.train(arm, 0.3, 7, 10, "val/accuracy")
    monitor = {"_target_": "ds_lightning.ConsensusMonitor", "every_n_steps": 10}
    assert trained == [
        ["lightning.pytorch.strategies.DDPStrategy", 0.3, 7, None],
        ["ds_lightning.DSSyncStrategy", 0.3, 7, monitor],
    ]
    assert "[  2/2] dssync" in capsys.readouterr().out
    trained.clear()
    configured = compare.configure
    monkeypatch.setattr(compare, "configure", lambda folder, key: configured(folder, [*key, "trainer.max_epochs=7"]))
    study.train(Arm.parse("ddp"), 0.3, 7, 10, "val/accuracy")  # the recipe has changed
    assert len(trained) == 1
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert len(runs) == len({entry["folder"] for entry in runs}) == 2


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    arguments = ["recipe=wide_resnet", "--output"]
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    for content in ("[", "{}x", '[{"overrides": 3}]'):
        (tmp_path / "broken" / "runs.json").write_text(content)
        with pytest.raises(SystemExit, match=r"error: .*runs\.json is broken\. HINT"):
            main([*arguments, str(tmp_path / "broken")])
    with pytest.raises(SystemExit, match=r"error: --output is .*file, which is a file\. HINT"):
        main([*arguments, str(tmp_path / "file")])
    with (
        alone(tmp_path / "busy"),
        pytest.raises(SystemExit, match=r"error: another comparison.* in .*busy\. HINT"),
    ):
        main([*arguments, str(tmp_path / "busy")])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_comparison_writes_its_report_and_the_same_command_continues_it(tmp_path):
    arguments = ["-m", "recipes.compare", "recipe=wide_resnet", "trainer.devices=2", "trainer.max_epochs=1"]
    arguments += ["--seeds", "1", "--tuning-seeds", "1", "--lrs", "0.05", "0.1", "--output", "out"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out"
    report = (folder / "report.md").read_text()
    assert report in done.stdout
    rows = {(cells := line.strip("| ").split(" | "))[0]: cells[1:] for line in report.splitlines() if "|" in line}
    assert all(20 < float(rows["test/accuracy (%), mean ± sd of 1 seeds"][i].split()[0]) <= 100 for i in (0, 1))
    assert rows["steps"][:2] == ["36", "36"]
    # Two workers: a ring sends the gradients once, and a pair its parameters once.
    ddp, dssync = (int(value.replace(",", "")) for value in rows["bytes sent per worker per step"][:2])
    assert 0.9 < dssync / ddp < 1.1
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "data:" in (folder / "config-dssync.yaml").read_text()
    assert "python -m recipes.compare recipe=wide_resnet" in report
    assert "torch 2" in report

    runs = json.loads((folder / "runs.json").read_text())
    assert len(runs) == 6
    runs[-1]["results"]["test/accuracy"] = 0.125  # no training gives this: it is read back
    del runs[-2]  # as if it had not been finished
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "report.md").unlink()
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert " 12.50 ± nan " in (folder / "report.md").read_text()
    assert len(json.loads((folder / "runs.json").read_text())) == 6


def test_the_recipe_comes_first():
    assert parse(["trainer.devices=8", "recipe=bert"]).overrides == ["recipe=bert", "trainer.devices=8"]


def test_a_grid_of_our_own_grows_for_all_arms_while_one_is_best_at_its_edge():
    class Fake:
        def __init__(self) -> None:
            self.total = 12
            self.tried: list[tuple[str, float, int]] = []

        def train(self, arm, lr, seed, monitor_every, shown):
            self.tried.append((arm.name, lr, seed))
            best = {"ddp": 0.1, "dssync": 0.4}[arm.name]
            return Run({"val/accuracy": 1 - abs(math.log(lr / best)) + seed / 1e6}, Path("unused"))

    study = Fake()
    tuned = tune(parse(["recipe=wide_resnet"]), study, "accuracy", [0.05, 0.1, 0.2])
    assert [list(values) for values in tuned.values()] == [[0.05, 0.1, 0.2, 0.4, 0.8]] * 2  # 0.8: 0.4 was an edge, too
    assert {seed for *_, seed in study.tried} == {1000, 1001}
    assert len(study.tried) == len(set(study.tried)) == study.total == 2 * 5 * 2
    study = Fake()
    given = tune(parse(["recipe=wide_resnet", "--lrs", "0.05", "0.1"]), study, "accuracy", [0.05, 0.1])
    assert [list(values) for values in given.values()] == [[0.05, 0.1]] * 2


def test_an_arm_with_a_learning_rate_of_its_own_is_not_tuned(tmp_path, monkeypatch, capsys):
    trained: list[tuple[str, float, int]] = []

    def fake_run(cfg):
        log = Path(cfg.output_dir) / "csv" / "version_0" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text("step,dssync/bytes_sent\n19,100\n39,120\n")
        name = cfg.strategy._target_.rpartition(".")[2]
        trained.append((name, cfg.model.optimizer.lr, cfg.seed))
        results = {"val/accuracy": 0.5, "test/accuracy": 0.5, "train/steps": 1.0, "train/seconds": 1.0}
        results |= {"dssync/bytes_sent": 120.0} if name == "DSSyncStrategy" else {}
        return {**results, "model/gradient_bytes": 8.0, "model/buffer_bytes": 0.0, "train/world_size": 4.0}

    monkeypatch.setattr("recipes.compare.run", fake_run)
    monkeypatch.setattr("recipes.compare.plot", lambda *args: None)
    fixed = "fixed=strategy=dssync model.optimizer.lr=0.3"
    common = ["recipe=wide_resnet", "--seeds", "1", "--tuning-seeds", "1", "--output", str(tmp_path)]
    main([*common, "--arms", "ddp", fixed])
    assert [(lr, seed) for name, lr, seed in trained if name == "DSSyncStrategy"] == [(0.3, 0)]
    assert {seed for name, _, seed in trained if name == "DDPStrategy"} == {0, 1000}
    assert f"/{len(trained)}] fixed" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert "tuned on 1000 to 1000" in report
    assert "| bytes sent per worker per step | 12 | 110 |" in report  # counted: the mean of all measurements
    trained.clear()
    both = ["ddp=strategy=ddp model.optimizer.lr=0.1", fixed]
    main([*common, "--arms", *both])
    assert "no learning rate was tuned" in (tmp_path / "report.md").read_text()
