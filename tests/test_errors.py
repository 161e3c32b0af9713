"""Bad input: a `ValueError` naming value, rule and way out, on every rank, in under 5 s; and what warns instead."""

import os
import re
import socket
import sys
import time
import warnings
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from ds_lightning import DSSyncStrategy, GridSchedule, ShuffleSchedule
from ds_lightning.topology import Topology
from tests.ranks import QUIET, run_ranks

LIMIT = 5.0


def fit(model, world_size, steps=2, **options):
    trainer = Trainer(
        strategy=DSSyncStrategy(**options),
        accelerator="cpu",
        devices=world_size,
        max_steps=steps,
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(model)
    return trainer


def refused(world_size, options=lambda rank: {}, model=lambda rank: BoringModel()):
    """What every rank is told, which must be the same on all, in time. Both arguments are functions of the rank."""

    def run(rank):
        start = time.perf_counter()
        try:
            fit(model(rank), world_size, **options(rank))
        except Exception as e:
            return type(e), str(e), time.perf_counter() - start
        return None, "nothing was raised", 0.0

    ranks = run_ranks(run, world_size, init=False, timeout=30)
    for type_, message, seconds in ranks:
        assert type_ is ValueError, message
        assert message == ranks[0][1]
        assert "HINT: " in message
        assert seconds < LIMIT
    return ranks[0][1]


class Users:
    """A user's schedule of pairs, with whatever a test replaces."""

    world_size, period = 4, 2

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def partition(self, step):
        return ((0, 1), (2, 3)) if step % 2 else ((0, 2), (1, 3))

    def group(self, rank, step):
        return next((g for g in self.partition(step) if rank in g), ())

    def __repr__(self):
        return "Users()"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size=0 is too small"),
        ({"group_size": -2}, "group_size=-2 is too small"),
        ({"group_size": 2.0}, "group_size=2.0 is not an int but a float. HINT: use group_size=2"),
        ({"group_size": True}, "group_size=True is not an int but a bool"),
        ({"group_size": "4"}, "group_size='4' is neither an int nor 'auto'"),
        ({"group_size": None}, "group_size=None is not an int"),
        ({"group_size": np.array([2, 2])}, r"group_size=array\(\[2, 2\]\) is not an int but a ndarray"),
        ({"schedule": "gird"}, "schedule='gird' is unknown. HINT: use one of 'auto', 'grid', 'shuffle'"),
        ({"schedule": "topology"}, "schedule='topology' needs a description of the network, but topology=None"),
        ({"schedule": "topology", "topology": 3}, "topology=3 is no path and no Topology"),
        (
            {"schedule": "topology", "topology": "none.yaml"},
            "topology='none.yaml' cannot be read: there is no topology",
        ),
        ({"schedule": 3}, "schedule=3 is no schedule: it needs `world_size`"),
        ({"schedule": None}, "schedule=None is no schedule"),
        ({"wire_dtype": "bf17"}, "wire_dtype='bf17' is not supported. HINT: use None"),
        ({"wire_dtype": torch.int32}, "wire_dtype=torch.int32 is not supported"),
        ({"wire_dtype": 16}, "wire_dtype=16 is not supported"),
        ({"wire_dtype": np.array([1, 2])}, r"wire_dtype=array\(\[1, 2\]\) is not supported"),
        ({"wire_dtype": ["bf16"]}, r"wire_dtype=\['bf16'\] is not supported"),
        ({"overlap": "false"}, "overlap='false' is not a bool. HINT: use overlap=True or overlap=False"),
        ({"average_gradients": 1}, "average_gradients=1 is not a bool"),
        ({"sync_every": 0}, "sync_every=0 is too small"),
        ({"sync_every": 1.5}, "sync_every=1.5 is not an int but a float. HINT: use a whole number"),
        ({"seed": "0"}, "seed='0' is not an int but a str"),
        ({"average_optimizer_state": "exp_avg_sq"}, "average_optimizer_state='exp_avg_sq' is not a sequence of names"),
        ({"average_optimizer_state": None}, "average_optimizer_state=None is not a sequence of names"),
        ({"average_optimizer_state": [1]}, r"average_optimizer_state=\[1\] is not a sequence of names"),
        ({"average_optimizer_state": iter(["exp_avg_sq"])}, "average_optimizer_state=<.*> is not a sequence of names"),
        ({"average_optimizer_state": ["step"]}, r"average_optimizer_state=\('step',\) names 'step', which counts"),
        ({"average_optimizer_state": ["exp_avg"]}, "averages 'exp_avg' without the second moment"),
        (
            {"average_optimizer_state": {"exp_avg_sq"}},
            r"average_optimizer_state=\{'exp_avg_sq'\} is not a sequence of names",
        ),
        ({"average_optimizer_state": ["exp_avg_sq", "step"]}, "names 'step', which counts updates"),
        ({"group_size": torch.tensor(True)}, r"group_size=tensor\(True\) is not an int but a Tensor"),
        ({"wire_dtype": {}}, r"wire_dtype=\{\} is not supported"),
        ({"timeout": 60}, "timeout=60 is not a timedelta of 1 ms to 100 years. HINT: use timedelta"),
        ({"timeout": timedelta(seconds=-5)}, r"timeout=datetime.timedelta\(.*\) is not a timedelta of 1 ms"),
        ({"timeout": timedelta.max}, r"timeout=datetime.timedelta\(.*\) is not a timedelta of 1 ms"),
        ({"optimizer_state_every": 0}, "optimizer_state_every=0 is too small"),
        ({"noise_correction": "on"}, "noise_correction='on' is neither a bool nor 'auto'"),
        ({"noise_correction": 1}, "noise_correction=1 is neither a bool nor 'auto'"),
        ({"noise_correction": True, "average_gradients": True}, "cannot be used with average_gradients=True"),
        ({"optimizer_state_every": "8"}, "optimizer_state_every='8' is not an int but a str"),
        (
            {"grop_size": 4},
            "grop_size=4 is no option of DSSyncStrategy or DDPStrategy. HINT: did you mean 'group_size'",
        ),
        ({"strat_method": "fork"}, "strat_method='fork' is no option.* did you mean 'start_method'"),
        ({"start_method": "thread"}, "start_method='thread' is unknown. HINT: use one of 'popen', 'fork'"),
        ({"zzz": 1}, "zzz=1 is no option.*its own options are .*wire_dtype"),
        ({"model_averaging_period": 4}, "model_averaging_period=4 cannot be used with.*HINT: .* sync_every"),
        ({"ddp_comm_state": 1}, "ddp_comm_state=1 cannot be used"),
        ({"ddp_comm_hook": len}, "ddp_comm_hook=<built-in function len> cannot be used"),
        ({"ddp_comm_wrapper": len}, "ddp_comm_wrapper=<built-in function len> cannot be used"),
    ],
)
def test_refused_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message) as error:
        DSSyncStrategy(**options)
    assert "HINT: " in str(error.value)


