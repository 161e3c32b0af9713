"""WHEN replicas are averaged: Lightning's face of the synchronizer. The only file that knows Lightning's strategies."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module, SyncBatchNorm
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from ds_lightning.adapting import Adapting, Leader
from ds_lightning.checkpoint import AtomicCheckpointIO, require_resumable, resume
from ds_lightning.consensus import broadcast_from_rank_0, consensus_of, consensus_of_optimizer_state
from ds_lightning.groups import (
    Attendance,
    ScheduledGroups,
    connect,
    connecting_later,
    exchange,
    name_timeout,
    own_store,
    require_agreement,
    within,
)
from ds_lightning.launchers import ProcessLauncher, ScriptLauncher
from ds_lightning.noise import check_noise_correction, corrects_noise
from ds_lightning.options import (
    check_backend,
    check_bool,
    check_compute,
    check_ddp_kwargs,
    check_group_size_alone,
    check_start_method,
    check_timeout,
    check_topology,
)
from ds_lightning.planner import plan
from ds_lightning.preemption import StopSignals
from ds_lightning.probe import probe
from ds_lightning.replica import load_replica, remove_older, restore_replica, save_replica
from ds_lightning.rows import is_table
from ds_lightning.schedule import (
    CyclicSchedule,
    GridSchedule,
    Schedule,
    as_int,
    check_schedule_name,
    consensus_rate,
    make_schedule,
    positive_int,
    schedule_parts,
    schedule_period,
)
from ds_lightning.synchronizer import SPARSE_GRADIENTS, DSSynchronizer, Statistics, check_state_names
from ds_lightning.topology import Topology
from ds_lightning.wire import as_wire_dtype, wire_bytes

CHECKPOINT_KEY = "ds_lightning"

_ATTENDANCES = itertools.count()  # of this process: the store may outlive a strategy


class DSSyncStrategy(DDPStrategy):
    """Data-parallel training by Divide-and-Shuffle Synchronization (DS-Sync, arXiv 2007.03298).

    Each rank steps on its own gradient, then the ranks average their parameters and float buffers inside small groups
    that are others at every step. No gradient is all-reduced. Before validation, test and checkpoints, and at the end
    of fit, all replicas become the exact global average, so that metrics and files are those of one model.

    Use it in the place of ``"ddp"``: ``Trainer(strategy="dssync")``. Every rank must take the same number of optimizer
    steps; whether a step was skipped or a parameter unused there does not matter.

    Args:
        group_size: Ranks per group, 2 to the world size; ``"auto"``: 2 up to 8 ranks, about sqrt(N) beyond, at most 32.
        schedule: ``"grid"`` (exact consensus after k steps), ``"shuffle"`` (random groups, any N), ``"auto"`` (a grid
            where the world size factors into groups near ``group_size``, else a shuffle), ``"topology"`` (planned for
            ``topology``, see :mod:`ds_lightning.planner`), or a :class:`~ds_lightning.schedule.Schedule`.
        topology: The network to plan for: the path of a YAML file or a :class:`~ds_lightning.topology.Topology`, whose
            ranks are found by the names of their hosts; if it has none of these, by its own numbers of ranks. Or
            ``"probe"``: it is measured at the start, see :mod:`ds_lightning.probe`.
        compute: With ``schedule="topology"``: seconds of forward and backward of a step, which the first plan is made
            for. ``None``: not known, see :func:`~ds_lightning.planner.plan`.
        overlap: Average while forward and backward run, and the update if that reads no parameters
            (:attr:`DSSynchronizer.finishes_first`): ``X <- W X - lr U``. ``False`` is the paper's order, after the
            optimizer step: ``X <- W (X - lr U)``; better beyond 16 ranks with small groups.
        sync_every: Optimizer steps between synchronizations. With ``overlap`` one average travels during all of them:
            ``X <- W X - lr (U_1 + ... + U_k)``.
        wire_dtype: dtype in which parameters are sent: ``None`` (as stored), ``"bf16"``, ``"fp16"``, ``"int8"``
            (per-block scales), ``"fp32"``, or the torch dtype. The mean over ranks keeps full precision at any.
        average_gradients: Average gradients inside the group as well, before clipping. It adds the gradients' bytes;
            it helps on non-IID data and at many ranks.
        average_optimizer_state: Names of optimizer states to average with the parameters, such as ``("exp_avg_sq",)``
            for Adam on non-IID data.
        optimizer_state_every: Periods of the schedule (rounds until its partitions repeat) of which one averages these
            states. A second moment changes within about 1,000 steps, so that one period in 8 should serve it, for an
            eighth of the bytes.
        noise_correction: Make an adaptive optimizer's updates as long as DDP's at the same learning rate, by how far
            replicas are apart when they average, see :mod:`ds_lightning.noise`; it sends nothing. ``"auto"``: with
            torch's Adam, AdamW, NAdam, RAdam and RMSprop, unless gradients are averaged as well or the wire has fewer
            than 32 bits. ``True``: also at such a wire, where rounding counts as noise, and with optimizers of others.
        seed: Seed of random schedules; the same on all ranks.
        adapt: With ``schedule="topology"``: measure links and compute while training, and change to another plan where
            they are no longer what it was made for, see :mod:`ds_lightning.adapting`. ``False`` keeps the first plan,
            so that a run can be repeated exactly.
        save_replicas: When a signal stops a run, save every rank's own replica beside the checkpoint, so that the
            resumed run equals the undisturbed one bit for bit: as much disk as N checkpoints, until the next stop.
        **ddp_kwargs: What :class:`~lightning.pytorch.strategies.DDPStrategy` takes besides: ``start_method``,
            ``timeout`` (also of every group), ``process_group_backend``, ``cluster_environment`` and so on. Options of
            ``DistributedDataParallel`` itself have nothing to act on here and warn.

    Raises:
        ValueError: For a bad option; when the Trainer starts, on all ranks alike, for one that the world size rules
            out (before any process group exists), and if ranks have different options, schedules, models or optimizers.
    """

    def __init__(
        self,
        *,
        group_size: int | str = "auto",
        schedule: str | Schedule = "auto",
        topology: Any = None,  # a narrower type makes jsonargparse read the file itself
        compute: float | None = None,
        overlap: bool = True,
        sync_every: int = 1,
        wire_dtype: str | torch.dtype | None = None,
        average_gradients: bool = False,
        average_optimizer_state: Sequence[str] = (),
        optimizer_state_every: int = 1,
        noise_correction: bool | str = False,
        seed: int = 0,
        adapt: bool = True,
        save_replicas: bool = False,
        **ddp_kwargs: Any,
    ) -> None:
        own = set(inspect.signature(DSSyncStrategy.__init__).parameters) - {"self", "ddp_kwargs"}
        check_ddp_kwargs(ddp_kwargs, own)
        super().__init__(**ddp_kwargs)
        check_start_method(self._start_method)
        check_timeout(self._timeout)
        automatic = isinstance(group_size, str) and group_size == "auto"
        self.group_size = group_size if automatic else check_group_size_alone(group_size)
        check_schedule_name(schedule)
        self.schedule = schedule
        self.topology = check_topology(topology, schedule)
        self.compute = check_compute(compute, schedule)
        self.overlap = check_bool("overlap", overlap)
        self.sync_every = positive_int("sync_every", sync_every)
        self.wire_dtype = as_wire_dtype(wire_dtype)
        self.average_gradients = check_bool("average_gradients", average_gradients)
        self.average_optimizer_state = check_state_names(average_optimizer_state)
        self.optimizer_state_every = positive_int("optimizer_state_every", optimizer_state_every)
        self.noise_correction = check_noise_correction(noise_correction, self.average_gradients)
        self.seed = as_int("seed", seed)
        self.adapt = check_bool("adapt", adapt)
        self.save_replicas = check_bool("save_replicas", save_replicas)
        self.synchronizers: list[DSSynchronizer] = []
        self._groups: ScheduledGroups | None = None
        self._attendance: Attendance | None = None
        self._first_schedule = ""  # its description; plans that adapt leave it
        self._leader: Leader | None = None  # of plans that adapt; on rank 0
        self.adapting: Adapting | None = None  # while fitting
        self._begun: int | None = None  # the round that it was asked for
        self._changes = 0  # of plans, over all fits
        self._took: dict[str, float] = {}  # seconds of start-up
        self._positions: list[dict[str, Any]] = []  # in the schedule, per optimizer: of a checkpoint or an earlier fit
        self._no_loss = False
        self._stepping = False  # an optimizer's step has begun: its closure is running
        self._signals: StopSignals | None = None
        self.asked_for: Any = None  # as ckpt_path; see resume
        self._mark: str | None = None  # of the replicas beside the checkpoint that is being saved
        self._replica: dict[str, Any] | None = None  # read, and to be restored before the first batch
        self.timed = False  # set by ConsensusMonitor: only then is the time of averages taken

    # ---- set-up -----------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._start_method == "popen" or self.cluster_environment.creates_processes_externally:
            self._launcher = ScriptLauncher(self)
        else:
            self._launcher = ProcessLauncher(self, self._start_method)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        check_backend(self._process_group_backend, self.root_device)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self.world_size > 1:
            self._signals = StopSignals(trainer, self)
        if self._start_method == "fork":
            # torch replaces the thread pool it inherited at the first use, which two threads at once do not survive.
            torch.set_num_threads(torch.get_num_threads())
        error = None
        planned = isinstance(self.schedule, str) and self.schedule == "topology"  # once the hosts are known
        if self.world_size > 1 and not planned:
            try:
                make_schedule(self.schedule, self.world_size, self.group_size, self.seed)
            except ValueError as e:
                if isinstance(self.schedule, str):
                    raise  # on every rank alike, before any of them waits for another
                error = str(e)  # a schedule object may be wrong on one rank only, and the others must not wait for it
        later = self._get_process_group_backend() == "gloo"  # not one of several, which `connect` leaves alone
        with self._taking_time("process group"), self._meeting_at_the_store(), connecting_later(later):
            within(self._timeout, super().setup_distributed)
            if self.world_size > 1:
                store = own_store(f"attendance {next(_ATTENDANCES)}", self._timeout)
        if self.world_size > 1:
            _warn_of_torchruns_store()
            with self._taking_time("agreement"):
                self._attendance = Attendance(store, self._timeout)
                with self._meeting("to compare options"):
                    require_agreement("the strategy's options", self._options(), error)
            with self._taking_time("connections"), self._meeting("to connect"):
                connect(self._timeout)
        connector = trainer._checkpoint_connector
        if "resume_start" not in vars(connector):
            connector.resume_start = partial(self._resume_start, connector.resume_start)  # type: ignore[method-assign]

    @contextmanager
    def _taking_time(self, what: str) -> Iterator[None]:
        """Where start-up's time goes, which includes waiting for ranks that come later."""
        start = time.perf_counter()
        yield
        self._took[what] = time.perf_counter() - start

    @contextmanager
    def _meeting_at_the_store(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            environment = self.cluster_environment
            assert environment is not None
            raise RuntimeError(
                f"Rank {self.global_rank} ({socket.gethostname()}) could not meet the other {self.world_size - 1} ranks"
                f" at {environment.main_address}:{environment.main_port} within {name_timeout(self._timeout)}:"
                f" {str(error).rstrip('.')}. HINT: one of them ended or did not start, or a host cannot be"
                " reached; their own logs say more."
            ) from error

    @override
    def configure_ddp(self) -> None:
        """In the place of wrapping the module into DDP: nothing reduces gradients, nothing broadcasts buffers."""
        module = self.lightning_module
        assert module is not None
        if self.world_size == 1:
            rank_zero_info("dssync: the world size is 1, so there is nothing to synchronize.")
            return
        assert self._attendance is not None
        first = self._groups is None
        with self._meeting("to begin with the same model"):
            with self._taking_time("model"):
                for model in self.averaged_modules():  # an average model is a copy of each rank's own first values
                    broadcast_from_rank_0(model)
            with self._taking_time("groups"):
                if self._groups is None:
                    schedule = self._make_schedule(self._attendance.hosts)
                    self._groups = ScheduledGroups(schedule, self._timeout, self._attendance.hosts)
                    self._first_schedule = repr(schedule)
            if self._signals is not None:
                self._signals.start(self._timeout or default_pg_timeout)
        if first:
            took = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self._took.items())
            rank_zero_info(f"dssync: {_describe(self._groups.schedule, self._groups.period)}. Start-up: {took}.")
        if self.optimizer_state_every > 1 and not self.average_optimizer_state:
            rank_zero_warn(
                f"dssync: optimizer_state_every={self.optimizer_state_every} has no effect: there is no"
                " average_optimizer_state."
            )
        if any(isinstance(m, SyncBatchNorm) for m in module.modules()):
            rank_zero_warn(
                "dssync: SyncBatchNorm exchanges statistics among all ranks in every forward pass. Training is correct"
                " but waits for the slowest link again. HINT: use BatchNorm (its statistics are averaged with the"
                " parameters) or GroupNorm."
            )

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        if self._groups is not None and self.optimizers:  # those of an earlier fit
            self._positions = [{"step": position["step"]} for position in self._positions_now()]
        super().setup_optimizers(trainer)
        self.timed = False
        self.synchronizers = []
        if self.average_gradients and any(isinstance(o, LBFGS) for o in self.optimizers):
            raise ValueError(
                "average_gradients=True cannot be used with LBFGS: ranks evaluate their closures unequally often, so"
                " they would wait for each other forever. HINT: use average_gradients=False."
            )
        if self._groups is not None:
            corrected = [*map(self._corrects_noise, self.optimizers)]  # refuses what must not be
            if self.noise_correction == "auto" and corrected and not any(corrected):
                rank_zero_warn(
                    "dssync: noise_correction='auto' has no effect: it takes an adaptive optimizer of torch's, a wire"
                    " of 32 bits, and gradients that are not averaged. HINT: use noise_correction=False; True also"
                    " corrects at other wires and with optimizers of others."
                )
        tables = [m.weight for m in trainer.lightning_module.modules() if is_table(m)]
        if self.average_gradients and self._groups is not None and any(table.requires_grad for table in tables):
            raise ValueError(SPARSE_GRADIENTS)
        if self._groups is not None:
            names = {p: name for name, p in trainer.lightning_module.named_parameters()}
            optimized = [
                (type(o).__name__, [[(names.get(p), [*p.shape]) for p in group["params"]] for group in o.param_groups])
                for o in self.optimizers
            ]
            with self._meeting("to compare optimizers"):
                require_agreement("the optimizers' parameters", optimized)

    def _options(self) -> dict[str, Any]:
        """Those that must be the same on all ranks and that the schedule's partitions do not show."""
        return {
            "group_size": self.group_size,
            "topology": self.topology.to_yaml() if isinstance(self.topology, Topology) else self.topology,
            "compute": self.compute,
            "overlap": self.overlap,
            "sync_every": self.sync_every,
            "wire_dtype": self.wire_dtype,
            "average_gradients": self.average_gradients,
            "average_optimizer_state": self.average_optimizer_state,
            "optimizer_state_every": self.optimizer_state_every,
            "noise_correction": self.noise_correction,
            "adapt": self.adapt,
            "save_replicas": self.save_replicas,
        }

    def _make_schedule(self, hosts: list[str]) -> Schedule:
        if self.schedule == "topology":
            schedule = self._plan(hosts)
        else:
            schedule = make_schedule(self.schedule, self.world_size, self.group_size, self.seed, hosts)
        if (schedule is self.schedule or self.schedule == "topology") and self.group_size != "auto":
            rank_zero_warn(f"dssync: group_size={self.group_size} has no effect: {schedule!r} decides.")
        if not self.adapt and self.schedule != "topology":
            rank_zero_warn(f"dssync: adapt=False has no effect: {schedule!r} never changes.")
        if self.seed and self.schedule not in ("auto", "shuffle", "topology"):
            rank_zero_warn(f"dssync: seed={self.seed} has no effect: {schedule!r} draws nothing.")
        if self.schedule == "grid" and isinstance(schedule, GridSchedule) and not schedule.is_near:
            rank_zero_warn(
                f"dssync: {self.world_size} ranks have no grid of groups near group_size={self.group_size}; groups are"
                f" of {' and '.join(map(str, schedule.dims))}. HINT: use schedule='shuffle' or another number of ranks."
            )
        return schedule

    def _plan(self, hosts: list[str]) -> Schedule:
        """Rank 0's plan, which all follow: the arithmetic of another machine may differ in the last digit."""
        if self.topology == "probe":
            with self._taking_time("probe"):
                limit = self._timeout or default_pg_timeout
                store = own_store(f"probe {next(_ATTENDANCES)}", limit)
                self.topology = probe(store, self.global_rank, hosts, timeout=limit).topology
            rank_zero_info(f"dssync: probed the network:\n{self.topology}")
        module, network = self.lightning_module, self.topology
        assert module is not None
        assert isinstance(network, Topology)
        tensors = [*(p for p in module.parameters() if p.requires_grad), *module.buffers()]
        size = sum(wire_bytes(t.numel(), self.wire_dtype or t.dtype) for t in tensors if t.is_floating_point())

        compute = None if self.compute is None else self.sync_every * self.compute  # which an average has to hide in

        def conclude(words: list[str]) -> str:
            try:
                found = plan(network.of_job(hosts), max(1, size), compute, self.overlap, self.seed)
            except ValueError as error:
                return json.dumps(str(error))
            rank_zero_info(f"dssync: {found.verdict}")
            self._leader = Leader(found, self.seed)
            period = range(schedule_period(found.schedule))
            return json.dumps([[found.schedule.partition(t) for t in period], schedule_parts(found.schedule)])

        answer = json.loads(exchange("", conclude))
        if isinstance(answer, str):
            raise ValueError(answer)
        return CyclicSchedule(*answer)

    def _synchronizer(self, optimizer: Optimizer) -> DSSynchronizer:
        """The synchronizer of an optimizer, made at its first step (a callback may replace optimizers at any time)."""
        for synchronizer in self.synchronizers:
            if synchronizer.optimizer is optimizer:
                return synchronizer
        assert self.lightning_module is not None
        index = next((i for i, o in enumerate(self.optimizers) if o is optimizer), len(self.synchronizers))
        synchronizer = DSSynchronizer(
            self.lightning_module,
            optimizer,
            self._groups,
            sync_every=self.sync_every,
            wire_dtype=self.wire_dtype,
            average_optimizer_state=self.average_optimizer_state,
            optimizer_state_every=self.optimizer_state_every,
            noise_correction=self._corrects_noise(optimizer),
            index=index,
            broadcast=False,
        )
        if index < len(self._positions):
            synchronizer.load_state_dict(self._positions[index])
        synchronizer.timed = self.timed
        self.synchronizers.append(synchronizer)
        return synchronizer

    def _corrects_noise(self, optimizer: Optimizer) -> bool:
        return corrects_noise(self.noise_correction, optimizer, self.average_gradients, self.wire_dtype)

    def synchronizers_in_order(self) -> list[DSSynchronizer]:
        """In the order of Lightning's optimizers, whose first steps may have come in any other."""
        return [self._synchronizer(optimizer) for optimizer in self.optimizers]

    def _positions_now(self) -> list[dict[str, Any]]:
        return [synchronizer.state_dict() for synchronizer in self.synchronizers_in_order()]

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # Lightning makes the iterator of a resumed epoch before it tells the sampler which epoch that is. Loader
        # workers then already fetch the order of epoch 0 (Lightning issue 21938).
        assert self.lightning_module is not None
        loop: Any = self.lightning_module.trainer.fit_loop
        epoch, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        # Saved right after an epoch's last batch: training goes on with the next epoch, which is counted only later.
        over = batches.is_last_batch and batches.current.completed < batches.current.processed
        _set_sampler_epoch(dataloader, epoch.processed + (loop.restarting and over and epoch.processed < epoch.started))
        return super().process_dataloader(dataloader)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        loop: Any = trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.processed == loop.epoch_progress.current.started:
            # Resumed after an epoch's last batch: a new epoch begins, which Lightning would not count as begun. A
            # checkpoint at its own end would then be resumed with the epoch that it ends.
            loop.reset_restart_stage()
        self._follow_the_network()
        if self._groups is None or loop._combined_loader is None:
            return
        batches = [loop.max_batches] * self.world_size
        with self._meeting("to compare numbers of batches"):
            dist.all_gather_object(batches, loop.max_batches)
        if min(batches) == max(batches):
            return
        # A rank without data has no update to average, and averaging on without one would pull the others back.
        rank_zero_warn(
            f"dssync: ranks have unequal numbers of training batches, {batches}: all stop an epoch after"
            f" {min(batches)}. HINT: Lightning's DistributedSampler gives all ranks the same number."
        )
        trainer.limit_train_batches = int(min(batches))
        loop._combined_loader_states_to_load = loop._combined_loader._state_dicts()
        loop._combined_loader = None
        loop.setup_data()

    # ---- plans that adapt -------------------------------------------------------------------------------------------

    def _follow_the_network(self) -> None:
        self._stop_following()
        if self._groups is None or self.schedule != "topology" or not self.adapt or not self.optimizers:
            return
        limit = self._timeout or default_pg_timeout
        store = own_store(f"adapting {next(_ATTENDANCES)}", limit)
        first = self.synchronizers_in_order()[0]
        self._begun, self.timed = None, True
        for synchronizer in self.synchronizers:
            synchronizer.timed = True
        schedule, ranks = self._groups.schedule, self.world_size
        self.adapting = Adapting(
            store, self.global_rank, ranks, first.round, schedule, self._changes, self._leader, limit
        )

    def _stop_following(self) -> None:
        if self.adapting is not None:
            self.adapting.stop()
        self.adapting = None

    def _before_round(self) -> None:
        """Between two rounds of all optimizers, which is at the same point of the program on all ranks."""
        if self.adapting is None or not all(s.between for s in self.synchronizers_in_order()):
            return
        first = self.synchronizers_in_order()[0]
        if first.round == self._begun:
            return
        assert self._groups is not None
        self._begun = first.round
        waited = sum(s.seconds_waited() for s in self.synchronizers)
        self.adapting.passed(first.round, waited, first.arrivals)
        change, look = self.adapting.at(first.round)
        if change is not None:
            with self._taking_time("change"), self._meeting("to change the schedule"):
                self._groups.change(change.schedule)
            for synchronizer in self.synchronizers:
                synchronizer.regroup()
            self._changes = self.adapting.version
            self.adapting.changed(self._took["change"])
            assert self.lightning_module is not None
            rank_zero_info(
                f"dssync: from step {self.lightning_module.trainer.global_step} on with"
                f" {_describe(change.schedule, change.schedule.period)}: {change.why}. Changing took"
                f" {self._took['change']:.1f} s."
            )
        self._groups.look = None if look is None else (first.round, look)

    # ---- training ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        automatic = self._groups is not None and self.lightning_module.automatic_optimization
        if not self._stepping:
            self._before_round()
        if self._groups is not None and self.overlap and not self._stepping:
            # With gradient accumulation the average has all micro-batches of the step to hide in. Of several optimizers
            # (manual optimization) one may step later: until then nothing else changes its parameters.
            for synchronizer in map(self._synchronizer, self.optimizers):
                if not synchronizer.started:
                    synchronizer.start()
        output = super().training_step(*args, **kwargs)
        self._no_loss = automatic and output is None
        if self._no_loss:
            # Lightning refuses None in distributed training because DDP would wait for this rank's gradients. Nobody
            # does here. Backward through a tensor of its own leaves the gradients as if backward had not run.
            return torch.full((), torch.nan, device=self.root_device, requires_grad=True)
        return output

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        assert self.lightning_module is not None
        if not closure_loss.requires_grad and not is_overridden("backward", self.lightning_module):
            raise ValueError(
                "The loss depends on no parameter that requires a gradient, so there is nothing to train. HINT:"
                " unfreeze some, and compute the loss from the model's output, without detach() or no_grad()."
            )

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._groups is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        self._before_round()
        synchronizer = self._synchronizer(optimizer)
        after_first_closure: list[Callable[[], None]] = []
        if self.average_gradients:
            after_first_closure.append(lambda: synchronizer.average_gradients(self._loss_scale()))
        if self.overlap:
            if not synchronizer.started:
                synchronizer.start()
            if synchronizer.finishes_first:
                after_first_closure.append(synchronizer.finish)
        self._stepping = True

        def synchronized_closure() -> Any:
            # Forward and backward have run; clipping and the update come next. LBFGS calls a closure again: then this
            # step's average has been added already.
            loss = closure()
            while after_first_closure:
                after_first_closure.pop(0)()
            if self._no_loss and self._scaler is not None:
                # A GradScaler must not look for gradients to unscale where there are none.
                gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
                return loss if gradients else None
            return loss

        try:
            output = super().optimizer_step(optimizer, synchronized_closure, model, **kwargs)
        finally:
            self._stepping = False
        while after_first_closure:  # an optimizer that never calls its closure
            after_first_closure.pop(0)()
        if not self.overlap:
            synchronizer.synchronize()
        elif synchronizer.started:
            synchronizer.finish()
        return output

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.precision_plugin, "scaler", None)

    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    @property
    def statistics(self) -> Statistics:
        """What synchronization cost this rank since fit began, over all optimizers."""
        return sum((s.statistics for s in self.synchronizers), Statistics(0, 0, 0.0, 0.0))

    @override
    def on_exception(self, exception: BaseException) -> None:
        for synchronizer in self.synchronizers:
            synchronizer.discard()
        self._stop_following()
        super().on_exception(exception)

    # ---- where all ranks meet ---------------------------------------------------------------------------------------

    def _meeting(self, what: str, often: bool = False) -> AbstractContextManager[None]:
        if self._attendance is None:
            return nullcontext()
        assert self.lightning_module is not None
        return self._attendance.at(f"{what} after step {self.lightning_module.trainer.global_step}", often)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with self._meeting(f"at Lightning's barrier {args[0] if args else ''!r}"):
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._meeting("for a broadcast of Lightning's"):
            return super().broadcast(obj, src)

    @override
    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._meeting("to reduce a metric", often=self.lightning_module.trainer.training):
            return super().reduce(*args, **kwargs)

    # ---- consensus points -------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.consensus()

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self.consensus()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if not self.is_global_zero:  # which goes on to answer the others
            self._stop_following()
        self.consensus()
        self._stop_following()

    def consensus(self) -> None:
        """Make every replica the exact global average of parameters and float buffers. Collective over all ranks.

        The strategy does it before validation, test and checkpoints and at the end of fit; call it in a callback of
        yours, on all ranks, before anything else that looks at *the* model. A no-op at world size 1.
        """
        if self._groups is None:
            return
        assert self.lightning_module is not None
        for synchronizer in self.synchronizers:
            synchronizer.discard()
        with self._meeting("to average all replicas"):
            consensus_of(self.averaged_modules())
            for synchronizer in self.synchronizers_in_order():  # also those that only other ranks have used
                synchronizer.on_consensus()
            self._warn_of_different_learning_rates()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The first thing that a checkpoint reads, on all ranks: here they become what the file will hold."""
        assert self.lightning_module is not None
        if self._groups is not None and self.lightning_module.trainer.state.status == TrainerStatus.INTERRUPTED:
            # Ranks are at different points, or gone: a collective might wait for what never comes.
            rank_zero_warn("dssync: a checkpoint saved on an exception holds rank 0's own replica, not the average.")
        elif self._groups is not None and dist.is_initialized():
            with self._meeting("to save a checkpoint"):
                self.consensus()
                for optimizer in self.optimizers:
                    consensus_of_optimizer_state(optimizer)
                self._adopt_rank_0s_settings()
        return super().lightning_module_state_dict()

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # unless it has one
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    def _resume_start(self, resume_start: Callable[..., None], path: Any, weights_only: bool | None = None) -> None:
        assert self.lightning_module is not None
        with self._meeting("to find the checkpoint to resume from"):
            resume(self.lightning_module.trainer, resume_start, path, weights_only, self.asked_for)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        require_resumable(checkpoint, checkpoint_path, self.lightning_module.trainer.state.fn == TrainerFn.FITTING)
        return checkpoint

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._groups is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "world_size": self.world_size,
                "schedule": self._first_schedule,
                "positions": self._positions_now(),
                "replicas": self._mark,
            }
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        super().load_optimizer_state_dict(checkpoint)
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            return
        self._positions, self.synchronizers = list(saved["positions"]), []
        now = "nothing to synchronize" if self._groups is None else self._first_schedule
        if (saved["world_size"], saved["schedule"]) != (self.world_size, now):
            rank_zero_info(
                f"dssync: resuming a checkpoint of {saved['world_size']} ranks with {saved['schedule']} on"
                f" {self.world_size} with {now}{'' if self._groups is None else ', which goes on at the same step'}."
            )
        elif saved.get("replicas") and self._groups is not None:
            assert self.lightning_module is not None
            with self._meeting("to read replicas"):
                self._replica = load_replica(self, self.lightning_module.trainer.ckpt_path, saved["replicas"])

    # ---- stops ------------------------------------------------------------------------------------------------------

    def before_batch(self) -> None:
        """Called before every batch of a fit on several ranks."""
        if self._replica is not None:
            restore_replica(self, self._replica)
            self._replica = None

    @property
    def can_stop(self) -> bool:
        """Whether no average is under way that a replica's file would lack; the same on all ranks."""
        return all(s.between for s in self.synchronizers) or not self.save_replicas

    def save_stopped(self, path: str) -> None:
        """The checkpoint that a stop leaves behind. Collective."""
        assert self.lightning_module is not None
        try:
            if self.save_replicas:
                with self._meeting("to save replicas"):
                    self._mark = save_replica(self, path)
            self.lightning_module.trainer.save_checkpoint(path)
        finally:
            self._mark = None
        self.checkpoint_io.teardown()  # waits for one that writes in the background
        if self.is_global_zero:
            remove_older(path)

    def averaged_modules(self) -> list[Module]:
        """The model, and the averages of its trajectory that callbacks keep."""
        assert self.lightning_module is not None
        return [self.lightning_module, *self._averaged_models()]

    def of_each_rank(self) -> list[Any]:
        """What else has a state of its own on each rank."""
        return [*self.optimizers, *self._deciding(), *filter(None, [self._scaler])]

    def _averaged_models(self) -> list[Module]:
        """Models that Lightning's averaging callbacks derive from each rank's own replica."""
        assert self.lightning_module is not None
        callbacks: list[Callback] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        models = [c._average_model for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        return [model for model in models if model is not None]

    def _adopt_rank_0s_settings(self) -> None:
        """What cannot be averaged, as the file will have it: rank 0's, and of the loss scales the smallest."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        stateful = self._deciding()
        mine = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        mine += [each.state_dict() for each in stateful]
        settings = [move_data_to_device(mine, torch.device("cpu"))]  # rank 0's device is not every rank's
        dist.broadcast_object_list(settings, src=0)
        if not self.is_global_zero:
            for group, values in zip(groups, settings[0][: len(groups)], strict=True):
                for name, value in values.items():
                    if isinstance(group.get(name), Tensor):
                        group[name].copy_(value)
                    else:
                        group[name] = value
            for each, state in zip(stateful, settings[0][len(groups) :], strict=True):
                each.load_state_dict(state)
        if self._scaler is not None:
            states = [self._scaler.state_dict()] * self.world_size
            dist.all_gather_object(states, self._scaler.state_dict())
            self._scaler.load_state_dict(min(states, key=lambda state: float(state.get("scale", 0.0))))

    def _deciding(self) -> list[Any]:
        """What decides by the metrics of its own rank."""
        assert self.lightning_module is not None
        callbacks: list[Callback] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        deciding = [c for c in callbacks if isinstance(c, EarlyStopping | ModelCheckpoint)]
        return [*(config.scheduler for config in self.lr_scheduler_configs), *deciding]

    def _warn_of_different_learning_rates(self) -> None:
        rates = [float(group["lr"]) for o in self.optimizers for group in o.param_groups if "lr" in group]
        everyones = [rates] * self.world_size
        dist.all_gather_object(everyones, rates)
        if any(rates != everyones[0] for rates in everyones):
            rank_zero_warn(
                f"dssync: ranks have different learning rates {everyones}: a scheduler follows its own rank's metric."
                " HINT: log the metric with sync_dist=True. The next checkpoint gives all ranks those of rank 0."
            )

    # ---- Lightning's registry ---------------------------------------------------------------------------------------

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        methods = {"dssync": "popen", "dssync_spawn": "spawn", "dssync_fork": "fork", "dssync_notebook": "fork"}
        for name, start_method in methods.items():
            if name not in strategy_registry:  # importing the package a second time must not fail
                strategy_registry.register(
                    name,
                    cls,
                    description=f"Divide-and-Shuffle Synchronization with `start_method` '{start_method}'",
                    start_method=start_method,
                )


def _warn_of_torchruns_store() -> None:
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank_zero_warn(
            "dssync: torchrun keeps one key-value store over all restarts, where new ranks find addresses of the ended"
            f" ones (pytorch issue 135712), so that --max-restarts={restarts} may not bring the job back. HINT: set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun, with --rdzv-backend=c10d."
        )


def _describe(schedule: Schedule, period: int) -> str:
    sizes = sorted({len(group) for t in range(period) for group in schedule.partition(t)})
    groups = f"groups of {' and '.join(map(str, sizes))}"
    if schedule.world_size > 1024:
        return f"{schedule!r}, {groups}"  # the matrices would take gigabytes
    rate = consensus_rate(schedule)
    steps = "step" if period == 1 else "steps"
    reached = f"exact consensus after {period} {steps}" if rate == 0 else f"consensus rate {rate:.3f} per step"
    return f"{schedule!r}, {groups}, {reached}"
