"""Random configurations: each trains for a step on all ranks, or all are told what is wrong before any step.

``FUZZ=1000 pytest tests/test_fuzz.py`` draws so many of each kind; the number of a case is its seed.
"""

import hashlib
import importlib
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hydra.core.plugins import Plugins
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import ds_lightning
from ds_lightning import ConsensusMonitor, DSSyncStrategy, GridSchedule, ShuffleSchedule
from tests.ranks import QUIET, run_ranks
from tests.test_errors import Users

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("FUZZ", 20))

# Where an error may be raised: here (a signature of Python's), in ds_lightning, or in Lightning; never inside torch.
OWN = str(Path(ds_lightning.__file__).parent)
ALLOWED = (__file__, OWN, f"{os.sep}lightning{os.sep}", "lightning_utilities")


@dataclass(frozen=True)
class Bad:
    """A value that must be refused, by a message that matches ``told``; default: it has ``name=value``."""

    value: Any
    told: str = ""
    error: type[Exception] = ValueError


@pytest.fixture(scope="module")
def tally(request):
    """How often there was which end; shown after the last case."""
    ends: Counter[str] = Counter()
    yield ends
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *(f"{count:5d} {end}" for end, count in sorted(ends.items())), sep="\n")


# ---- constructor arguments ------------------------------------------------------------------------------------------


def schedules(n: int) -> list[Any]:
    """For ``n`` ranks; with one rank none of them is ever asked."""
    everybody = tuple(range(n))

    def users(partition: Any, **attributes: Any) -> Users:
        return Users(**{"world_size": n, "period": 1, "partition": partition} | attributes)

    good: list[Any] = ["auto", "grid", "shuffle", GridSchedule(n, min(n, 2)), ShuffleSchedule(n, min(n, 2), seed=3)]
    good += [
        users(lambda t: (everybody,)),
        users(lambda t: [[*everybody]], period=None),
        users(lambda t: (group for group in [everybody])),
        users(lambda t: [(*reversed(everybody),)]),
        users(lambda t: tuple((rank,) for rank in everybody) if t % 2 else (everybody,), period=2),
    ]
    broken = [
        GridSchedule(8, 2),
        users(lambda t: (everybody,), world_size=str(n)),
        users(lambda t: (everybody,), world_size=None),
        *(users(lambda t: (everybody,), period=period) for period in (0, -1, 2.0, "2", True, 10**10)),
        users(lambda t: (everybody[: t % 97],), period=None),  # repeats after 97 steps, but leaves ranks out
        users(lambda t: (everybody, (t,)), period=None),
        users(lambda t: (everybody[1:],)),
        users(lambda t: (everybody, everybody)),
        users(lambda t: ((*everybody, n),)),
        users(lambda t: ((-1, *everybody[1:]),)),
        users(lambda t: (tuple(map(float, everybody)),)),
        users(lambda t: (tuple(map(str, everybody)),)),
        users(lambda t: everybody),
        users(lambda t: None),
        users(lambda t: {}["x"]),
        users(lambda t: (everybody,), group=lambda rank, t: (rank,)),
        users(lambda t: (everybody,), group=lambda rank, t: None),
    ]
    junk = ["gird", "", "topology", "GRID", None, 3, True, ["grid"], GridSchedule, np.array([1, 2]), object]
    refused = r"schedule=|period of the schedule"
    return good + ([Bad(s, refused) for s in broken] if n > 1 else broken) + [Bad(s, "schedule=") for s in junk]


