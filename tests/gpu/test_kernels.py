"""Our Triton kernels against float64 and against themselves: every scheme, odd shapes, any company."""

import pytest
import torch
from exact import ROUNDING, activations, check_experts, error, exact, stored

from undistilled import scheme as schemes
from undistilled.model.spec import Moe
from undistilled.ops.attention import attend_rows
from undistilled.ops.experts import experts
from undistilled.ops.linear import apply, both, dense, linear
from undistilled.ops.mla import mla_rows
from undistilled.ops.norm import add_norm, rms_norm
from undistilled.ops.rope import rotate
from undistilled.ops.router import logits, route
from undistilled.ops.swiglu import silu_mul
from undistilled.ops.triton.form import form_of
from undistilled.scheme import Stored

pytestmark = pytest.mark.gpu
QUANTISED = [name for name, scheme in schemes.SCHEMES.items() if form_of(scheme)]
SOME = [
    "int8",
    "int8-g32",
    "fp8_block",
    "fp8_channel",
    "int4",
    "int4-g32-sym",
    "int3",
    "int5-g64",
    "int6",
    "nl3-g32",
    "nvfp4",
]


@pytest.mark.parametrize("name", QUANTISED)
def test_linear(name):
    for tokens, outputs, inputs in ((1, 576, 7168), (5, 100, 200), (17, 64, 384), (64, 96, 136), (130, 72, 200)):
        w, x = stored(name, outputs, inputs), activations(tokens, inputs)
        assert linear.resolve(w, x.dtype).name == "triton"
        assert error(apply(x, w), x.double() @ exact(w).T) < ROUNDING, (tokens, outputs, inputs)
        assert error(dense(w, torch.bfloat16), exact(w)) < ROUNDING


def test_every_fp8_number_is_exact():
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[(codes & 127) == 127] = 0
    values = codes.view(torch.float8_e4m3fn).expand(128, 256).contiguous()
    w = Stored(schemes.get("fp8_block"), (128, 256), {"values": values, "scales": torch.ones(1, 2, device="cuda")})
    assert torch.equal(dense(w, torch.bfloat16), values.bfloat16())
    one = torch.eye(256, device="cuda").bfloat16()[:64]
    assert torch.equal(apply(one, w), values.bfloat16().T[:64])


@pytest.mark.parametrize("name", ["int8", "fp8_block", "int4", "nl3-g32"])
def test_a_row_in_any_company(name):
    w, x = stored(name, 576, 1024), activations(64, 1024)
    together = apply(x, w)
    for rows in (1, 3, 7):
        assert torch.equal(apply(x[:rows], w), apply(x[:8], w)[:rows]), rows
    for rows in (8, 16, 33):  # tiles for more rows run other instructions of the tensor cores
        assert error(apply(x[:rows], w), together[:rows].double()) < ROUNDING
    assert torch.equal(apply(x, w), together)


@pytest.mark.parametrize("experts, hidden", [(256, 7168), (40, 200), (32, 256)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 65])
def test_router_logits(tokens, experts, hidden):
    """As exact as a product in float32: a router's choices hang on it."""
    w, x = stored("bf16", experts, hidden), activations(tokens, hidden)
    with torch.inference_mode():
        kernel = logits.resolve(w, x.dtype)
        assert kernel.name == "triton"
        y = kernel.run(x, w)
        assert y.dtype is torch.float32
        assert error(y, x.double() @ exact(w).T) < 3e-6
        assert tokens > 8 or torch.equal(kernel.run(x[:1], w), y[:1])


def bank(name, count, width, hidden):
    return stored(name, count, width, hidden), stored(name, count, width, hidden), stored(name, count, hidden, width)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_experts(name, tokens):
    """Some experts are chosen by nobody, some ids are of other banks."""
    weights = bank(name, 9, 72, 200)
    check_experts(tokens, *weights)


@pytest.mark.parametrize("name", ["int8-g32", "int4-g32", "nvfp4", "nl4-g16"])
@pytest.mark.parametrize("tokens", [33, 64])
def test_many_groups_and_rows_fit_shared_memory(name, tokens):
    w, x = stored(name, 128, 512), activations(tokens, 512)
    assert error(apply(x, w), x.double() @ exact(w).T) < ROUNDING


