"""Dynamic blocks: what each tile loses at each width, and the values of a weight once its widths are counted.

A tile's loss is the weighted square error of its values with searched scales: 1/2 sum of G[r] M[c, c] d[r, c]^2, with
output and input moments from compress/calibrate.py. E experts (or nothing), B blocks, S sections, T tiles, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ...scheme.base import Parts, Scheme
from ...scheme.grouped import NORMAL, Grouped, normal
from ...scheme.packing import QUANTUM
from ...scheme.tiles import WIDTHS, Tiles
from . import gptq, hqq, search

MEASURED = 5  # candidates for a scale where only the loss is wanted


def lost(scheme: Scheme, parts: Parts, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """What each value of [..., N, K] loses as `parts` of `scheme`, for mean moments [..., K] and [..., N]."""
    d = scheme.decompress(parts, tuple(w.shape), torch.float32) - w
    return 0.5 * d.square() * inputs[..., None, :] * outputs[..., :, None]


def losses(
    shape: Tiles, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor, widths: tuple[int, ...] = WIDTHS
) -> dict[int, torch.Tensor]:
    """Bits -> losses [..., B, S, T] of [..., N, K], for mean moments [..., K] and [..., N]."""
    found = {}
    for bits in widths:
        scheme = normal(bits, shape.cols)
        parts = search.solve(scheme, w, inputs[..., None, :], MEASURED)
        found[bits] = shape.tiled(lost(scheme, parts, w, inputs, outputs)).sum((-1, -2))
    return found


def solve(scheme: Tiles, w: torch.Tensor, moments: torch.Tensor, outputs: torch.Tensor) -> Parts:
    """[..., N, K] in `scheme`: widths by loss, values by GPTQ, for mean moments [..., K, K] and [..., N]."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    order = _order(scheme, w, diagonal, outputs)
    scales, kind = _scales(scheme, w, order, lambda form: search.fit(form, w, diagonal[..., None, :]))
    place = order.argsort(-1)
    meta = scheme.stored_scales(scales)
    steps = scheme.sorted(scheme.read_scales(meta), place)
    wide = (_spread(scheme, by_row, w) for by_row in (steps, _begins(kind)[..., None].expand_as(steps)))
    scale, kinds = (t.reshape(-1, *w.shape[-2:]) for t in wide)
    grid = gptq.Grid(scale, None, kinds, nearest)
    codes = gptq.rounded(gptq.stacked(w), gptq.stacked(moments), grid).reshape(w.shape)
    return scheme.pack(scheme.sorted(scheme.tiled(codes), order), order, meta)


def plain(scheme: Tiles, w: torch.Tensor) -> Parts:
    """[..., N, K] in `scheme` without moments: widths by loss, scales by half-quadratic splitting, nearest levels."""
    order = _order(scheme, w, w.new_ones(w.shape[-1]), w.new_ones(w.shape[-2]))
    scales, _ = _scales(scheme, w, order, lambda form: hqq.fit(form, w))
    return scheme.assemble(scheme.tiled(w), scales, order)


def _order(scheme: Tiles, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Tiles [..., B, S, T] by what they lose at the middle width."""
    middle = scheme.counts[len(scheme.counts) // 2][0]
    return losses(scheme, w, inputs, outputs, (middle,))[middle].argsort(-1)


def _scales(
    scheme: Tiles, w: torch.Tensor, order: torch.Tensor, fit: Callable[[Grouped], Parts]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [..., B, S, T, R] in stored order, as `fit` has them for a width; bits [..., B, S, T] by place."""
    scales = None
    kind = torch.tensor(scheme.widths, device=w.device)[order.argsort(-1)]
    for bits, _ in scheme.counts:
        form = normal(bits, scheme.cols)
        fitted, _ = form.steps(fit(form))
        by_tile = scheme.tiled(fitted.repeat_interleave(scheme.cols, -1)[..., : w.shape[-1]])[..., 0]
        scales = by_tile if scales is None else torch.where((kind == bits)[..., None], by_tile, scales)
    assert scales is not None
    return scheme.sorted(scales, order), kind


def _spread(scheme: Tiles, by_row: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[..., B, S, T, R] -> [..., N, K]: each value for a tile's row."""
    return scheme.flat(by_row[..., None].expand(*by_row.shape, scheme.cols), tuple(w.shape))


def nearest(x: torch.Tensor, kind: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and levels of values in units of their scales; `kind`: where the rungs of their width begin."""
    assert kind is not None
    codes, levels = _rungs(x.device)
    place = (x * FINE).ceil_().clamp_(-FINE * MOST, FINE * MOST).int() + kind
    return codes[place], levels[place]


FINE, MOST = 2, int(NORMAL[2][-1])  # what lies halfway between levels of any width is half a unit's multiple
STEPS = 2 * FINE * MOST + 1


def _begins(bits: torch.Tensor) -> torch.Tensor:
    """Where the rungs of each width are, for values from -MOST to MOST."""
    return (bits.int() - WIDTHS[0]) * STEPS + FINE * MOST


@cache
def _rungs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, levels) nearest to what lies in each half unit, width after width."""
    ends = torch.arange(-FINE * MOST, FINE * MOST + 1) / FINE
    forms = [normal(bits, QUANTUM) for bits in WIDTHS]
    codes = [form.rank(ends) for form in forms]
    levels = [form.level(code) for form, code in zip(forms, codes, strict=True)]
    return torch.cat(codes).to(device), torch.cat(levels).to(device)