def options(n: int) -> dict[str, list[Any]]:
    """Values of the strategy's options for ``n`` ranks."""
    bools = [True, False, *map(Bad, ("true", "no", 0, 1, None, [], np.True_))]
    positive = [1, 2, 3, 10**12, np.int64(2), *map(Bad, (0, -1, 1.0, 2.5, "2", None, True, math.inf, (1,)))]
    sizes = [1, n + 1, 10**30]  # one rank takes any group size
    return {
        "group_size": ["auto", *([2, n, np.int64(2), torch.tensor(2)] if n > 1 else sizes)]
        + (list(map(Bad, sizes)) if n > 1 else [])
        + list(map(Bad, (0, -1, -(10**9), 2.0, math.nan, math.inf, None, True, False, "2", "AUTO", "", [2], (2, 2))))
        + [Bad(np.array([2, 2]), "group_size="), Bad(torch.tensor(True)), Bad(torch.tensor([2, 2])), Bad(2j)],
        "schedule": schedules(n),
        "overlap": bools,
        "average_gradients": bools,
        "adapt": bools,
        "compute": [None, 0, 0.35, np.float32(0.1), *map(Bad, (-0.1, math.nan, math.inf, "0.35", True, [0.1]))],
        "save_replicas": bools,
        "sync_every": positive,
        "optimizer_state_every": positive,
        "noise_correction": ["auto", False, *map(Bad, ("on", "true", 0, 1, None, [], np.True_))],
        "wire_dtype": [None, "bf16", "fp16", "int8", "fp32", "bfloat16", "torch.float16", torch.bfloat16, torch.int8]
        + list(map(Bad, ("bf17", "", "nn", "int32", "float64", torch.int32, torch.float64, 16, True, ["bf16"], {})))
        + [Bad(np.float16), Bad(np.array([1, 2]), "wire_dtype=")],
        "average_optimizer_state": [(), ["exp_avg_sq"], ("exp_avg_sq", "exp_avg"), ("momentum_buffer",), ["sum"]]
        + [["exp_avg_sq", "exp_avg_sq"], [""], ["no such state"]]
        + list(map(Bad, ("exp_avg_sq", None, 3, True, [1], [None], ("exp_avg_sq", 2), {"exp_avg_sq": 1})))
        + [Bad({"exp_avg_sq"}), Bad((name for name in ["exp_avg_sq"]), "average_optimizer_state=")]
        + [Bad(names, "average_optimizer_state=") for names in (["exp_avg"], ["step"], ("exp_avg_sq", "step"))],
        "seed": [0, 1, -5, 2**70, np.int64(3), *map(Bad, (1.0, "0", None, True, math.nan, [0]))],
        "timeout": [None, timedelta(minutes=2), timedelta(days=36500)]
        + [Bad(bad) for bad in (60, 60.0, "60", True, timedelta(0), timedelta(seconds=-5), timedelta.max)],
        "process_group_backend": [None, "gloo", "GLOO"]
        + [
            Bad(bad)
            for bad in (
                "junk",
                "nccl",
                "mpi",
                "undefined",
                "cpu:gloo",
                "cpu:junk",
                "cuda:nccl",
                "cpu:gloo,cuda:nccl",
                3,
            )
        ],
        "start_method": ["popen", Bad("thread"), Bad(3)],
        # Of DistributedDataParallel: they warn.
        "find_unused_parameters": [True],
        "static_graph": [True],
        "bucket_cap_mb": [1],
        "broadcast_buffers": [False],
        "gradient_as_bucket_view": [True],
        # Of DDPStrategy, in the place of which this one stands.
        "ddp_comm_hook": [None, Bad(len)],
        "ddp_comm_state": [None, Bad(3)],
        "model_averaging_period": [None, Bad(4)],
        **{
            name: [Bad(value, f"{name}=.* is no option of DSSyncStrategy")]
            for name, value in (("grop_size", 2), ("overlaps", True), ("wiredtype", "bf16"), ("zzz", None))
        },
    }


