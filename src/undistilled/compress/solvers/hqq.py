"""Half-quadratic quantization (Badri and Shaji 2023): minimums and scales without calibration, not led by outliers.

The error's lp norm with p < 1 is split: part of each error is set aside, more of a large one (the lp norm's proximal
step), and what remains is fitted by least squares: a minimum, or the scale where a scheme has no minimums. Errors are
in units of the step between levels, so that the size of weights does not matter; with BETA at 1 none is set aside that
rounding alone can make. A group keeps the best that it met, and it starts with what rounding to nearest takes. Scales
that are powers of two (mxfp4) seldom move.
"""

from __future__ import annotations

import torch

from ...scheme.base import Parts
from ...scheme.grouped import Grouped
from ...scheme.int8 import grouped

P = 0.7
BETA, GROWTH = 1.0, 1.01
ITERATIONS = 10


def fit(scheme: Grouped, w: torch.Tensor) -> Parts:
    """The parts beside `values` for [..., N, K]."""
    groups = grouped(w.float(), scheme.group)
    there = grouped(groups.new_ones(w.shape[-1]), scheme.group)
    step = (max(scheme.levels) - min(scheme.levels)) / (len(set(scheme.levels)) - 1)
    s, m = kept_s, kept_m = scheme.steps(scheme.fit(w.float()))
    best = torch.full_like(s, float("inf"))
    for at in range(ITERATIONS):
        scales, low = scheme.steps(scheme.stored(s, m))
        value = scheme.level(scheme.nearest(groups, scales[..., None], None if low is None else low[..., None]))
        error = (groups - value * scales[..., None] - (0 if low is None else low[..., None])) * there
        lost, rest = _split(error, scales * step, BETA * GROWTH**at)
        better = lost < best
        if not better.any():
            break
        best = best.where(~better, lost)
        kept_s = scales.where(better, kept_s)
        if low is not None and kept_m is not None:
            kept_m = low.where(better, kept_m)
        s, m = _refitted(value * there, rest, there, scales, low)
    return scheme.stored(kept_s, kept_m)


def _split(error: torch.Tensor, step: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(the lp norm of each group's errors to the power of p, what remains of the errors once a part is set aside)."""
    unit = step.abs().clamp(min=1e-30)
    size = (error / unit[..., None]).abs().clamp_(min=1e-6)
    power = size.pow(P - 1)
    return (size * power).sum(-1) * unit**P, error * (power / size / beta).clamp_(max=1)


def _refitted(
    value: torch.Tensor, rest: torch.Tensor, there: torch.Tensor, s: torch.Tensor, m: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The least-squares minimum, or scale, for levels `value` and what is left of the errors."""
    if m is not None:
        return s, m + rest.sum(-1) / there.sum(-1)
    return s + (value * rest).sum(-1) / value.square().sum(-1).clamp(min=1e-30), None


def solve(scheme: Grouped, w: torch.Tensor) -> Parts:
    """The weight [..., N, K] with such scales and minimums, and the nearest codes."""
    meta = fit(scheme, w)
    return {"values": scheme.packed(scheme.codes(w.float(), meta)), **meta}