def test_a_misspelt_option_by_name_is_refused():
    with pytest.raises(ValueError, match="'dssink'"):
        Trainer(strategy="dssink", devices=2, accelerator="cpu")


def test_other_strategies_options_given_as_none_are_fine():
    DSSyncStrategy(ddp_comm_hook=None, model_averaging_period=None)


# ---- found on every rank alike --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size=1 is too small: a group of one averages nothing"),
        ({"group_size": 3}, "group_size=3 is larger than the world size 2. HINT: use 2 to 2"),
        ({"schedule": GridSchedule(4, 2)}, "is for 4 ranks but the world size is 2. HINT: make it for 2 ranks"),
        ({"schedule": Users(world_size=2, partition=lambda t: ((0, 1), (1,)))}, "has rank 1 in two groups of step 0"),
        ({"schedule": Users(world_size=2, partition=lambda t: ((0,),))}, "leaves out ranks [1] at step 0"),
        ({"schedule": Users(world_size=2, partition=lambda t: ((0, 2),))}, "has rank 2 in group (0, 2)"),
        ({"schedule": Users(world_size=2, partition=lambda t: ((0, 1),), period=0)}, "period of the schedule=0 is too"),
        (
            {"schedule": Users(world_size=2, partition=lambda t: ((0, 1),), group=lambda r, t: (r,))},
            "contradicts itself",
        ),
        ({"schedule": Users(world_size=2, period=10**10)}, "period of the schedule=10000000000 is too large: all"),
        ({"schedule": Users(world_size=2, partition=lambda t: 7)}, "schedule=Users() could not be asked: TypeError"),
        (
            {"schedule": "topology", "topology": Topology.flat("abc", bandwidth=1)},
            "and 3 ranks of its own where the world size is 2. HINT: name hosts as `hostname` does",
        ),
    ],
)
def test_refused_once_the_world_size_is_known(options, message):
    assert message in refused(2, lambda rank: options)


@pytest.mark.parametrize("options", [{"group_size": 1}, {"group_size": 3}, {"process_group_backend": "junk"}])
def test_bad_options_are_refused_before_any_process_group_exists(options):
    def run(rank):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value!r} "):
            fit(BoringModel(), 2, **options)
        return dist.is_initialized()

    assert run_ranks(run, 2, init=False) == [False, False]


def test_average_gradients_with_lbfgs_is_refused():
    class WithLBFGS(BoringModel):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    message = refused(2, lambda rank: {"average_gradients": True}, lambda rank: WithLBFGS())
    assert "average_gradients=True cannot be used with LBFGS" in message


