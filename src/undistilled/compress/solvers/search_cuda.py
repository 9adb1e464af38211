"""The search for scales on a GPU: all candidates at once, in one launch that fits them and one that takes the best.

Between the two PyTorch rounds scales to how they are stored, which may take a whole row. G groups of a weight,
C candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...scheme.grouped import Grouped
from .ladder_cuda import arguments, inverse, nearest

TILE = 2048  # values of a program


@triton.jit
def _tile(values, importance, total, rows, by_row, group, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Groups, whether there are such, and their values and importances, which are 0 past a group's end."""
    at = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = at < total
    there = inside[:, None] & (column < group)
    v = tl.load(values + at[:, None] * group + column, mask=there, other=0.0)
    matter = (at // by_row // rows) * by_row + at % by_row  # all rows of a matrix have the same
    h = tl.load(importance + matter[:, None] * group + column, mask=there, other=0.0)
    return at, inside, v, h


@triton.jit
def _snapped(v, scale, minimum, table, levels, least, most, fine):
    """The levels nearest to values [G, W] with such scales and minimums [G]."""
    over = inverse(scale)[:, None]
    x = v * over
    if minimum is not None:
        x -= minimum[:, None] * over
    _, level = nearest(x, 0, table, levels, least, most, fine)
    return level


@triton.jit(do_not_specialize=["total", "rows", "by_row", "group", "candidates"])
def _refitted(
    values, importance, base, low, factors, scales, minimums, table, levels, least, most, fine, highest,
    total, rows, by_row, group, candidates, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at, inside, v, h = _tile(values, importance, total, rows, by_row, group, GROUPS, WIDTH)
    b = tl.load(base + at, mask=inside, other=0.0)
    for i in range(candidates):
        factor = tl.load(factors + i)
        s = b * factor
        if low is None:
            t = _snapped(v, s, None, table, levels, least, most, fine)
            tt, wt = tl.sum(h * t * t, 1), tl.sum(h * t * v, 1)
            s = tl.where(tt > 0, tl.div_rn(wt, tl.maximum(tt, 1e-30)), s)
        else:
            m = tl.load(low + at, mask=inside, other=0.0) + b * (1 - factor) * highest * 0.5
            t = _snapped(v, s, m, table, levels, least, most, fine)
            n, w = tl.sum(h, 1), tl.sum(h * v, 1)
            st, tt, wt = tl.sum(h * t, 1), tl.sum(h * t * t, 1), tl.sum(h * t * v, 1)
            det = n * tt - st * st
            sound = det > 1e-6 * n * tt
            det = tl.where(sound, det, 1.0)
            s = tl.where(sound, tl.div_rn(n * wt - st * w, det), s)
            m = tl.where(sound, tl.div_rn(tt * w - st * wt, det), m)
            tl.store(minimums + at, m, mask=inside)
            minimums += total
        tl.store(scales + at, s, mask=inside)
        scales += total


@triton.jit(do_not_specialize=["total", "rows", "by_row", "group", "candidates"])
def _best(
    values, importance, base, low, scales, minimums, table, levels, least, most, fine,
    total, rows, by_row, group, candidates, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Leaves in `base` and `low` the candidate of least error."""
    at, inside, v, h = _tile(values, importance, total, rows, by_row, group, GROUPS, WIDTH)
    kept = tl.load(base + at, mask=inside, other=0.0)
    kept_low = kept
    if low is not None:
        kept_low = tl.load(low + at, mask=inside, other=0.0)
    least_error = tl.full([GROUPS], float("inf"), tl.float32)
    for _ in range(candidates):
        s = tl.load(scales + at, mask=inside, other=0.0)
        if low is None:
            missed = v - _snapped(v, s, None, table, levels, least, most, fine) * s[:, None]
        else:
            m = tl.load(minimums + at, mask=inside, other=0.0)
            missed = v - (_snapped(v, s, m, table, levels, least, most, fine) * s[:, None] + m[:, None])
        error = tl.sum(h * missed * missed, 1)
        better = error < least_error
        least_error = tl.where(better, error, least_error)
        kept = tl.where(better, s, kept)
        if low is not None:
            kept_low = tl.where(better, m, kept_low)
            minimums += total
        scales += total
    tl.store(base + at, kept, mask=inside)
    if low is not None:
        tl.store(low + at, kept_low, mask=inside)


def best(
    scheme: Grouped, groups: torch.Tensor, h: torch.Tensor, base: torch.Tensor, low: torch.Tensor | None,
    factors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """As search._best: scales and minimums [..., N, G] of values [..., N, G, group], for importances [..., 1, G, group]
    and the candidates that `factors` [C] times `base` give."""
    per_row, group = groups.shape[-2:]
    lead, rows = groups.shape[:-3], groups.shape[-3]
    groups, h = groups.contiguous(), h.expand(*lead, 1, per_row, group).contiguous()
    base, low = base.contiguous(), None if low is None else low.contiguous()
    total, width = base.numel(), triton.next_power_of_2(group)
    sizes = (total, rows, per_row, group, len(factors))
    tile = {"GROUPS": max(1, TILE // width), "WIDTH": width}
    grid = (triton.cdiv(total, tile["GROUPS"]),)
    ladder = arguments(scheme.ladder(base.device))
    s = base.new_empty((len(factors), *base.shape))
    m = None if low is None else torch.empty_like(s)
    _refitted[grid](groups, h, base, low, factors, s, m, *ladder, float(scheme.levels[-1]), *sizes, **tile)
    s, m = scheme.steps(scheme.stored(s, m))
    kept, kept_low = base.clone(), None if low is None else low.clone()
    s, m = s.contiguous(), None if m is None else m.contiguous()
    _best[grid](groups, h, kept, kept_low, s, m, *ladder, *sizes, **tile)
    return kept, kept_low
