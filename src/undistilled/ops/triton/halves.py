"""Activations for ops/triton/tiles.py: float16 by a power of two a row, in the order that codes come in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import experts as routed

COLUMNS = 8  # tokens or pairs that an instruction multiplies by


@triton.jit
def halved(x, up, out, factors, row, K, STRIDE, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """A row of activations, or of silu(x) * up, in float16: times the power of two that brings its largest value just
    below 2^15, zeros behind it, inputs k and k + 16 of each 32 side by side. `factors`: what undoes it, and the 2^-8
    of `scale_pair`."""
    row = row.to(tl.int64)
    at = tl.arange(0, BLOCK)
    k = at // 32 * 32 + at % 32 // 2 + at % 2 * 16
    value = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    if SILU:
        value = value / (1.0 + tl.exp(-value)) * tl.load(up + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    exponent = tl.max(tl.abs(value), 0).to(tl.int32, bitcast=True) >> 23  # with a bias of 127
    power = tl.maximum(exponent - 141, -100)
    small = ((127 - power) << 23).to(tl.float32, bitcast=True)
    tl.store(out + row * STRIDE + at, (value * small).to(tl.float16), mask=at < STRIDE)
    tl.store(factors + row, ((135 + power) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["K", "STRIDE"])
def _halves(x, up, out, factors, K, STRIDE, SILU: tl.constexpr, BLOCK: tl.constexpr):
    halved(x, up, out, factors, tl.program_id(0), K, STRIDE, SILU, BLOCK)


@triton.jit(do_not_specialize=["K", "STRIDE", "P"])
def _begin(
    x, out, factors, K, STRIDE, ids, pairs, P, E,
    BLOCK: tl.constexpr, BM: tl.constexpr, PP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The order of pairs, by the first program, and the halves of x's rows, by the others: one launch."""
    if tl.program_id(0) == 0:
        routed.arrange(ids, pairs, pairs + P, pairs + 2 * P, pairs + 3 * P, P, E, BM, PP, STEP)
    else:
        halved(x, x, out, factors, tl.program_id(0) - 1, K, STRIDE, False, BLOCK)


def halves(x: torch.Tensor, up: torch.Tensor | None, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(float16 [rows, stride], factors [rows]) of x [rows, K], or of silu(x) * up."""
    rows, inputs = x.shape
    out = torch.empty(rows, stride, dtype=torch.float16, device=x.device)
    factors = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(stride)
    warps = min(32, max(4, block // 1024))
    other = x if up is None else up
    _halves[(rows,)](x, other, out, factors, inputs, stride, SILU=up is not None, BLOCK=block, num_warps=warps)
    return out, factors


def begun(
    x: torch.Tensor, ids: torch.Tensor, experts: int, stride: int
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tiles of up to COLUMNS pairs there can be, what `routed.tiles` makes, and `halves` of x) for few pairs."""
    (rows, inputs), pairs = x.shape, ids.numel()
    made = torch.empty(4, pairs, dtype=torch.int32, device=x.device)
    out = torch.empty(rows, stride, dtype=torch.float16, device=x.device)
    factors = torch.empty(rows, dtype=torch.float32, device=x.device)
    padded = max(16, triton.next_power_of_2(pairs))
    _begin[(rows + 1,)](
        x, out, factors, inputs, stride, ids, made, pairs, experts,
        BLOCK=triton.next_power_of_2(stride), BM=COLUMNS, PP=padded, STEP=min(padded, 32), num_warps=8,
    )  # fmt: skip
    return pairs, made, out, factors
