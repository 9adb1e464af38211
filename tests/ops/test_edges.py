"""The native kernels at the edges: numbers without a scale, no rows, more threads than work, memory that ends, indices
beyond 2^31."""

import ctypes
import mmap
import multiprocessing
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coded import CODED, make
from test_native import EPS, SOME, STORED, _restore_threads, stored  # noqa: F401

from undistilled.ops import integers
from undistilled.ops.cpu import native
from undistilled.ops.cpu.matrix import KIND, matrix, of

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_missing())

PRODUCTS = [None, *(["bfloat16"] if native.rounds() else []), *integers.LARGEST]
FEW = ["int2", "int3-g32", "int4-g32-sym", "nl5-g64", "mxfp4", "nvfp4", "tiles16x32-2x3-3x4-4x2"]


def held(name, n, k, products=None):
    """(what native.linear takes, its parts' names and tensors)"""
    if name in CODED:
        found, exact = make(name, (n, k), products)
        return of(found), exact
    weight, exact = stored(name, n, k, 32)
    return matrix(KIND[name], *weight, products), exact


def pairs():
    for name in (*STORED, *FEW):
        integer, exact = name in CODED or name == "int8", name in ("fp32", "fp16")
        for products in PRODUCTS:
            if products is None or integer or (products == "bfloat16" and not exact):
                yield name, products


PAIRS = list(pairs())
sizes = st.sampled_from([2.0**e for e in (-149, -140, -126, -101, -100, -99, -60, 0, 40, 59)])
odd = st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 2.0**-149])


@pytest.mark.parametrize("name, products", PAIRS)
@settings(max_examples=10)
@given(
    size=sizes,
    marks=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 299), odd), max_size=6),
    k=st.sampled_from([31, 300]),
)
def test_numbers_that_have_no_scale_reach_their_own_row_alone(name, products, size, marks, k):
    """NaN and infinity make a row NaN or infinite, whatever small or large its neighbours are; all else stays exact."""
    weight, exact = held(name, 20, k, products)
    x = torch.randn(4, k, generator=torch.Generator().manual_seed(3)) * size
    for row, at, value in marks:
        x[row, at % k] = value * (size if abs(value) == 1 else 1)
    y = native.linear(x, weight)
    finite = x.isfinite().all(-1)
    assert not y[~finite].isfinite().any() or (exact == 0).any()
    seen = x[finite]
    if products in integers.LARGEST:
        seen = integers.rounded(seen, products)
    elif products:
        seen = seen.bfloat16().float()
    bound = (seen.double().abs() @ exact.abs().T + 15 * seen.double().abs().sum(1, keepdim=True)) * EPS * 16
    least = 2.0**-90 * exact.abs().sum(1)  # FP8 sums subnormals before it scales them
    assert torch.all((y[finite].double() - seen.double() @ exact.T).abs() <= bound + least)
    for row in range(4):
        assert torch.equal(native.linear(x[row], weight).nan_to_num(7), y[row].nan_to_num(7))


@pytest.mark.parametrize("name, products", PAIRS)
def test_no_rows_are_no_rows_and_threads_without_work_wait(name, products):
    weight, exact = held(name, 1, 33, products)
    for threads in (1, 8):
        torch.set_num_threads(threads)
        assert native.linear(torch.empty(0, 33), weight).shape == (0, 1)
        assert native.dequantise(weight, (1, 1)).shape == (0, 33)
        assert torch.equal(native.dequantise(weight), exact.float())
        y = native.linear(torch.ones(1, 33), weight)
    assert (y - exact.sum()).abs() <= exact.abs().sum() * 1e-2