def arguments(n: int) -> dict[str, list[Any]]:
    """Of the Trainer. Left out is what Lightning itself takes without a look, such as ``accumulate_grad_batches=0``."""
    wrong = MisconfigurationException
    return {
        "max_steps": [1, 2, 3, Bad(-2, "max_steps.* -2", wrong)],
        "precision": ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"]
        + [Bad(bad, f"Precision {bad!r} is invalid") for bad in ("bf17", 17, "")],
        "accumulate_grad_batches": [1, 2, 3],
        "gradient_clip_val": [None, 0.1, 1, Bad("x", "gradient_clip_val.* x", TypeError)],
        "gradient_clip_algorithm": ["norm", "value", Bad("median", "gradient_clip_algorithm. median", wrong)],
        "devices": [Bad(n + 1, f"devices={n + 1}"), Bad(0, "devices=0", wrong), Bad("x", "devices", TypeError)],
        "num_nodes": [1, Bad(2, "num_nodes=2")],
        "accelerator": ["cpu", Bad("quantum", "accelerator='quantum'")]
        + ([] if torch.cuda.is_available() else [Bad("gpu", "No supported gpu backend", wrong)]),
        "limit_val_batches": [0, 1, 1.0, *(Bad(bad, f"{bad} for limit_val_batches", wrong) for bad in (-1, 2.5))],
        "detect_anomaly": [True],
        "max_time": [None, Bad("x", "duration='x'", wrong)],
        "max_step": [Bad(1, "unexpected keyword argument 'max_step'", TypeError)],
        "strategy": ["dssync", Bad("dssink", "strategy='dssink'")],
        "monitor": [1, 2, *(Bad(bad, f"every_n_steps={bad!r}") for bad in (0, -1, 1.0, "x", None, True))],
    }


def gaps() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 8)[:, ::2].detach())


# Beside a linear layer. A parameter enters the loss by the sum of its squares, if it requires gradients.
PARTS: dict[str, Any] = {
    "frozen": lambda: nn.Linear(3, 3).requires_grad_(False),
    "unused": lambda: nn.Linear(3, 3),
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "channels_last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "float64": lambda: nn.Parameter(torch.randn(5, dtype=torch.float64)),
    "bf16": lambda: nn.Parameter(torch.randn(5).bfloat16()),
    "fp16": lambda: nn.Parameter(torch.randn(5).half()),
    "complex": lambda: nn.Parameter(torch.randn(5, dtype=torch.complex64)),
    "integer": lambda: nn.Parameter(torch.arange(5), requires_grad=False),
    "scalar": lambda: nn.Parameter(torch.tensor(1.5)),
    "empty": lambda: nn.Parameter(torch.empty(0, 3)),
    "gaps": gaps,
    "mask": lambda: torch.full((3,), -torch.inf),
    "count": lambda: torch.tensor(7),
    "expanded": lambda: torch.randn(1).expand(4),
    "fp8": lambda: torch.randn(4).to(torch.float8_e4m3fn),
    "sparse": lambda: nn.Embedding(10, 3, sparse=True),
}
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "adagrad", "rmsprop", "lbfgs", "several", "sparse", "none")


class Model(LightningModule):
    def __init__(self, case: "Case") -> None:
        super().__init__()
        self.case = case
        self.linear = nn.Linear(4, 4)
        for name in case.parts:
            part = PARTS[name]()
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.automatic_optimization = not case.manual
        if case.frozen:
            self.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        if not self.case.manual:
            return self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def loss(self, batch):
        y = self.linear(batch + self.global_rank)
        if "batch_norm" in self.case.parts:
            y = self.batch_norm(y)
        loss = y.square().mean()
        for name in self.case.parts:
            part = getattr(self, name)
            if name == "sparse":
                loss = loss + part(torch.tensor([self.global_rank, 2])).square().mean()
            elif isinstance(part, nn.Parameter) and part.requires_grad:
                loss = loss + part.abs().square().sum()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch).float(), sync_dist=True)

    def configure_optimizers(self):
        every = [p for p in self.parameters() if p.is_floating_point() or p.is_complex()]
        table = [p for name, p in self.named_parameters() if name.startswith("sparse")]
        dense = [p for p in every if not any(p is t for t in table)]
        optim = torch.optim
        return {
            "sgd": lambda: optim.SGD(self.parameters(), 0.01),
            "momentum": lambda: optim.SGD(self.parameters(), 0.01, momentum=0.9),
            "adam": lambda: optim.Adam(self.parameters(), 0.01),
            "adamw": lambda: optim.AdamW(self.parameters(), 0.01, amsgrad=True),
            "adagrad": lambda: optim.Adagrad(every, 0.01),
            "rmsprop": lambda: optim.RMSprop(self.parameters(), 0.01, momentum=0.9),
            "lbfgs": lambda: optim.LBFGS(every, 0.01, max_iter=2),
            "several": lambda: [optim.Adam(self.linear.parameters(), 0.01), optim.SGD(self.linear.parameters(), 0.01)],
            "sparse": lambda: [optim.Adam(dense, 0.01), optim.SparseAdam(table, 0.01)],
            "none": lambda: None,
        }[self.case.optimizer]()

    def train_dataloader(self):
        return DataLoader(torch.randn(64, 4), 2)

    def val_dataloader(self):
        return DataLoader(torch.randn(8, 4), 2)


