"""Few tokens: two weights in one launch, experts whose gate and up are apart, a router's logits; with a GPU or not."""

import pytest
import torch
import torch.nn.functional as F
from exact import ROUNDING, activations, error, exact, stored

pytest.importorskip("triton")
from undistilled.ops.triton import experts, linear, router

pytestmark = [pytest.mark.gpu, pytest.mark.interpreted]
NAMES = ["fp8_block", "int4", "int8"]


@pytest.mark.parametrize("name", NAMES)
def test_experts(name, monkeypatch):
    """Against float64; programs for gate and up each give the bits of common ones. Expert 9 is another bank's."""
    weights = stored(name, 5, 72, 200), stored(name, 5, 72, 200), stored(name, 5, 200, 72)
    x = activations(2, 200)
    ids, shares = torch.tensor([[0, 3], [3, 9]], device=x.device), torch.rand(2, 2, device=x.device)
    found = []
    for programs in (experts.APART, 0):
        monkeypatch.setattr(experts, "APART", programs)
        found.append(experts.experts(x, ids, shares, *weights))
    gate, up, down = (exact(w) for w in weights)
    truth = torch.zeros(2, 200, dtype=torch.float64, device=x.device)
    for t, j in ((0, 0), (0, 1), (1, 0)):
        e, row = int(ids[t, j]), x[t].double()
        truth[t] += shares[t, j].double() * (down[e] @ (F.silu(gate[e] @ row) * (up[e] @ row)))
    assert error(found[0], truth) < 2 * ROUNDING
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_two_weights(name):
    first, second, x = stored(name, 72, 200), stored(name, 33, 200), activations(3, 200)
    for y, w in zip(linear.few_of_both(x, first, second), (first, second), strict=True):
        assert error(y, x.double() @ exact(w).T) < ROUNDING


def test_logits():
    x = activations(3, 200)
    w = torch.randn(40, 200, device=x.device).bfloat16()
    assert error(router.logits(x, w), x.double() @ w.double().T) < 3e-6
