"""Products of many rows by tiles, as AMX has them: the bits of the kernels for few rows. What imitates them runs on
any processor, so that all but the instructions themselves is tried; where there is AMX, that too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_across import NAMES, both, lying, usual
from test_coded import make
from test_native import _restore_threads  # noqa: F401

from undistilled.ops.cpu import matrix, native
from undistilled.ops.cpu.loader import kernels
from undistilled.ops.experts import experts
from undistilled.plan.cost import DEPTH, in_tiles
from undistilled.scheme.across import LANES

pytestmark = pytest.mark.skipif(not native.crosses(), reason="no kernels for weights that lie across")

TILED = [name for name in NAMES if in_tiles(name)]


@pytest.fixture(autouse=True, params=["imitated", "AMX"])
def tiles(request):
    kernels.imitate_tiles(request.param == "imitated")
    if not native.tiles():
        pytest.skip("no AMX here")
    yield
    kernels.imitate_tiles(0)


def met():
    """Whether products went by tiles since this was asked last; None of real ones, which are not counted."""
    imitated = kernels.imitated() > 0
    return imitated if kernels.tiles() == 2 else None


def one_by_one(x, weight):
    """Products that no tile has part in: of single rows."""
    return torch.cat([native.linear(row.clone(), matrix.of(weight)) for row in x.split(1)])


@pytest.mark.parametrize("name", TILED)
@settings(max_examples=6)
@given(
    panels=st.integers(1, 7), depths=st.integers(1, 20), m=st.sampled_from([8, 9, 16, 31, 33, 200]),
    threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_row_in_tiles_has_the_bits_that_it_has_alone(name, panels, depths, m, threads, seed):
    rows, exact = make(name, (LANES * panels, 2 * DEPTH * depths), "int16", seed)
    weight = lying(rows)
    x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.set_num_threads(threads)
    met()
    together = native.linear(x, matrix.of(weight))
    assert met() in (True, None)
    some = torch.tensor(sorted({0, 1, 7, m // 2, m - 2, m - 1}))
    assert torch.equal(together[some], one_by_one(x[some], weight))
    off = (together.double() - x.double() @ exact.T).norm() / (x.double() @ exact.T).norm()
    assert off < 1e-4
    assert met() in (False, None)


@pytest.mark.parametrize("name, inputs", [("int8", 96), ("int8", 1568), ("int8-g32", 128), ("mxfp4", 128)])
def test_what_is_no_whole_tiles_goes_another_way(name, inputs):
    weight = both(name, (32, inputs), "int16")[1]
    x = torch.randn(20, inputs, generator=torch.Generator().manual_seed(1))
    met()
    assert torch.equal(native.linear(x, matrix.of(weight)), one_by_one(x, weight))
    assert met() in (False, None)


def test_rows_of_nan_infinity_and_nothing_stay_by_themselves():
    weight = both("int4", (48, 256), "int16")[1]
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(3))
    x[3], x[5, 7], x[6] = float("nan"), float("inf"), 0
    x[7] = 2.0**-149
    x[8] = 32767 * 2.0**-14
    together = native.linear(x, matrix.of(weight))
    assert torch.equal(together.view(torch.int32), one_by_one(x, weight).view(torch.int32))
    assert together[3].isnan().all() and together[5].isnan().all() and (together[6] == 0).all()


BANKS = {  # gate, up and down; whether some of it goes by tiles
    "int8": (("int8",) * 3, True),
    "int4": (("int4",) * 3, True),
    "nl4-g64": (("nl4-g64",) * 3, True),
    "mxfp4": (("mxfp4",) * 3, False),
    "other groups": (("int4", "int4-g64", "int8"), True),
    "other bits": (("int8", "int4", "nl4-g64"), True),
    "one in tiles": (("int8", "int8-g32", "mxfp4"), True),
    "other products": (("int8", "fp8_block", "fp8_block"), True),
    "by rows": (("int3", "int8", "int4"), True),
}


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("most", [7, 40, 1 << 20])
def test_experts_in_waves_have_the_bits_of_rows_alone(bank, most):
    """Some chosen by one row, some by all; and choices of experts that are not here."""
    count, inner, width, rows, top = 6, 256, 128, 75, 3
    shapes = ((count, inner, width), (count, inner, width), (count, width, inner))
    names, tiles = BANKS[bank]
    stored = [
        lying(make(name, shape, usual(name), seed)[0])
        for seed, (name, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    bank = [matrix.of(weight) for weight in stored]
    made = torch.Generator().manual_seed(4)
    x, shares = torch.randn(rows, width, generator=made), torch.rand(rows, top, generator=made)
    ids = torch.rand(rows, count + 2, generator=made).argsort(-1)[:, :top].to(torch.int32)
    ids[:30, 0], ids[:30, 1:] = 2, count
    ids[40] = count + 1
    torch.set_num_threads(2)
    met()
    together = native.experts_rows(x, *bank, ids, shares, most)
    assert met() in (tiles and most > 7, None)
    for one in (slice(0, 1), slice(29, 30), slice(40, 41), slice(50, 51), slice(74, 75)):
        alone = native.experts_rows(x[one].clone(), *bank, ids[one].clone(), shares[one].clone())
        assert torch.equal(together[one], alone)
    assert not together[40].any()
    torch.set_num_threads(1)
    assert torch.equal(native.experts_rows(x, *bank, ids, shares, most), together)
    expected = experts.reference.run(x, ids.long(), shares, *stored)
    # the reference sums in other orders, so a hidden value may be the next code of INT16
    assert (together - expected).norm() / expected.norm() < 1e-3
    rounded = [row for row in range(rows) if (together[row] - expected[row]).norm() > 2e-3 * expected[row].norm()]
    assert not rounded
