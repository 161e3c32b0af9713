"""Ends a fit after a batch that all ranks agree on when a signal reaches any of them.

Lightning's handlers communicate: one that saves a checkpoint, or broadcasts, while other ranks wait in another
collective never returns. And before every batch Lightning broadcasts from rank 0 whether to stop, which lets no rank
run ahead of it. Here a handler sets a flag; the rest is a few words in the key-value store that the process groups were
made with.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeGuard

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch.distributed.distributed_c10d import Store

from ds_lightning.groups import own_store

if TYPE_CHECKING:
    from ds_lightning.strategy import DSSyncStrategy

Handler = Callable[[int, FrameType | None], Any] | int | None


class StopAgreement:
    """All ranks' agreement on the batch after which to stop.

    Nobody knows how far the others are, and a rank may be held up inside a batch by another. So, when a request is in
    the store, a thread of every rank tells there how many batches its rank will have done with the one that it is in,
    and until all have told it begins no other. The largest of these numbers is the answer, and whoever is behind goes
    on to it. Telling waits for nothing that a rank may wait for in a batch.

    Args:
        store: The key-value store, with keys that nobody else uses.
        rank: This process's.
        world_size: Number of ranks.
        timeout: Seconds that an agreement may take.
        interval: Seconds between looks into the store; default: half a second, and longer where more than 1,000 ranks
            look.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float, interval: float | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.interval = max(0.5, world_size / 2000) if interval is None else interval
        self.why: str | None = None  # set by a signal handler of this rank, which must not take locks
        self._store = store
        self._changed = threading.Condition()
        self._begun = 0  # batches done or begun
        self._told: int | None = None
        self._stop: tuple[int, str] | None = None
        self._error: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="dssync: stop agreement", daemon=True)
        self._thread.start()

    def reached(self, done: int) -> str | None:
        """Why to stop now, after `done` batches, or None to begin the next; waits while an agreement is under way.

        Raises:
            RuntimeError: If other ranks did not answer within the timeout.
        """
        with self._changed:
            while self._told is not None and done >= self._told and self._stop is None and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise RuntimeError(self._error)
            if self._stop is not None and done >= self._stop[0]:
                return self._stop[1]
            self._begun = max(self._begun, done + 1)
        return None

    def close(self) -> str | None:
        """End the thread. Returns why to stop, if this rank was asked to and never did."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1)  # it may be waiting for a store whose server hangs, or whose link is cut
        return self.why

    def _watch(self) -> None:
        try:
            if self._requested():
                self._agree()
        except (
            Exception
        ) as error:  # most likely the store's server ended; whatever it is, nobody must wait for this thread
            with self._changed:
                if not self._closed:
                    self._error = (
                        f"Rank {self.rank} lost the store of rank 0, in which ranks agree to stop: {error}. HINT: that"
                        " rank or its host ended; its own log says more."
                    )
                self._changed.notify_all()

    def _requested(self) -> bool:
        while not self._sleep():
            if self.why is not None:
                self._store.set("why", self.why)
                return True
            if self._store.check(["why"]):
                return True
        return False

    def _agree(self) -> None:
        with self._changed:
            self._told = self._begun
        self._store.set(f"rank {self.rank}", str(self._told))
        if self._store.add("told", 1) == self.world_size:
            last = max(int(self._store.get(f"rank {rank}")) for rank in range(self.world_size))
            self._store.set("stop", str(last))
        deadline = time.monotonic() + self.timeout
        while not self._store.check(["stop"]):
            if self._sleep():
                return
            if time.monotonic() > deadline:
                missing = [r for r in range(self.world_size) if not self._store.check([f"rank {r}"])]
                with self._changed:
                    self._error = (
                        f"Rank {self.rank} was to stop ({self._store.get('why').decode()}), but ranks {missing} did not"
                        f" say within {self.timeout:.0f} s how far they are. HINT: they ended or stopped; their own log"
                        " says more."
                    )
                    self._changed.notify_all()
                return
        with self._changed:
            self._stop = int(self._store.get("stop")), self._store.get("why").decode()
            self._changed.notify_all()

    def _sleep(self) -> bool:
        """Until it is time to look again; returns whether there is nothing to look for any more."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, self.interval)


