"""How averages travel: rounding, and the mean that no rounding may move. Forked gloo ranks."""

import pytest
import torch
import torch.distributed as dist

from ds_lightning.wire import RunningAverage, as_wire_dtype, by_dtype, codec_for, distinct, exact_mean_, flatten, split
from tests.ranks import run_ranks

WIRES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def values(rank, n=1000):
    """Weights around 1 with a common part, as replicas have: here a rounding hits all members alike."""
    common = torch.randn(n, generator=torch.Generator().manual_seed(99))
    return 1 + 0.1 * common + 1e-3 * torch.randn(n, generator=torch.Generator().manual_seed(rank))


def average_often(rank, wire, times):
    x = values(rank)
    members = tuple(range(dist.get_world_size()))
    for _ in range(times):
        x += RunningAverage(x, members, dist.group.WORLD, wire).wait()
    return x


@pytest.mark.parametrize("g", [2, 3, 4])
@pytest.mark.parametrize("wire", WIRES)
def test_the_mean_does_not_move(wire, g):
    before = torch.stack([values(r) for r in range(g)]).double().mean(0)
    for times in (1, 20):
        after = torch.stack(run_ranks(average_often, g, wire, times)).double().mean(0)
        assert (after - before).norm() / before.norm() < 1e-6


def test_an_all_reduce_in_bf16_would_move_it():
    """The check above can fail: the second trap of the design, replayed."""
    x = torch.stack([values(r) for r in range(2)])
    naive = x.bfloat16().sum(0).div_(2)
    assert (naive.double() - x.double().mean(0)).norm() / x.double().norm() > 1e-4


@pytest.mark.parametrize("g", [2, 3, 4])
@pytest.mark.parametrize(("wire", "tolerance"), [(torch.float32, 1e-7), (torch.bfloat16, 4e-3), (torch.int8, 8e-3)])
def test_one_average_brings_members_together(wire, tolerance, g):
    after = torch.stack(run_ranks(average_often, g, wire, 1))
    mean = torch.stack([values(r) for r in range(g)]).mean(0)
    # The owner of a shard keeps g times the residual of the mean's rounding.
    assert (after - mean).abs().max() / mean.abs().max() < tolerance * g


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
def test_codecs_round_trip(wire, n):
    codec = codec_for(wire)
    if codec is None:
        return
    x = torch.randn(2, -(-n // codec.block) * codec.block)
    x[0, 0] = 0.0
    error = (codec.decode(codec.encode(x), torch.float32) - x).abs().max()
    assert error <= x.abs().max() * {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.int8: 1 / 253}[wire]


def test_int8_is_not_disturbed_by_zeros_and_shows_nan():
    codec = codec_for(torch.int8)
    assert codec is not None
    assert torch.equal(codec.decode(codec.encode(torch.zeros(1, 64)), torch.float32), torch.zeros(1, 64))
    bad = torch.zeros(1, 128)
    bad[0, 3] = float("nan")
    decoded = codec.decode(codec.encode(bad), torch.float32)
    assert decoded[0, :64].isnan().all()
    assert not decoded[0, 64:].isnan().any()


def test_fp16_clips_instead_of_overflowing():
    codec = codec_for(torch.float16)
    assert codec is not None
    assert codec.decode(codec.encode(torch.tensor([[1e6, -1e6]])), torch.float32).tolist() == [[65504.0, -65504.0]]


def bytes_of(rank, wire):
    x = values(rank, 6400)
    members = tuple(range(dist.get_world_size()))
    average = RunningAverage(x, members, dist.group.WORLD, wire)
    average.wait()
    return average.bytes_sent / x.nbytes


@pytest.mark.parametrize("g", [2, 4])
@pytest.mark.parametrize(("wire", "share"), [(torch.float32, 1.0), (torch.bfloat16, 0.5), (torch.int8, 0.28)])
def test_bytes_are_those_of_the_wire_dtype(wire, share, g):
    assert all(b <= share * 2 * (g - 1) / g for b in run_ranks(bytes_of, g, wire))


def exact(rank, dtype):
    equal = torch.randn(1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    different = torch.full((7,), float(rank), dtype=dtype)
    return exact_mean_(equal.clone()).equal(equal), exact_mean_(different).tolist(), exact_mean_(torch.ones(1)).item()


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_exact_mean_leaves_equal_values_alone(n, dtype):
    for unchanged, mean, one in run_ranks(exact, n, dtype):
        assert unchanged
        assert mean == [(n - 1) / 2] * 7
        assert one == 1.0


def test_flatten_and_split_are_inverse():
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(2, 2, 2).to(memory_format=torch.contiguous_format)]
    for t, part in zip(tensors, split(flatten(tensors), tensors), strict=True):
        assert torch.equal(t, part)


def test_tensors_are_listed_once_and_as_they_lie_in_memory():
    weight, mask = torch.nn.Parameter(torch.randn(3, 3)), torch.ones(3).expand(5, 3)
    tied = torch.nn.Parameter(weight.data)
    assert [t.shape for t in distinct([weight, weight, tied, mask, torch.empty(0)])] == [(3, 3), (1, 3)]
    assert [(d, [t.shape for t in ts]) for d, ts in by_dtype([torch.zeros(2, dtype=torch.complex64)])] == [
        (torch.float32, [(2, 2)])
    ]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(None, None), ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.float16", torch.float16)]
    + [("int8", torch.int8), ("fp32", torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_wire_dtypes(given, dtype):
    assert as_wire_dtype(given) is dtype


@pytest.mark.parametrize("bad", ["bf17", "float64", torch.float64, torch.int32, 16, True])
def test_bad_wire_dtypes(bad):
    with pytest.raises(ValueError, match=r"wire_dtype=.* is not supported. HINT: use None"):
        as_wire_dtype(bad)
