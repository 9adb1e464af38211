"""Codes of 2 to 6 bits by groups and in dynamic blocks: every scheme's kernels against float64 of what it stores, and
the invariance of a row's bits. N outputs, K inputs; the shapes divide nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import _restore_threads, routed  # noqa: F401

from undistilled import scheme as schemes
from undistilled.errors import BadArtefact
from undistilled.ops import integers
from undistilled.ops import linear as ops
from undistilled.ops.cpu import matrix, native
from undistilled.ops.experts import experts
from undistilled.scheme import Stored
from undistilled.scheme.grouped import Grouped

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_missing())

TILES = [
    *("tiles16x32-2x3-3x4-4x2", "tiles16x64-2x1-3x5-4x2", "tiles16x128-3x2-5x1-6x1"),
    *("tiles32x32-4x3", "tiles5x32-2x1-6x2", "tiles1x64-3x1-4x1"),
]
CODED = [*(name for name, scheme in schemes.SCHEMES.items() if isinstance(scheme, Grouped)), *TILES]
PRODUCTS = [*(["bfloat16"] if native.rounds() else []), *integers.LARGEST]
KERNELS = {None: "native", "bfloat16": "native bf16"} | {p: f"native {p}" for p in integers.LARGEST}
ROWS = (1, 2, 3, 4, 31, 100)
sizes = st.one_of(st.integers(1, 70), st.integers(500, 700))


def make(name, shape, products=None, seed=0):
    """A random weight, its rows of different sizes and one of them zero, and its values in float64."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w *= 2.0 ** (torch.arange(shape[-2]) % 7 - 3)[:, None]
    w[..., shape[-2] // 2, :] = 0
    scheme = schemes.get(name)
    stored = Stored(scheme, shape, scheme.compress(w), products)
    return stored, stored.dense(torch.float32).double()


def rows_of(x, products):
    if products in integers.LARGEST:
        return integers.rounded(x, products).double()
    return (x.to(getattr(torch, products)) if products else x).double()


@pytest.mark.parametrize("products", [None, *PRODUCTS])
@pytest.mark.parametrize("name", CODED)
@settings(max_examples=5)
@given(n=st.integers(1, 70), k=sizes, m=st.sampled_from(ROWS), seed=st.integers(0, 99))
def test_products_are_what_float64_says_of_what_is_stored(name, products, n, k, m, seed):
    stored, exact = make(name, (n, k), products, seed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1))
    assert ops.linear.resolve(stored, x.dtype).name == KERNELS[products]
    y = ops.apply(x, stored)
    if not (products == "int16" and m >= ops.LARGE and not ops.crosses(stored)):  # else a dense copy meets them
        x = rows_of(x, products)
    x = x.double()
    size = x.abs() @ (exact.abs() + 2 * offsets(stored)).T
    assert torch.all((y.double() - x @ exact.T).abs() <= size * 2e-6)


def offsets(stored):
    """What is added up apart from the levels that it cancels, [N, K]: its rounding counts too. The kernels for INT4 on
    float32 activations and for integers take even a symmetric code as it counts from 0, less what it counts from."""
    counted = stored.scheme.name.startswith("int") and stored.products != "bfloat16"
    counted &= stored.products is not None or stored.scheme.name.startswith("int4")
    parts = [stored.parts["minimums"].double()] if "minimums" in stored.parts else []
    parts += [-min(stored.scheme.levels) * stored.parts["scales"].double()] if counted and not parts else []
    each = [part.abs().repeat_interleave(stored.scheme.group, 1)[:, : stored.shape[1]] for part in parts]
    return sum(each, torch.zeros(stored.shape).double())


@pytest.mark.parametrize("products", [None, *PRODUCTS])
@pytest.mark.parametrize("name", CODED)
def test_a_row_has_the_same_bits_in_any_company_on_any_threads_and_in_a_slice(name, products):
    stored, _ = make(name, (115, 600), products)
    x = torch.randn(31 if products in (None, "int16") else 70, 600, generator=torch.Generator().manual_seed(2))
    weight = matrix.of(stored)
    torch.set_num_threads(2)
    together = native.linear(x, weight)
    for some in (1, 2, 3, 4, 7, len(x) - 1):
        assert torch.equal(native.linear(x[:some].clone(), weight), together[:some])
    assert torch.equal(native.linear(x[len(x) - 1], weight), together[-1])
    torch.set_num_threads(1)
    assert torch.equal(native.linear(x, weight), together)
    upper = stored.narrow("out", 80 if "tiles5" in name else 64, 115)
    assert torch.equal(native.linear(x[:5].clone(), matrix.of(upper)), together[:5, -upper.shape[0] :])
    x[1:] = float("nan")
    assert torch.equal(native.linear(x, weight)[0], together[0])


