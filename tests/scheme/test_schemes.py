"""Every scheme on shapes that divide nothing: parts as declared, bytes as counted, slices as the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undistilled import scheme as schemes
from undistilled.errors import UsageError
from undistilled.scheme.grouped import NORMAL
from undistilled.scheme.packing import pack, unpack

# half a step of each format, relative to the largest value that shares a scale
HALF_STEP = {
    "bf16": 2**-8,
    "fp16": 2**-11,
    "fp32": 0.0,
    "fp8_block": 2**-4,
    "fp8_channel": 2**-4,
    "int8": 0.5 / 127,
    "int6": 0.55 / 31,
    "int5": 0.55 / 15,
    "int4": 0.55 / 7,
    "int3": 0.55 / 3,
    "int2": 0.55 / 2,
    # half of the widest gap between levels, and what an FP8 scale that was rounded down cuts off
    "nl6": 0.07,
    "nl5": 0.08,
    "nl4": 0.1,
    "nl3": 0.14,
    "nl2": 0.22,
    "mxfp4": 0.17,
    "nvfp4": 0.13,
    "tiles16x32": 0.22,
}
TILES = ["tiles16x32-2x3-3x4-4x5", "tiles16x32-6x12", "tiles16x32-3x6-5x6"]
R1_SHAPES = [(576, 7168), (1536, 7168), (2048, 7168), (7168, 2048)]


@pytest.mark.parametrize("name", [*schemes.SCHEMES, *TILES])
@settings(max_examples=25)
@given(out=st.integers(1, 300), into=st.integers(1, 300), experts=st.integers(0, 3), seed=st.integers(0, 99))
def test_parts_bytes_and_error(name, out, into, experts, seed):
    scheme = schemes.get(name)
    shape = (experts, out, into) if experts else (out, into)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parts = scheme.compress(w)
    specs = schemes.parts_of(scheme, shape)
    assert {k: (tuple(t.shape), str(t.dtype)) for k, t in parts.items()} == {
        k: (s.shape, f"torch.{s.dtype}") for k, s in specs.items()
    }
    stored = schemes.Stored(scheme, shape, parts)
    assert stored.nbytes == schemes.bytes_of(scheme, shape)
    error = (stored.dense(torch.float32) - w).abs().amax()
    assert error <= HALF_STEP[name.split("-")[0]] * 2 * w.abs().amax() + 1e-6


# dynamic blocks are cut by blocks of rows and by sections, which have 384 inputs here
@pytest.mark.parametrize(
    "name, into, start, stop", [*((n, 384, 128, 256) for n in schemes.SCHEMES), *((n, 768, 384, 768) for n in TILES)]
)
def test_a_slice_is_the_slice_of_the_whole(name, into, start, stop):
    scheme = schemes.get(name)
    stored = schemes.Stored(scheme, (3, 300, into), scheme.compress(torch.randn(3, 300, into)))
    dense = stored.dense(torch.float32)
    assert torch.equal(stored.narrow("out", 128, 256).dense(torch.float32), dense[:, 128:256])
    assert torch.equal(stored.narrow("out", 256, 300).dense(torch.float32), dense[:, 256:])
    assert torch.equal(stored.narrow("in", start, stop).dense(torch.float32), dense[..., start:stop])
    assert torch.equal(stored.narrow("expert", 1, 3).dense(torch.float32), dense[1:])
    assert torch.equal(stored.expert(2).dense(torch.float32), dense[2])


@pytest.mark.parametrize(
    "name, axis, start",
    [
        ("fp8_block", "out", 64),
        ("fp8_block", "in", 64),
        ("int4", "in", 32),
        ("int3-g64", "in", 32),
        (TILES[0], "out", 8),
        (TILES[0], "in", 32),
    ],
)
def test_a_cut_quantum_is_refused(name, axis, start):
    scheme = schemes.get(name)
    stored = schemes.Stored(scheme, (256, 256), scheme.compress(torch.randn(256, 256)))
    with pytest.raises(ValueError, match="quantum"):
        stored.narrow(axis, start, 256)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_packed_codes_come_back(bits):
    codes = torch.randint(0, 1 << bits, (3, 5, 96), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 3, 4 * bits)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", sorted(NORMAL))
def test_levels_of_a_normal_distribution_lose_least_on_one(bits):
    """No level can move by 2% of the range and lose less: a fixed point of Lloyd's iteration, up to 127ths."""
    x = torch.randn(200_000)
    levels = torch.tensor(NORMAL[bits])

    def lost(levels):
        rank = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        return (levels[rank] - x).square().mean()

    best = min((torch.linspace(1.0, 4.5, 100) / 127).tolist(), key=lambda s: lost(levels * s))
    base = lost(levels * best)
    for at in range(len(levels) // 2, len(levels)):
        for move in (-0.02, 0.02):
            moved = levels * best
            moved[at] += move * moved[-1]
            assert lost(moved.sort().values) > base * 0.999


@pytest.mark.parametrize("name", ["int4-g32", "int8", "fp8_block", "fp8_channel", "nl3-g32", "mxfp4"])
def test_compressing_rows_apart_is_compressing_them_together(name):
    scheme = schemes.get(name)
    w = torch.randn(300, 160)
    step = schemes.row_quantum(scheme) * (1 if name == "fp8_block" else 7)
    whole = scheme.compress(w)
    pieces = [scheme.compress(w[at : at + step]) for at in range(0, 300, step)]
    for part in whole:
        joined = torch.cat([p[part].view(torch.uint8) for p in pieces])
        assert torch.equal(joined, whole[part].view(torch.uint8))


def test_extremes_survive():
    for name in schemes.SCHEMES:
        scheme = schemes.get(name)
        for w in (torch.zeros(4, 64), torch.full((4, 64), 3.0), torch.full((4, 64), -1e-8)):
            dense = scheme.decompress(scheme.compress(w), (4, 64), torch.float32)
            assert dense.isfinite().all(), name
            assert (dense - w).abs().max() <= 0.07 * w.abs().max() + 1e-7, name


def test_unknown_scheme_names_the_known_ones():
    with pytest.raises(UsageError, match="int8"):
        schemes.get("int7")


@pytest.mark.parametrize("shape", R1_SHAPES)
def test_r1_shapes_have_bytes(shape):
    weights = shape[0] * shape[1]
    assert schemes.bytes_of(schemes.get("int4"), shape) * 8 / weights == pytest.approx(4.25, abs=0.01)
    assert schemes.bytes_of(schemes.get("fp8_block"), shape) * 8 / weights == pytest.approx(8.002, abs=0.001)
    assert schemes.bytes_of(schemes.get("fp8_channel"), shape) == weights + 4 * shape[0]


def test_fp8_by_channel_is_what_others_write():
    """A row's largest value becomes 448, the others the E4M3 numbers nearest to w / scale."""
    w = torch.tensor([[1.0, -2.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-3, 5e-4, -1e-3, 1e-9]])
    parts = schemes.get("fp8_channel").compress(w)
    assert torch.equal(parts["scales"], w.abs().amax(1, keepdim=True) / 448) and parts["scales"].shape == (3, 1)
    assert parts["values"].float().tolist() == [[224.0, -448.0, 64.0, 0.0], [0.0] * 4, [448.0, 224.0, -448.0, 0.0]]