@dataclass
class Case:
    """A configuration, and the errors of which it must give one; none: it must run."""

    world_size: int
    parts: list[str]
    optimizer: str
    frozen: bool = False
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)  # options of the last rank alone
    bad: dict[str, Bad] = field(default_factory=dict)  # by what is wrong

    @property
    def manual(self) -> bool:
        return self.optimizer in ("several", "sparse")

    def put(self, draw: random.Random, where: dict[str, Any], table: dict[str, list[Any]]) -> None:
        name = draw.choice(list(table))
        good = [value for value in table[name] if not isinstance(value, Bad)]
        bad = [value for value in table[name] if isinstance(value, Bad)]
        value = draw.choice(bad if not good or (bad and draw.random() < 0.3) else good)
        self.bad.pop(name, None)  # of a value that is replaced now
        if isinstance(value, Bad):
            told = value.told or re.escape(f"{name}={value.value!r}")
            self.bad[name] = Bad(value.value, told, value.error)
            value = value.value
        where[name] = value

    def run(self, rank: int) -> dict[str, Any]:
        """What becomes of it on one rank."""
        steps: list[int] = []
        register_optimizer_step_post_hook(lambda *_: steps.append(1))
        torch.manual_seed(rank)
        try:
            given = {**self.strategy, **(self.differs if rank == self.world_size - 1 else {})}
            trainer_options = dict(self.trainer)
            if "monitor" in trainer_options:
                trainer_options["callbacks"] = [ConsensusMonitor(trainer_options.pop("monitor"))]
            base = {"accelerator": "cpu", "devices": self.world_size, "max_steps": 1, "max_epochs": 1}
            trainer = Trainer(**{"strategy": DSSyncStrategy(**given), **base, **QUIET, **trainer_options})
            model = Model(self)
            trainer.fit(model)
        except Exception as e:
            frame = traceback.extract_tb(e.__traceback__)[-1]
            return {
                "error": type(e),
                "message": str(e),
                "where": f"{frame.filename}:{frame.lineno}",
                "steps": len(steps),
                "trace": traceback.format_exc(),
            }
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        values = [
            v.detach().reshape(-1).clone(memory_format=torch.contiguous_format) for v in model.state_dict().values()
        ]
        digest = hashlib.sha256(b"".join(v.view(torch.uint8).numpy().tobytes() for v in values)).hexdigest()
        return {"error": None, "message": "", "finite": finite, "digest": digest, "steps": len(steps)}


