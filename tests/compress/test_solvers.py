"""Solvers lose less than rounding to nearest, by the measure that they are given, and give parts of the scheme."""

import pytest
import torch

from undistilled import scheme as schemes
from undistilled.compress.calibrate import Moments
from undistilled.compress.hessian import Factored, Hessian
from undistilled.compress.solvers import gptq, hqq, search, tiles
from undistilled.scheme.tiles import Tiles

NAMES = ["int4", "int3-g64", "int2-g32", "int4-g32-sym", "nl3-g32", "nl2-g64", "mxfp4", "nvfp4"]


def case(n=48, k=160, experts=None):
    """A weight and the second moments of inputs that are correlated and of very different sizes."""
    lead = () if experts is None else (experts,)
    x = torch.randn(*lead, 400, k) @ torch.randn(*lead, k, k) * torch.rand(*lead, 1, k).pow(3)
    return torch.randn(*lead, n, k), x.transpose(-1, -2) @ x / 400


def lost(scheme, parts, w, moments):
    d = scheme.decompress(parts, tuple(w.shape), torch.float32) - w
    return float(((d @ moments) * d).sum())


def checked(scheme, parts, shape):
    specs = schemes.parts_of(scheme, shape)
    assert {k: (tuple(t.shape), str(t.dtype)) for k, t in parts.items()} == {
        k: (s.shape, f"torch.{s.dtype}") for k, s in specs.items()
    }
    return parts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [160, 129])
def test_each_solver_loses_less_than_the_one_before(name, k):
    scheme, (w, moments) = schemes.get(name), case(k=k)
    diagonal = moments.diagonal()
    nearest = scheme.compress(w)
    searched = checked(scheme, search.solve(scheme, w, diagonal[None]), w.shape)
    solved = checked(scheme, gptq.solve(scheme, w, Hessian(moments)), w.shape)
    by_input = torch.diag(diagonal)
    assert lost(scheme, searched, w, by_input) <= lost(scheme, nearest, w, by_input)
    assert lost(scheme, solved, w, moments) < 0.8 * lost(scheme, searched, w, moments)


HEAVY = ["int4", "int3-g64", "int2-g32", "int4-g32-sym", "int3-sym", "nl3-g32", "nl2-g64", "nvfp4", "tiles"]


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize("experts, k", [(None, 512), (3, 129)])
def test_half_quadratic_splitting_loses_less_than_rounding_on_heavy_tails(name, experts, k):
    """By the lp norm that it is for, and by the mean square too."""
    scheme = Tiles(16, 32, ((2, 2), (4, 3))) if name == "tiles" else schemes.get(name)
    shape = (64, k) if experts is None else (experts, 64, k)
    w = torch.distributions.StudentT(3.0).sample(shape)
    solve = tiles.plain if name == "tiles" else hqq.solve
    solved, nearest = checked(scheme, solve(scheme, w), shape), scheme.compress(w)
    errors = [(scheme.decompress(parts, shape, torch.float32) - w).abs() for parts in (solved, nearest)]
    for power in (hqq.P, 2):
        ours, theirs = (float(e.double().pow(power).mean()) for e in errors)
        assert ours < theirs, (power, ours, theirs)


def test_half_quadratic_splitting_is_the_same_at_any_size_and_for_any_expert():
    scheme, w = schemes.get("int3-g64"), torch.distributions.StudentT(3.0).sample((2, 16, 160))
    both, small = hqq.solve(scheme, w), hqq.solve(scheme, w / 1024)
    assert torch.equal(both["values"][1], hqq.solve(scheme, w[1])["values"])
    assert (both["values"] == small["values"]).float().mean() > 0.99


def test_experts_together_are_experts_apart():
    scheme, (w, moments) = schemes.get("int3-g64"), case(experts=3)
    both = gptq.solve(scheme, w, Hessian(moments))
    for at in range(3):
        one = gptq.solve(scheme, w[at], Hessian(moments[at]))
        # a product over stacked matrices rounds otherwise in its last bits, which may move a code by one
        same = (both["values"][at] == one["values"]).float().mean()
        assert same > 0.98 and torch.equal(both["scales"][at], one["scales"])


def test_experts_in_tiles_together_are_experts_apart():
    """Eighteen in a stack, whose inputs differ in size alone, as they are solved on a large GPU."""
    scheme, (_, moments), count = schemes.get("tiles16x32-2x2-3x2-5x1"), case(), 18
    w, stretch, outputs = torch.randn(count, 48, 160), torch.rand(count, 160) + 0.5, torch.rand(count, 48)
    known = Factored().of(moments)
    together = tiles.solve(scheme, w, Hessian(moments, 1.0, stretch), outputs, known)
    for at in (0, 7, 17):
        alone = tiles.solve(scheme, w[at], Hessian(moments, 1.0, stretch[at]), outputs[at], known)
        for part in ("order", "scales", "multipliers"):
            assert torch.equal(together[part][at].float(), alone[part].float())
        both = torch.stack([scheme.decompress(p, (48, 160), torch.float32) for p in (_one(together, at), alone)])
        assert (both[0] == both[1]).float().mean() > 0.98  # as above


