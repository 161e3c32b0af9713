"""How values are rounded, the exact mean, and lists of tensors as flat ones."""

import pytest
import torch

from ds_lightning.wire import Code, as_wire_dtype, by_dtype, codec_for, distinct, exact_mean_, flatten, split
from tests.ranks import run_ranks

WIRES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def rounded(codec, x):
    """Encoded and decoded again."""
    code = Code(codec, torch.empty(codec.nbytes(x.numel()), dtype=torch.uint8), x.numel())
    codec.encode(x.clone(), code)
    out = torch.empty_like(x)
    codec.decode(code, out)
    return out


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("blocks", [1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codecs_round_trip(wire, blocks, dtype):
    codec = codec_for(wire)
    x = torch.randn(blocks * codec.block, dtype=dtype)
    x[0] = 0.0
    error = (rounded(codec, x) - x).abs().max()
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.int8: 1 / 253}[wire]
    assert error <= x.abs().max() * unit


@pytest.mark.parametrize("wire", WIRES)
def test_a_part_of_a_code_is_the_code_of_a_part(wire):
    codec = codec_for(wire)
    x, n = torch.randn(10 * codec.block), 10 * codec.block
    code = Code(codec, torch.empty(codec.nbytes(n), dtype=torch.uint8), n)
    for start, stop in ((0, 3), (3, 4), (4, 10)):
        part = x[start * codec.block : stop * codec.block]
        codec.encode(part.clone(), code.part(start * codec.block, stop * codec.block))
    whole = torch.empty(n)
    codec.decode(code, whole)
    assert torch.equal(whole, rounded(codec, x))


def test_int8_has_a_scale_for_every_64_values():
    x = torch.cat([torch.randn(64) * 1e-4, torch.randn(64) * 1e4])
    error = (rounded(codec_for(torch.int8), x) - x).abs()
    assert (error[:64] <= x[:64].abs().max() / 253).all()
    assert codec_for(torch.int8).nbytes(128) == 128 + 2 * 4


def test_int8_is_not_disturbed_by_zeros_and_shows_nan():
    codec = codec_for(torch.int8)
    assert torch.equal(rounded(codec, torch.zeros(64)), torch.zeros(64))
    tiny = torch.full((64,), 1e-42)  # too small for a scale of its own
    assert (rounded(codec, tiny) - tiny).abs().max() <= 1e-42
    for odd in (torch.nan, torch.inf, -torch.inf):
        bad = torch.zeros(128)
        bad[3] = odd
        decoded = rounded(codec, bad)
        assert decoded[:64].isnan().all() if odd != odd else not decoded[:64].isfinite().any()
        assert torch.equal(decoded[64:], torch.zeros(64))


def test_fp16_clips_instead_of_overflowing():
    assert rounded(codec_for(torch.float16), torch.tensor([1e6, -1e6])).tolist() == [65504.0, -65504.0]


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
