"""Virtual workers against N torch modules and mixing matrices, against the real wire, and their command line."""

import csv
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import ds_lightning.__main__ as dispatcher
from ds_lightning import GridSchedule, ShuffleSchedule, learning_command
from ds_lightning.__main__ import main
from ds_lightning.command import Progress, dated_folder
from ds_lightning.digits import Data, digits
from ds_lightning.lanes import Lane
from ds_lightning.learning import Experiment, batches, consensus_distance, differences, index_arrays, run
from ds_lightning.payload import Payload
from ds_lightning.schedule import CyclicSchedule, mixing_matrix
from ds_lightning.wire import codec_for
from tests.ranks import run_ranks
from tests.reference import Reference, flat, relative_error

OPTIMIZERS = {"sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), "adam": torch.optim.Adam}
WIRES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class Pairs:
    """Of five workers some are alone at each step; groups of different sizes otherwise."""

    world_size, period = 5, 3

    def partition(self, step):
        return (((0, 1), (2, 3, 4)), ((0,), (1, 2), (3, 4)), ((0, 4), (1,), (2,), (3,)))[step % 3]

    def group(self, rank, step):
        return next(g for g in self.partition(step) if rank in g)


def small_model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def small_data(n=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 5, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)
    return Data(x, y, x[:9], y[:9])


def rows(experiment, data, make_model=small_model):
    """X after every step."""
    seen = []
    run(experiment, data, on_step=lambda step, x: seen.append(x.clone()), make_model=make_model)
    assert len(seen) == experiment.steps
    return seen


def first_model(experiment):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        return small_model().double()


def reference(experiment, data, schedule, overlap, sync_every):
    """Replicas of the plain loop after every step: N modules, N optimizers of torch, mixing matrices."""
    e = experiment

    def make():
        model = small_model().double()
        model.load_state_dict(first_model(e).state_dict())
        return model

    def make_optimizer(model):
        return OPTIMIZERS[e.optimizer](model.parameters(), e.lr)

    states = e.average_optimizer_state, e.optimizer_state_every
    ref = Reference(make, make_optimizer, schedule, overlap, sync_every, e.average_gradients, e.corrects_noise, *states)
    for indices, _ in zip(batches(e, data.train_labels), range(e.steps), strict=False):

        def backward(model, rank, indices=indices):
            F.cross_entropy(model(data.train[indices[rank]]), data.train_labels[indices[rank]]).backward()

        ref.step(backward)
        yield torch.stack([ref.flat(rank) for rank in range(e.world_size)])


def assert_equal_at_every_step(experiment, data, *args):
    for step, (x, expected) in enumerate(zip(rows(experiment, data), reference(experiment, data, *args), strict=True)):
        assert relative_error(x, expected) < 1e-12, step


@pytest.mark.parametrize("average_gradients", [False, True])
@pytest.mark.parametrize("sync_every", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["grid", "shuffle", Pairs()], ids=["grid", "shuffle", "own"])
def test_workers_equal_modules_and_matrices(schedule, optimizer, overlap, sync_every, average_gradients):
    n = 5 if isinstance(schedule, Pairs) else 8
    options = {"noise_correction": "auto", "optimizer": optimizer, "lr": 0.05, "steps": 15}
    e = Experiment(n, schedule, 2, overlap, sync_every, None, average_gradients, **options)
    assert e.corrects_noise == (optimizer == "adam" and not average_gradients)
    made = {"grid": GridSchedule(8, 2), "shuffle": ShuffleSchedule(8, 2, 0)}.get(schedule, schedule)
    assert_equal_at_every_step(e, small_data(), made, overlap, sync_every)


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [("sgd", ("momentum_buffer",)), ("adam", ("exp_avg_sq",)), ("adam", ("exp_avg", "exp_avg_sq"))],
)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_optimizer_states_are_averaged_when_they_are_due(overlap, every, optimizer, states):
    options = {"noise_correction": "auto", "lr": 0.05, "steps": 30}
    e = Experiment(8, "grid", 2, overlap, 2, None, False, states, every, optimizer, **options)
    assert_equal_at_every_step(e, small_data(), GridSchedule(8, 2), overlap, 2)


