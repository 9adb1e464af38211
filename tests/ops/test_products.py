"""Products of activations rounded to BF16: against float64, a row's bits in any company, and greedy tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_native import EPS, SOME, STORED, _restore_threads, draw, linear, one_expert, routed, stack, weights  # noqa: F401

from runs import greedy
from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.events import subscribed
from undistilled.load.build import build
from undistilled.ops import linear as ops
from undistilled.ops import registry
from undistilled.ops.cpu import native
from undistilled.ops.cpu.matrix import KIND, matrix
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve

needs_products = pytest.mark.skipif(not native.rounds(), reason="needs AVX512_BF16, here and in the build")
ROUNDED = [kind for kind in STORED if kind not in ("fp32", "fp16")]
cases = weights.filter(lambda case: case["kind"] in ROUNDED)


def rounded(x):
    return x.bfloat16().double()


@needs_products
@SOME
@given(cases, st.sampled_from([1, 2, 3, 7, 31, 32, 33, 64, 200]))
def test_products_are_exact_for_rounded_activations(case, m):
    kind, weight, exact = draw(case)
    x = torch.randn(m, weight[4], generator=torch.Generator().manual_seed(1))
    y = linear(kind, x, *weight, rounded=True)
    bound = (x.double().abs() @ exact.abs().T + 15 * x.abs().sum(1, keepdim=True)) * EPS * 16
    assert torch.all((y.double() - rounded(x) @ exact.T).abs() <= bound)


@needs_products
@SOME
@given(cases, st.sampled_from([2, 31, 70, 230]))
def test_a_row_has_the_same_bits_alone_in_company_and_on_any_threads(case, m):
    kind, weight, _ = draw(case)
    x = torch.randn(m, weight[4], generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(2)
    together = linear(kind, x, *weight, rounded=True)
    for some in (1, 2, 3, 5, 33):
        assert torch.equal(linear(kind, x[:some].clone(), *weight, rounded=True), together[:some])
    assert torch.equal(linear(kind, x[m - 1], *weight, rounded=True), together[m - 1])
    torch.set_num_threads(1)
    assert torch.equal(linear(kind, x, *weight, rounded=True), together)
    x[1:] = float("nan")
    assert torch.equal(linear(kind, x, *weight, rounded=True)[0], together[0])


@needs_products
def test_activations_round_to_nearest_even():
    x = torch.cat([torch.randn(4000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, 3e38, 1e-37])])[:, None]
    weight = torch.ones(1, 1, dtype=torch.bfloat16), None, None, 1, 1, 1
    assert torch.equal(linear(KIND["bf16"], x, *weight, rounded=True), x.bfloat16().float())


@needs_products
@SOME
@given(
    st.sampled_from(ROUNDED),
    st.booleans(),
    st.sampled_from([1, 3, 40]),
    st.integers(1, 4),
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(0, 50),
)
def test_experts(kind, mins, rows, top, d, inner, seed):
    count = 6
    shapes = (inner, d), (inner, d), (d, inner)
    given = [stack(kind, count, *shape, 32, mins, at)[0] for at, shape in enumerate(shapes)]
    gate, up, down = (matrix(*arguments, rounded=True, experts=count) for arguments in given)
    x, chosen, shares = routed(rows, top, count, d, seed)
    torch.set_num_threads(2)
    got = native.experts_rows(x, gate, up, down, chosen, shares)
    for r in range(rows):
        want, size = torch.zeros(d), 1e-6
        for e, share in zip(chosen[r].tolist(), shares[r], strict=True):
            if e < count:
                one = [matrix(*one_expert(arguments, e), rounded=True) for arguments in given]
                a, b = (native.linear(x[r], w) for w in one[:2])
                y = native.linear(native.silu_mul(a, b), one[2])
                want, size = want.double().add(share.double() * y.double()).float(), size + float(y.abs().max())
        assert torch.allclose(got[r], want, rtol=3e-7, atol=size * 2e-7)
    one = slice(rows - 1, rows)
    assert torch.equal(native.experts_rows(x[one], gate, up, down, chosen[one], shares[one]), got[one])
    torch.set_num_threads(1)
    assert torch.equal(native.experts_rows(x, gate, up, down, chosen, shares), got)


@needs_products
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_block", "fp8_channel"])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_kernel_computes_what_the_reference_says(scheme, rows):
    found = schemes.get(scheme)
    parts = found.compress(torch.randn(200, 320))
    weight = schemes.Stored(found, (200, 320), parts, "bfloat16")
    x = torch.randn(rows, 320)
    assert ops.linear.resolve(weight, x.dtype).name in ("native bf16", "native by row")
    want = ops.linear.reference.run(x, weight)
    assert (ops.apply(x, weight) - want).norm() <= 1e-6 * want.norm()
    assert weight.narrow("out", 0, 128).products == "bfloat16"


def test_without_the_kernel_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "rounds", lambda: False)
    monkeypatch.setattr(registry, "_said", set())
    weight = schemes.Stored(schemes.get("bf16"), (8, 64), {"values": torch.randn(8, 64).bfloat16()}, "bfloat16")
    said, x = [], torch.randn(3, 64)
    with subscribed(said.append):
        y = ops.apply(x, weight)
    assert torch.allclose(y, x.bfloat16().float() @ weight.parts["values"].float().T, atol=1e-5)
    assert [e.name for e in said] == ["op.fallback"] and "bfloat16" in said[0].fields["subject"]


def test_floats_that_bf16_does_not_hold_are_refused():
    w = torch.randn(4, 8)
    with pytest.raises(ValueError, match="rounded"):
        linear(KIND["fp32"], torch.randn(2, 8), w, None, None, 4, 8, 8, rounded=True)


@needs_products
@pytest.mark.parametrize("scheme", ["bf16", "int8,expert=nl3-g64,expert.down=int4"])
def test_r1_nano_writes_the_same_tokens_alone_in_a_batch_and_preempted(scheme):
    model = find("r1-nano")
    ask = Ask(scheme, 256, 4, False, "cpu", dtype="bfloat16")
    plan = solve(model.name, model.config, model.spec, load_machine("this"), ask)
    assert plan.compute_dtype == "bfloat16"
    decoder = build(plan, model.spec, model.source())
    rounds = {name: m.stored.products for name, m in decoder.named_modules() if hasattr(m, "stored")}
    assert rounds["layers.1.mlp.gate"] is None and rounds["layers.1.mlp.banks.0.gate"] == "bfloat16"
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
        of = None if name == "fp16" else products
        made.append(schemes.Stored(scheme, shape, scheme.compress(torch.randn(shape) / 8), of))
    return made


@pytest.mark.parametrize("products", [None, pytest.param("bfloat16", marks=needs_products)])
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
    assert (y.double() - expected).norm() < (1e-2 if products else 1e-5) * expected.norm()


@needs_products
def test_no_rows_are_no_rows():
    w = schemes.get("int8").compress(torch.randn(32, 64))
    y = linear(KIND["int8"], torch.empty(0, 64), w["values"], w["scales"], None, 32, 64, 64, rounded=True)
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
