"""scheme/ladder.py's ladders in Triton kernels: the same tables, the same places in them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...scheme import ladder as tables

WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers of this size are whole
SMALLEST = tl.constexpr(tables.SMALLEST)


@triton.jit
def nearest(x, begin, codes, levels, least, most, fine):
    """Codes int32 and levels of x; codes and levels are None where levels are neighbouring integers."""
    if codes is None:
        code = tl.minimum(tl.maximum(x - least, 0.0), most - least)
        code = (code + WHOLE) - WHOLE  # halves to even
        return code.to(tl.int32), code + least
    else:
        step = tl.minimum(tl.maximum(tl.ceil(x * fine), least), most)
        rung = (step - least).to(tl.int32) + begin
        return tl.load(codes + rung).to(tl.int32), tl.load(levels + rung)


@triton.jit
def inverse(scale):
    """1 / scale, 0 where there is none."""
    none = tl.abs(scale) < SMALLEST
    return tl.where(none, 0.0, tl.div_rn(1.0, tl.where(none, 1.0, scale)))


def arguments(ladder: tables.Ladder) -> tuple[torch.Tensor | None, torch.Tensor | None, float, float, float]:
    """What `nearest` takes after x and begin; floats, of which a kernel is not compiled for each value."""
    fine = float(ladder.fine)
    return ladder.codes, ladder.levels, ladder.least * fine, ladder.most * fine, fine