@pytest.mark.parametrize("average_gradients", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_are_averaged_each_in_its_own_partition(parts, overlap, average_gradients):
    """Against matrices on the columns of each part, with a plain optimizer on all rows."""
    data, schedule = small_data(), CyclicSchedule([Pairs().partition(t) for t in range(3)], parts)
    e = Experiment(5, schedule, 2, overlap, 2, None, average_gradients, ("momentum_buffer",), lr=0.05, steps=14)
    model, first = small_model().double(), torch.nn.utils.parameters_to_vector(first_model(e).parameters()).detach()
    x, n = first.repeat(5, 1), len(first)
    momentum = torch.zeros_like(x)
    cuts = [n // parts * q + min(q, n % parts) for q in range(parts + 1)]  # the first ones have one more

    def mixed(values, round_):
        columns = [values[:, one:other] for one, other in pairwise(cuts)]
        matrices = [torch.from_numpy(mixing_matrix(schedule, round_ + q)) for q in range(parts)]
        return torch.cat([w @ part for w, part in zip(matrices, columns, strict=True)], dim=1)

    begun = x
    for step, (batch, found) in enumerate(zip(batches(e, data.train_labels), rows(e, data), strict=False)):
        round_, place = divmod(step, 2)
        begun = x if place == 0 else begun
        gradients = []
        for row, indices in zip(x, batch, strict=True):
            torch.nn.utils.vector_to_parameters(row, model.parameters())
            loss = F.cross_entropy(model(data.train[indices]), data.train_labels[indices])
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
        gradient = torch.stack(gradients)
        if place == 1 and average_gradients:
            gradient = mixed(gradient, round_)
        if place == 1 and overlap:
            x, momentum = x + mixed(begun, round_) - begun, mixed(momentum, round_)
        momentum = 0.9 * momentum + gradient
        x = x - 0.05 * momentum
        if place == 1 and not overlap:
            x, momentum = mixed(x, round_), mixed(momentum, round_)
        assert relative_error(found, x) < 1e-12, step


def test_local_sgd_averages_everybody_every_few_steps():
    e = Experiment(6, "local", sync_every=4, lr=0.05, steps=13)
    assert_equal_at_every_step(e, small_data(), GridSchedule(6, 6), False, 4)
    distances = [consensus_distance(x) for x in rows(e, small_data())]
    assert [distance < 1e-12 for distance in distances] == [t % 4 == 3 for t in range(13)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_bsp_is_one_worker_with_one_big_batch(optimizer):
    e, data = Experiment(6, "bsp", optimizer=optimizer, lr=0.05, steps=15), small_data()
    model = first_model(e)
    one = OPTIMIZERS[optimizer](model.parameters(), e.lr)
    for x, indices in zip(rows(e, data), batches(e, data.train_labels), strict=False):
        one.zero_grad()
        F.cross_entropy(model(data.train[indices.flatten()]), data.train_labels[indices.flatten()]).backward()
        one.step()
        assert relative_error(x, flat(model).expand_as(x)) < 1e-12
        assert consensus_distance(x) == 0


def test_one_worker_is_plain_sgd():
    e, data = Experiment(1, "auto", lr=0.05, steps=9), small_data()
    assert all(torch.equal(x, y) for x, y in zip(rows(e, data), rows(replace(e, schedule="bsp"), data), strict=True))


SCHEDULES = {"pairs": GridSchedule(8, 2), "3x3": GridSchedule(9, 3), "4, 4, 3": ShuffleSchedule(11, 4), "own": Pairs()}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_wire_moves_the_mean(name, wire):
    schedule = SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(schedule.world_size, 1000, generator=generator, dtype=torch.float64)
    mean, codec, before = x.mean(0), codec_for(WIRES[wire]), consensus_distance(x)
    for t in range(6):
        groups = index_arrays(schedule.partition(t))
        change, exact = differences(x, groups, codec), differences(x, groups)
        assert 1e-5 < (change - exact).abs().max() < 0.2, "a wire of few bits rounds, but by its steps only"
        x += change
    assert relative_error(x.mean(0), mean) < 1e-14
    assert consensus_distance(x) < before / 3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("group_size", [2, 4])
def test_the_mean_of_a_run_moves_by_the_mean_gradients_alone(group_size, overlap):
    means, momentum = [flat(first_model(Experiment(16)))], 0.0

    def look(step, x):
        nonlocal momentum
        momentum = 0.9 * momentum + x.grad.mean(0)
        means.append(x.mean(0).clone())
        assert relative_error(means[-1], means[-2] - 0.05 * momentum) < 1e-13

    e = Experiment(16, "grid", group_size, overlap, wire_dtype="int8", average_gradients=True, lr=0.05, steps=20)
    run(e, small_data(), look, small_model)
    assert len(means) == 21


def real_average(rank, wire, n, members):
    x = worker_values(rank, n)
    payload = Payload([x], wire)
    payload.start(members, torch.distributed.group.WORLD, Lane())
    payload.finish()
    return x


def worker_values(rank, n):
    return 1 + torch.randn(n, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("g", [2, 3, 4])
@pytest.mark.parametrize("wire", [torch.float32, *WIRES.values()])
def test_a_wire_does_what_the_real_one_does(wire, g):
    for n in (1000, 130):
        real = torch.stack(run_ranks(real_average, g, wire, n, tuple(range(g))))
        x = torch.stack([worker_values(rank, n) for rank in range(g)])
        codec = codec_for(wire) if wire != torch.float32 else None
        virtual = x + differences(x, index_arrays([tuple(range(g))]), codec)
        assert relative_error(virtual, real) < 1e-7  # sums in another order; one step of int8 is 1e-2
        assert (virtual - real).abs().max() < 1e-5


@pytest.mark.parametrize("partition", ["iid", "by_label", "dirichlet:0.5"])
def test_samples_are_seen_once_before_any_is_seen_again(partition):
    labels = small_data(60).train_labels
    e = Experiment(6, batch_size=2, partition=partition, seed=3)
    drawn = [indices for indices, _ in zip(batches(e, labels), range(10), strict=False)]
    first, second = torch.stack(drawn[:5]), torch.stack(drawn[5:])
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist()) == list(range(60))
    assert not torch.equal(first, second)
    stay = [set(first[:, w].flatten().tolist()) == set(second[:, w].flatten().tolist()) for w in range(6)]
    assert all(stay) == (partition != "iid")
    if partition == "by_label":
        assert max(len(set(labels[first[:, w]].flatten().tolist())) for w in range(6)) <= 2
    assert torch.equal(next(batches(e, labels)), drawn[0])
    assert not torch.equal(next(batches(replace(e, seed=4), labels)), drawn[0])


def test_a_batch_may_be_larger_than_the_data():
    indices = next(batches(Experiment(8, batch_size=9), torch.zeros(30)))
    counts = indices.flatten().bincount(minlength=30)
    assert indices.shape == (8, 9)
    assert counts.min() >= 2
    assert counts.max() <= 3


def test_the_curve_is_even_ends_at_the_end_and_tells_what_it_says():
    e, data = Experiment(4, "grid", lr=0.3, steps=50, seed=2), small_data()
    result = run(e, data, make_model=small_model, points=7)
    assert [p.step for p in result.curve] == [8, 15, 22, 29, 36, 43, 50]
    seen = rows(e, data)
    assert result.final.distance == pytest.approx(
        torch.tensor([consensus_distance(x) for x in seen[43:]]).square().mean().sqrt().item()
    )
    model = small_model().double()
    nn.utils.vector_to_parameters(seen[-1].mean(0), model.parameters())
    assert result.final.accuracy == (model(data.test).argmax(1) == data.test_labels).double().mean()
    assert 0 < result.final.loss < result.curve[0].loss
    assert replace(result, seconds=0) == replace(run(e, data, make_model=small_model, points=7), seconds=0)
    assert [p.step for p in run(replace(e, steps=3), data, make_model=small_model).curve] == [1, 2, 3]


def test_the_caller_s_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(Experiment(2, steps=2), small_data(), make_model=small_model)
    assert torch.equal(torch.rand(1), expected)


def test_other_models_train_and_dropout_differs_between_workers():
    def model():
        return nn.Sequential(nn.Linear(5, 64), nn.GroupNorm(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))

    data = small_data()
    data = replace(data, train=data.train[:1].expand(40, 5), train_labels=data.train_labels[:1].expand(40))
    x = rows(Experiment(4, "local", sync_every=9, steps=1), data, model)[0]
    assert consensus_distance(x) > 1e-3  # all have the same sample
    with pytest.raises(ValueError, match=r"buffer '1.running_mean'.*HINT: .*GroupNorm"):
        run(Experiment(2), data, make_model=lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "world_size=0 is too small. HINT"),
        ({"world_size": 2.0}, "world_size=2.0 is not an int.*HINT"),
        ({"schedule": "ring"}, "schedule='ring' is unknown. HINT"),
        ({"schedule": 7}, "schedule=7 is no schedule.*HINT"),
        ({"schedule": GridSchedule(4, 2)}, "is for 4 ranks but the world size is 8. HINT"),
        ({"group_size": 9}, "group_size=9 is larger than the world size 8. HINT"),
        ({"group_size": 9, "schedule": "bsp"}, "group_size=9 is larger than the world size 8. HINT"),
        ({"group_size": "big"}, "group_size='big' is not an int.*HINT"),
        ({"overlap": 1}, "overlap=1 is not a bool. HINT"),
        ({"average_gradients": "no"}, "average_gradients='no' is not a bool. HINT"),
        ({"sync_every": 0}, "sync_every=0 is too small. HINT"),
        ({"wire_dtype": "int4"}, "wire_dtype='int4' is not supported. HINT"),
        ({"average_optimizer_state": "exp_avg"}, "'exp_avg' is not a sequence of names. HINT"),
        ({"average_optimizer_state": ("exp_avg_sq",)}, "sgd has no state 'exp_avg_sq'. HINT: it has momentum_buffer."),
        ({"average_optimizer_state": ("exp_avg",), "optimizer": "adam"}, "diverges.*HINT"),
        ({"optimizer_state_every": 0}, "optimizer_state_every=0 is too small. HINT"),
        ({"optimizer": "lamb"}, "optimizer='lamb' is unknown. HINT: use one of sgd, adam."),
        ({"lr": 0}, "lr=0 is not a positive number. HINT"),
        ({"lr": float("nan")}, "lr=nan is not a positive number. HINT"),
        ({"lr": "0.1"}, "lr='0.1' is not a positive number. HINT"),
        ({"batch_size": 0}, "batch_size=0 is too small. HINT"),
        ({"steps": True}, "steps=True is not an int.*HINT"),
        ({"seed": 0.5}, "seed=0.5 is not an int.*HINT"),
        ({"partition": "dirichlet:0"}, "partition is 'dirichlet:0', but must be.*HINT"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**{"world_size": 8, **options})


def test_workers_that_keep_samples_need_one_each():
    with pytest.raises(ValueError, match=r"partition='by_label': 40 training samples.*41 workers. HINT"):
        run(Experiment(41, partition="by_label"), small_data(), make_model=small_model)


def test_64_workers_learn_digits_in_seconds():
    data, start = digits(), time.process_time()
    assert len(data.train) == 1437
    assert abs(float(data.train.mean())) < 1e-5
    ds, bsp, local = (
        run(Experiment(64, schedule, overlap=False, sync_every=k, steps=120), data)
        for schedule, k in (("grid", 1), ("bsp", 1), ("local", 8))
    )
    assert time.process_time() - start < 30
    assert min(ds.final.accuracy, bsp.final.accuracy) > 0.96
    assert bsp.final.distance == 0 < ds.final.distance < 0.2 < 1 < local.final.distance


# ---- the command ----------------------------------------------------------------------------------------------------

SHORT = ["simulate", "learning", "--world-size", "6", "--steps", "4"]


def test_the_command_writes_a_table_a_csv_and_a_picture(tmp_path, capsys):
    lrs = ["--lr", "0.1", "0.2", "0.1"]
    assert main([*SHORT, "--schedules", "auto", "bsp", "local", *lrs, "--seeds", "2", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "learning").iterdir()
    assert f"outputs in {folder}" in out
    lines = re.findall(r"^\| (\w+) +\| (0\.\d) \| \d+\.\d\d ± \d+\.\d\d +\| [\d.]+ +\| ", out, re.MULTILINE)
    assert lines == [(name, lr) for name in ("auto", "bsp", "local") for lr in ("0.1", "0.2")]
    assert len(err.splitlines()) == 12
    assert err.splitlines()[-1].startswith("100%  local, lr 0.2, seed 1: accuracy ")
    with (folder / "learning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 4
    assert {"schedule", "lr", "seed", "step", "accuracy", "loss", "consensus_distance"} == set(rows[0])
    assert (folder / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_corrects_noise_where_there_is_some(tmp_path, capsys):
    """And says so; a rate at which Adam alone moves little."""
    words = [
        *SHORT,
        *["--world-size", "16", "--steps", "200", "--schedules", "grid", "--seeds", "1", "--lr", "0.001", "--output"],
        str(tmp_path),
    ]
    accuracies = []
    for more in ([], ["--noise-correction", "auto"], ["--noise-correction", "auto", "--average-gradients"]):
        assert main([*words, "--optimizer", "adam", *more]) == 0
        out = capsys.readouterr().out
        assert ("corrected for noise" in out) == (len(more) == 2)
        accuracies.append(float(re.search(r"\| (\d+\.\d\d) +\| ", out)[1]))
    assert accuracies[1] > accuracies[0] + 3
    with pytest.raises(SystemExit):
        main([*words, "--noise-correction", "true"])
    assert "noise_correction=True cannot be used with optimizer='sgd'" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "words", [["--lr", "1e30"], ["--schedules", "bsp", "--seeds", "1"]], ids=["diverges", "bsp alone"]
)
def test_what_has_no_consensus_distance_is_drawn(words, tmp_path, capsys):
    assert main([*SHORT, *words, "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("learning/*/learning.png"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--schedules", "ring"],
            "schedule='ring' is unknown. HINT: use one of grid, shuffle",
        ),
        (["--schedules", "topology"], "schedule='topology' is unknown"),
        (["--world-size", "100000"], "world_size=100000 is too large. HINT: use at most 4,096"),
        (["--world-size", "0"], "world_size=0 is too small"),
        (["--world-size", "six"], "invalid int value: 'six'"),
        (["--group-size", "many"], "group_size='many' is neither an int nor 'auto'"),
        (["--group-size", "7"], "group_size=7 is larger"),
        (["--sync-every", "0"], "sync_every=0 is too small"),
        (["--seeds", "0"], "seeds=0 is too small"),
        (["--lr", "-1"], "lr=-1.0 is not a positive number"),
        (["--world-size", "2000", "--partition", "by_label"], "1437 training samples are not one for each of 2000"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--output", __file__], "File exists|Not a directory"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        main([*SHORT, "--output", str(tmp_path), *words])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_named_before_anything_is_done(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*SHORT, "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {module} cannot be imported")
    assert "pip install 'ds_lightning[recipes]'" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_is_done(monkeypatch, capsys, tmp_path):
    def interrupted(experiment, *args, **options):
        if experiment.seed:
            raise KeyboardInterrupt
        return run(experiment, *args, **options)

    monkeypatch.setattr(learning_command, "run", interrupted)
    assert main([*SHORT, "--schedules", "grid", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    (table,) = (tmp_path / "learning").glob("*/learning.csv")
    assert len(table.read_text().splitlines()) == 1 + 4


def test_the_dispatcher_helps(monkeypatch, capsys):
    for words in ([], ["--help"], ["simulate", "-h"]):
        assert main(words) == (0 if words else 2)
        assert "simulate learning" in capsys.readouterr().out
    assert main(["simulate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no command 'simulate'. HINT: there is 'plan', ")
    assert "'simulate learning'" in error
    assert error.count("\n") == 1
    monkeypatch.setitem(dispatcher.COMMANDS, "other", ("other_module", ""))
    monkeypatch.setitem(sys.modules, "other_module", SimpleNamespace(main=lambda argv: len(argv)))
    assert main(["other", "a", "b", "c"]) == 3


def test_python_m_prints_help():
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-m", "ds_lightning", "--help"]
    environment = {**os.environ, "PYTHONPATH": root}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert "usage: python -m ds_lightning COMMAND" in result.stdout


def test_progress_is_lines_where_there_is_no_terminal_and_a_bar_where_there_is(monkeypatch, capsys):
    with Progress(4) as progress:
        progress.advance("first")
        monkeypatch.setattr("ds_lightning.command._EVERY", 0.0)
        progress.advance("second")
        progress.line("third")
    assert capsys.readouterr().err == " 50%  second\n 50%  third\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(4) as progress:
        progress.advance("fourth", 4)
        progress.line("not said")
    assert "not said" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with Progress(4) as progress:
        progress.line("fifth")
    assert capsys.readouterr().err == "  0%  fifth\n"


def test_folders_of_one_second_do_not_meet(tmp_path):
    folders = [dated_folder(tmp_path) for _ in range(3)]
    assert len({*folders}) == 3
