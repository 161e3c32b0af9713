"""Checkpoint files: written whole or not at all, read without running code, and told apart from broken ones."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from ds_lightning.groups import require_agreement


class CheckpointError(ValueError):
    """A file from which nothing can be resumed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, of which a name never stands for half a one.

    A file is written beside its place, flushed to the disk, and then takes that place in one step; whatever ends the
    process before leaves the earlier file as it was. (Lightning writes to the system's temporary folder and moves the
    file, which across file systems is a copy.) Elsewhere than in a local or mounted folder it is as Lightning does it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            _write(path, lambda file: torch.save(checkpoint, file))

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, by default without running code that it may hold.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is broken, or holds objects that only ``weights_only=False`` would load.
        """
        if _is_local_file_protocol(path) and os.path.exists(path):
            _require_whole(path)  # torch reads damaged values as if they were others
        try:
            return super().load_checkpoint(path, map_location, weights_only is None or weights_only)
        except pickle.UnpicklingError as error:
            held = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{path} holds objects besides tensors and plain values"
                f" ({held[1] if held else str(error).splitlines()[0]}), and loading these could run code."
                " HINT: if you trust the file, pass weights_only=False to fit, validate or test."
            ) from error


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Writes checkpoints while training goes on: ``Trainer(plugins=[BackgroundCheckpointIO()])``.

    A save takes what copying to memory takes. A file is removed only after those saved before are on the disk, one
    save waits for the one before, and fit ends when all are written. Nothing that runs during fit, such as a logger
    that uploads every file, may rely on a file to be there as soon as it was saved.

    Raises:
        OSError: At the next save or at the end of fit, if a file could not be written.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self.wait()
        copy = io.BytesIO()
        torch.save(checkpoint, copy)
        self._later(lambda: _write(path, lambda file: file.write(copy.getbuffer())))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self._later(lambda: super(BackgroundCheckpointIO, self).remove_checkpoint(path))

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(*args, **kwargs)

    def wait(self) -> None:
        """Until all is written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    @override
    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

    def _later(self, task: Callable[[], Any]) -> None:
        before = self._last

        def run() -> None:
            if before is not None:
                before.result()  # what could not be written must not cost an older file
            task()

        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "dssync: checkpoints")
        self._last = self._executor.submit(run)