class StopSignals:
    """Takes the place of Lightning's signal connector: during a fit its handlers only note what to agree on.

    SIGTERM saves a checkpoint and ends the program, and so does SIGUSR1 (of Slurm's environment: its requeue signal; of
    submitit's jobs also theirs), after which Slurm's job is put back into the queue. Handlers that others had set
    before, such as submitit's, are called after the checkpoint instead. Outside a fit there is nothing to save, and a
    job of Slurm's is requeued at once. Signals that were blocked until then are let through meanwhile.
    """

    # Lightning asks at places that ranks do not reach together, and would end this rank alone.
    received_sigterm = False
    _fits = itertools.count()  # of this process: the store may outlive trainers and strategies

    def __init__(self, trainer: pl.Trainer, strategy: DSSyncStrategy) -> None:
        self._trainer = trainer
        self._strategy = strategy
        self._replaced = trainer._signal_connector
        environment = strategy.cluster_environment
        self._slurm = environment if isinstance(environment, SLURMEnvironment) else None
        requeue = None if self._slurm is None else self._slurm.requeue_signal
        self._requeue = signal.SIGUSR1 if requeue is None else requeue
        self._signals: list[int] = [signal.SIGTERM, self._requeue]
        if self._slurm is not None and "SUBMITIT_EXECUTOR" in os.environ:
            self._signals.append(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        self._originals: dict[int, Handler] = {}
        self._listener: threading.Thread | None = None
        self._over = threading.Event()
        self._why: str | None = None
        self._agreement: StopAgreement | None = None
        self._batches = 0
        trainer._signal_connector = self  # type: ignore[assignment]
        self.register_signal_handlers()

    def register_signal_handlers(self) -> None:
        """From before the process group exists; again where somebody set others since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in self._signals:
            handler = signal.getsignal(signum)
            if handler != self._note and (self._fitting or self._may_requeue(signum, handler)):
                self._originals[signum] = handler
                signal.signal(signum, self._note)
        if self._listener is None and signal.pthread_sigmask(signal.SIG_BLOCK, []) & self._originals.keys():
            self._listener = threading.Thread(target=self._listen, name="dssync: signals", daemon=True)
            self._listener.start()

    def _listen(self) -> None:
        # Only this thread lets them through, so that they wait again as soon as it ends: threads inherit what is
        # blocked, and one that was made while the main thread let them through would go on to do so.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._originals)
        self._over.wait()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._originals)  # who has joined a thread may still meet it

    def _may_requeue(self, signum: int, handler: Handler) -> bool:
        """Whether that is for this object to do, not for a handler that others have set."""
        requeues = self._slurm is not None and self._slurm.auto_requeue and signum == self._requeue
        return requeues and not _is_of_others(handler)

    def start(self, timeout: timedelta) -> None:
        """Let ranks agree from here on; the process groups must exist."""
        store = own_store(f"stop {next(self._fits)}", timeout)
        rank, world_size = self._trainer.global_rank, self._trainer.world_size
        self._agreement = StopAgreement(store, rank, world_size, timeout.total_seconds())
        if self._why is not None:  # came before; a later one is noted there as well
            self._agreement.why = self._why
        # Called before every batch; by default it broadcasts.
        self._trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self.stop_if_agreed  # type: ignore[method-assign]

    def stop_if_agreed(self) -> None:
        """Between two batches: save, and end the program, if that was agreed on."""
        assert self._agreement is not None
        self._strategy.before_batch()
        done, self._batches = self._batches, self._batches + 1
        why = self._agreement.reached(done)
        if why is not None and not self._trainer.fit_loop._should_accumulate() and self._strategy.can_stop:
            self._stop(why)

    def teardown(self) -> None:
        """Lightning calls it when a fit ended, whichever way."""
        missed = None if self._agreement is None else self._agreement.close()
        self._trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        if threading.current_thread() is threading.main_thread():
            if self._listener is not None:
                self._over.set()
                self._listener.join()
            for signum, handler in self._originals.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._trainer._signal_connector = self._replaced
        if missed is not None and self._trainer.state.status != TrainerStatus.INTERRUPTED:
            warnings.warn(f"dssync: {missed} came after the last batch; fit has ended as it would have.", stacklevel=2)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._why = f"{signal.Signals(signum).name} on rank {self._trainer.global_rank} ({socket.gethostname()})"
        if self._agreement is not None:
            self._agreement.why = self._why
        if not self._fitting:
            _requeue_job()

    def _stop(self, why: str) -> None:
        path = self._trainer._checkpoint_connector.hpc_save_path(self._trainer.default_root_dir)
        path = self._strategy.broadcast(path)
        self._strategy.save_stopped(path)
        rank_zero_info(
            f"dssync: {why}: saved {path} after step {self._trainer.global_step}, and ending. A job that Slurm requeues"
            " goes on there; elsewhere pass it to fit as ckpt_path."
        )
        signum = signal.Signals[why.split()[0]]
        original = self._originals.get(signum)
        if self._may_requeue(signum, original):
            _requeue_job()
        elif _is_of_others(original):
            original(signum, None)
        if signum == signal.SIGTERM and self._slurm is not None and self._slurm.auto_requeue:
            _requeue_job(if_preempted=True)
        # A program that forked or spawned the ranks waits for their results, unless they end with an error.
        forked = isinstance(self._strategy.launcher, _MultiProcessingLauncher)
        raise SIGTERMException(128 + signum if forked else None)


def _is_of_others(handler: Handler) -> TypeGuard[Callable[[int, FrameType | None], Any]]:
    return callable(handler) and handler is not signal.default_int_handler


@rank_zero_only
def _requeue_job(if_preempted: bool = False) -> None:
    """Put this job of Slurm's back into the queue.

    Args:
        if_preempted: Only if it was given time to end (GraceTime) because another needs its nodes: Slurm requeues those
            that use it up, not those that end. Any other SIGTERM means that it was cancelled, or is requeued anyway.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        if if_preempted:
            shown = _scontrol("--oneliner", "show", "job", job)
            if "JobState=COMPLETING" in shown or not re.search(r" PreemptTime=\d", shown):
                return
        _scontrol("requeue", job)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        rank_zero_warn(f"dssync: job {job} could not be requeued: {error}. HINT: submit it again; it goes on there.")
    else:
        rank_zero_info(f"dssync: job {job} is in the queue again.")


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout
