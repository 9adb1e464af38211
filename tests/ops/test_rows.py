"""The small kernels of a decode pass against the ops' reference bodies, and a row's bits in company."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_native import FLOATS, SOME, _restore_threads  # noqa: F401

from undistilled import scheme as schemes
from undistilled.model.spec import Moe
from undistilled.ops import mla, norm, rope, table
from undistilled.ops.cpu import matrix, native
from undistilled.ops.router import route
from undistilled.scheme import Stored

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_missing())

HELD = ["fp32", "fp16", "bf16", "fp8_block", "int8", "int4", "nl3-g64", "mxfp4", "tiles16x32-2x3-3x4-4x2"]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(name, shape, products=None):
    scheme = schemes.get(name)
    return Stored(scheme, shape, scheme.compress(drawn(*shape, seed=7)), products)


@SOME
@given(st.integers(1, 40), st.integers(1, 300), st.booleans(), st.booleans())
def test_sums_and_products_have_pytorchs_bits(rows, d, one, times):
    a, b = drawn(rows, d), drawn(d, seed=1) if one else drawn(rows, d, seed=1)
    assert torch.equal(native.pointwise(a, b, times), a * b if times else a + b)
    assert torch.equal(native.pointwise(a, b, times, out=a), a)


@pytest.mark.parametrize("dtype", list(FLOATS.values()))
def test_a_row_in_the_cache_is_rounded_as_pytorch_rounds(dtype):
    exponents = torch.arange(-150.0, 129)
    values = torch.cat([(1 + drawn(len(exponents)).abs() % 1) * 2.0**exponents * s for s in (1, -1)])
    halves = (torch.arange(-2100, 2100) * 2 + 1) * 2.0**-25  # ties of float16's subnormals and small normals
    ties = (torch.arange(0, 512) * 2 + 1 + 2**12) * 2.0**-3
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.9, 65520.0, 65535.0, 6.1e-5])
    values = torch.cat([values, halves, ties, special, drawn(9)])
    values = values[: len(values) // 6 * 6].view(-1, 2, 3)
    slots = torch.randperm(len(values) + 5)[: len(values)]
    got, want = (torch.ones(len(values) + 5, 2, 3, dtype=dtype) for _ in range(2))
    table.write_rows(values, got, slots)
    table.write_rows.reference.run(values, want, slots)
    kind = {4: torch.int32, 2: torch.int16}[got.element_size()]
    same = (got.view(kind) == want.view(kind)) | (got.isnan() & want.isnan())
    assert same.all()


def test_a_slot_outside_the_cache_is_not_written():
    cache = torch.zeros(4, 8)
    native.write_rows(cache, torch.tensor([4, -1, 2]), torch.ones(3, 8))
    assert cache.sum() == 8 and cache[2].sum() == 8


@pytest.mark.parametrize("name", HELD)
def test_embedding(name):
    weight = held(name, (48, 96))
    tokens = torch.tensor([0, 47, 5, 5, 31])
    assert table.embed.resolve(weight, torch.float32).name == "native"
    got = table.embed.resolve(weight, torch.float32).run(tokens, weight, torch.float32)
    assert torch.equal(got, weight.dense(torch.float32)[tokens])
    assert native.pick_rows(matrix.of(weight), torch.tensor([48, -1])).abs().sum() == 0


@SOME
@given(st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 20))
def test_parts_of_rows(rows, heads, interleaved, before):
    cos, sin, eps = drawn(rows, 6), drawn(rows, 6, seed=1), 1e-6
    x, w = drawn(rows, heads, before + 12), drawn(before + 7).abs()
    turned = rope.rotate_tail(x.clone(), cos, sin, interleaved, 12)
    assert torch.equal(turned[..., before:], rope.rotate(x[..., before:].contiguous(), cos, sin, interleaved))
    assert torch.equal(turned[..., :before], x[..., :before])
    flat = x[:, 0].contiguous()
    got = norm.norm_head(flat.clone(), w, eps)
    assert torch.equal(got[:, : before + 7], norm.rms_norm(flat[:, : before + 7].contiguous(), w, eps))
    assert torch.equal(got[:, before + 7 :], flat[:, before + 7 :])
    assert torch.allclose(norm.norm_head.reference.run(flat, w, eps), got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("products", [None, *(["bfloat16"] if native.rounds() else [])])
@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("rows", [1, 2, 5, 31])
def test_the_lift_is_read_where_it_lies(name, products, rows):
    if products and name in ("fp32", "fp16"):
        return
    heads, nope, values, latent, tail = 3, 32, 20, 100, 8
    cos, sin = drawn(rows, tail // 2, seed=3), drawn(rows, tail // 2, seed=4)
    weight = held(name, (heads * (nope + values), latent), products)
    dense = weight.dense(torch.float32).unflatten(0, (heads, -1)).double()
    q, z = drawn(rows, heads, nope + tail), drawn(rows, heads, latent, seed=2)
    lift = mla.lift_of(weight, heads, rows, torch.float32)
    assert isinstance(lift, matrix.Matrix)
    absorb, release = mla.absorb.resolve(lift).run, mla.release.resolve(lift).run
    inside, out = absorb(q.clone(), lift, nope, (cos, sin, True)), release(z, lift, nope)
    want = torch.einsum("rhn,hnz->rhz", q[..., :nope].double(), dense[:, :nope])
    assert (inside[..., :latent] - want).norm() <= 2e-6 * want.norm()
    assert torch.equal(inside[..., latent:], rope.rotate_tail(q.clone(), cos, sin, True, tail)[..., nope:])
    want = torch.einsum("rhz,hvz->rhv", z.double(), dense[:, nope:])
    assert (out - want).norm() <= 2e-6 * want.norm()
    torch.set_num_threads(1)
    last = slice(rows - 1, rows)
    assert torch.equal(absorb(q[last].clone(), lift, nope, (cos[last], sin[last], True)), inside[last])
    assert torch.equal(release(z[last].clone(), lift, nope), out[last])


@SOME
@given(
    st.integers(1, 70),
    st.sampled_from([(8, 2, 1, 1), (64, 6, 1, 1), (16, 4, 4, 2), (256, 8, 8, 4), (21, 3, 3, 1)]),
    st.sampled_from(["sigmoid", "softmax"]),
    st.booleans(),
    st.booleans(),
)
def test_routing(rows, shape, scoring, biased, normalise):
    experts, top, groups, kept = shape
    moe = Moe(
        experts=experts, per_token=top, shared=0, width=8, first_dense=0, scoring=scoring, groups=groups,
        top_groups=kept, normalise=normalise, scale=2.5,
    )  # fmt: skip
    logits, bias = drawn(rows, experts), drawn(experts, seed=1) / 20 if biased else None
    ids, weights = route(logits, bias, moe)
    want_ids, want = route.reference.run(logits, bias, moe)
    assert ids.dtype is torch.int32 and torch.equal(ids.long(), want_ids)
    assert torch.allclose(weights, want, rtol=2e-6, atol=1e-7)
    one = route(logits[-1:], bias, moe)
    assert torch.equal(one[0], ids[-1:]) and torch.equal(one[1], weights[-1:])


def test_of_equal_choices_the_first():
    moe = Moe(
        experts=8, per_token=3, shared=0, width=8, first_dense=0, scoring="softmax", groups=1, top_groups=1,
        normalise=True, scale=1.0,
    )  # fmt: skip
    ids, weights = route(torch.zeros(2, 8), None, moe)
    assert ids.tolist() == [[0, 1, 2]] * 2 and torch.allclose(weights, torch.full((2, 3), 1 / 3))