def draw_case(seed: int) -> Case:
    """A valid configuration of which one to three things are changed, to valid values or not."""
    draw = random.Random(seed)
    n = draw.choices((1, 2, 3, 4), (1, 5, 2, 3))[0]
    case = Case(n, draw.sample([*PARTS][:-1], draw.choice((0, 0, 1, 2))), draw.choice(OPTIMIZERS))
    case.trainer = {"max_steps": draw.choice((1, 1, 2, 3)), "limit_val_batches": draw.choice((0, 0, 1))}
    if case.optimizer == "sparse":
        case.parts.append("sparse")
    for _ in range(draw.choice((1, 1, 2, 3))):
        own = draw.random() < 0.75
        case.put(draw, case.strategy if own else case.trainer, options(n) if own else arguments(n))
    # What goes together.
    if "strategy" in case.trainer:
        case.bad = {name: bad for name, bad in case.bad.items() if name not in case.strategy}
        case.strategy = {}
    elif n > 1 and "sync_every" not in case.strategy and draw.random() < 0.03:
        case.differs = {"sync_every": 7}
        case.bad["differs"] = Bad(7, "do not agree on the strategy's options")
    if case.optimizer != "none" and draw.random() < 0.02:
        case.frozen = True
        case.bad["frozen"] = Bad(None, "nothing to train")
    if case.manual:
        for name, off in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
            if case.trainer.get(name, off) != off:
                case.bad.setdefault(name, Bad(case.trainer[name], name, MisconfigurationException))
    if case.strategy.get("average_gradients") is True:
        if case.optimizer == "lbfgs":
            case.bad["lbfgs"] = Bad(True, "average_gradients=True cannot be used with LBFGS")
        if case.optimizer == "sparse" and n > 1:
            case.bad["sparse"] = Bad(True, "average_gradients=True cannot average sparse gradients")
    return case


def judge(case: Case, ranks: list[dict[str, Any]]) -> str:
    """The end it came to, or an ``AssertionError``."""
    first = ranks[0]
    if first["error"] is None and not case.bad:
        assert all(rank["error"] is None for rank in ranks), ranks
        assert all(rank["finite"] for rank in ranks), ranks
        assert all(rank["digest"] == first["digest"] for rank in ranks), ranks
        assert case.optimizer == "none" or all(rank["steps"] > 0 for rank in ranks), ranks
        return f"ran on {case.world_size}"
    assert case.bad, first
    assert first["error"] is not None, "was accepted"
    assert all((rank["error"], rank["message"]) == (first["error"], first["message"]) for rank in ranks), ranks
    assert all(rank["steps"] == 0 for rank in ranks), ranks
    told = [
        bad
        for bad in case.bad.values()
        if bad.error is first["error"] and re.search(bad.told, first["message"], re.DOTALL)
    ]
    assert told, first
    assert any(place in first["where"] for place in ALLOWED), first
    assert f"{os.sep}torch{os.sep}" not in first["where"], first
    by = "ds_lightning" if OWN in first["where"] else "Lightning" if "lightning" in first["where"] else "Python"
    assert by != "ds_lightning" or "HINT: " in first["message"], first
    return f"{first['error'].__name__} by {by}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(CASES))
def test_arguments(seed, tally):
    case = draw_case(seed)
    try:
        tally[judge(case, run_ranks(case.run, case.world_size, init=False, timeout=90))] += 1
    except Exception as e:
        tally["FAILED"] += 1
        raise AssertionError(f"{case}") from e


# ---- overrides on the command line ----------------------------------------------------------------------------------


