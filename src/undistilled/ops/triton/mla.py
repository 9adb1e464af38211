"""What a decode step of MLA computes around attention in latent space, a launch each; shapes as in ops/mla.py.

A program of `absorb` or `release` reads a tile of one head's rows of kv_b as they are stored. Queries meet the weight
along its outputs, where scales of rows and groups cannot follow a product: it is scaled and rounded to bfloat16 first,
as a dense copy would be. Attended latents meet it along its inputs, as in any linear layer. Queries are computed alike
in any company of up to 16 rows, of 17 to 32, and so on; what is released, of up to 8, of 9 to 16, and so on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...scheme import Stored
from .after import EARLY, after
from .decode import CODE, get, settled
from .form import arguments
from .linear import padded
from .room import depth
from .small import normalised, rotated
from .tile import bytes_of, multiplied, product, weights

BK = 128  # latents in a tile of `absorb`, and in a step of `release`
NOPE = 128  # rows of a head that meet their queries at once
VALUES = 32  # rows of a head in a program of `release`
NARROW, WIDE = (2, 4), (4, 3)  # warps and depth of its pipeline for up to 32 columns of activations, and for more


@triton.jit(do_not_specialize=["R"])  # a row must meet the same code in any company
def _absorb(
    q, y, cos, sin, w, scales, lows, multipliers, R, H, N, P, EACH, Z, WR, GR,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, FP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """EACH: rows of the weight that a head has. The tile past the last latents is the rotated tail."""
    NP: tl.constexpr = get(S, "pieces")
    PER: tl.constexpr = BK // NP
    k, head = tl.program_id(0) * BK, tl.program_id(1)
    r = tl.arange(0, BM)
    live = (r < R)[:, None]
    place = (r.to(tl.int64) * H + head)[:, None]
    q_at, y_at = q + place * (N + P), y + place * (Z + P)
    if k >= Z:
        after()
        f = tl.arange(0, FP)[None, :]
        F = P // 2
        turn, mask = r[:, None] * F, live & (f < F)
        first, second = rotated(q_at + N, cos + turn, sin + turn, f, F, mask, PAIRED)
        tl.store(y_at + Z + f, first.to(y.dtype.element_ty), mask=mask)
        tl.store(y_at + Z + F + f, second.to(y.dtype.element_ty), mask=mask)
    else:
        for p in tl.static_range(NP):
            acc = tl.zeros([BM, PER], tl.float32)
            for begin in tl.range(0, N, BN):
                i = begin + tl.arange(0, BN)
                n = head * EACH + tl.minimum(i, N - 1)
                at, there, _ = bytes_of(w, n, k, Z, WR, S, PER)
                f = weights(at, scales, lows, multipliers, n, k, there, GR, S, p, PER)
                after()  # no kernel writes weights, which may be on their way before
                xs = tl.load(q_at + i[None, :], mask=live & (i < N)[None, :], other=0.0).to(CODE)
                acc = tl.dot(xs, settled(f.to(CODE)), acc)
            kk = tl.arange(0, PER)
            z = k + kk // get(S, "unit") * 32 + kk % get(S, "unit") + p * get(S, "unit")
            tl.store(y_at + z[None, :], acc.to(y.dtype.element_ty), mask=live & (z < Z)[None, :])


def absorb(q_RHX: torch.Tensor, weight: Stored, nope: int, turn: tuple) -> torch.Tensor:
    """As ops.mla.absorb, for few rows; weight [H * (N + V), Z]."""
    q, (cos, sin, interleaved) = q_RHX.contiguous(), turn
    (R, H, width), (rows, Z), a = q.shape, weight.shape, arguments(weight)
    tail = width - nope
    y = q.new_empty(R, H, Z + tail)
    if R == 0:
        return y
    bn = min(NOPE, max(32, triton.next_power_of_2(nope)))
    _absorb[(-(-Z // BK) + 1, H)](
        q, y, cos.contiguous(), sin.contiguous(), *a.parts, R, H, nope, tail, rows // H, Z, a.row_bytes, a.groups,
        S=a.form, BN=bn, BM=padded(R, 16), BK=BK, FP=triton.next_power_of_2(tail // 2), PAIRED=interleaved,
        num_warps=8 if bn == NOPE else 4, num_stages=1, **EARLY,  # of one step nothing is ahead
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["R"])
def _release(
    x, y, w, scales, lows, multipliers, R, H, N, V, Z, WR, GR,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    after()
    tile, head = tl.program_id(0), tl.program_id(1)
    v = tile * BN + tl.arange(0, BN)
    n = head * (N + V) + N + tl.minimum(v, V - 1)
    m = tl.arange(0, G * BM) % BM
    acc, _ = product(
        x, (m.to(tl.int64) * H + head) * Z, m < R, w, scales, lows, w, scales, lows, n, 0, tl.cdiv(Z, BK), Z, WR, GR,
        S, BN, BM, BK, EVEN, True, False,
    )  # fmt: skip
    r = tl.arange(0, BM)
    at = y + (r.to(tl.int64) * H + head)[None, :] * V + v[:, None]
    mask = (r < R)[None, :] & (v < V)[:, None]
    tl.store(at, multiplied(acc, multipliers, n, S).to(y.dtype.element_ty), mask=mask)


def release(out_RHZ: torch.Tensor, weight: Stored, nope: int) -> torch.Tensor:
    """As ops.mla.release, for few rows; weight [H * (N + V), Z]."""
    x, a = out_RHZ.contiguous(), arguments(weight)
    R, H, Z = x.shape
    width = weight.shape[0] // H - nope
    y = x.new_empty(R, H, width)
    if R == 0:
        return y
    bm, groups = padded(R), a.form.columns(BK)
    warps, deep = NARROW if bm * groups <= 32 else WIDE
    stages = depth(deep, BK * (2 * bm * groups + VALUES), x.device)
    _release[(-(-width // VALUES), H)](
        x, y, *a.parts, R, H, nope, width, Z, a.row_bytes, a.groups,
        S=a.form, BN=VALUES, BM=bm, BK=BK, G=groups, EVEN=Z % BK == 0, num_warps=warps, num_stages=stages, **EARLY,
    )  # fmt: skip
    return y


@triton.jit
def _keep(
    x, w, cos, sin, cache, slots, eps, Z, F, STRIDE,
    ZP: tl.constexpr, FP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Rounded to x's dtype first, as what comes between ops is."""
    after()
    t = tl.program_id(0).to(tl.int64)
    row, kept = x + t * (Z + 2 * F), cache + tl.load(slots + t) * STRIDE
    z, f = tl.arange(0, ZP), tl.arange(0, FP)
    latent = normalised(row, w, z, Z, eps).to(x.dtype.element_ty)
    tl.store(kept + z, latent.to(cache.dtype.element_ty), mask=z < Z)
    first, second = rotated(row + Z, cos + t * F, sin + t * F, f, F, f < F, PAIRED)
    tl.store(kept + Z + f, first.to(x.dtype.element_ty).to(cache.dtype.element_ty), mask=f < F)
    tl.store(kept + Z + F + f, second.to(x.dtype.element_ty).to(cache.dtype.element_ty), mask=f < F)


def keep(
    both_TW: torch.Tensor, w_Z: torch.Tensor, eps: float, turn: tuple, cache: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """As ops.mla.keep; cache rows are dense."""
    x, (cos, sin, interleaved) = both_TW.contiguous(), turn
    (tokens, width), latent = x.shape, w_Z.shape[0]
    half = (width - latent) // 2
    if tokens:
        _keep[(tokens,)](
            x, w_Z, cos.contiguous(), sin.contiguous(), cache, slots_T.contiguous(), eps, latent, half,
            cache.stride(0), ZP=triton.next_power_of_2(latent), FP=triton.next_power_of_2(half), PAIRED=interleaved,
            num_warps=4, **EARLY,
        )  # fmt: skip
