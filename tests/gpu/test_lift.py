"""MLA's lift and latents in a launch each, against float64 and against the ops that they replace.

Small ones run in Triton's interpreter too (conftest.py says how); the rest wants a GPU.
"""

import pytest
import torch
from exact import DEVICE, ROUNDING, activations, error, exact, nothing_waits, stored

from tiny import CONFIGS
from undistilled import scheme as schemes
from undistilled.model.batch import Batch
from undistilled.model.deepseek import Attention
from undistilled.model.spec import spec_from_config
from undistilled.model.weights import weights
from undistilled.ops import mla
from undistilled.ops import triton as cuda
from undistilled.ops.rope import rotate_tail

pytest.importorskip("triton")
from undistilled.ops.triton import mla as kernels
from undistilled.ops.triton.form import form_of

pytestmark = pytest.mark.gpu
INTERPRETED = pytest.mark.interpreted
QUANTISED = [name for name, scheme in schemes.SCHEMES.items() if form_of(scheme)]
SOME = ["fp8_block", "int8", "int4-g32", "int4-g32-sym", "int3-g32"]
R1, NANO, ODD = (128, 128, 64, 512), (32, 32, 32, 96), (20, 12, 8, 72)  # N, V, P, Z
ROWS = [1, 3, 16, 17]


def turn(rows, tail, interleaved=True):
    return torch.rand(rows, tail // 2, device=DEVICE), torch.rand(rows, tail // 2, device=DEVICE), interleaved


def lift(name, heads, shape):
    nope, values, _, latent = shape
    return stored(name, heads * (nope + values), latent)


def lifted(name, rows, heads, shape, interleaved=True):
    """Both kernels against float64: the weight is rounded to bfloat16 for queries, and so are results."""
    nope, values, tail, latent = shape
    weight = lift(name, heads, shape)
    q, x = activations(rows, heads, nope + tail), activations(rows, heads, latent)
    angles = turn(rows, tail, interleaved)
    with torch.inference_mode():
        assert mla.lift_of(weight, heads, rows, q.dtype) is weight
        assert mla.absorb.resolve(weight).name == mla.release.resolve(weight).name == "triton"
        kernels.absorb(q, weight, nope, angles)  # compiles
        kernels.release(x, weight, nope)
        with nothing_waits():
            inside = mla.absorb.resolve(weight).run(q, weight, nope, angles)
            out = mla.release.resolve(weight).run(x, weight, nope)
    dense = exact(weight).unflatten(0, (heads, -1))
    turned = rotate_tail.reference.run(q.double(), *angles, tail)
    assert inside.shape == (rows, heads, latent + tail) and out.shape == (rows, heads, values)
    assert error(inside[..., :latent], torch.einsum("rhn,hnz->rhz", turned[..., :nope], dense[:, :nope])) < ROUNDING
    assert error(inside[..., latent:], turned[..., nope:]) < ROUNDING
    assert error(out, torch.einsum("rhz,hvz->rhv", x.double(), dense[:, nope:])) < ROUNDING


@INTERPRETED
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SOME)
def test_small(name, rows):
    lifted(name, rows, 8 if rows == 3 else 2, NANO)


@INTERPRETED
@pytest.mark.parametrize("name", ["fp8_block", "int4-g32"])
def test_r1s_widths(name):
    lifted(name, 3, 2, R1)


@INTERPRETED
@pytest.mark.parametrize("interleaved", [True, False])
def test_odd_widths(interleaved):
    lifted("int8", 5, 3, ODD, interleaved)


@pytest.mark.parametrize("name", QUANTISED)
def test_every_scheme(name):
    lifted(name, 3, 5, R1)


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("name", ["fp8_block", "int8", "int4-g32"])
def test_r1s_heads(name, heads):
    for rows in (1, 64):
        lifted(name, rows, heads, R1)


@INTERPRETED
@pytest.mark.parametrize("name", ["fp8_block", "int4-g32"])
def test_a_row_in_any_company(name):
    nope, _, tail, latent = NANO
    weight, angles = lift(name, 2, NANO), turn(16, tail)
    q, x = activations(16, 2, nope + tail), activations(16, 2, latent)
    inside, out = kernels.absorb(q, weight, nope, angles), kernels.release(x[:8], weight, nope)
    for rows in (1, 9):
        few = angles[0][:rows], angles[1][:rows], True
        assert torch.equal(kernels.absorb(q[:rows], weight, nope, few), inside[:rows])
    for rows in (1, 5):
        assert torch.equal(kernels.release(x[:rows], weight, nope), out[:rows])


@INTERPRETED
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("latent, tail", [(512, 64), (96, 32), (72, 8)])
@torch.inference_mode()
def test_latents(latent, tail, dtype, interleaved):
    both, w, angles = activations(5, latent + tail), torch.rand(latent, device=DEVICE), turn(5, tail, interleaved)
    slots = torch.tensor([7, 0, 3, 11, 4], device=DEVICE)
    cache = torch.full((12, latent + tail), 9.0, dtype=dtype, device=DEVICE)
    kernels.keep(both, w, 1e-6, angles, cache, slots)
    want = mla.latents(both.double(), w.double(), 1e-6, angles)
    assert error(cache[slots], want) < 2 * ROUNDING
    assert torch.equal(cache, cache.bfloat16().to(dtype))
    others = torch.ones(12, dtype=torch.bool).index_fill_(0, slots.cpu(), False)
    assert (cache[others] == 9).all()


def attention(name, scheme):
    """A layer of a tiny model, with random weights in a scheme; norms stay as they are."""
    spec = spec_from_config(CONFIGS[name])
    shapes = {w.name: w for w in weights(spec)}

    def make(weight):
        w = shapes[weight]
        return stored(scheme if w.is_linear else "bf16", *w.shape)

    return Attention(make, "model.layers.1.self_attn", spec), spec


@INTERPRETED
@pytest.mark.parametrize("scheme", ["fp8_block", "int4-g32"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3-no-q-lora"])
@torch.inference_mode()
def test_decode_as_with_a_dense_lift(name, scheme, monkeypatch):
    layer, spec = attention(name, scheme)
    x, size = activations(3, spec.hidden), 4
    contexts = torch.tensor([1, 6, 8], dtype=torch.int32)
    tables = torch.arange(6, dtype=torch.int32, device=DEVICE).view(3, 2)
    slots = torch.tensor([0, 13, 23], device=DEVICE)
    width = spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    before = activations(24, width)

    def decoded():
        cos, sin, _ = angles
        batch = Batch(slots, contexts.long() - 1, slots, tables, contexts, size, False, cos, sin)
        cache = before.clone()
        return layer(x, batch, (cache,)), cache

    angles = turn(3, spec.mla.qk_rope_head_dim)
    taken = []
    monkeypatch.setattr(kernels, "release", lambda *a, run=kernels.release: taken.append(1) or run(*a))
    ours, cache = decoded()
    assert taken
    monkeypatch.setattr(cuda, "FEW", 0)
    dense, same = decoded()
    assert len(taken) == 1 and torch.equal(cache, same)
    assert error(ours, dense.double()) < 2 * ROUNDING