def overrides(recipe: str, n: int) -> dict[str, list[Any]]:
    """Values of the application's settings for ``n`` ranks; those of "" are whole arguments.

    Left out is what Hydra itself answers with a traceback, such as ``logger=null`` and ``=3``.
    """

    def must(*values: Any, told: str = "") -> list[Bad]:
        return [Bad(str(value), told or "but must be ") for value in values]

    def bools(told: str = "is not a bool") -> list[Any]:
        return ["true", "false", *must("maybe", 3, "null", told=told)]

    sizes = ["0", "-1", "1.5", "abc", "true", "null", "[2]", *(["1", str(n + 1)] if n > 1 else [])]
    settings: dict[str, list[Any]] = {
        "strategy.group_size": ["auto", str(max(n, 2)), *(Bad(size, "group_size=") for size in sizes)],
        "strategy.schedule": ["auto", "grid", "shuffle", *map(Bad, ("gird", "topology"), ("schedule=",) * 2)],
        "strategy.overlap": bools(),
        "strategy.average_gradients": bools(),
        "strategy.adapt": bools(),
        "strategy.compute": ["null", "0", "0.35", *must(-1, "x", "true", ".inf", told="compute=")],
        "strategy.save_replicas": bools(),
        "strategy.sync_every": ["1", "2", *must(0, 1.5, "x", "null", told="sync_every=")],
        "strategy.optimizer_state_every": ["1", "8", *must(0, 1.5, "x", told="optimizer_state_every=")],
        "strategy.noise_correction": ["auto", "false", *must("maybe", 3, "null", told="noise_correction=")],
        "strategy.wire_dtype": ["null", "bf16", "fp16", "int8", *must("bf17", 16, "[bf16]", told="wire_dtype=")],
        "strategy.average_optimizer_state": ["[]", "[exp_avg_sq]"]
        + must("exp_avg_sq", "null", "[1]", "[exp_avg]", told="average_optimizer_state="),
        "strategy.seed": ["0", "-7", *must(1.5, "x", "null", told="seed=")],
        "strategy.timeout": ["null", *must(5, "long", told="timeout=")],
        "strategy.timeout.seconds": ["60", *must(0, -5, told="timeout="), *must("x", told="timedelta seconds")],
        "strategy.process_group_backend": ["null", "gloo", *must("junk", "nccl", told="process_group_backend=")],
        "strategy.start_method": ["fork", *must("thread", told="start_method='thread' is unknown")],
        "strategy": [
            *("dssync", "dssync_adam", "dssync_corrected", "ddp"),
            Bad("dsync", "Could not find 'strategy/dsync'"),
        ],
        "trainer.max_steps": ["1", "2", *must("a", 1.5, "null", "[1]"), Bad("-2", "max_steps.* -2")],
        "trainer.max_epochs": ["1", *must("a", 1.5, "true"), Bad("-5", "max_epochs.* -5")],
        "trainer.precision": ["32-true", "bf16-mixed", *must("bf17", 17)],
        "trainer.accumulate_grad_batches": ["1", "2", *must(0, -1, "two", 1.5)],
        "trainer.gradient_clip_val": ["null", "0.5", "1", *must("x", "[1]", "true")],
        "trainer.devices": [*must(0, -1, "x", told="devices")],
        "trainer.accelerator": ["cpu", Bad("quantum", "accelerator='quantum'"), *must(3)],
        "trainer.limit_train_batches": ["2", "0.5", *must("x"), Bad("-1", "-1 for limit_train_batches")],
        "trainer.limit_val_batches": ["0", "1", *must("x"), Bad("2.5", "2.5 for limit_val_batches")],
        "trainer.log_every_n_steps": ["1", "10", *must("x", 1.5)],
        "trainer.val_check_interval": ["1.0", Bad("x", "val_check_interval.*'x'"), Bad("7", "val_check_interval.*7")],
        "trainer.deterministic": ["true", "warn", *must("x")],
        "trainer.fast_dev_run": ["true", *must("x")],
        "trainer.enable_model_summary": ["true", *must("x")],
        "data.batch_size": ["8", *must(0, -1, "x", 1.5), Bad("100000", "data.batch_size=100000")],
        "data.num_workers": ["0", *must("x", 1.5), Bad("-1", "num_workers option should be non-negative")],
        "data.partition": ["iid", "by_label", "dirichlet:0.5", *must("by_lable", "dirichlet:-1", "dirichlet:x", 3)],
        "data.split_seed": ["1", *must(-1, "x", 1.5, 2**40)],
        "model.optimizer.lr": ["0.01", "1", *must("x", "null", "true"), Bad("-1", "learning rate: -1")],
        "model.optimizer.weight_decay": ["0.0", *must("x"), Bad("-1", "weight_decay value: -1")],
        "callbacks": [
            "default",
            "consensus",
            "swa callbacks.swa.start=0",
            Bad("nope", "Could not find 'callbacks/nope'"),
        ]
        + [Bad("consensus callbacks.consensus.every_n_steps=0", "every_n_steps=0")]
        + [Bad("swa callbacks.swa.start=2.5", "start=2.5")],
        "callbacks.learning_rate.logging_interval": ["step", *must("sometimes", 3)],
        "logger": ["csv", "tensorboard", Bad("nope", "Could not find 'logger/nope'")],
        "seed": ["3", "null", *must("x", 1.5, "true"), Bad("-1", "-1 is not in bounds")],
        "compile": ["false", *must("x", 3)],
        "ckpt_path": ["null", "last", Bad("nowhere.ckpt", "nowhere.ckpt"), *must(3)],
        "": ["+strategy.find_unused_parameters=true", "+trainer.detect_anomaly=true"]
        + [
            Bad(f"{name}=1", f"Could not override '{name}'")
            for name in (
                "trainer.foo",
                "strategy.grop_size",
                "data.batchsize",
                "model.net.dept",
                "optimizer.lr",
                "modle",
            )
        ]
        + [Bad(f"+{name}.foo=1", "argument 'foo'") for name in ("trainer", "model", "model.net", "data", "logger")]
        + [
            Bad("+strategy.zzz=1", "zzz=1 is no option of DSSyncStrategy"),
            Bad("strategy.group_size", "missing EQUAL"),
            Bad("strategy.group_size=[1", "no viable alternative"),
            Bad("trainer.=3", "LexerNoViableAlt"),
            Bad("seed=0,1", "Ambiguous value"),
            Bad("--nope", "unrecognized arguments: --nope"),
            Bad("data=mnist", "Could not find 'data/mnist'"),
            Bad("trainer=nope", "Could not find 'trainer/nope'"),
            Bad("recipe=bret", "Could not find 'recipe/bret'"),
            Bad("strategy.group_size=${foo.bar}", "Interpolation key 'foo.bar' not found"),
            Bad("trainer.strategy=null", "strategy=None"),
            Bad("model.optimizer._target_=torch.optim.Nope", "Error locating target 'torch.optim.Nope'"),
            Bad("model._target_=recipes.nowhere.Model", "Error locating target 'recipes.nowhere.Model'"),
        ],
    }
    vision: dict[str, list[Any]] = {
        "model.net.depth": ["10", *must("x", 1.5), Bad("11", "depth is 11")],
        "model.net.width": ["1", *must(0, "x", 1.5)],
        "model.net.norm": ["batch", "group", *must("layer", 3)],
        "model.net.in_channels": ["1", *must("x"), Bad("3", "model.net.in_channels=1")],
        "model.num_classes": ["10", *must("x"), Bad("11", "model.num_classes=10"), Bad("0", "`num_classes`.*got 0")],
        "model.label_smoothing": ["0.1", *must(1, -1, "x")],
        "model.channels_last": bools("but must be bool"),
        "model.optimizer.momentum": ["0.5", *must("x"), Bad("-1", "momentum value: -1")],
        "model.optimizer.nesterov": ["true", "false", *must("x")],
        "model.scheduler": ["null"],
        "model.scheduler.milestones": ["[1,2]", *must(3, "x")],
        "model.scheduler.gamma": ["0.5", *must("x")],
        "data": [Bad("cifar10", "no complete CIFAR-10"), Bad("randhie", "Could not find 'recipe/wide_resnet/randhie'")],
    }
    clicks: dict[str, list[Any]] = {
        "model.net.embedding_dim": ["4", *must("x", 1.5)],
        "model.net.hidden": ["[8]", "[]", *must("x", 3)],
        "model.net.dropout": ["0.0", *must("x"), Bad("2", "dropout probability")],
        "model.thresholds": ["null", "50", *must("x")],
        "model": ["deepfm_sparse"],
        "data": [Bad("criteo", "data.root is missing"), Bad("digits", "Could not find 'recipe/deepfm/digits'")],
    }
    return settings | (vision if recipe == "wide_resnet" else clicks)


