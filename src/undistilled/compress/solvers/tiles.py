"""Dynamic blocks: what each tile loses at each width, and the values of a weight once its widths are counted.

A tile's loss is the weighted square error of its values with searched scales: 1/2 sum of G[r] M[c, c] d[r, c]^2, with
output and input moments from compress/calibrate.py. E experts (or nothing), B blocks, S sections, T tiles, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch

from ...scheme.base import Parts, Scheme
from ...scheme.grouped import NORMAL, Grouped, normal
from ...scheme.ladder import Ladder
from ...scheme.packing import QUANTUM
from ...scheme.tiles import WIDTHS, Tiles
from ..hessian import Factor, Hessian
from . import gptq, hqq, search

MEASURED = 5  # candidates for a scale where only the loss is wanted


def lost(scheme: Scheme, parts: Parts, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """What each value of [..., N, K] loses as `parts` of `scheme`, for mean moments [..., K] and [..., N]."""
    d = scheme.decompress(parts, tuple(w.shape), torch.float32) - w
    return 0.5 * d.square() * inputs[..., None, :] * outputs[..., :, None]


Rounding = Callable[[Grouped, torch.Tensor, torch.Tensor], Parts]  # of a scheme, [..., N, K] and moments [..., K]


def searching(scheme: Grouped, w: torch.Tensor, inputs: torch.Tensor) -> Parts:
    """Scales by a short search, where only the loss is wanted."""
    return search.solve(scheme, w, inputs[..., None, :], MEASURED)


def losses(
    shape: Tiles,
    w: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    widths: tuple[int, ...] = WIDTHS,
    rounding: Rounding = searching,
) -> dict[int, torch.Tensor]:
    """Bits -> losses [..., B, S, T] of [..., N, K], for mean moments [..., K] and [..., N]."""
    found = {}
    for bits in widths:
        scheme = normal(bits, shape.cols)
        parts = rounding(scheme, w, inputs)
        found[bits] = shape.tiled(lost(scheme, parts, w, inputs, outputs)).sum((-1, -2))
    return found


def corrected(
    w: torch.Tensor, hessian: Hessian, outputs: torch.Tensor, group: int, known: Factor | None = None
) -> dict[int, tuple[float, float]]:
    """Bits -> what [N, K] loses by the diagonal of its moments with searched scales, and by all of them after GPTQ."""
    forms = [normal(bits, group) for bits in WIDTHS]
    diagonal = hessian.diagonal()
    metas = [search.fit(form, w, diagonal.reshape(1, -1), MEASURED) for form in forms]
    wide = [f.steps(m)[0].repeat_interleave(group, -1)[..., : w.shape[-1]] for f, m in zip(forms, metas, strict=True)]
    begins = _begins(WIDTHS, w.device)[:, None, None].expand(-1, *w.shape)
    grid = gptq.Grid(torch.stack(wide), None, begins, _ladders(w.device))
    codes = gptq.rounded(w.expand(len(WIDTHS), -1, -1), hessian, grid, known)
    found = []
    for form, meta, own in zip(forms, metas, codes, strict=True):
        before, after = (form.dense(c, meta) - w for c in (form.codes(w, meta), own))
        one, other = (before.square() * diagonal).sum(-1), hessian.lost(after)
        found.append(torch.stack([(outputs * one).sum(), (outputs * other).sum()]))
    return {bits: (one, other) for bits, (one, other) in zip(WIDTHS, torch.stack(found).tolist(), strict=True)}


def solve(
    scheme: Tiles, w: torch.Tensor, hessian: Hessian, outputs: torch.Tensor, known: Factor | None = None
) -> Parts:
    """[..., N, K] in `scheme`: widths by loss, values by GPTQ, for mean moments of inputs, and of outputs [..., N].
    `known`: the factor of the inputs' `whole`."""
    order, scales = _searched(scheme, w, hessian.diagonal(), outputs)
    place = order.argsort(-1)
    meta = scheme.stored_scales(scales)
    steps = scheme.sorted(scheme.read_scales(meta), place)
    begin = _begins(scheme.widths, w.device)[place]
    scale, begins = (_spread(scheme, by_row, w) for by_row in (steps, begin[..., None].expand_as(steps)))
    codes = gptq.rounded(w, hessian, gptq.Grid(scale, None, begins, _ladders(w.device)), known)
    return scheme.pack(scheme.sorted(scheme.tiled(codes), order), order, meta)