@pytest.mark.parametrize("name", CODED)
def test_a_dense_copy_is_what_the_scheme_says(name):
    for shape in ((33, 70), (1, 1), (40, 500)):
        stored, _ = make(name, shape)
        want = stored.dense(torch.float32)
        assert torch.equal(ops.dense(stored, torch.float32), want)
        n0 = shape[0] // 3
        assert torch.equal(native.dequantise(matrix.of(stored), (n0, shape[0])), want[n0:])


@pytest.mark.parametrize("products", [None, *PRODUCTS])
@pytest.mark.parametrize("gate, down", [*((name, name) for name in CODED), ("nl2-g64", TILES[0]), ("int8", "int3")])
def test_experts(gate, down, products):
    """Some experts nobody chose, and choices that are none of these experts."""
    count, d, inner, top = 7, 100, 72, 2
    shapes = (gate, (count, inner, d)), (gate, (count, inner, d)), (down, (count, d, inner))
    held = [make(name, shape, products, at)[0] for at, (name, shape) in enumerate(shapes)]
    found = experts.resolve(held[0], torch.float32)
    assert found.name == "native"
    for rows in (1, 5, 40):
        x, chosen, shares = routed(rows, top, count, d, rows)
        chosen[chosen == 3] = 5
        got = found.run(x, chosen, shares, *held)
        want = experts.reference.run(x, chosen, shares, *held)
        assert (got - want).norm() <= (2e-3 if products else 2e-6) * want.norm() + 1e-6  # one step of h, rounded
        one = slice(rows - 1, rows)
        assert torch.equal(found.run(x[one], chosen[one], shares[one], *held), got[one])
        for r, e in ((row, int(e)) for row in range(min(rows, 2)) for e in chosen[row] if e < count):
            alone = found.run(x[r : r + 1], torch.tensor([[e]]), torch.ones(1, 1), *held)[0]
            a, b = (native.linear(x[r], matrix.of(w.expert(e))) for w in held[:2])
            assert torch.equal(native.linear(native.silu_mul(a, b), matrix.of(held[2].expert(e))), alone)


@pytest.mark.parametrize("name", ["nl3-g64", "int2", TILES[0]])
def test_a_slice_of_stacked_experts_is_read_where_it_lies(name):
    stored, exact = make(name, (4, 96, 288))
    part = stored.narrow("out", 32, 80)
    assert not next(iter(part.parts.values())).is_contiguous() and matrix.takes(part)
    x = torch.randn(3, 288)
    y = native.linear(x, matrix.of(part.expert(2)))
    assert (y - x.double() @ exact[2, 32:80].T).norm() <= 1e-6 * y.norm()
    assert matrix.of(part).struct.n == 48


def test_a_slice_along_the_inputs_is_not_read_in_place():
    stored, _ = make("nl3-g64", (32, 256))
    half = stored.narrow("in", 0, 128)
    assert not matrix.takes(half)
    x = torch.randn(2, 128)
    assert torch.allclose(ops.apply(x, half), x @ half.dense(torch.float32).T, atol=1e-4)


def test_scales_of_a_power_of_two_reach_both_ends():
    stored, _ = make("mxfp4", (16, 64), "bfloat16" if native.rounds() else None)
    for code in (0, 1, 30, 250):
        stored.parts["scales"].fill_(code)
        want = stored.dense(torch.float32)
        assert torch.equal(native.dequantise(matrix.of(stored)), want)
        x = torch.ones(1, 64) / 1024
        y = native.linear(x, matrix.of(stored)).double()
        assert (y - x.double() @ want.double().T).abs().max() <= 1e-6 * want.abs().max()


def test_an_order_that_leaves_its_section_is_refused():
    stored, _ = make(TILES[0], (32, 300))
    for wrong in (9, -1):
        stored.parts["order"][0, 0, 0] = wrong
        with pytest.raises(BadArtefact, match="outside its section of 9"):
            matrix.of(stored)
