"""Weights whose outputs lie side by side: the layout against the scheme that it has by rows, and its kernels against
float64 of what is stored. P panels of 16 outputs, B blocks of 32 inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coded import make, offsets, rows_of
from test_native import _restore_threads, routed  # noqa: F401

from undistilled import scheme as schemes
from undistilled.ops import linear as ops
from undistilled.ops import table
from undistilled.ops.cpu import matrix, native
from undistilled.ops.experts import experts
from undistilled.scheme import Stored, parts_of
from undistilled.scheme.across import LANES, Across
from undistilled.scheme.packing import QUANTUM

pytestmark = pytest.mark.skipif(not native.crosses(), reason="no kernels for weights that lie across")

NAMES = [name for name, scheme in schemes.SCHEMES.items() if Across.suits(scheme, (LANES, QUANTUM))]
ROWS = (1, 2, 3, 4, 7, 31, 70)


def met(names):
    """(name, products): what each has, and INT8's where levels are one apart."""
    return [(name, usual(name)) for name in names] + [(name, "int8") for name in names if name.startswith("int4")]


def usual(name):
    return None if name == "fp8_block" else "int16"


def lying(rows):
    """A weight as the loader has it for its products: across where kernels can."""
    lies = matrix.laid(rows.scheme, rows.shape, rows.products)
    if lies is rows.scheme:
        return rows
    parts = {part: tensor.contiguous() for part, tensor in lies.arranged(rows.parts).items()}
    return Stored(lies, rows.shape, parts, rows.products)


def both(name, shape, products, seed=0):
    """(by rows, across, values in float64) of a random weight."""
    rows, exact = make(name, shape, products, seed)
    across = lying(rows)
    assert isinstance(across.scheme, Across) and across.scheme.name == name
    return rows, across, exact


def test_which_schemes_lie_across():
    families = {name.split("-")[0] for name in NAMES}
    assert families == {"fp8_block", "int8", "int4", "nl4", "mxfp4"}
    for shape in ((24, 64), (16, 48), (16,)):
        assert not Across.suits(schemes.get("int8"), shape)
    for name, other in (("int8", "int8"), ("nl4-g64", "int8"), ("int8", None), ("fp8_block", "bfloat16")):
        across = Across(schemes.get(name))
        assert matrix.laid(across.of, (16, 64), other) is across.of
        with pytest.raises(ValueError, match=f"products: {name} across has none of {other}"):
            matrix.of(Stored(across, (16, 64), across.compress(torch.ones(16, 64)), other))


@pytest.mark.parametrize("shape", [(16, 32), (48, 416), (3, 32, 160)])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_in_another_order(name, shape):
    rows, across, exact = both(name, shape, usual(name))
    assert {n: tuple(p.shape) for n, p in across.parts.items()} == {
        n: spec.shape for n, spec in parts_of(across.scheme, shape).items()
    }
    assert across.nbytes == rows.nbytes
    for part, tensor in across.scheme.by_rows(across.parts).items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), rows.parts[part].contiguous().view(torch.uint8))
    assert torch.equal(across.dense(torch.float32).double(), exact)
    half = across.narrow("out", 0, shape[-2] if name == "fp8_block" else 16)
    assert torch.equal(half.dense(torch.float32).double(), exact[..., : half.shape[-2], :])
    if len(shape) == 2:
        laid = matrix.lay(across.scheme, rows.parts)
        for part, tensor in laid.items():
            assert torch.equal(tensor.contiguous().view(torch.uint8), across.parts[part].view(torch.uint8))
        assert torch.equal(native.dequantise(matrix.of(across), (3, shape[0])).double(), exact[3:])


@pytest.mark.parametrize("name, products", met(NAMES))
@settings(max_examples=8)
@given(
    panels=st.integers(1, 4), blocks=st.one_of(st.integers(1, 9), st.integers(15, 36)), m=st.sampled_from(ROWS),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_products_are_what_float64_says_of_what_is_stored(name, products, panels, blocks, m, seed):
    n, k = LANES * panels, QUANTUM * blocks
    rows, across, exact = both(name, (n, k), products, seed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1))
    assert ops.linear.resolve(across, x.dtype).name == (f"native {products}" if products else "native")
    y = ops.apply(x, across).double()
    x = rows_of(x, products).double()
    added = 2 * offsets(rows) if name.startswith("int4") else 0
    assert torch.all((y - x @ exact.T).abs() <= x.abs() @ (exact.abs() + added).T * 2e-6)


