"""The solvers' Triton kernels against PyTorch's loops, on the same device.

Small ones run in Triton's interpreter too (conftest.py says how); the rest wants a GPU.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from exact import DEVICE

from undistilled import scheme as schemes
from undistilled.compress.hessian import Hessian, factor
from undistilled.compress.solvers import gptq, on_gpu, search, tiles
from undistilled.scheme.int8 import grouped

pytest.importorskip("triton")
from undistilled.compress.solvers import gptq_cuda

pytestmark = pytest.mark.gpu
EQUAL = 0.99  # of the codes, at least: ties and rounding may move some


def case(n, k, experts=None):
    """A weight and the second moments of inputs that are correlated and of very different sizes."""
    lead = () if experts is None else (experts,)
    x = torch.randn(*lead, 3 * k, k) @ torch.randn(*lead, k, k) * torch.rand(*lead, 1, k).pow(3)
    return torch.randn(*lead, n, k).to(DEVICE), (x.transpose(-1, -2) @ x / (3 * k)).to(DEVICE)


def block_of(name, stacks, k, n):
    """A block of inputs in the middle of weights: values, an upper factor, a grid and where codes go."""
    w = torch.randn(stacks, 3 * k, n, device=DEVICE)
    scale = (torch.rand_like(w) + 0.2) * 0.02
    scale[:, :, ::7] = 0.0
    low = begin = None
    if name == "tiles":
        ladder = tiles._ladders(w.device)
        begin = tiles._begins(range(2, 7), w.device)[torch.randint(5, w.shape, device=DEVICE)]
    else:
        scheme = schemes.get(name)
        ladder = scheme.ladder(w.device)
        scale *= 127 / scheme.levels[-1]
        low = torch.randn_like(w) * 0.1 if scheme.affine else None
    some = [None if t is None else t[:, k : 2 * k] for t in (scale, low, begin)]
    return w[:, k : 2 * k], gptq.Grid(*some, ladder), torch.zeros_like(w, dtype=torch.uint8)[:, k : 2 * k]


LADDERS = ["int4", "int3-g64-sym", "nl3-g64", "nvfp4", "tiles"]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("stacks, shared, k, n", [(2, True, 64, 40), (3, False, 9, 33), (1, True, 1, 5)])
def test_a_block_is_rounded_as_by_pytorch(name, stacks, shared, k, n):
    w, grid, codes = block_of(name, stacks, k, n)
    _, moments = case(1, 2 * k, 1 if shared else stacks)
    upper = factor(moments).upper[:, :k, :k]
    ours, loss = codes.clone(), None
    ours = torch.zeros_like(w._base, dtype=torch.uint8)[:, k : 2 * k]
    before = w.clone()
    loss = gptq_cuda.block(w, upper, grid, ours)
    assert torch.equal(w, before)
    expected = gptq._block(w, upper, grid, codes)
    assert (ours == codes).float().mean() >= EQUAL
    assert torch.isclose(loss, expected, rtol=1e-3, atol=1e-3).float().mean() >= EQUAL


SEARCHED = ["int4", "int2-g32", "int3-g64-sym", "nl2-g16", "nl3-g64", "nl6-g128", "mxfp4", "nvfp4"]
WEIGHTS = [((5, 130), (1, 130)), ((3, 17, 64), (3, 1, 64)), ((2, 3, 7, 96), (1, 96))]  # values, importances
WEIGHTS = [pytest.param(*shapes, marks=pytest.mark.interpreted) for shapes in WEIGHTS]


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("shape, by", [*WEIGHTS, ((576, 576), (1, 576)), ((9, 512, 1000), (9, 1, 1000))])
def test_scales_lose_what_pytorchs_lose(monkeypatch, name, shape, by):
    """Each group what it loses there: where candidates are as good, either may be taken."""
    scheme, w, matter = schemes.get(name), torch.randn(shape, device=DEVICE), torch.rand(by, device=DEVICE)
    w[..., 0, :32] = 0.0
    found = [solved(monkeypatch, ours, lambda: search.fit(scheme, w, matter)) for ours in (True, False)]
    lost = [_by_group(scheme, w, matter, meta) for meta in found]
    assert torch.isclose(*lost, rtol=1e-3, atol=1e-9).float().mean() >= EQUAL
    assert float(lost[0].sum()) == pytest.approx(float(lost[1].sum()), rel=1e-3)
    for one, other in zip(*map(scheme.steps, found), strict=True):
        assert one is None or torch.isclose(one, other, rtol=1e-3).float().mean() >= 0.95


def _by_group(scheme, w, matter, meta):
    d = scheme.dense(scheme.codes(w, meta), meta) - w
    return grouped((matter * d.square()).double(), scheme.group).sum(-1)


@contextmanager
def never_waited():
    """Where the host waits for the GPU, an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["int4", "nl3-g64", "mxfp4"])