@pytest.mark.parametrize("name", ["int8", "fp8_block", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_two_weights_of_one_input(name, tokens):
    first, second, x = stored(name, 576, 1024), stored(name, 100, 1024), activations(tokens, 1024)
    assert both.resolve(first, second, x.dtype).name == "triton"
    for y, w in zip(both.resolve(first, second, x.dtype).run(x, first, second), (first, second), strict=True):
        assert error(y, x.double() @ exact(w).T) < ROUNDING


def test_no_tokens_by_two_weights():
    first, second = stored("int8", 64, 128), stored("int8", 32, 128)
    a, b = both.resolve(first, second, torch.bfloat16).run(activations(0, 128), first, second)
    assert a.shape == (0, 64) and b.shape == (0, 32)


def test_counters_stay_where_captured_passes_have_them():
    from undistilled.ops.triton.linear import counters

    device = torch.device("cuda")
    before = counters(device, 1)
    assert len(counters(device, len(before) + 1)) > len(before)
    assert counters(device, 1) is before


def test_no_expert_of_this_bank():
    weights = bank("int8", 4, 64, 128)
    x, ids = activations(3, 128), torch.full((3, 2), 9, device="cuda")
    y = experts.resolve(weights[0], x.dtype).run(x, ids, torch.ones(3, 2, device="cuda"), *weights)
    assert not y.any()


def paged(rows, longest, size, *width):
    blocks = -(-longest // size)
    cache = activations(rows * blocks * size, *width)
    return cache, torch.randperm(rows * blocks, device="cuda", dtype=torch.int32).view(rows, blocks)


@pytest.mark.parametrize("heads, latent, rope, size", [(128, 512, 64, 64), (64, 512, 64, 16), (5, 24, 8, 4)])
def test_mla_rows(heads, latent, rope, size):
    contexts = torch.tensor([1, 31, 256, 257, 1000], dtype=torch.int32)
    cache, table = paged(5, 1000, size, latent + rope)
    q = activations(5, heads, latent + rope)
    rest = (size, latent, 0.1)
    ours = mla_rows(q, cache, table, contexts, *rest)
    assert error(ours, mla_rows.reference.run(q.double(), cache, table, contexts, *rest).double()) < 2 * ROUNDING
    for r in range(5):
        pair = [r, (r + 1) % 5]
        assert torch.equal(mla_rows(q[pair], cache, table[pair], contexts[pair], *rest)[0], ours[r])
        alone = mla_rows(q[r : r + 1], cache, table[r : r + 1], contexts[r : r + 1], *rest)  # by narrower programs
        assert error(alone[0], ours[r].double()) < ROUNDING


@pytest.mark.parametrize("heads, groups, width", [(6, 2, 64), (32, 1, 128), (5, 5, 24)])
def test_attend_rows(heads, groups, width):
    contexts = torch.tensor([1, 31, 256, 700], dtype=torch.int32)
    k, table = paged(4, 700, 16, groups, width)
    v, q = torch.randn_like(k), activations(4, heads, width)
    ours = attend_rows(q, k, v, table, contexts, 16, 0.2)
    truth = attend_rows.reference.run(q.double(), k, v, table, contexts, 16, 0.2)
    assert error(ours, truth.double()) < 2 * ROUNDING


def test_between_products():
    with torch.inference_mode():
        x, w = activations(3, 1536), torch.rand(1536, device="cuda")
        assert error(rms_norm(x, w, 1e-6), rms_norm.reference.run(x.double(), w, 1e-6).double()) < 2 * ROUNDING
        with torch.inference_mode():
            total, y = add_norm(x, x.flip(0), w, 1e-6)
            assert torch.equal(total, x + x.flip(0)) and torch.equal(y, rms_norm(total, w, 1e-6))
        g, u = activations(3, 200), activations(3, 200)
        assert error(silu_mul(g, u), silu_mul.reference.run(g.double(), u.double())) < ROUNDING
        q = activations(3, 5, 96)[..., 64:]
        cos, sin = torch.rand(3, 16, device="cuda"), torch.rand(3, 16, device="cuda")
        for interleaved in (True, False):
            ours = rotate(q, cos, sin, interleaved)
            assert error(ours, rotate.reference.run(q, cos, sin, interleaved).double()) < ROUNDING


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", [(8, 2, 1, 1), (64, 6, 1, 1), (16, 4, 4, 2), (256, 8, 8, 4), (21, 3, 3, 1)], ids=str)
@torch.inference_mode()
def test_routing(shape, scoring):
    experts_, top, groups, kept = shape
    for biased, normalise in ((True, True), (False, True), (True, False)):
        moe = Moe(
            experts=experts_, per_token=top, shared=0, width=8, first_dense=0, scoring=scoring, groups=groups,
            top_groups=kept, normalise=normalise, scale=2.5,
        )  # fmt: skip
        logits = torch.randn(300, experts_, device="cuda")
        bias = torch.randn(experts_, device="cuda") / 20 if biased else None
        ids, weights = route(logits, bias, moe)
        want_ids, want = route.reference.run(logits, bias, moe)
        # a choice between scores that differ by a rounding may fall otherwise
        same = (ids == want_ids).all(1)
        assert same.float().mean() > 0.99
        assert torch.allclose(weights[same], want[same], rtol=1e-5, atol=1e-6)
        one = route(logits[-1:], bias, moe)
        assert torch.equal(one[0], ids[-1:]) and torch.equal(one[1], weights[-1:])


@torch.inference_mode()
def test_of_equal_choices_the_first():
    moe = Moe(
        experts=8, per_token=3, shared=0, width=8, first_dense=0, scoring="softmax", groups=1, top_groups=1,
        normalise=True, scale=1.0,
    )  # fmt: skip
    ids, weights = route(torch.zeros(2, 8, device="cuda"), None, moe)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 1 / 3, device="cuda"))
