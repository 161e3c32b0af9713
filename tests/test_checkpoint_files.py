"""Checkpoint files: whole or not there, whatever ends the process; broken and foreign ones; files written beside."""

import multiprocessing
import os
import pickle
import random
import re
import signal
import threading
import time
import warnings
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.utils.data import DataLoader

from ds_lightning import AtomicCheckpointIO, BackgroundCheckpointIO, DSSyncStrategy
from ds_lightning.checkpoint import _candidates
from tests.ranks import run_ranks
from tests.reference import flat
from tests.test_strategy import Net, RankData, trainer_for

BOTH = pytest.mark.parametrize("make", [AtomicCheckpointIO, BackgroundCheckpointIO])

# ---- killed while saving -------------------------------------------------------------------------------------------


def save_forever(make, folder, pipe):
    """As a ModelCheckpoint does that keeps the newest file and a `last.ckpt`; tells the first files that are whole."""
    io, values = make(), torch.zeros(300_000)
    for step in range(100_000):
        values.fill_(step)
        checkpoint = {"state_dict": {"values": values}, "step": step}
        io.save_checkpoint(checkpoint, f"{folder}/step={step}.ckpt")
        io.save_checkpoint(checkpoint, f"{folder}/last.ckpt")
        if step:
            io.remove_checkpoint(f"{folder}/step={step - 1}.ckpt")
        else:
            io.teardown()
            pipe.send(None)


@BOTH
def test_a_kill_at_any_moment_leaves_whole_files(make, tmp_path):
    """200 kills: `KILLS=200 pytest tests/test_checkpoint_files.py -k kill`."""
    context, draw, seen = multiprocessing.get_context("fork"), random.Random(0), 0
    for kill in range(int(os.environ.get("KILLS", "20"))):
        folder = tmp_path / str(kill)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(make, str(folder), sender))
        process.start()
        try:
            assert receiver.poll(30)
            time.sleep(draw.uniform(0, 0.3))
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        steps = {}
        for path in folder.glob("*.ckpt"):
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
            assert (checkpoint["state_dict"]["values"] == checkpoint["step"]).all()
            steps[path.stem] = checkpoint["step"]
        newest = max(step for name, step in steps.items() if name != "last")
        assert newest - 1 <= steps["last"] <= newest
        assert len(steps) <= 3
        assert len(list(folder.glob(".*.tmp"))) <= 1
        seen = max(seen, newest)
    assert seen > 1  # kills came in the midst of saves