def test_kernels_of_no_rows():
    none = torch.empty(0, 4, 8)
    cache, table, context = (
        torch.zeros(16, 2, 8),
        torch.zeros(0, 1, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
    )
    assert native.attend_rows(none, cache, cache, table, context, 16, 1.0).shape == (0, 4, 8)
    assert native.mla_rows(none, cache[:, 0].contiguous(), table, context, 16, 6, 1.0).shape == (0, 4, 6)
    assert native.norm_rows(none[:, 0], torch.ones(8), 1e-6).shape == (0, 8)
    assert native.silu_mul(none, none).shape == none.shape
    gate, down = (of(make("int4", (3, 8, 8), None)[0]) for _ in range(2))
    chosen = torch.zeros(0, 2, dtype=torch.int32)
    assert native.experts_rows(none[:, 0], gate, gate, down, chosen, torch.zeros(0, 2)).shape == (0, 8)
    assert native.route(torch.empty(0, 6), None, 2, (1, 1), True, True, 1.0)[0].shape == (0, 2)


class Guarded:
    """Tensors that end where a page without access begins."""

    def __init__(self):
        self.areas = []

    def __call__(self, tensor):
        raw = tensor.contiguous().view(torch.uint8).flatten() if tensor.numel() else tensor
        pages = -(-max(1, raw.numel()) // mmap.PAGESIZE) * mmap.PAGESIZE
        area = mmap.mmap(-1, pages + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
        self.areas.append(area)
        held = torch.frombuffer(area, dtype=torch.uint8, count=raw.numel(), offset=pages - raw.numel())
        held.copy_(raw)
        return held.view(tensor.dtype).view(tensor.shape)


def _read_to_the_end(name, products):
    """Products with every part of a weight, and x, against a wall; exits by a signal where one is passed."""
    place = Guarded()
    for n, k in ((1, 1), (3, 17), (17, 70), (5, 129), (33, 300)):
        if name in CODED:
            weight, _ = make(name, (n, k), products)
            weight.parts.update({part: place(tensor) for part, tensor in weight.parts.items()})
            weight = of(weight)
        else:
            (*parts, n, k, group), _ = stored(name, n, k, 32)
            weight = matrix(KIND[name], *(t if t is None else place(t) for t in parts), n, k, group, products)
        native.dequantise(weight)
        for m in (1, 2, 3, 5, 40):
            native.linear(place(torch.randn(m, k)), weight)
    sys.stdout.flush()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("name", [*STORED, *FEW])
def test_nothing_is_read_past_the_end(name):
    context = multiprocessing.get_context("fork")
    for products in (p for other, p in PAIRS if other == name):
        child = context.Process(target=_read_to_the_end, args=(name, products))
        child.start()
        child.join(120)
        assert child.exitcode == 0, products


def untouched(*shape, dtype):
    """Zeros that take no memory where nobody writes."""
    return torch.frombuffer(mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize), dtype=dtype).view(shape)


def test_experts_beyond_two_to_the_31_bytes():
    """R1's: 256 experts of 2048 x 7168. Only the last one is ever written, or read."""
    count, inner, d = 256, 2048, 7168
    drawn = [torch.randint(-128, 128, s, dtype=torch.int8) for s in ((inner, d), (inner, d), (d, inner))]
    stacked = []
    for one in drawn:
        values, scales = untouched(count, *one.shape, dtype=torch.int8), torch.zeros(count, len(one), 1)
        values[-1], scales[-1] = one, 0.01
        stacked.append(matrix(KIND["int8"], values, scales, None, *one.shape, 0, "int16", count))
    x = torch.randn(1, d) / 64
    got = native.experts_rows(x, *stacked, torch.tensor([[count - 1]], dtype=torch.int32), torch.ones(1, 1))
    gate, up, down = (
        matrix(KIND["int8"], one, torch.full((len(one), 1), 0.01), None, *one.shape, 0, "int16") for one in drawn
    )
    alone = native.linear(native.silu_mul(native.linear(x, gate), native.linear(x, up)), down)
    assert torch.equal(got, alone) and got.abs().max() > 0


def test_rows_beyond_two_to_the_31_elements():
    n, k = (1 << 31) // 7168 + 40, 7168
    values, scales = untouched(n, k, dtype=torch.int8), torch.zeros(n, 1)
    values[-1], scales[-1] = 3, 0.5
    weight = matrix(KIND["int8"], values, scales, None, n, k, 0, "int16")
    want = torch.tensor([[1.5], [0.0]]).expand(2, k)
    assert torch.equal(native.pick_rows(weight, torch.tensor([n - 1, 0])), want)
    assert torch.equal(native.dequantise(weight, (n - 1, n)), want[:1])


def test_a_cache_beyond_two_to_the_31_elements():
    slots, heads, d = (1 << 31) // 1024 + 64, 8, 128
    slots -= slots % 16
    cache = untouched(slots, heads, d, dtype=torch.bfloat16)
    cache[-16:] = torch.randn(16, heads, d)
    table, context = torch.tensor([[slots // 16 - 1]], dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    q = torch.randn(1, heads, d)
    got = native.attend_rows(q, cache, cache, table, context, 16, 0.1)
    last = cache[-16:].double()
    shares = (torch.einsum("hd,thd->ht", q[0].double(), last) * 0.1).softmax(-1)
    assert torch.allclose(got[0].double(), torch.einsum("ht,thd->hd", shares, last), rtol=1e-5, atol=1e-5)