SMALL = ("trainer=smoke", "trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")


@dataclass
class Command:
    """A command line, and the messages of which it must give one; none: it must run."""

    recipe: str
    devices: int
    given: dict[str, str] = field(default_factory=dict)
    bad: dict[str, Bad] = field(default_factory=dict)

    def put(self, draw: random.Random) -> None:
        table = overrides(self.recipe, self.devices)
        name = draw.choice(list(table))
        if any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in self.given if other):
            return  # one decides what the other is of
        good = [value for value in table[name] if not isinstance(value, Bad)]
        bad = [value for value in table[name] if isinstance(value, Bad)]
        value = draw.choice(bad if not good or (bad and draw.random() < 0.4) else good)
        self.bad.pop(name, None)
        if isinstance(value, Bad):
            self.bad[name] = value
            value = value.value
        self.given[name] = value

    @property
    def arguments(self) -> list[str]:
        small = ["model.net.width=1"] if self.recipe == "wide_resnet" else []
        base = [f"recipe={self.recipe}", *SMALL, *small, "callbacks.checkpoint=null", f"trainer.devices={self.devices}"]
        given = (f"{name}={value}" if name else value for name, value in self.given.items())
        return base + [argument for arguments in given for argument in arguments.split()]


def draw_command(seed: int) -> Command:
    """A small run of which one to three settings are changed, to valid values or not."""
    draw = random.Random(seed)
    command = Command(draw.choice(("wide_resnet", "deepfm")), draw.choice((1, 2, 2, 2, 3)))
    for _ in range(draw.choice((1, 1, 2, 3))):
        command.put(draw)
    sparse = command.given.get("model") == "deepfm_sparse"
    if sparse and command.given.get("strategy.average_gradients") == "true" and command.devices > 1:
        command.bad["sparse"] = Bad(True, "cannot average sparse gradients")
    return command


