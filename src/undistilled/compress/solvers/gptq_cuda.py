"""GPTQ's inner loop on a GPU: a block of inputs in one launch. B stacked weights, k inputs, N outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gptq import BLOCK, Grid
from .ladder_cuda import arguments, inverse, nearest

OUTPUTS = 32  # of a program: a lane keeps one output's inputs in registers


@triton.jit(do_not_specialize=["k", "n", "programs", "by_stack", "upper_by_stack", "upper_by_row", "upper_by_input"])
def _rounded(
    w, scale, low, begin, upper, codes, lost, table, levels, least, most, fine,
    k, n, programs, by_stack, upper_by_stack, upper_by_row, upper_by_input,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    stack, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    out, row = part * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    inside = out < n
    at = stack * by_stack + out
    place = at[None, :] + row[:, None] * n
    left = tl.load(w + place, mask=inside[None, :] & (row < k)[:, None], other=0.0)
    lost_at = stack * k * n + out
    factors = upper + stack * upper_by_stack
    for i in range(k):
        step = tl.load(scale + at, mask=inside, other=0.0)
        x = tl.sum(tl.where((row == i)[:, None], left, 0.0), 0)
        if low is not None:
            x -= tl.load(low + at, mask=inside, other=0.0)
        first = 0
        if begin is not None:
            first = tl.load(begin + at, mask=inside, other=0)
        code, level = nearest(x * inverse(step), first, table, levels, least, most, fine)
        missed = tl.div_rn(x - level * step, tl.load(factors + i * upper_by_input))
        tl.store(codes + at, code.to(tl.uint8), mask=inside)
        tl.store(lost + lost_at, missed, mask=inside)
        factor = tl.load(factors + row * upper_by_input, mask=(row > i) & (row < k), other=0.0)
        left -= factor[:, None] * missed[None, :]
        at += n
        lost_at += n
        factors += upper_by_row


def block(w: torch.Tensor, upper: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """As gptq._block: rounds w [B, k, N] into `codes`; what each lost [B, k, N]. w stays as it is.

    All but `upper` [B or 1, k, k] are slices of k inputs of contiguous [B, K, N]; k is BLOCK at most.
    """
    stacks, k, n = w.shape
    lost = torch.empty((stacks, k, n), dtype=torch.float32, device=w.device)
    programs = -(-n // OUTPUTS)
    assert all(t is None or t.stride() == w.stride() for t in (codes, grid.scale, grid.low, grid.begin))
    assert w.stride()[1:] == (n, 1) and k <= BLOCK
    _rounded[(stacks * programs,)](
        w, grid.scale, grid.low, grid.begin, upper, codes, lost, *arguments(grid.ladder),
        k, n, programs, w.stride(0), 0 if upper.shape[0] == 1 else upper.stride(0), *upper.stride()[1:],
        INPUTS=BLOCK, OUTPUTS=OUTPUTS, num_warps=1,
    )  # fmt: skip
    return lost
