"""Operations between the products, one kernel each where PyTorch would launch several."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .after import EARLY, after


@triton.jit
def normalised(x, w, d, D, eps):
    """The row of D values at x, normalised, in float32; past its end zeros."""
    return _scaled(tl.load(x + d, mask=d < D, other=0.0), w, d, D, eps)


@triton.jit
def _scaled(x, w, d, D, eps):
    value = x.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    return tl.load(w + d, mask=d < D, other=0.0).to(tl.float32) * value.to(x.dtype).to(tl.float32)


@triton.jit
def _norm(x, w, y, D, eps, BLOCK: tl.constexpr):
    after()
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    tl.store(y + at + d, normalised(x + at, w, d, D, eps).to(y.dtype.element_ty), mask=d < D)


def rms_norm(x_TD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    """As ops.norm.rms_norm."""
    x = x_TD.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    if rows:
        _norm[(rows,)](x, w_D, y, width, eps, **_row(width))
    return y


def _row(width: int) -> dict:
    """How a program takes a whole row."""
    return {"BLOCK": triton.next_power_of_2(width), "num_warps": 8 if width > 2048 else 4, **EARLY}


@triton.jit
def _add_norm(a, b, w, total, y, D, eps, BLOCK: tl.constexpr):
    after()
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    first = tl.load(a + at + d, mask=d < D, other=0.0).to(tl.float32)
    second = tl.load(b + at + d, mask=d < D, other=0.0).to(tl.float32)
    value = (first + second).to(total.dtype.element_ty)
    tl.store(total + at + d, value, mask=d < D)
    tl.store(y + at + d, _scaled(value, w, d, D, eps).to(y.dtype.element_ty), mask=d < D)


def add_norm(
    h_TD: torch.Tensor, y_TD: torch.Tensor, w_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ops.norm.add_norm."""
    a, b = h_TD.contiguous(), y_TD.contiguous()
    total, y, (rows, width) = torch.empty_like(a), torch.empty_like(a), a.shape
    if rows:
        _add_norm[(rows,)](a, b, w_D, total, y, width, eps, **_row(width))
    return total, y


@triton.jit
def _silu_mul(g, u, y, count, BLOCK: tl.constexpr):
    after()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(g + i, mask=i < count, other=0.0).to(tl.float32)
    b = tl.load(u + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, (a / (1.0 + tl.exp(-a)) * b).to(y.dtype.element_ty), mask=i < count)


def silu_mul(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """As ops.swiglu.silu_mul."""
    a, b = g.contiguous(), u.contiguous()
    y = torch.empty_like(a)
    if a.numel():
        _silu_mul[(-(-a.numel() // 1024),)](a, b, y, a.numel(), BLOCK=1024, **EARLY)
    return y


@triton.jit
def rotated(x, cos, sin, f, F, mask, PAIRED: tl.constexpr):
    """First and second values of the pairs f of F, rotated, in float32. x, cos, sin: where rows begin, which broadcast
    with f and mask."""
    first = f * 2 if PAIRED else f
    second = f * 2 + 1 if PAIRED else f + F
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + f, mask=mask, other=0.0)
    s = tl.load(sin + f, mask=mask, other=0.0)
    return a * c - b * s, b * c + a * s


@triton.jit
def _rotate(x, cos, sin, y, HEADS, F, ST, SH, PAIRED: tl.constexpr, FP: tl.constexpr):
    after()
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, FP)
    mask = f < F
    first, second = rotated(x + t * ST + h * SH, cos + t * F, sin + t * F, f, F, mask, PAIRED)
    at = y + (t * HEADS + h) * 2 * F + f
    tl.store(at, first.to(y.dtype.element_ty), mask=mask)
    tl.store(at + F, second.to(y.dtype.element_ty), mask=mask)


def rotate(x_THR: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As ops.rope.rotate; x may be a view whose last dimension is dense."""
    if x_THR.stride(-1) != 1:
        x_THR = x_THR.contiguous()
    tokens, heads, width = x_THR.shape
    y = x_THR.new_empty(x_THR.shape)
    if y.numel():
        strides = x_THR.stride(0), x_THR.stride(1)
        padded = triton.next_power_of_2(width // 2)
        _rotate[(tokens, heads)](
            x_THR, cos_TF.contiguous(), sin_TF.contiguous(), y, heads, width // 2, *strides,
            PAIRED=interleaved, FP=padded, num_warps=1, **EARLY,
        )  # fmt: skip
    return y
