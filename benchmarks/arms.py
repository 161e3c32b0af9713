"""What is compared: ways to synchronize (the arms), the models that they train, and one measured `Trainer.fit`."""

from __future__ import annotations

import logging
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.cluster import sent_by
from benchmarks.hierarchical import HierarchicalMean, racks_of
from ds_lightning import DSSyncStrategy
from ds_lightning.cost import Network, ddp_step_seconds, rounds
from ds_lightning.flows import followed_step_seconds
from ds_lightning.planner import plan
from ds_lightning.schedule import make_schedule
from ds_lightning.topology import Topology
from ds_lightning.wire import as_wire_dtype, wire_bytes

COMPUTE = "compute"  # the arm that trains without any communication
PEERS = ("ddp", "ddp-default", "ddp-bf16", "ddp-powersgd", "ddp-hierarchical", "post-local-sgd")
DSSYNC_ARMS = "dssync[-corrected][-blocking][-gSIZE|-topology[-fixed]][-everySTEPS][-bf16|-fp16|-int8]"
LAYERS = 16  # of the paced model
POWERSGD_RANK = 2
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
LOCAL_STEPS = 4  # of post-local SGD, between two averages
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: How to synchronize.
        model: "paced" or "conv".
        parameters_mb: Size of the paced model's parameters, in 10^6 bytes.
        compute: Seconds that forward and backward of the paced model take.
        warmup: Steps before the measured ones.
        steps: Measured steps.
        interface: Whose counter tells the bytes sent.
        trace: File for a trace of some measured steps (its rank is appended), or None.
        topology: The description of the cluster, for plans; None where it has none.
        optimizer: Of :data:`OPTIMIZERS`.
    """

    arm: str
    model: str
    parameters_mb: float
    compute: float
    warmup: int
    steps: int
    interface: str
    trace: str | None = None
    topology: str | None = None
    optimizer: str = "sgd"


@dataclass(frozen=True)
class Measurement:
    """What one rank saw.

    Attributes:
        seconds: Per step: from the first measured step to the last, over their number.
        median_seconds: Of single steps.
        bytes_sent: Per step, by the interface's counter.
        memory: Highest resident memory (bytes) of the measured steps above what the process held before the model.
        memory_of_fit: The same, including what follows the measured steps (consensus at the end of fit).
        parameter_bytes: Of the model.
        table: Where a trace was taken: time by named range.
    """

    seconds: float
    median_seconds: float
    bytes_sent: float
    memory: int
    memory_of_fit: int
    parameter_bytes: int
    table: str | None


# ---- models ---------------------------------------------------------------------------------------------------------


class Pace:
    """A clock that waits as if an accelerator computed: sleeping, so that the processor is free for the wire.

    What the processor does meanwhile for the model or the strategy counts as hidden behind the accelerator's time.
    """

    def __init__(self) -> None:
        self.due = 0.0

    def restart(self) -> None:
        """Now is when the accelerator begins."""
        self.due = time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Until the accelerator has computed for so many seconds more."""
        self.due += seconds
        time.sleep(max(0.0, self.due - time.perf_counter()))


class Paced(torch.autograd.Function):
    """The identity, which takes its time: a third in forward, two thirds in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pace: Pace, seconds: float) -> Tensor:
        """A third of the seconds."""
        ctx.pace, ctx.seconds = pace, seconds
        pace.wait(seconds / 3)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The others."""
        ctx.pace.wait(ctx.seconds * 2 / 3)
        return gradients[0], None, None


class PacedNet(nn.Module):
    """Linear layers with a batch so small that they cost next to nothing; the time is slept, layer by layer."""

    def __init__(self, parameters_mb: float, compute: float) -> None:
        super().__init__()
        self.width = max(1, round((parameters_mb * 1e6 / 4 / LAYERS) ** 0.5))
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(LAYERS))
        self.pace, self.seconds = Pace(), compute / LAYERS

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.pace.restart()
        for layer in self.layers:
            x = Paced.apply(torch.tanh(layer(x)), self.pace, self.seconds)
        return x