def test_average_gradients_with_a_sparse_embedding_is_refused_before_the_first_step():
    message = refused(
        2,
        lambda rank: {"average_gradients": True, "sync_every": 2},  # gradients would be looked at in the second step
        lambda rank: model_with(nn.Embedding(3, 2, sparse=True)),
    )
    assert "average_gradients=True cannot average sparse gradients" in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_without_anything_to_train_is_refused(world_size):
    message = refused(world_size, model=lambda rank: BoringModel().requires_grad_(False))
    assert "The loss depends on no parameter that requires a gradient, so there is nothing to train." in message


# ---- ranks that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"sync_every": 2}, {}, "'sync_every': 2"),
        ({"overlap": False}, {}, "'overlap': False"),
        ({"wire_dtype": "bf16"}, {"wire_dtype": "fp16"}, "torch.bfloat16"),
        ({"average_gradients": True}, {}, "'average_gradients': True"),
        ({"average_optimizer_state": ["exp_avg_sq"]}, {}, "exp_avg_sq"),
        (
            {"average_optimizer_state": ["exp_avg_sq"], "optimizer_state_every": 8},
            {"average_optimizer_state": ["exp_avg_sq"]},
            "'optimizer_state_every': 8",
        ),
        ({"noise_correction": "auto"}, {}, "'noise_correction': 'auto'"),
        ({"group_size": 4}, {"group_size": 2}, "'group_size': 4"),
    ],
)
def test_options_that_differ_are_refused_on_all_ranks(one, other, message):
    told = refused(4, lambda rank: one if rank == 2 else other)
    assert "Ranks do not agree on the strategy's options: rank 2" in told or "(found on ranks [2])" in told
    assert message in told


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (ShuffleSchedule(4, 2, seed=1), ShuffleSchedule(4, 2, seed=2), "do not agree on the schedule's partitions"),
        ("shuffle", "grid", "do not agree on the schedule's partitions"),
        (Users(partition=lambda t: ((0, 1), (2, 3))), Users(), "do not agree on the schedule's partitions"),
        (Users(period=1), Users(), "do not agree on the schedule's partitions"),
        (Users(world_size=8), Users(), "Users() is for 8 ranks but the world size is 4"),
        (Users(partition=lambda t: ((0, 1), (1, 2, 3))), Users(), "has rank 1 in two groups of step 0"),
        (Users(partition=lambda t: 1 // 0), Users(), "could not be asked: ZeroDivisionError"),
    ],
)
def test_schedules_that_differ_are_refused_on_all_ranks(one, other, message):
    assert message in refused(4, lambda rank: {"schedule": one if rank == 1 else other})


def test_seeds_that_differ_are_refused_where_they_matter():
    told = refused(4, lambda rank: {"schedule": "shuffle", "seed": rank // 3})
    assert "do not agree on the schedule's partitions: rank 3 differs from rank 0" in told


def model_with(layer):
    model = BoringModel()
    model.extra = layer
    return model


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 3), "extra.weight [4, 3]"),
        (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3, bias=False), "extra.bias"),
        (lambda: nn.Linear(3, 3), lambda: None, "extra.weight"),
        (lambda: nn.Linear(3, 3).double(), lambda: nn.Linear(3, 3), "float64"),
        (lambda: nn.Linear(3, 3).requires_grad_(False), lambda: nn.Linear(3, 3), "requires_grad"),
        (lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm1d(3, track_running_stats=False), "extra.running_mean"),
        (lambda: nn.LazyLinear(3), lambda: nn.Linear(3, 3), "parameters ['extra.weight', 'extra.bias'] have no shape"),
        (lambda: nn.LazyLinear(3), lambda: nn.LazyLinear(3), "HINT: run one batch through the model first"),
    ],
    ids=["shape", "number", "layer", "dtype", "frozen", "buffers", "lazy on one", "lazy"],
)
def test_models_that_differ_are_refused_on_all_ranks(one, other, message):
    assert message in refused(3, model=lambda rank: model_with(one() if rank == 1 else other()))


def test_optimizers_of_other_parameters_are_refused_on_all_ranks():
    class Some(BoringModel):
        def __init__(self, rank):
            super().__init__()
            self.rank = rank

        def configure_optimizers(self):
            parameters = list(self.layer.parameters())
            return torch.optim.SGD(parameters[: 2 - self.rank], lr=0.1)

    assert "Ranks do not agree on the optimizers' parameters" in refused(2, model=Some)


# ---- what has no effect warns ---------------------------------------------------------------------------------------


