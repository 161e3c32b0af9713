"""Random configurations: each trains for a step on all ranks, or all are told what is wrong before any step.

``FUZZ=1000 pytest tests/test_fuzz.py`` draws so many of each kind; the number of a case is its seed.
"""

import hashlib
import math
import os
import random
import re
import traceback
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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

CASES = int(os.environ.get("FUZZ", 24))

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
    for end, count in sorted(ends.items()):
        request.config.get_terminal_writer().line(f"\n{count:5d} {end}")


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
        "save_replicas": bools,
        "sync_every": positive,
        "optimizer_state_every": positive,
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
        "start_method": ["popen", Bad("thread", "start method 'thread'"), Bad(3, "start method '3'")],
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
