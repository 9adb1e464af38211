"""Scales by search: for each group, of several clipped ranges, the one with the least weighted error.

Given codes, the best scale (and minimum) is a weighted least-squares fit; given the scale, the nearest codes: each
candidate takes one of both (alternating minimisation, Lloyd 1982).
"""

from __future__ import annotations

import torch

from ...scheme.base import Parts
from ...scheme.grouped import Grouped
from ...scheme.int8 import grouped
from ...scheme.ladder import inverse
from . import on_gpu

CANDIDATES = 16
PIECE = 1 << 17  # values that a CPU fits at once: what is worked out between stays in its cache
NARROWEST, WIDEST = 0.45, 1.05  # of the whole range


def fit(scheme: Grouped, w: torch.Tensor, importance: torch.Tensor, candidates: int = CANDIDATES) -> Parts:
    """The parts beside `values` for [..., N, K]; importance >= 0 broadcasts with it (by input: [..., 1, K])."""
    at = 0 if w.dim() > 2 and w.shape[0] > 1 else w.dim() - 2  # never within a row
    if w.numel() <= PIECE or w.device.type != "cpu" or w.shape[at] == 1:
        return _fit(scheme, w, importance, candidates)
    pieces = w.split(max(1, w.shape[at] * PIECE // w.numel()), at)
    matter = [importance] * len(pieces)
    if importance.dim() == w.dim() and importance.shape[at] > 1:
        matter = list(importance.split(pieces[0].shape[at], at))
    found = [fit(scheme, one, other, candidates) for one, other in zip(pieces, matter, strict=True)]
    return {name: torch.cat([each[name] for each in found], at) for name in found[0]}


def _fit(scheme: Grouped, w: torch.Tensor, importance: torch.Tensor, candidates: int) -> Parts:
    groups = grouped(w.float(), scheme.group)
    h = grouped(importance.float().expand(*importance.shape[:-2], 1, w.shape[-1]) + 1e-12, scheme.group)
    if w.shape[-1] % scheme.group:
        h[..., -1, w.shape[-1] % scheme.group :] = 0
    base, low = scheme.steps(scheme.fit(w.float()))
    factors = torch.linspace(NARROWEST, WIDEST, candidates, device=w.device)
    best = _best
    if on_gpu(w):
        from .search_cuda import best
    return scheme.stored(*best(scheme, groups, h, base, low, factors))


def _best(
    scheme: Grouped, groups: torch.Tensor, h: torch.Tensor, base: torch.Tensor, low: torch.Tensor | None,
    factors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Scales and minimums [..., N, G] for values [..., N, G, group] and importances [..., 1, G, group], of the
    candidates that `factors` [C] times `base` give."""
    best = torch.full(base.shape, float("inf"), device=base.device)
    scales, minimums = base.clone(), None if low is None else low.clone()
    for factor in factors.tolist():
        s, m = base * factor, low
        if low is not None:
            m = low + base * (1 - factor) * scheme.levels[-1] / 2
        s, m = _refit(scheme, groups, h, s, m)
        parts = scheme.stored(s, m)
        s, m = scheme.steps(parts)
        error = _error(scheme, groups, h, s, m)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, s, scales)
        if m is not None and minimums is not None:
            minimums = torch.where(better, m, minimums)
    return scales, minimums


def _levels(scheme: Grouped, groups: torch.Tensor, s: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    by = inverse(s)[..., None]
    return scheme.snapped(groups * by if m is None else groups.mul(by).add_(-m[..., None] * by))


def _refit(scheme: Grouped, groups: torch.Tensor, h: torch.Tensor, s: torch.Tensor, m: torch.Tensor | None):
    t = _levels(scheme, groups, s, m)
    ht = h * t
    st, tt, wt = ht.sum(-1), (ht * t).sum(-1), (ht * groups).sum(-1)
    if m is None:
        return torch.where(tt > 0, wt / tt.clamp(min=1e-30), s), None
    n, w = h.expand_as(t).sum(-1), (h * groups).sum(-1)
    det = n * tt - st * st
    sound = det > 1e-6 * n * tt
    det = torch.where(sound, det, 1.0)
    return torch.where(sound, (n * wt - st * w) / det, s), torch.where(sound, (tt * w - st * wt) / det, m)


def _error(scheme: Grouped, groups: torch.Tensor, h: torch.Tensor, s: torch.Tensor, m: torch.Tensor | None):
    value = _levels(scheme, groups, s, m) * s[..., None]
    if m is not None:
        value += m[..., None]
    return (h * (groups - value).square()).sum(-1)


def solve(scheme: Grouped, w: torch.Tensor, importance: torch.Tensor, candidates: int = CANDIDATES) -> Parts:
    """The weight [..., N, K] with searched scales and the nearest codes."""
    meta = fit(scheme, w, importance, candidates)
    return {"values": scheme.packed(scheme.codes(w.float(), meta)), **meta}