def _write(path: Any, write: Callable[[Any], Any]) -> None:
    """Let the file at ``path`` become what ``write`` writes, or stay as it is."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    # Always this name: the next save overwrites what a killed process has left.
    beside = os.path.join(folder, f".{name}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, os.path.join(folder, name))
    except BaseException:
        if os.path.exists(beside):
            os.remove(beside)
        raise
    entries = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entries)
    except OSError:  # not every file system can
        pass
    finally:
        os.close(entries)


def _require_whole(path: Any) -> None:
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder, not a checkpoint file. HINT: sharded checkpoints cannot be loaded.")
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                raise zipfile.BadZipFile("torch.save did not write it")
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} ({os.path.getsize(path)} bytes) is no checkpoint, or was cut off: {error}. HINT: resume from"
            ' another; ckpt_path="last" finds the newest whole one.'
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {damaged!r} does not match. HINT: resume from another;"
            ' ckpt_path="last" finds the newest whole one.'
        )


def resume(
    trainer: pl.Trainer, resume_start: Callable[..., None], path: Any, weights_only: bool | None, asked: Any
) -> None:
    """In the place of the ``resume_start`` of Lightning's connector: all ranks resume from one file, or none does.

    Where the file was asked for as ``"last"`` or ``"hpc"``, or found for ``fit`` without being asked for, rank 0
    decides. It takes the newest that a stop or ``ModelCheckpoint(save_last=True)`` left (for ``"hpc"``, a stop), and if
    that is not whole, the newest whole checkpoint in their folders. What a stop left in the middle of training is
    nothing to evaluate unless it was asked for.

    Args:
        trainer: Whose process group exists.
        resume_start: Lightning's, which loads a file.
        path: What Lightning found on this rank, or None.
        weights_only: As for ``fit``.
        asked: What was passed to ``fit`` (``test``, ...) as ``ckpt_path``; False: nothing, but a model.

    Raises:
        FileNotFoundError: If an explicit path does not exist.
        ValueError: On every rank alike, if no file is whole, or a rank cannot read it.
    """
    rank, ranks = trainer.global_rank, trainer.world_size
    evaluates = trainer.state.fn != TrainerFn.FITTING
    decides = asked in (("last", "hpc") if evaluates else ("last", "hpc", None, False))
    decides = decides and not trainer._checkpoint_connector._user_managed
    if evaluates and not asked and path == trainer._checkpoint_connector._hpc_resume_path:
        # Lightning takes it, on Slurm.
        path = None if asked is False else getattr(trainer.checkpoint_callback, "best_model_path", None) or None
    paths = [path] * ranks
    if ranks > 1:
        dist.all_gather_object(paths, path)
    if paths == [None] * ranks and asked != "last":
        resume_start(path, weights_only=weights_only)
        return
    outcome: list[Any] = [path, []]  # the file, or what to raise; why others were skipped
    if rank == 0:
        outcome = _load_first(_candidates(trainer, path, asked) if decides else [path], resume_start, weights_only)
        if outcome[0] is None and any(paths):
            others = [r for r in range(ranks) if paths[r] is not None]
            outcome[0] = ValueError(
                f"Ranks {others} found the checkpoint {paths[others[0]]} and rank 0 none. HINT: all ranks need the same"
                " folder (default_root_dir, or dirpath of ModelCheckpoint)."
            )
    if ranks > 1:
        dist.broadcast_object_list(outcome, src=0)
    chosen, skipped = outcome
    if isinstance(chosen, Exception):
        raise chosen
    if skipped:
        rank_zero_warn(f"dssync: {' '.join(skipped)} Resuming from {chosen}, the newest whole one.")
    problem = None
    if rank != 0:
        try:
            resume_start(chosen if decides else path, weights_only=weights_only)
        except Exception as error:
            problem = f"{error}. HINT: all ranks need the same folder"
    if ranks > 1:
        require_agreement("being able to read the checkpoint", None, problem)


def _load_first(candidates: list[Any], resume_start: Callable[..., None], weights_only: bool | None) -> list[Any]:
    """The first of ``candidates`` that is whole, loaded, or what to raise, or None of none; and why not the others."""
    skipped: list[str] = []
    for candidate in candidates:
        try:
            resume_start(candidate, weights_only=weights_only)
            return [candidate, skipped]
        except CheckpointError as error:
            skipped.append(str(error))
        except FileNotFoundError as error:
            return [error, skipped]
        except Exception as error:  # its own class may not travel to the other ranks
            told = str(error) if isinstance(error, ValueError) else f"{candidate}: {type(error).__name__}: {error}"
            return [ValueError(told), skipped]
    if skipped:
        return [ValueError(" ".join(skipped)), []]
    resume_start(None, weights_only=weights_only)
    return [None, []]


def _candidates(trainer: pl.Trainer, path: Any, asked: Any) -> list[str]:
    """Which file to resume from, and then what else there is, from the newest on."""
    kept = {os.path.dirname(path)} if path is not None else set()
    kept |= {c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
    files: dict[str, float] = {}
    for folder in {*map(str, kept), trainer.default_root_dir}:
        fs = get_filesystem(folder)
        for file in fs.ls(folder, detail=False) if fs.isdir(folder) else []:
            name = os.path.basename(file)
            if re.fullmatch(r"hpc_ckpt_\d+.ckpt" if folder not in kept else r".*\.ckpt", name):
                files[str(file)] = fs.modified(file).timestamp()
    ordered = sorted(files, key=lambda file: files[file], reverse=True)
    first = r"hpc_ckpt_\d+.ckpt" if asked == "hpc" else r"(hpc_ckpt_\d+|last.*).ckpt"
    chosen = [file for file in ordered if re.fullmatch(first, os.path.basename(file))][:1]
    return [*chosen, *(file for file in ordered if file not in chosen)] if chosen or path is not None else []


def require_resumable(checkpoint: Any, path: Any, fit: bool) -> None:
    """Raise a ``ValueError`` unless ``checkpoint``, read from ``path``, is a trainer's, with all that ``fit`` needs."""
    held = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else [f"a {type(checkpoint).__name__}"]
    if "state_dict" not in held:
        raise CheckpointError(
            f"{path} is no checkpoint of a Lightning trainer: it has no 'state_dict', but {held[:5]}. HINT: load"
            " weights into the model before fit."
        )
    if fit and "optimizer_states" not in held:
        raise CheckpointError(
            f"{path} holds weights alone (save_weights_only), from which fit cannot go on. HINT: load them into the"
            " model before fit."
        )