def conv_net() -> nn.Module:
    """A small network that computes for real: communication does not dominate."""
    layers: list[nn.Module] = []
    for channels_in, channels in ((3, 32), (32, 64), (64, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Module(LightningModule):
    """Trains a network on one synthetic batch, each rank on another, by SGD or Adam."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = job.optimizer
        self.net: nn.Module = conv_net() if job.model == "conv" else PacedNet(job.parameters_mb, job.compute)
        torch.manual_seed(rank)  # replicas that are equal would leave a noise correction nothing to do
        if isinstance(self.net, PacedNet):
            self.batch = (torch.randn(4, self.net.width), torch.randint(self.net.width, (4,)))
        else:
            self.batch = (torch.randn(16, 3, 16, 16), torch.randint(10, (16,)))

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=1e-3)


# ---- arms -----------------------------------------------------------------------------------------------------------


class HookedDDP(DDPStrategy):
    """DDP with a communication hook on any device: Lightning silently ignores hooks off CUDA.

    Args:
        arm: Names the hook.
        topology: The description of the cluster, for a hook that goes by racks; None: all ranks are in one.
        **kwargs: As for Lightning's strategy.
    """

    def __init__(self, arm: str, topology: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.arm = arm
        self.topology = topology

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        if self.arm == "ddp-bf16":
            self.model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif self.arm == "ddp-powersgd":
            powersgd = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2)
            self.model.register_comm_hook(powersgd, powerSGD_hook.powerSGD_hook)
        elif self.arm == "ddp-hierarchical":
            one = [list(range(self.world_size))]
            racks = one if self.topology is None else racks_of(Topology.parse(self.topology))
            assert self._timeout is not None
            self.model.register_comm_hook(None, HierarchicalMean(racks, self._timeout).hook)
        elif self.arm == "post-local-sgd":
            alone, _ = dist.new_subgroups(group_size=1)
            # Lightning looks for this state and averages models every `model_averaging_period` steps from then on.
            self._ddp_comm_state = post_localSGD_hook.PostLocalSGDState(
                None, alone, start_localSGD_iter=2, post_local_gradient_allreduce=False
            )
            self.model.register_comm_hook(self._ddp_comm_state, post_localSGD_hook.post_localSGD_hook)


def dssync_options(arm: str) -> dict[str, Any]:
    """The options of :class:`DSSyncStrategy` that an arm's name spells.

    >>> dssync_options("dssync-g4-int8")
    {'group_size': 4, 'wire_dtype': 'int8'}
    >>> dssync_options("dssync-topology-fixed")
    {'schedule': 'topology', 'adapt': False}
    """
    matched = re.fullmatch(
        r"dssync(?P<corrected>-corrected)?(?P<blocking>-blocking)?(-g(?P<size>\d+)|(?P<topology>-topology)(?P<fixed>-fixed)?)?"
        r"(-every(?P<every>\d+))?(-(?P<wire>bf16|fp16|int8))?",
        arm,
    )
    if matched is None:
        raise ValueError(f"{arm!r} is no arm. HINT: {', '.join(PEERS)} or {DSSYNC_ARMS}, for instance dssync-g4-int8.")
    options: dict[str, Any] = {"noise_correction": "auto"} if matched["corrected"] else {}
    if matched["blocking"]:
        options["overlap"] = False
    if matched["size"]:
        options["group_size"] = int(matched["size"])
    elif matched["topology"]:
        options["schedule"] = "topology"
        if matched["fixed"]:
            options["adapt"] = False
    if matched["every"]:
        options["sync_every"] = int(matched["every"])
    if matched["wire"]:
        options["wire_dtype"] = matched["wire"]
    return options


def check_arm(arm: str, hosts: int) -> str:
    """Raises ValueError for what is no arm, or not at this number of hosts."""
    if arm in PEERS:
        return arm
    group_size = dssync_options(arm).get("group_size", 2)
    if not 2 <= group_size <= hosts:
        raise ValueError(f"{arm!r} wants groups of {group_size}, but with {hosts} hosts they are of 2 to {hosts}")
    return arm


def make_strategy(
    arm: str, parameter_bytes: int, timeout: float, topology: str | None = None, compute: float | None = None
) -> Strategy:
    """The strategy of an arm; its collectives wait `timeout` seconds, and plans are for `topology` and `compute`."""
    limit = timedelta(seconds=timeout)
    if arm == COMPUTE:
        return SingleDeviceStrategy(torch.device("cpu"))
    if arm not in PEERS:
        options = dssync_options(arm)
        if options.get("schedule") == "topology":
            assert topology is not None
            options |= {"topology": Topology.parse(topology), "compute": compute}
        return DSSyncStrategy(timeout=limit, process_group_backend="gloo", **options)
    if arm == "ddp-default":
        return DDPStrategy(timeout=limit, process_group_backend="gloo")
    # Tuned: with the default of 25 MiB small models fit one bucket, and nothing overlaps backward.
    bucket_cap = min(25.0, max(0.25, parameter_bytes / MIB / 8))
    if arm == "ddp-powersgd":
        # It chains collectives in callbacks. With several buckets ranks call them in different orders, and gloo fails:
        # hence one bucket here, and the single ordered worker of the hierarchical hook.
        bucket_cap = 2 * parameter_bytes / MIB
    return HookedDDP(
        arm,
        topology,
        timeout=limit,
        process_group_backend="gloo",
        bucket_cap_mb=bucket_cap,
        gradient_as_bucket_view=True,
        static_graph=True,
        model_averaging_period=LOCAL_STEPS,
    )


def predict(arm: str, topology: str | None, parameter_bytes: int, compute: float) -> float | None:
    """What the cost model says that a step of an arm takes (see ds_lightning.cost); None where it says nothing."""
    if topology is None or arm in (COMPUTE, "ddp-default", "ddp-powersgd"):
        return None
    network = Network(Topology.parse(topology))
    ring = network.ring_seconds(range(network.world_size), parameter_bytes / (2 if arm == "ddp-bf16" else 1))
    if arm == "post-local-sgd":
        return compute + ring / LOCAL_STEPS
    if arm == "ddp-hierarchical":
        return ddp_step_seconds(network.hierarchical_seconds(parameter_bytes), compute)
    if arm in PEERS:
        return ddp_step_seconds(ring, compute)
    options = dssync_options(arm)
    size = wire_bytes(parameter_bytes // 4, as_wire_dtype(options.get("wire_dtype", "fp32")) or torch.float32)
    overlap, every = bool(options.get("overlap", True)), int(options.get("sync_every", 1))
    if options.get("schedule") == "topology":
        schedule = plan(network.topology, size, overlap=overlap).schedule
    else:
        schedule = make_schedule("auto", network.world_size, options.get("group_size", "auto"))
    # An average has the compute of all steps until the next one to hide in.
    # Event by event, as the planner takes the time of so few ranks.
    return followed_step_seconds(network, rounds(schedule), size, every * compute, overlap) / every


# ---- one run --------------------------------------------------------------------------------------------------------


class Meter(Callback):
    """Time, bytes and memory between the end of the last warm-up step and the end of the last step."""

    def __init__(self, job: Job, trace: bool) -> None:
        self.job = job
        self.ends: list[float] = []
        self.sent = [0, 0]
        self.peak = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU]) if trace else None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step < self.job.warmup:
            return
        self.ends.append(time.perf_counter())
        if step == self.job.warmup:
            self.sent[0] = sent_by(self.job.interface)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            if self.profiler is not None:
                self.profiler.start()
        elif step == self.job.warmup + self.job.steps:
            self.sent[1] = sent_by(self.job.interface)
            self.peak = memory("VmHWM")
            if self.profiler is not None:
                self.profiler.stop()


def memory(field: str) -> int:
    """A memory figure of this process, in bytes: VmHWM, RssAnon, RssFile and so on."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"there is no {field!r} in /proc/self/status")


def prepare(arm: str) -> None:
    """Makes this process, a rank of a cluster, quiet and of one thread; with the arm `compute` it is a world alone."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning's launcher sets one thread per core of this one "node" again
    with suppress(PermissionError):  # not every container's root may
        os.nice(-10)  # whatever else runs here disturbs less
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if arm == COMPUTE:  # alone, though the others do the same at the same time
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]


def measure(rank: int, job: Job, world_size: int, timeout: float) -> Measurement:
    """Runs one `Trainer.fit`, as the rank that the environment says, and measures its later steps."""
    prepare(job.arm)
    before = memory("RssAnon")
    module = Module(job, rank)
    meter = Meter(job, trace=job.trace is not None and rank < 2)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1 if job.arm == COMPUTE else world_size,
        strategy=make_strategy(job.arm, module.parameter_bytes, timeout, job.topology),
        max_epochs=1,
        callbacks=[meter],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: list[Any] = [module.batch] * (job.warmup + job.steps)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    # Pages of libraries come in as they are used and stay: what they hold at the end is not the strategy's.
    libraries = memory("RssFile")
    table = None
    if meter.profiler is not None:
        meter.profiler.export_chrome_trace(f"{job.trace}-rank{rank}.json")
        averages = meter.profiler.key_averages()
        named = [event for event in averages if event.key.startswith("dssync: ")]
        table = type(averages)(named or averages).table(sort_by="cpu_time_total", row_limit=12)
    single = [after - before for before, after in zip(meter.ends, meter.ends[1:], strict=False)]
    return Measurement(
        seconds=(meter.ends[-1] - meter.ends[0]) / job.steps,
        median_seconds=statistics.median(single),
        # One loopback serves all ranks.
        bytes_sent=(meter.sent[1] - meter.sent[0]) / job.steps / (world_size if job.interface == "lo" else 1),
        memory=meter.peak - libraries - before,
        memory_of_fit=memory("VmHWM") - libraries - before,
        parameter_bytes=module.parameter_bytes,
        table=table,
    )