def serve(pipe: Connection) -> None:
    """Runs the application for every message, in a fork of its own of this process, which has imported everything."""
    for module in ("train", "wide_resnet", "images", "deepfm", "clicks", "progress"):
        importlib.import_module(f"recipes.{module}")
    Plugins.instance()
    sys.modules.pop("recipes.train")  # it will be __main__
    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            arguments, folder, limit = pipe.recv()
            pid = os.fork()
            if pid == 0:
                run_application(arguments, folder)
            deadline = time.monotonic() + limit
            while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            if not ended[0]:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            pipe.send(os.waitstatus_to_exitcode(ended[1]) if ended[0] else None)


def run_application(arguments: list[str], folder: Path) -> NoReturn:
    """As `python -m recipes.train` does, its output in a file."""
    os.setsid()
    os.chdir(folder)
    output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.argv = ["train.py", *arguments]
    code = 1
    try:
        runpy.run_module("recipes.train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def application():
    """Runs a command line in a folder; the exit code and the output, or a TimeoutError."""
    context = multiprocessing.get_context("spawn")  # no test has run there
    pipe, other = context.Pipe()
    process = context.Process(target=serve, args=(other,))
    process.start()
    other.close()

    def run(arguments: list[str], folder: Path, limit: float = 90) -> tuple[int, str]:
        pipe.send((arguments, folder, limit))
        if (code := pipe.recv()) is None:
            raise TimeoutError(f"did not end within {limit} s")
        return code, (folder / "output.txt").read_text()

    yield run
    pipe.close()
    process.join(10)


def judge_command(command: Command, code: int, output: str, folder: Path) -> str:
    """The end it came to, or an ``AssertionError``."""
    lines = output.strip().splitlines()
    shown = "\n".join(lines[-30:])
    results = [*folder.rglob("results.json")]
    assert "Traceback" not in output, shown
    if not command.bad:
        assert code == 0, shown
        assert len(results) == 1, shown
        return f"command ran on {command.devices}"
    assert code in (1, 2), f"{code}: {shown}"
    assert not results, shown
    assert "train/loss" not in output, f"it had begun to train: {shown}"
    own = lines[-1].startswith("error: ")
    told = lines[-1] if own else output
    assert any(re.search(bad.told, told, re.DOTALL) for bad in command.bad.values()), shown
    return f"command refused by {'the application, in one line' if own else 'Hydra'}"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", range(CASES))
def test_overrides(seed, tally, application, tmp_path):
    command = draw_command(seed)
    try:
        tally[judge_command(command, *application(command.arguments, tmp_path), tmp_path)] += 1
    except Exception as e:
        tally["command FAILED"] += 1
        raise AssertionError(f"{command}") from e
