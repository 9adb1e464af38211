"""Our Triton kernels for dynamic blocks against float64 and against themselves.

Small ones run in Triton's interpreter too (conftest.py says how); the rest wants a GPU.
"""

from itertools import pairwise

import pytest
import torch
from exact import DEVICE, ROUNDING, activations, check_experts, error, exact, reference, stored
from hypothesis import given, settings
from hypothesis import strategies as some

from undistilled.ops.experts import experts
from undistilled.ops.linear import apply, dense, linear

pytest.importorskip("triton")
from undistilled.ops.triton import experts as routed
from undistilled.ops.triton.tiles import few

pytestmark = pytest.mark.gpu
FLOAT32 = 1e-5  # what sums of a few hundred products round


def parts_of(inputs, cols, *shares):
    """The scheme whose sections are all `inputs`: of each width a share, the widest takes the rest."""
    tiles = -(-inputs // cols)
    counts = {bits: int(tiles * share) for bits, share in shares}
    counts[shares[-1][0]] += tiles - sum(counts.values())
    return f"tiles16x{cols}" + "".join(f"-{bits}x{n}" for bits, n in counts.items() if n)


MIXES = {
    "all": ((2, 0.2), (3, 0.3), (4, 0.2), (5, 0.1), (6, 0.2)),
    "usual": ((2, 0.2), (3, 0.5), (4, 0.3)),
    **{f"{bits} bits": ((bits, 1.0),) for bits in (2, 3, 4, 5, 6)},
}


SHAPES = [(576, 7168, 64), (7168, 2048, 128), (33, 520, 32)]


@pytest.mark.interpreted
@pytest.mark.parametrize("mix", MIXES)
def test_small_linear(mix):
    linear_is_right(MIXES[mix], 100, 200, 32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mix", ["all", "usual"])
def test_linear(mix, shape):
    linear_is_right(MIXES[mix], *shape)


def linear_is_right(mix, outputs, inputs, cols):
    w = stored(parts_of(inputs, cols, *mix), outputs, inputs)
    assert error(dense(w, torch.bfloat16), exact(w)) < ROUNDING
    for tokens in (1, 8, 32, 100):
        x = activations(tokens, inputs)
        assert linear.resolve(w, x.dtype).name == "triton tiles"
        assert error(apply(x, w), x.double() @ exact(w).T) < ROUNDING, tokens


@some.composite
def mixes(draw, tiles):
    """Counts of tiles of each width, as a scheme's name has them, any of them missing."""
    cuts = sorted(draw(some.lists(some.integers(0, tiles), min_size=4, max_size=4)))
    counts = [b - a for a, b in pairwise([0, *cuts, tiles])]
    return "".join(f"-{bits}x{n}" for bits, n in zip(range(2, 7), counts, strict=True) if n)


@pytest.mark.interpreted
@settings(max_examples=12)
@given(mixes(6), some.sampled_from([32, 64, 128]), some.integers(1, 40), some.integers(1, 9), some.data())
def test_any_mix(mix, cols, outputs, tokens, data):
    """Results in float32, of activations that bfloat16 holds."""
    inputs = data.draw(some.integers(5 * cols + 1, 6 * cols))
    w, x = stored(f"tiles16x{cols}{mix}", outputs, inputs), activations(tokens, inputs)
    assert error(few(x.float(), w), x.double() @ exact(w).T) < FLOAT32
    assert torch.allclose(dense(w, x.dtype).float(), exact(w).float(), rtol=2**-7, atol=0)


@pytest.mark.interpreted
def test_sections_and_slices():
    """Two sections of 6 tiles; blocks of rows from the middle; one of two sections, copied as a shard would be."""
    w, x = stored("tiles16x32-2x3-3x2-6x1", 96, 384), activations(5, 384)
    whole = apply(x, w)
    assert error(whole, x.double() @ exact(w).T) < ROUNDING
    assert torch.equal(apply(x, w.narrow("out", 16, 80)), whole[:, 16:80])
    half = w.narrow("in", 192, 384)
    half.parts = {name: part.contiguous() for name, part in half.parts.items()}
    assert error(apply(x[:, 192:], half), x[:, 192:].double() @ exact(half).T) < ROUNDING


@pytest.mark.interpreted
def test_any_scale_of_activations():
    """Float16 would overflow, or lose small ones; zeros stay zeros."""
    w, x = stored("tiles16x64-2x4-3x8-5x4", 64, 1024), activations(6, 1024)
    x = x * torch.tensor([1e30, 1e-30, 1e6, 1e-6, 1.0, 0.0], device=DEVICE).bfloat16()[:, None]
    x[4, 7] = 3e4  # one large among small ones
    y, truth = apply(x, w), x.double() @ exact(w).T
    for row in range(5):
        assert error(y[row], truth[row]) < ROUNDING, row
    assert not y[5].any()


@pytest.mark.parametrize("outputs", [pytest.param(10, marks=pytest.mark.interpreted), 576])
def test_a_row_in_any_company(outputs):
    w, x = stored("tiles16x64-2x4-3x8-5x4", outputs, 1024), activations(64, 1024)
    together = apply(x, w)
    for rows in (1, 3, 8, 9, 33):
        assert torch.equal(apply(x[:rows], w), together[:rows]), rows


def bank(count, width, hidden):
    """Gate, up and down, of different tiles."""
    gate = parts_of(hidden, 32, *MIXES["usual"])
    up, down = parts_of(hidden, 64, (3, 0.5), (5, 0.5)), parts_of(width, 32, *MIXES["all"])
    return stored(gate, count, width, hidden), stored(up, count, width, hidden), stored(down, count, hidden, width)


@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_experts(tokens):
    """Some experts are chosen by nobody, some ids are of other banks."""
    weights = bank(9, 168, 200)
    check_experts(tokens, *weights)


@pytest.mark.interpreted
@pytest.mark.parametrize("few", [routed.FEW, 0])
def test_few_experts(monkeypatch, few):
    """In tiles of few pairs and of many."""
    monkeypatch.setattr(routed, "FEW", few)
    check_experts(1, *bank(9, 16, 72))


def test_experts_at_r1s_widths():
    weights = bank(2, 2048, 7168)
    x, shares = activations(3, 7168), torch.rand(3, 2, device=DEVICE)
    ids = torch.tensor([[0, 1], [1, 0], [1, 5]], device=DEVICE)
    ours = experts.resolve(weights[0], x.dtype).run(x, ids, shares, *weights)
    assert error(ours, reference(x, ids, shares, *weights)) < 2 * ROUNDING