def _one(parts, at):
    return {name: part[at] for name, part in parts.items()}


@pytest.mark.parametrize("shape, by", [((48, 160), (1, 160)), ((3, 48, 160), (3, 1, 160)), ((3, 48, 160), (1, 160))])
def test_scales_are_the_same_in_pieces(shape, by, monkeypatch):
    for name in ("int4", "nl3-g32"):
        scheme, w, importance = schemes.get(name), torch.randn(shape), torch.rand(by)
        whole = search.fit(scheme, w, importance)
        with monkeypatch.context() as patch:
            patch.setattr(search, "PIECE", 1000)
            pieces = search.fit(scheme, w, importance)
        assert all(torch.equal(whole[part].float(), pieces[part].float()) for part in whole)


def test_weights_with_one_input_share_its_factor():
    (w, moments), factored = case(), Factored()
    first = factored.of(moments)
    assert factored.of(moments) is first and factored.of(moments.clone()) is not first
    stretch = torch.rand(160) + 0.5
    scheme, hessian = schemes.get("int4"), Hessian(moments, 2.0, stretch)
    solved = gptq.solve(scheme, w, hessian, first)
    searched = search.solve(scheme, w, hessian.diagonal()[None])
    assert lost(scheme, solved, w, hessian.dense()) < 0.8 * lost(scheme, searched, w, hessian.dense())


def test_gptq_without_correlation_is_rounding_to_nearest():
    scheme, (w, _) = schemes.get("int4"), case()
    moments = torch.diag(torch.rand(160) + 0.1)
    solved, searched = gptq.solve(scheme, w, Hessian(moments)), search.solve(scheme, w, moments.diagonal()[None])
    assert torch.equal(solved["values"], searched["values"])


@pytest.mark.parametrize("experts", [None, 2])
def test_dynamic_blocks_spend_their_bits_where_they_count(experts):
    w, moments = case(n=64, k=256, experts=experts)
    outputs = torch.rand(*w.shape[:-1])
    scheme = Tiles(16, 32, ((2, 3), (3, 2), (5, 3)))
    solved = checked(scheme, tiles.solve(scheme, w, Hessian(moments), outputs), tuple(w.shape))
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    by_tile = tiles.losses(scheme, w, diagonal, outputs, (3,))[3]
    order = solved["order"].long()
    in_order = by_tile.gather(-1, order)
    assert (in_order[..., :-1] <= in_order[..., 1:] * 1.05).all()

    def weighted(parts):
        d = scheme.decompress(parts, tuple(w.shape), torch.float32) - w
        return float((((d @ moments) * d).sum(-1) * outputs).sum())

    assert weighted(solved) < 0.8 * weighted(scheme.compress(w))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nl3-g32", "int4-g32"])
def test_groups_of_zeros_stay_zeros(name):
    """Whose scales have no inverse."""
    scheme, (w, _) = schemes.get(name), case()
    w[::2, :64] = 0
    solved = checked(scheme, search.solve(scheme, w, torch.rand(1, 160)), w.shape)
    dense = scheme.decompress(solved, tuple(w.shape), torch.float32)
    assert dense.isfinite().all() and not dense[::2, :64].any() and dense[1::2].any()


def test_an_input_that_never_fires_costs_nothing_and_breaks_nothing():
    scheme, (w, moments) = schemes.get("int3-g64"), case()
    moments[:, :40] = 0
    moments[:40] = 0
    assert all(t.float().isfinite().all() for t in gptq.solve(scheme, w, Hessian(moments)).values())
    assert all(t.float().isfinite().all() for t in gptq.solve(scheme, w, Hessian(torch.zeros_like(moments))).values())


def test_an_expert_that_met_too_few_tokens_has_its_layers_moments():
    x = torch.randn(3, 500, 8) * torch.tensor([1.0, 3.0, 1.0])[:, None, None]
    met = torch.tensor([500.0, 500.0, 2.0])
    x[2, 2:] = 0
    found = Moments(x.transpose(1, 2) @ x, torch.tensor([[500.0], [1000.0], [8.0]]), met, 1000)
    hessian, outputs = found.of(slice(0, 3))
    inputs = hessian.dense()
    assert torch.allclose(inputs[:2] * 1000, found.inputs[:2])
    assert torch.allclose(inputs[2] * 1000, found.inputs.sum(0) / 1002 * 3)
    assert outputs.flatten().tolist() == pytest.approx([1.0, 2.0, 1508 / 1002])