def warned(world_size, model=BoringModel, steps=2, **options):
    """Warnings of a run that goes well, by rank."""

    def run(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model(), world_size, steps=steps, **options)
        texts = [str(w.message) for w in caught]
        return [text for text in texts if "no effect" in text or text.startswith("dssync")]

    return run_ranks(run, world_size, init=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": GridSchedule(2, 2), "group_size": 2}, "group_size=2 has no effect: GridSchedule"),
        ({"schedule": "grid", "seed": 3}, "seed=3 has no effect: GridSchedule"),
        ({"optimizer_state_every": 8}, "optimizer_state_every=8 has no effect: there is no average_optimizer_state"),
        ({"schedule": GridSchedule(2, 2), "seed": 3}, "seed=3 has no effect: GridSchedule"),
        ({"noise_correction": "auto"}, "noise_correction='auto' has no effect: it takes an adaptive optimizer"),
    ],
)
def test_settings_without_effect_warn_once_on_rank_0(options, message):
    (text,), others = warned(2, **options)
    assert message in text
    assert others == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"find_unused_parameters": True}, "dssync: find_unused_parameters of DistributedDataParallel has no effect"),
        ({"bucket_cap_mb": 1, "static_graph": True}, "bucket_cap_mb, static_graph of DistributedDataParallel have no"),
    ],
)
def test_options_of_distributed_data_parallel_warn(options, message):
    with pytest.warns(UserWarning, match=message):
        DSSyncStrategy(**options)


def test_settings_with_an_effect_do_not_warn():
    assert warned(2, schedule="shuffle", seed=3, group_size=2, wire_dtype="bf16", sync_every=2) == [[], []]


class Momentum(BoringModel):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Plain(BoringModel):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "steps", "states"), [(Momentum, 3, r"\['momentum_buffer'\]"), (Plain, 20, r"\[\]")], ids=["some", "none"]
)
def test_an_optimizer_state_that_there_is_not_warns_once(model, steps, states):
    (text,), others = warned(2, model, steps, average_optimizer_state=["exp_avg_sq"])
    pattern = r"average_optimizer_state=\('exp_avg_sq',\) has no effect for 'exp_avg_sq': SGD has the states " + states
    assert re.search(pattern, text), text
    assert others == []


def test_a_grid_far_from_its_group_size_warns():
    (text, *_), *_ = warned(5, schedule="grid", group_size=2)
    assert "5 ranks have no grid of groups near group_size=2; groups are of 5. HINT: use schedule='shuffle'" in text


def test_torchruns_store_warns_where_restarts_would_find_old_addresses(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert warned(2) == [[], []]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    # There is no agent. (torch.distributed has a function of the module's name.)
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "_torchelastic_use_agent_store", lambda: False)
    (text,), others = warned(2)
    assert "--max-restarts=3 may not bring the job back. HINT: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
    assert others == []


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("junk", "there is no 'junk' here"),
        (3, "there is no '3' here"),
        ("nccl", ""),
        ("cuda:nccl", "."),
        ("cuda:gloo", "it has nothing for cpu tensors"),
        ("cpu:gloo", "only under its plain name 'gloo'"),
    ],
)
def test_a_backend_that_is_not_to_be_had_is_refused(backend, why):
    message = refused(2, lambda rank: {"process_group_backend": backend})
    assert re.search(f"process_group_backend={backend!r} cannot be used: .*{why}", message)


class Frozen(BoringModel):
    def on_fit_start(self):
        self.requires_grad_(False)


def test_a_loss_without_gradients_is_refused_before_torch_does():
    assert refused(2, model=lambda rank: Frozen()).startswith(
        "The loss depends on no parameter that requires a gradient"
    )


class Table(BoringModel):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(4, 2, sparse=True)


def test_averaging_sparse_gradients_is_refused_before_the_first_step():
    message = refused(2, lambda rank: {"average_gradients": True}, lambda rank: Table())
    assert message.startswith("average_gradients=True cannot average sparse gradients")


def test_a_period_that_nobody_can_look_through_is_refused():
    message = refused(4, lambda rank: {"schedule": Users(period=10**10)})
    assert "period of the schedule=10000000000 is too large" in message


# ---- others that do not answer --------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_ends_in_an_error():
    """As one whose link was cut: torch would wait for its answer without a limit."""

    def run(rank):
        os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_PORT=str(port))
        fit(BoringModel(), 2, timeout=timedelta(seconds=1))

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        start = time.perf_counter()
        (error,) = run_ranks(run, 1, init=False, timeout=30, errors=True)
    assert time.perf_counter() - start < 10
    expected = (
        rf"Rank 1 \(.+\) could not meet the other 1 ranks at 127.0.0.1:{port} within 0:00:01: .+ HINT: one of them"
    )
    assert re.match(expected, error.message), error.message