def searched(scheme: Tiles, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> Parts:
    """[..., N, K] in `scheme` for mean moments [..., K] and [..., N]: searched scales, nearest levels."""
    order, scales = _searched(scheme, w, inputs, outputs)
    return scheme.assemble(scheme.tiled(w), scales, order)


def plain(scheme: Tiles, w: torch.Tensor) -> Parts:
    """[..., N, K] in `scheme` without moments: widths by loss, scales by half-quadratic splitting, nearest levels."""
    order = _order(scheme, w, w.new_ones(w.shape[-1]), w.new_ones(w.shape[-2]))
    tiles = scheme.tiled(w)
    scales = _scales(scheme, scheme.sorted(tiles, order), lambda form, some, _: hqq.fit(form, some))
    return scheme.assemble(tiles, scales, order)


def _searched(
    scheme: Tiles, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [..., B, S, T], scales [..., B, S, T, R] in it)."""
    order = _order(scheme, w, inputs, outputs)
    counts = inputs.unsqueeze(-2).expand(*inputs.shape[:-1], w.shape[-2], -1)[..., :: scheme.rows, :]
    by_tile = replace(scheme, rows=1).tiled(counts).squeeze(-2)  # [..., B, S, T, C]
    weight = scheme.sorted(by_tile, order)[..., None, :]
    tiles = scheme.sorted(scheme.tiled(w), order)
    return order, _scales(scheme, tiles, lambda form, some, at: search.fit(form, some, weight[..., at, :, :]))


def _order(scheme: Tiles, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Tiles [..., B, S, T] by what they lose at the middle width."""
    middle = scheme.counts[len(scheme.counts) // 2][0]
    return losses(scheme, w, inputs, outputs, (middle,))[middle].argsort(-1)


def _scales(scheme: Tiles, tiles: torch.Tensor, fit: Callable[[Grouped, torch.Tensor, slice], Parts]) -> torch.Tensor:
    """Scales [..., B, S, T, R] of tiles [..., B, S, T, R, C] in stored order, as `fit` has them for their widths."""
    found, at = [], 0
    for bits, count in scheme.counts:
        form, some = normal(bits, scheme.cols), slice(at, at + count)
        fitted, _ = form.steps(fit(form, tiles[..., some, :, :], some))
        found.append(fitted[..., 0])
        at += count
    return torch.cat(found, -2)


def _spread(scheme: Tiles, by_row: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[..., B, S, T, R] -> [..., N, K]: each value for a tile's row."""
    return scheme.flat(by_row[..., None].expand(*by_row.shape, scheme.cols), tuple(w.shape))


FINE, MOST = 2, int(NORMAL[2][-1])  # what lies halfway between levels of any width is half a unit's multiple
STEPS = 2 * FINE * MOST + 1


def _begins(bits: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where the tables of widths begin in `_ladders`, int32; made without waiting for the device."""
    found = torch.tensor([(b - WIDTHS[0]) * STEPS for b in bits], dtype=torch.int32)
    return found.to(device, non_blocking=True)


@cache
def _ladders(device: torch.device) -> Ladder:
    """The tables of every width, one after another."""
    ends = torch.arange(-FINE * MOST, FINE * MOST + 1) / FINE
    codes, levels = zip(*(normal(bits, QUANTUM).ladder(ends.device).nearest(ends) for bits in WIDTHS), strict=True)
    return Ladder(-MOST, MOST, FINE, torch.cat(codes).to(device), torch.cat(levels).to(device))
