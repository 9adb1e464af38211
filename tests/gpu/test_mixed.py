"""Experts whose projections are stored in different ways: each product by its own weight's kernels."""

import pytest
import torch
from exact import check_experts, stored

pytest.importorskip("triton")

from undistilled.ops.experts import experts
from undistilled.ops.triton import experts as routed

pytestmark = pytest.mark.gpu
TILES = "tiles16x32-2x1-4x4-6x2"  # 200 inputs
NARROW = "tiles16x64-3x1-5x1"  # 72


def bank(gate, up, down, width=72, hidden=200):
    return stored(gate, 9, width, hidden), stored(up, 9, width, hidden), stored(down, 9, hidden, width)


THREES = [
    (TILES, TILES, "int8"),
    ("int6-g64", "int6-g64", NARROW),
    (TILES, "int6-g64", "fp8_block"),
    ("int8", "int4", "nl3-g32"),
    ("fp8_block", TILES, NARROW),
]


@pytest.mark.parametrize("three", THREES)
@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_experts(three, tokens):
    """Some experts are chosen by nobody, some ids are of other banks."""
    check_experts(tokens, *bank(*three))


@pytest.mark.interpreted
@pytest.mark.parametrize("three", THREES)
@pytest.mark.parametrize("few", [routed.FEW, 0])
def test_few_experts(monkeypatch, three, few):
    """In tiles of few pairs and of many."""
    monkeypatch.setattr(routed, "FEW", few)
    check_experts(1, *bank(*three))


def test_nobody():
    weights = bank(TILES, "int8", "int4")
    ids = torch.full((3, 2), 9, device="cuda")
    x = torch.randn(3, 200, device="cuda").bfloat16()
    assert not experts.resolve(weights[0], x.dtype).run(x, ids, torch.ones(3, 2, device="cuda"), *weights).any()