def test_a_search_takes_few_launches_and_waits_for_none(name):
    w, matter, scheme = torch.randn(576, 576, device=DEVICE), torch.rand(1, 576, device=DEVICE), schemes.get(name)
    search.fit(scheme, w, matter)
    with never_waited(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        search.fit(scheme, w, matter)
    launched = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 < len(launched) < 80, launched  # 16 candidates by PyTorch: hundreds


def test_solving_waits_for_nothing():
    (w, moments), outputs = case(128, 576), torch.rand(128, device=DEVICE)
    scheme, hessian, known = schemes.get("tiles16x32-2x6-3x6-5x6"), Hessian(moments), factor(moments)
    for again in (False, True):  # the first time makes the tables
        with never_waited() if again else nullcontext():
            tiles.losses(scheme, w, moments.diagonal(), outputs)
            tiles.solve(scheme, w, hessian, outputs, known)


def solved(monkeypatch, ours, solve):
    """What a solver finds with kernels, or without, on any device."""
    with monkeypatch.context() as patch:
        for module in (gptq, search):
            patch.setattr(module, "on_gpu", lambda w: ours)
        return solve()


def compared(monkeypatch, scheme, w, hessian, solve):
    """Codes and losses with kernels are those without."""
    found = [solved(monkeypatch, ours, solve) for ours in (True, False)]
    wide = [scheme.decompress(parts, tuple(w.shape), torch.float32) for parts in found]
    assert torch.isclose(*wide).float().mean() >= 0.98
    lost = [float(hessian.lost(d - w).sum()) for d in wide]
    assert lost[0] == pytest.approx(lost[1], rel=0.01)


SIZES = [pytest.param(24, 129, 2, marks=pytest.mark.interpreted), (576, 576, None), (256, 512, 18)]


@pytest.mark.parametrize("name", ["int4", "nl3-g32", "tiles"])
@pytest.mark.parametrize("n, k, experts", SIZES)
def test_gptq_loses_what_it_loses_in_pytorch(monkeypatch, name, n, k, experts):
    """Experts share their moments but for the size of inputs."""
    (w, _), (_, moments) = case(n, k, experts), case(1, k)
    stretch = None if experts is None else torch.rand(experts, k, device=DEVICE) + 0.5
    hessian, outputs = Hessian(moments, 1.0, stretch), torch.rand(w.shape[:-1], device=DEVICE)
    if name != "tiles":
        scheme = schemes.get(name)
        return compared(monkeypatch, scheme, w, hessian, lambda: gptq.solve(scheme, w, hessian))
    count = -(-k // 32)
    scheme = schemes.get(f"tiles16x32-2x{count // 3}-3x{count // 3}-5x{count - 2 * (count // 3)}")
    compared(monkeypatch, scheme, w, hessian, lambda: tiles.solve(scheme, w, hessian, outputs))


def test_a_gpu_has_the_kernels():
    assert on_gpu(torch.zeros(1, device=DEVICE))
