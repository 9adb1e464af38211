"""The native kernels against float64 PyTorch, and the invariance of a row's bits."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undistilled import scheme as schemes
from undistilled.ops import linear as layer
from undistilled.ops.cpu import native
from undistilled.ops.cpu.matrix import KIND, matrix

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_missing())

SOME = settings(max_examples=40)
STORED = [kind for kind in KIND if kind not in ("coded", "across", "fp8_across")]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def linear(kind, x, *weight, products=None):
    return native.linear(x, matrix(kind, *weight, products))


def dequantise(kind, *weight, rows=None):
    return native.dequantise(matrix(kind, *weight), rows)


def stored(kind: str, n: int, k: int, group: int = 32, mins: bool = False, seed: int = 0):
    """A random weight as `linear`'s arguments after x, and the same weight in float64."""
    g = torch.Generator().manual_seed(seed)
    group = k if kind in FLOATS else 128 if kind == "fp8_block" else group
    groups = -(-k // group)
    scales = lows = None
    w = torch.randn(n, k, generator=g)
    if kind in FLOATS:
        values = w.to(FLOATS[kind])
        exact = values.double()
    elif kind == "fp8_block":
        values = torch.randint(0, 256, (n, k), generator=g, dtype=torch.uint8)
        values[(values & 0x7F) == 0x7F] = 3
        scales = torch.rand(-(-n // 128), groups, generator=g) + 0.1
        spread = scales.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        values = values.view(torch.float8_e4m3fn)
        exact = values.double() * spread
    elif kind == "int8":
        values = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
        scales = torch.rand(n, groups, generator=g) + 0.1
        exact = values.double() * scales.double().repeat_interleave(group, 1)[:, :k]
    else:
        codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
        blocks = torch.nn.functional.pad(codes, (0, -k % 32)).view(n, -1, 2, 16)
        values = blocks[:, :, 0] | (blocks[:, :, 1] << 4)
        scales = (torch.rand(n, groups, generator=g) + 0.1).half()
        spread = scales.double().repeat_interleave(group, 1)[:, :k]
        exact = (codes.double() - 8) * spread
        if mins:
            lows = torch.randn(n, groups, generator=g).half()
            exact = codes.double() * spread + lows.double().repeat_interleave(group, 1)[:, :k]
    return (values, scales, lows, n, k, group), exact


weights = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(STORED),
        "n": st.one_of(st.integers(1, 20), st.integers(120, 260)),
        "k": st.one_of(st.integers(1, 70), st.integers(500, 1300)),
        "mins": st.booleans(),
        "seed": st.integers(0, 1000),
        "block": st.sampled_from([1, 2, 4, 20, 32]),
        "any": st.sampled_from([1, 3, 32, 100, 600, None]),
    }
)


def draw(case):
    kind, k = case["kind"], case["k"]
    group = (case["any"] or k) if kind == "int8" else case["block"] * 32
    return KIND[kind], *stored(kind, case["n"], k, group, case["mins"], case["seed"])


@SOME
@given(weights, st.integers(1, 40))
def test_linear_and_dequantise_are_exact(case, m):
    kind, weight, exact = draw(case)
    x = torch.randn(m, weight[4], generator=torch.Generator().manual_seed(1))
    y = linear(kind, x, *weight)
    # int4 codes are multiplied before their offset is taken away: up to 2 x 15 / 8 more rounding
    bound = (x.double().abs() @ exact.abs().T + 15 * x.abs().sum(1, keepdim=True)) * EPS * 8
    assert torch.all((y.double() - x.double() @ exact.T).abs() <= bound)

    w = dequantise(kind, *weight)
    want = exact.float()
    if weight[2] is None:
        assert torch.equal(w, want)
    else:  # one rounding of q * scale + min; float64 holds it exactly
        assert torch.equal(w, want)
    n0, n1 = weight[3] // 3, weight[3] // 2 + 1
    assert torch.equal(dequantise(kind, *weight, rows=(n0, n1)), want[n0:n1])


@SOME
@given(weights, st.integers(2, 40))
def test_linear_keeps_the_bits_of_a_row(case, m):
    kind, weight, _ = draw(case)
    x = torch.randn(m, weight[4], generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(2)
    together = linear(kind, x, *weight)
    for some in (1, 2, 3, 5):
        assert torch.equal(linear(kind, x[:some].clone(), *weight), together[:some])
    for row in range(m):
        assert torch.equal(linear(kind, x[row], *weight), together[row])
    torch.set_num_threads(1)
    assert torch.equal(linear(kind, x, *weight), together)
    x[1:] = float("nan")
    assert torch.equal(linear(kind, x, *weight)[0], together[0])


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8_block", "int8"])
def test_every_code_is_decoded_exactly(kind):
    if kind in FLOATS:
        values = torch.arange(-32768, 32768).to(torch.int16).view(FLOATS[kind]).view(256, 256)
        got = dequantise(KIND[kind], values, None, None, 256, 256, 256)
        assert torch.equal(got.nan_to_num(7), values.float().nan_to_num(7))
    elif kind == "fp8_block":
        values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
        got = dequantise(KIND[kind], values, torch.tensor([[0.3, 0.7]]), None, 1, 256, 128)
        want = values.float() * torch.tensor([0.3, 0.7]).repeat_interleave(128)
        finite = ~want.isnan()
        assert finite.sum() == 254 and torch.equal(got[finite], want[finite])
    else:
        values = torch.arange(-128, 128).to(torch.int8).view(1, 256)
        got = dequantise(KIND[kind], values, torch.tensor([[0.3]]), None, 1, 256, 256)
        assert torch.equal(got, values.float() * 0.3)


def paged(rows, context, slots_per_block, shape, dtype, generator):
    """A cache with scattered blocks, its table, and the slots of each row's tokens in order."""
    blocks = max(1, -(-max(context) // slots_per_block))
    order = torch.randperm(rows * blocks + 3, generator=generator)
    table = order[: rows * blocks].view(rows, blocks).to(torch.int32)
    caches = [torch.randn((len(order) * slots_per_block, *s), generator=generator).to(dtype) for s in shape]
    slots = [
        torch.tensor(
            [int(table[r, t // slots_per_block]) * slots_per_block + t % slots_per_block for t in range(c)],
            dtype=torch.long,
        )
        for r, c in enumerate(context)
    ]
    return caches, table, torch.tensor(context, dtype=torch.int32), slots


contexts = st.lists(
    st.one_of(st.integers(0, 40), st.integers(500, 530), st.integers(1000, 1200)), min_size=1, max_size=4
)


def close(got, want):
    return torch.allclose(got.double(), want, rtol=1e-5, atol=3e-6)


@SOME
@given(
    contexts,
    st.sampled_from([1, 2, 3, 5, 8, 11]),
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from([64, 128])),
    st.sampled_from([1, 16, 7]),
    st.sampled_from(list(FLOATS.values())),
    st.integers(0, 1000),
)
def test_attend_rows(context, group, kv_heads, d, block, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    rows, scale = len(context), d**-0.5
    (k, v), table, lengths, slots = paged(rows, context, block, [(kv_heads, d)] * 2, dtype, g)
    q = torch.randn(rows, kv_heads * group, d, generator=g)
    torch.set_num_threads(2)
    got = native.attend_rows(q, k, v, table, lengths, block, scale)
    for r in range(rows):
        keys, values = (c[slots[r]].double().repeat_interleave(group, 1) for c in (k, v))
        p = (torch.einsum("hd,thd->ht", q[r].double(), keys) * scale).softmax(-1)
        assert close(got[r], torch.einsum("ht,thd->hd", p, values))
        one = slice(r, r + 1)
        alone = native.attend_rows(q[one], k, v, table[one], lengths[one], block, scale)
        assert torch.equal(alone[0], got[r])
    torch.set_num_threads(1)
    assert torch.equal(native.attend_rows(q, k, v, table, lengths, block, scale), got)


@SOME
@given(
    contexts,
    st.integers(1, 20),
    st.sampled_from([(5, 2), (16, 8), (40, 7), (512, 64)]),
    st.sampled_from([1, 16]),
    st.sampled_from(list(FLOATS.values())),
    st.integers(0, 1000),
)
def test_mla_rows(context, heads, widths, block, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    latent, width = widths[0], sum(widths)
    rows, scale = len(context), width**-0.5
    (cache,), table, lengths, slots = paged(rows, context, block, [(width,)], dtype, g)
    q = torch.randn(rows, heads, width, generator=g)
    torch.set_num_threads(2)
    got = native.mla_rows(q, cache, table, lengths, block, latent, scale)
    for r in range(rows):
        seen = cache[slots[r]].double()
        p = (q[r].double() @ seen.T * scale).softmax(-1)
        assert close(got[r], p @ seen[:, :latent])
        one = slice(r, r + 1)
        alone = native.mla_rows(q[one], cache, table[one], lengths[one], block, latent, scale)
        assert torch.equal(alone[0], got[r])
    torch.set_num_threads(1)
    assert torch.equal(native.mla_rows(q, cache, table, lengths, block, latent, scale), got)


@pytest.mark.parametrize("dtype", list(FLOATS.values()))
@pytest.mark.parametrize("group", range(1, 10))
def test_attention_where_spans_and_blocks_begin(group, dtype):
    """A row of nothing, of one token, of whole blocks and one more; of one span in company of one of many."""
    g = torch.Generator().manual_seed(group)
    context, d, kv_heads = [0, 1, 7, 8, 9, 63, 64, 65, 128, 129, 64 * (1024 // (2 * group)) + 1], 24, 2
    (k, v), table, lengths, slots = paged(len(context), context, 16, [(kv_heads, d)] * 2, dtype, g)
    q = torch.randn(len(context), kv_heads * group, d, generator=g)
    torch.set_num_threads(2)
    got = native.attend_rows(q, k, v, table, lengths, 16, 0.3)
    for r in range(len(context)):
        keys, values = (c[slots[r]].double().repeat_interleave(group, 1) for c in (k, v))
        p = (torch.einsum("hd,thd->ht", q[r].double(), keys) * 0.3).softmax(-1)
        assert close(got[r], torch.einsum("ht,thd->hd", p, values)), context[r]
        one = slice(r, r + 1)
        assert torch.equal(native.attend_rows(q[one], k, v, table[one], lengths[one], 16, 0.3)[0], got[r])
    torch.set_num_threads(1)
    assert torch.equal(native.attend_rows(q, k, v, table, lengths, 16, 0.3), got)


@SOME
@given(st.integers(1, 9), st.one_of(st.integers(1, 50), st.integers(4000, 8000)), st.booleans())
def test_norm_rows(rows, d, add):
    g = torch.Generator().manual_seed(d)
    x, w, r = (torch.randn(s, generator=g) for s in ((rows, d), (d,), (rows, d)))
    total = x + r if add else x.clone()
    alone = [native.norm_rows(x[i].clone(), w, 1e-6, r[i] if add else None) for i in range(rows)]
    y = native.norm_rows(x, w, 1e-6, r if add else None)
    assert torch.equal(x, total)
    wide = total.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
    assert torch.allclose(y.double(), want, rtol=1e-6, atol=1e-9)
    assert torch.equal(torch.stack(alone), y)


def test_silu_mul():
    g = torch.cat([torch.linspace(-87, 87, 70001), torch.randn(40002), torch.tensor([0.0, -200.0, 200.0])])
    u = torch.randn(len(g), generator=torch.Generator().manual_seed(3))
    y = native.silu_mul(g, u)
    want = g.double() * g.double().sigmoid() * u.double()
    assert torch.all((y.double() - want).abs() <= want.abs() * 5e-7 + 1e-37)
    for i in (0, 5, 70001, len(g) - 1):  # an element's bits depend on no lane or tail
        assert torch.equal(native.silu_mul(g[i : i + 1].clone(), u[i : i + 1].clone())[0], y[i])
    assert native.silu_mul(torch.tensor([float("nan")]), torch.ones(1)).isnan().all()


@SOME
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 33), st.booleans(), st.integers(0, 9))
def test_rope_rows(rows, heads, c, interleaved, before):
    g = torch.Generator().manual_seed(c)
    whole = torch.randn(rows, heads, before + 2 * c, generator=g)
    angle = torch.randn(rows, c, generator=g)
    x = whole[..., before:].double()
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :c], x[..., c:])
    cos, sin = (f(angle)[:, None].double() for f in (torch.cos, torch.sin))
    turned = a * cos - b * sin, b * cos + a * sin
    want = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    head = whole[..., :before].clone()
    got = native.rope_rows(whole[..., before:], angle.cos(), angle.sin(), interleaved)
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(whole[..., :before], head)


def stack(kind, experts, n, k, group, mins, seed):
    """Random weights as `matrix`'s arguments, and in float64."""
    parts = [stored(kind, n, k, group, mins, seed * 100 + e) for e in range(experts)]
    tensors = [None if parts[0][0][i] is None else torch.stack([p[0][i] for p in parts]) for i in range(3)]
    return (KIND[kind], *tensors, n, k, group), torch.stack([p[1] for p in parts])


def one_expert(weight, e):
    """The arguments of an expert of `stack`'s."""
    return weight[0], *(t if t is None else t[e] for t in weight[1:4]), *weight[4:]


def routed(rows, top, experts, d, seed):
    """Rows [rows, d], their choices of `experts` and one that is none, and the shares of these."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=g) / 16
    chosen = torch.stack([torch.randperm(experts + 1, generator=g)[:top] for _ in range(rows)]).to(torch.int32)
    return x, chosen, torch.rand(rows, top, generator=g)


@SOME
@given(
    st.sampled_from(STORED),
    st.booleans(),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(0, 50),
)
def test_experts_rows(kind, mins, rows, top, d, inner, seed):
    count = 6
    shapes = (inner, d), (inner, d), (d, inner)
    made = [stack(kind, count, *shape, 32, mins, at) for at, shape in enumerate(shapes, 1)]
    (gate_w, up_w, down_w), given = (exact for _, exact in made), [arguments for arguments, _ in made]
    gate, up, down = (matrix(*arguments, experts=count) for arguments in given)
    x, chosen, weights = routed(rows, top, count, d, seed)
    torch.set_num_threads(2)
    got = native.experts_rows(x, gate, up, down, chosen, weights)
    for r in range(rows):
        # The same steps with linear() and silu_mul() give the same bits.
        want, exact, size = torch.zeros(d), torch.zeros(d).double(), torch.zeros(d).double()
        for e, weight in zip(chosen[r].tolist(), weights[r], strict=True):
            if e == count:
                continue
            one = [matrix(*one_expert(arguments, e)) for arguments in given]
            a, b = (native.linear(x[r], w) for w in one[:2])
            y = native.linear(native.silu_mul(a, b), one[2])
            want = want.double().add(weight.double() * y.double()).float()
            wide = x[r].double()
            h = torch.nn.functional.silu(gate_w[e] @ wide) * (up_w[e] @ wide)
            exact += weight * (down_w[e] @ h)
            size += weight * (down_w[e].abs() @ h.abs()) + 1
        # two roundings in `want` against one fused: equal but for the last bit
        assert torch.allclose(got[r], want, rtol=3e-7, atol=float(size.max()) * 2e-7)
        assert torch.all((got[r] - exact).abs() <= size * 1e-4)
        one = slice(r, r + 1)
        assert torch.equal(native.experts_rows(x[one], gate, up, down, chosen[one], weights[one])[0], got[r])
    torch.set_num_threads(1)
    assert torch.equal(native.experts_rows(x, gate, up, down, chosen, weights), got)


def test_wrong_arguments_are_refused():
    weight, _ = stored("int8", 8, 64, 32)
    x = torch.randn(2, 64)
    for bad in (x.double(), x.T, torch.randn(2, 63)):
        with pytest.raises(ValueError):
            linear(KIND["int8"], bad, *weight)
    with pytest.raises(ValueError):
        linear(KIND["int8"], x, weight[0], weight[1][:, :1].contiguous(), *weight[2:])
    with pytest.raises(ValueError):
        linear(KIND["int4"], x, *weight)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_one_openmp_runtime_is_loaded():
    linear(KIND["fp32"], torch.randn(1, 512), torch.randn(512, 512), None, None, 512, 512, 512)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) == 1


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_fp8_by_channel_runs_on_the_kernel_for_blocks(rows):
    scheme = schemes.get("fp8_channel")
    weight = schemes.Stored(scheme, (130, 200), scheme.compress(torch.randn(130, 200)))
    x = torch.randn(rows, 200)
    assert layer.linear.resolve(weight, x.dtype).name == "native by row"
    exact = weight.parts["values"].double() * weight.parts["scales"].double()
    y, bound = layer.apply(x, weight), (x.double().abs() @ exact.abs().T) * EPS * 8
    assert torch.all((y.double() - x.double() @ exact.T).abs() <= bound)
    if rows < layer.LARGE:
        assert torch.equal(layer.apply(x[-1:], weight), y[-1:])