@BOTH
def test_a_save_that_fails_leaves_the_earlier_file(make, tmp_path):
    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("cannot be pickled")

    io, path = make(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        io.save_checkpoint({"step": 2, "other": Unpicklable()}, path)
    io.teardown()
    assert io.load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


# ---- in the background ---------------------------------------------------------------------------------------------


def test_what_is_written_in_the_background_is_what_was_saved(tmp_path):
    io, values = BackgroundCheckpointIO(), torch.zeros(100)
    for step in range(20):
        io.save_checkpoint({"values": values, "tied": values[:50]}, tmp_path / f"{step}.ckpt")
        values.add_(1)
    io.teardown()
    for step in range(20):
        checkpoint = io.load_checkpoint(tmp_path / f"{step}.ckpt")
        assert (checkpoint["values"] == step).all()
        assert checkpoint["tied"].untyped_storage().data_ptr() == checkpoint["values"].untyped_storage().data_ptr()
    assert not [t for t in threading.enumerate() if t.name.startswith("dssync: checkpoints")]


def test_a_file_is_removed_only_after_its_successor_is_written(tmp_path, monkeypatch):
    io = BackgroundCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "1.ckpt")
    io.wait()
    release = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (release.wait(10), fsync(file)))
    io.save_checkpoint({"step": 2}, tmp_path / "2.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    time.sleep(0.1)
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["1.ckpt"]
    release.set()
    io.teardown()
    assert os.listdir(tmp_path) == ["2.ckpt"]


def test_what_could_not_be_written_is_told_and_costs_no_file(tmp_path, monkeypatch):
    io = BackgroundCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "1.ckpt")
    io.wait()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    io.save_checkpoint({"step": 2}, tmp_path / "2.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"step": 3}, tmp_path / "3.ckpt")
    io.teardown()
    assert os.listdir(tmp_path) == ["1.ckpt"]


@pytest.mark.parametrize("make", [None, BackgroundCheckpointIO, AsyncCheckpointIO])
def test_fit_ends_with_all_files_written(make, tmp_path):
    def run(rank):
        callback = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
        plugins = [] if make is None else [make()]
        trainer = trainer_for(rank, [callback], enable_checkpointing=True, plugins=plugins)
        trainer.fit(Net(), DataLoader(RankData(rank, 6), batch_size=None))

    run_ranks(run, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", *(f"step={n}.ckpt" for n in (2, 4, 6))]
    for path in tmp_path.iterdir():
        assert "state_dict" in AtomicCheckpointIO().load_checkpoint(path)


# ---- broken and foreign files --------------------------------------------------------------------------------------


class Loaded:
    """Tells whether somebody unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(path, kind):
    """Make of a whole checkpoint another file."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind in ("state dict", "list", "weights alone", "objects"):
        checkpoint = torch.load(path, weights_only=True)
        if kind == "weights alone":
            del checkpoint["optimizer_states"]
        other = {"state dict": nn.Linear(1, 1).state_dict(), "list": [torch.zeros(1)], "weights alone": checkpoint}
        torch.save(other.get(kind, checkpoint | {"more": Loaded(f"{path}.loaded")}), path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", "c")
    else:
        data = {
            "half": whole[:middle],
            "one byte less": whole[:-1],
            "empty": b"",
            "other values": whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 9]) + whole[middle + 9 :],
            "text": b"not a checkpoint\n" * 99,
            "pickle": pickle.dumps(Loaded(f"{path}.loaded")),
        }
        path.write_bytes(data[kind])


KINDS = {
    "half": "is no checkpoint, or was cut off",
    "one byte less": "is no checkpoint, or was cut off",
    "empty": r"\(0 bytes\) is no checkpoint, or was cut off",
    "other values": "is damaged: the checksum of",
    "text": "is no checkpoint, or was cut off",
    "pickle": "is no checkpoint, or was cut off",
    "zip": "is no checkpoint, or was cut off",
    "folder": "is a folder, not a checkpoint file",
    "state dict": r"has no 'state_dict', but \['bias', 'weight'\]",
    "list": r"has no 'state_dict', but \['a list'\]",
    "weights alone": "holds weights alone",
    "objects": r"holds objects besides tensors .*mkdir.* weights_only=False",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole one, of two ranks."""
    path = tmp_path_factory.mktemp("whole") / "whole.ckpt"

    def run(rank):
        trainer = trainer_for(rank)
        trainer.fit(Net(), DataLoader(RankData(rank, 3), batch_size=None))
        trainer.save_checkpoint(path)

    run_ranks(run, 2)
    return path.read_bytes()


def resumed(rank, path, folders=None, **options):
    """The step from which fit goes on, and what it warned of; or what it raised."""
    steps = []

    class Begin(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            steps.append(trainer.global_step)

    callbacks = [Begin()]
    if folders is not None:
        callbacks.append(ModelCheckpoint(folders[rank % len(folders)], every_n_epochs=100, save_last=True))
    trainer = trainer_for(rank, callbacks, max_epochs=2, enable_checkpointing=folders is not None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(Net(), DataLoader(RankData(rank, 3), batch_size=None), ckpt_path=path, **options)
        except Exception as error:
            return type(error).__name__, str(error)
    return steps[0], [str(w.message) for w in caught if "dssync" in str(w.message)]


def test_a_broken_or_foreign_file_is_one_clear_error_on_all_ranks(checkpoint, tmp_path):
    def run(rank):
        return [resumed(rank, str(tmp_path / f"{kind}.ckpt")) for kind in [*KINDS, "missing"]]

    for kind in KINDS:
        path = tmp_path / f"{kind}.ckpt"
        path.write_bytes(checkpoint)
        damage(path, kind)
    ones, others = run_ranks(run, 2)
    for (kind, message), one, other in zip([*KINDS.items(), ("missing", "not found")], ones, others, strict=True):
        assert one == other
        assert one[0] == ("FileNotFoundError" if kind == "missing" else "ValueError")
        assert re.search(rf"{kind}.ckpt.*{message}|{message}.*{kind}.ckpt", one[1])
    assert not list(tmp_path.glob("*.loaded"))


def test_objects_are_loaded_for_who_trusts_them(checkpoint, tmp_path):
    path = tmp_path / "objects.ckpt"
    path.write_bytes(checkpoint)
    damage(path, "objects")
    assert run_ranks(lambda rank: resumed(rank, str(path), weights_only=False), 1) == [(3, [])]
    assert Path(f"{path}.loaded").exists()


@pytest.mark.parametrize("kind", ["half", "other values", "weights alone", "state dict", "folder"])
def test_last_skips_what_is_not_whole(kind, checkpoint, tmp_path):
    for age, name in enumerate(["last.ckpt", "step=9.ckpt", "step=6.ckpt", "step=3.ckpt"]):
        path = tmp_path / name
        path.write_bytes(checkpoint)
        if age < 2:
            damage(path, kind)
        os.utime(path, times=(2e9 - age, 2e9 - age))
    (tmp_path / ".step=12.ckpt.tmp").write_bytes(checkpoint)  # of a process that was killed
    one, other = run_ranks(lambda rank: resumed(rank, "last", [tmp_path]), 2)
    assert one[0] == other[0] == 3
    (warning,) = one[1]
    assert f"{tmp_path}/last.ckpt" in warning
    assert f"{tmp_path}/step=9.ckpt" in warning
    assert f"Resuming from {tmp_path}/step=6.ckpt, the newest whole one." in warning
    assert other[1] == []


@pytest.mark.parametrize(
    ("asked", "ages", "expected"),
    [
        ("last", {"last.ckpt": 2, "hpc_ckpt_1.ckpt": 1, "step=6.ckpt": 0}, "hpc_ckpt_1.ckpt"),
        ("last", {"last.ckpt": 1, "hpc_ckpt_1.ckpt": 2}, "last.ckpt"),
        ("last", {"last-v1.ckpt": 1, "last.ckpt": 2}, "last-v1.ckpt"),
        ("last", {"hpc_ckpt_1.ckpt": 2, "hpc_ckpt_2.ckpt": 1}, "hpc_ckpt_2.ckpt"),
        ("last", {"step=6.ckpt": 1, "hpc_ckpt_1.txt": 0}, None),  # nobody said that it is the last
        ("hpc", {"last.ckpt": 1, "hpc_ckpt_1.ckpt": 2}, "hpc_ckpt_1.ckpt"),
    ],
)
def test_the_newest_that_a_stop_or_a_callback_left(asked, ages, expected, tmp_path):
    """A stop's files lie in `default_root_dir`, where others' are nobody's business."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "pretrained.ckpt").touch()
    for name, age in ages.items():
        path = (tmp_path if name.startswith("hpc") else kept) / name
        path.touch()
        os.utime(path, times=(1e9 - age, 1e9 - age))
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[ModelCheckpoint(kept)], logger=False, accelerator="cpu")
    files = [os.path.basename(file) for file in _candidates(trainer, None, asked)]
    assert files[:1] == ([] if expected is None else [expected])
    if expected is not None:
        assert sorted(files) == sorted(ages)


def test_last_with_no_whole_file_is_an_error_on_all_ranks(checkpoint, tmp_path):
    for name in ("last.ckpt", "step=3.ckpt"):
        (tmp_path / name).write_bytes(checkpoint[:-9])
    one, other = run_ranks(lambda rank: resumed(rank, "last", [tmp_path]), 2)
    assert one == other
    assert one[0] == "ValueError"
    assert "last.ckpt" in one[1]
    assert "step=3.ckpt" in one[1]


@pytest.mark.parametrize("seer", [0, 1])
def test_folders_that_not_all_ranks_share(seer, checkpoint, tmp_path):
    """Rank 0 decides on its file, which others must be able to read; they need not have found it."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    (folders[seer] / "last.ckpt").write_bytes(checkpoint)
    one, other = run_ranks(lambda rank: resumed(rank, "last", folders), 2)
    if seer == 0:
        assert one[0] == other[0] == 3
    else:
        assert one == other
        assert one[0] == "ValueError"
        assert "found the checkpoint" in one[1]
        assert "rank 0 none" in one[1]


def test_a_file_that_one_rank_cannot_read_is_an_error_on_all(checkpoint, tmp_path):
    paths = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    paths[0].write_bytes(checkpoint)
    paths[1].write_bytes(checkpoint[:-9])
    one, other = run_ranks(lambda rank: resumed(rank, str(paths[rank])), 2)
    assert one == other
    assert one[0] == "ValueError"
    assert "1.ckpt" in one[1]
    assert "on ranks [1]" in one[1]


def test_what_was_asked_for_reaches_forked_workers(checkpoint, tmp_path):
    for name, data in {"last.ckpt": checkpoint[:-9], "step=3.ckpt": checkpoint}.items():
        (tmp_path / name).write_bytes(data)
    callback = ModelCheckpoint(tmp_path, every_n_epochs=100, save_last=True)
    strategy = DSSyncStrategy(start_method="fork")
    trainer = trainer_for(0, [callback], strategy, max_epochs=2, devices=2, enable_checkpointing=True)
    trainer.fit(Net(), DataLoader(RankData(0, 3), batch_size=None), ckpt_path="last")
    assert trainer.state.finished


@pytest.mark.parametrize("ranks", [1, 2])
def test_testing_takes_weights_alone(ranks, checkpoint, tmp_path):
    path = Path(tmp_path / "weights.ckpt")
    path.write_bytes(checkpoint)
    damage(path, "weights alone")

    class Evaluable(Net):
        def test_step(self, batch, batch_idx):
            pass

    def run(rank):
        trainer_for(rank).test(Evaluable(), DataLoader(RankData(rank, 1), batch_size=None), str(path), verbose=False)

    run_ranks(run, ranks)


class Evaluable(Net):
    def test_step(self, batch, batch_idx):
        pass


class Evaluated(pl.Callback):
    """The parameters that a test sees."""

    def on_test_epoch_end(self, trainer, pl_module):
        self.seen = flat(pl_module)


@pytest.mark.parametrize("slurm", [False, True])
def test_a_test_after_fit_is_that_of_the_model_or_of_the_best(slurm, tmp_path):
    """Not of what a stop left in the middle of training, which Lightning takes for it in a requeued job of Slurm's."""

    def run(rank):
        if slurm:
            tasks = {"JOB_ID": 4711, "PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": 2, "NTASKS_PER_NODE": 2}
            os.environ.update({f"SLURM_{name}": str(value) for name, value in tasks.items()}, SLURM_JOB_NAME="train")
        plugins = [SLURMEnvironment()] if slurm else []
        evaluated = Evaluated()
        best = ModelCheckpoint(tmp_path, "best", monitor="step", mode="min", every_n_train_steps=3, save_last=True)
        trainer = trainer_for(
            rank,
            [evaluated, best],
            max_epochs=1,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            plugins=plugins,
        )
        module, data = Evaluable(), DataLoader(RankData(rank, 12), batch_size=None)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
        if rank == 0:
            stopped = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
            stopped["state_dict"] = {name: value * 2 for name, value in stopped["state_dict"].items()}
            torch.save(stopped, tmp_path / "hpc_ckpt_1.ckpt")
        dist.barrier()
        final = flat(module)
        trainer.test(module, data, verbose=False)
        assert torch.equal(evaluated.seen, final)
        trainer.test(dataloaders=data, verbose=False)
        module.load_state_dict(torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"])
        assert torch.equal(evaluated.seen, flat(module))
        assert not torch.equal(evaluated.seen, final)
        trainer.test(module, data, ckpt_path="hpc", verbose=False)
        return torch.equal(evaluated.seen[:8], 2 * final[:8])

    assert run_ranks(run, 2) == [True, True]
