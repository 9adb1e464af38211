"""Products of rounded activations: against float64, a row's bits in any company, greedy tokens."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_native import EPS, SOME, STORED, _restore_threads, draw, linear, one_expert, routed, stack, weights  # noqa: F401

from runs import greedy
from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.events import subscribed
from undistilled.load.build import build
from undistilled.ops import integers, registry
from undistilled.ops import linear as ops
from undistilled.ops.cpu import native
from undistilled.ops.cpu.matrix import KIND, matrix
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve

needs_products = pytest.mark.skipif(not native.rounds(), reason="needs AVX512_BF16, here and in the build")
needs_kernels = pytest.mark.skipif(native.library() is None, reason=native.why_missing())
INTEGERS = list(integers.LARGEST)
KINDS = {p: ["int8", "int4"] for p in INTEGERS} | {"bfloat16": [k for k in STORED if k not in ("fp32", "fp16")]}
PRODUCTS = ["bfloat16", *INTEGERS] if native.rounds() else INTEGERS


def fits(products, case):
    groups = products == "bfloat16" or case["kind"] != "int8" or case["any"] in (32, None)
    return case["kind"] in KINDS[products] and groups


def cases_of(products):
    return weights.filter(partial(fits, products)).map(lambda case: case | {"products": products})


cases = st.one_of(*map(cases_of, PRODUCTS))


def drawn(case):
    """A weight as the arguments of `product` behind x, and in float64."""
    kind, weight, exact = draw(case)
    whole = case["kind"] == "int8" and case["any"] is None
    return (case["products"], kind, *weight[:-1], 0 if whole else weight[-1]), exact


def product(x, products, kind, *weight):
    return linear(kind, x, *weight, products=products)


def rounded(x, products):
    return (integers.rounded(x, products) if products in INTEGERS else x.bfloat16()).double()


SHORT = {"kind": "int8", "n": 3, "k": 17, "mins": False, "seed": 0, "block": 1, "any": None}  # a row of half a block


@needs_kernels
@SOME
@given(cases, st.sampled_from([1, 2, 3, 7, 31, 32, 33, 64, 200]))
@example(SHORT | {"products": "int8"}, 1)
@example(SHORT | {"products": "int16"}, 2)
def test_products_are_exact_for_rounded_activations(case, m):
    weight, exact = drawn(case)
    x = torch.randn(m, case["k"], generator=torch.Generator().manual_seed(1))
    bound = (x.double().abs() @ exact.abs().T + 15 * x.abs().sum(1, keepdim=True)) * EPS * 16
    expected = rounded(x, case["products"]) @ exact.T
    assert torch.all((product(x, *weight).double() - expected).abs() <= bound)


@needs_kernels
@SOME
@given(cases, st.sampled_from([2, 31, 70, 230]))
def test_a_row_has_the_same_bits_alone_in_company_and_on_any_threads(case, m):
    weight, _ = drawn(case)
    x = torch.randn(m, case["k"], generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(2)
    together = product(x, *weight)
    across = case["products"] == "int16" and native.crosses() and m >= ops.LARGE  # a kernel of their own
    for some in (32, 33, 69) if across else (1, 2, 3, 5, 33):
        assert torch.equal(product(x[:some].clone(), *weight), together[:some])
    if not across:
        assert torch.equal(product(x[m - 1], *weight), together[m - 1])
    torch.set_num_threads(1)
    assert torch.equal(product(x, *weight), together)
    x[1:] = float("nan")
    assert torch.equal(product(x, *weight)[0], together[0])


@needs_products
def test_activations_round_to_nearest_even():
    x = torch.cat([torch.randn(4000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, 3e38, 1e-37])])[:, None]
    weight = torch.ones(1, 1, dtype=torch.bfloat16), None, None, 1, 1, 1
    assert torch.equal(linear(KIND["bf16"], x, *weight, products="bfloat16"), x.bfloat16().float())


@needs_kernels
@pytest.mark.parametrize("products", INTEGERS)
@pytest.mark.parametrize("group", [32, 96, 128, 0])
def test_activations_round_to_integers_by_groups(products, group):
    """Against codes in float64, and by hand where they are ties, through a kernel whose weights are one at a time 1."""
    share, k, limit = integers.GROUP[products], 300, integers.LARGEST[products]
    x = torch.randn(9, k) * torch.logspace(-30, 30, 9)[:, None]
    x[1, :share], x[2], x[3, 5], x[4], x[5] = 0, 0, float("nan"), 1e-37, 0
    x[5, :5] = torch.tensor([limit, 0.5, 1.5, -2.5, 63.49])
    assert torch.equal(integers.rounded(x, products)[5, :5], torch.tensor([limit, 0, 2, -2, 63]))
    groups = torch.nn.functional.pad(x.double(), (0, -k % share)).unflatten(-1, (-1, share))
    most = groups.abs().amax(-1, keepdim=True)
    exact = (groups / most * limit).round() * most / limit
    exact = exact.where(most > integers.LEAST, torch.zeros(())).flatten(-2)[:, :k].float()
    ones, scales = torch.eye(k, dtype=torch.int8), torch.ones(k, -(-k // (group or k)))
    got = product(x, products, KIND["int8"], ones, scales, None, k, k, group)
    finite = torch.arange(9) != 3
    assert torch.allclose(got[finite], exact[finite], rtol=1e-6, atol=0)
    assert torch.equal(got[finite], integers.rounded(x, products)[finite])
    assert got[3, 5].isnan()


@needs_kernels
@pytest.mark.parametrize("products", INTEGERS)
def test_codes_at_their_limits_do_not_overflow(products):
    """-128 and 127 beside the largest codes of both signs, in every place of a group."""
    k, largest = 256, integers.LARGEST[products]
    x = torch.where(torch.rand(40, k) < 0.5, 1.0, -1.0) * largest
    values = torch.where(torch.rand(24, k) < 0.5, 127, -128).to(torch.int8)
    values[:2] = torch.tensor([[-128], [127]])
    x[:2] = torch.tensor([[largest], [-largest]])
    got = product(x, products, KIND["int8"], values, torch.ones(24, 2), None, 24, k, 128)
    assert torch.allclose(got.double(), x.double() @ values.double().T, rtol=1e-6, atol=k * largest * 1.28e-4)
    nibbles = torch.full((24, k // 32, 16), 255, dtype=torch.uint8)
    got = product(x, products, KIND["int4"], nibbles, torch.ones(24, 2).half(), None, 24, k, 128)
    assert torch.allclose(got, x @ torch.full((k, 24), 7.0), rtol=1e-6, atol=k * largest * 1.28e-4)


@needs_kernels
@pytest.mark.parametrize("products", PRODUCTS)
@SOME
@given(
    st.sampled_from(KINDS["bfloat16"]),
    st.booleans(),
    st.sampled_from([1, 3, 40]),
    st.integers(1, 4),
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(0, 50),
)
def test_experts(products, kind, mins, rows, top, d, inner, seed):
    count = 6
    kind = kind if kind in KINDS[products] else "int4"
    shapes = (inner, d), (inner, d), (d, inner)
    given = [stack(kind, count, *shape, 32, mins, at)[0] for at, shape in enumerate(shapes)]
    gate, up, down = (matrix(*arguments, products=products, experts=count) for arguments in given)
    x, chosen, shares = routed(rows, top, count, d, seed)
    torch.set_num_threads(2)
    got = native.experts_rows(x, gate, up, down, chosen, shares)
    for r in range(rows):
        want, size = torch.zeros(d), 1e-6
        for e, share in zip(chosen[r].tolist(), shares[r], strict=True):
            if e < count:
                one = [matrix(*one_expert(arguments, e), products=products) for arguments in given]
                a, b = (native.linear(x[r], w) for w in one[:2])
                y = native.linear(native.silu_mul(a, b), one[2])
                want, size = want.double().add(share.double() * y.double()).float(), size + float(y.abs().max())
        assert torch.allclose(got[r], want, rtol=3e-7, atol=size * 2e-7)
    one = slice(rows - 1, rows)
    assert torch.equal(native.experts_rows(x[one], gate, up, down, chosen[one], shares[one]), got[one])
    torch.set_num_threads(1)
    assert torch.equal(native.experts_rows(x, gate, up, down, chosen, shares), got)


@needs_kernels
@pytest.mark.parametrize(
    "products, scheme",
    [
        *(pytest.param("bfloat16", s, marks=needs_products) for s in ("bf16", "int8", "fp8_block", "fp8_channel")),
        *((p, s) for p in INTEGERS for s in ("int8", "int8-g32", "int8-g128", "int4", "int4-sym", "int4-g32")),
    ],
)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("k", [70, 320, 1100])
def test_the_kernel_computes_what_the_reference_says(products, scheme, rows, k):
    found = schemes.get(scheme)
    parts = found.compress(torch.randn(200, k))
    weight = schemes.Stored(found, (200, k), parts, products)
    x = torch.randn(rows, k)
    assert ops.linear.resolve(weight, x.dtype).name in ("native bf16", "native by row", "native int8", "native int16")
    want = ops.linear.reference.run(x, weight)
    dense = products == "int16" and rows >= ops.LARGE and not ops.crosses(weight)  # which rounds no activations
    assert (ops.apply(x, weight) - want).norm() <= (5e-5 if dense else 1e-6) * want.norm()
    assert weight.narrow("out", 0, 128).products == products


@needs_kernels
@pytest.mark.parametrize("scheme", ["int8", "int8-g32", "int4", "nl3-g64", "tiles16x32-3x4-6x6"])
@settings(max_examples=10)
@given(n=st.integers(1, 50), first=st.integers(0, 9), rows=st.integers(ops.LARGE, 60))
def test_many_rows_of_int16_are_the_same_in_any_company(scheme, n, first, rows):
    """From 32 rows on; also with another number of threads, and NaN in one row stays there."""
    found, k = schemes.get(scheme), 320
    weight = schemes.Stored(found, (n, k), found.compress(torch.randn(n, k)), "int16")
    x = torch.randn(first + rows, k) * 10.0 ** torch.randint(-6, 6, (first + rows, 1))
    whole = ops.apply(x, weight)
    torch.set_num_threads(2)
    assert torch.equal(ops.apply(x[first:], weight), whole[first:])
    x[-1, 7] = torch.nan
    assert torch.equal(ops.apply(x, weight)[:-1], whole[:-1])


def test_without_the_kernel_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "rounds", lambda: False)
    monkeypatch.setattr(registry, "_said", set())
    weight = schemes.Stored(schemes.get("bf16"), (8, 64), {"values": torch.randn(8, 64).bfloat16()}, "bfloat16")
    said, x = [], torch.randn(3, 64)
    with subscribed(said.append):
        y = ops.apply(x, weight)
    assert torch.allclose(y, x.bfloat16().float() @ weight.parts["values"].float().T, atol=1e-5)
    assert [e.name for e in said] == ["op.fallback"] and "bfloat16" in said[0].fields["subject"]


def test_products_that_a_weight_does_not_have_are_refused():
    w = torch.randn(4, 8)
    with pytest.raises(ValueError, match="products"):
        linear(KIND["fp32"], torch.randn(2, 8), w, None, None, 4, 8, 8, products="bfloat16")
    with pytest.raises(ValueError, match="products"):
        linear(KIND["bf16"], torch.randn(2, 8), w.bfloat16(), None, None, 4, 8, 8, products="int8")
    with pytest.raises(ValueError, match="group"):
        linear(KIND["int8"], torch.randn(2, 8), w.to(torch.int8), torch.ones(4, 2), None, 4, 8, 4, products="int16")


@needs_kernels
@pytest.mark.parametrize(
    "products, scheme",
    [
        pytest.param("bfloat16", "bf16", marks=needs_products),
        pytest.param("bfloat16", "int8,expert=nl3-g64,expert.down=int4", marks=needs_products),
        ("int8", "int8,expert=int4"),
        ("int16", "int8,expert=nl3-g64,expert.down=int4"),
    ],
)
def test_r1_nano_writes_the_same_tokens_alone_in_a_batch_and_preempted(products, scheme):
    model = find("r1-nano")
    ask = Ask(scheme, 256, 4, False, "cpu", dtype=products)
    plan = solve(model.name, model.config, model.spec, load_machine("this"), ask)
    assert plan.compute_dtype == products
    decoder = build(plan, model.spec, model.source())
    rounds = {name: m.stored.products for name, m in decoder.named_modules() if hasattr(m, "stored")}
    assert rounds["layers.1.mlp.gate"] is None and rounds["layers.1.mlp.banks.0.gate"] == products
    texts = ("Solve for x: 7*x + 12 = 89", "What is 3 + 4?" * 9, "Sort: pear, fig, apple. " * 6, "gcd(12, 18)")
    prompts = [model.tokenizer().encode(text, control=False) for text in texts]
    assert max(map(len, prompts)) > ops.LARGE
    for chunk in (16, 48, None):  # alone or not, a prompt is cut at the same places
        together = greedy(decoder, plan, prompts, 24, chunk=chunk)
        assert [greedy(decoder, plan, [p], 24, chunk=chunk)[0] for p in prompts] == together
    needed = sum(-(-(len(p) + 24) // plan.kv.block_size) for p in prompts)
    assert greedy(decoder, plan, prompts, 24, blocks=needed * 2 // 3) == together


def mixed(gate, down, products):
    """Experts [4, 64, 96] of one scheme for gate and up and another for down, with the values of both in float64."""
    made = []
    for name, shape in ((gate, (4, 64, 96)), (gate, (4, 64, 96)), (down, (4, 96, 64))):
        scheme = schemes.get(name)
        of = None if name == "fp16" or (products == "int8" and name != "int8") else products
        made.append(schemes.Stored(scheme, shape, scheme.compress(torch.randn(shape) / 8), of))
    return made


@pytest.mark.parametrize("products", [None, pytest.param("bfloat16", marks=needs_products), "int8"])
@pytest.mark.parametrize("gate, down", [("int8", "nl3-g32"), ("nl3-g32", "int8"), ("fp16", "int8"), ("int8", "fp16")])
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_whose_projections_have_different_schemes(gate, down, products, tokens):
    from undistilled.ops.experts import experts

    held = mixed(gate, down, products)
    x, ids = torch.randn(tokens, 96), torch.randint(0, 4, (tokens, 2))
    shares = torch.rand(tokens, 2)
    y = experts.resolve(held[0], x.dtype).run(x, ids, shares, *held)
    exact = [stored.dense(torch.float32).double() for stored in held]
    expected = torch.zeros(tokens, 96, dtype=torch.float64)
    for t in range(tokens):
        for pick in range(2):
            g, u, d = (w[ids[t, pick]] for w in exact)
            h = torch.nn.functional.silu(x[t].double() @ g.T) * (x[t].double() @ u.T)
            expected[t] += shares[t, pick] * (h @ d.T)
    assert (y.double() - expected).norm() < (2e-2 if products else 1e-5) * expected.norm()


@needs_products
def test_no_rows_are_no_rows():
    w = schemes.get("int8").compress(torch.randn(32, 64))
    y = linear(KIND["int8"], torch.empty(0, 64), w["values"], w["scales"], None, 32, 64, 64, products="bfloat16")
    assert y.shape == (0, 32)


def test_a_prompt_attends_by_blocks_as_float64_says():
    from undistilled.ops.attention import causal

    for fresh, seen, heads, groups, width in ((129, 129, 4, 2, 16), (300, 700, 4, 4, 16), (257, 260, 6, 2, 8)):
        q, k, v = torch.randn(fresh, heads, 16), torch.randn(seen, groups, 16), torch.randn(seen, groups, width)
        scores = torch.einsum("lhd,chd->hlc", q.double(), k.double().repeat_interleave(heads // groups, 1)) * 0.25
        hidden = torch.arange(seen)[None] > torch.arange(seen - fresh, seen)[:, None]
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = torch.einsum("hlc,chv->lhv", shares, v.double().repeat_interleave(heads // groups, 1))
        assert (causal(q, k, v, 0.25).double() - expected).norm() < 1e-5 * expected.norm()