SOME = ["fp8_block", "int8", "int8-g32", "int4", "int4-g32-sym", "nl4-g64", "mxfp4"]


@pytest.mark.parametrize("name, products", met(SOME))
def test_a_row_has_the_same_bits_in_any_company_on_any_threads_and_in_a_slice(name, products):
    _, across, _ = both(name, (176, 1568), products)
    x = torch.randn(70, 1568, generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(2)
    together = native.linear(x, matrix.of(across))
    for some in (1, 2, 3, 4, 7, 32, 69):
        assert torch.equal(native.linear(x[:some].clone(), matrix.of(across)), together[:some])
    torch.set_num_threads(1)
    assert torch.equal(native.linear(x, matrix.of(across)), together)
    upper = across.narrow("out", 128, 176)
    assert torch.equal(native.linear(x[:5].clone(), matrix.of(upper)), together[:5, 128:])
    x[1:] = float("nan")
    assert torch.equal(native.linear(x, matrix.of(across))[0], together[0])


@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-99, 2.0**59])
@pytest.mark.parametrize("name, products", met(["fp8_block", "int8", "int4", "nl4-g32"]))
def test_rows_without_a_scale_stay_by_themselves(name, products, size):
    _, across, exact = both(name, (32, 96), products)
    x = torch.randn(3, 96) * size
    x[1, 5] = float("inf")
    y = native.linear(x, matrix.of(across))
    assert not y[1].isfinite().any()
    seen = rows_of(x[::2], products).double()
    bound = seen.abs() @ (exact.abs() + 16 * exact.abs().amax()).T * 2e-6
    bound += 0 if products else 2.0**-90 * exact.abs().sum(1)  # FP8 sums subnormals before it scales them
    assert torch.all((y[::2].double() - seen @ exact.T).abs() <= bound)


@pytest.mark.parametrize("name", ["int4", "int4-g32-sym"])
def test_the_largest_sums_of_int8_fit_in_words(name):
    scheme, shape = schemes.get(name), (16, 256)
    parts = scheme.compress(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    parts["values"] = torch.full_like(parts["values"], 255)
    across = lying(Stored(scheme, shape, parts, "int8"))
    exact = across.dense(torch.float32).double()
    x = torch.ones(5, 256) * torch.tensor([3.0, -3.0, 1.0, -1.0, 2.0])[:, None]
    bound = x.double().abs() @ (exact.abs() + 16 * parts["scales"].double().abs().amax()).T * 2e-6
    y = native.linear(x, matrix.of(across)).double()
    assert torch.all((y - rows_of(x, "int8") @ exact.T).abs() <= bound)


PAIRS = [
    *(("fp8_block", "fp8_block", "int16"), ("fp8_block", "int4", "int16"), ("int4", "int4", "int16")),
    *(("int8", "int4-g32", "int16"), ("nl4-g64", "int8-g128", "int16"), ("int4", "nl3-g64", "int16")),
    *(("int4", "int4", "int8"), ("int8", "int4-g32", "int8"), ("int4-g32-sym", "nl4-g64", "int8")),
]


@pytest.mark.parametrize("gate, down, products", PAIRS)
def test_experts(gate, down, products):
    """Also where one projection lies across and another does not."""
    count, d, inner, top = 7, 96, 64, 2
    shapes = (gate, (count, inner, d)), (gate, (count, inner, d)), (down, (count, d, inner))
    rows = [make(name, shape, usual(name) and products, at)[0] for at, (name, shape) in enumerate(shapes)]
    held = [lying(one) for one in rows]
    found = experts.resolve(held[0], torch.float32)
    assert found.name == "native"
    for many in (1, 5, 40):
        x, chosen, shares = routed(many, top, count, d, many)
        chosen[chosen == 3] = 5
        got, want = found.run(x, chosen, shares, *held), experts.reference.run(x, chosen, shares, *rows)
        assert (got - want).norm() <= 2e-3 * want.norm() + 1e-6  # one step of h, rounded
        one = slice(many - 1, many)
        assert torch.equal(found.run(x[one], chosen[one], shares[one], *held), got[one])


@pytest.mark.parametrize("name", ["int8", "int4", "nl4-g64"])
def test_rows_of_a_table(name):
    """FP8 is no table: its blocks of 128 rows would be decompressed for each of its rows."""
    _, across, exact = both(name, (64, 96), usual(name))
    tokens = torch.tensor([0, 63, 17, 17, 16])
    for run in (table.embed.reference.run, table.embed.resolve(across, torch.float32).run):
        assert torch.equal(run(tokens, across, torch.float32).double(), exact[tokens])
