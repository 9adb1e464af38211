"""GPTQ (Frantar et al. 2023): input by input, what rounding one loses is made up for by those still to come.

Source: the paper's algorithm 1, with scales chosen beforehand (by search, weighted by the moments' diagonal) and the
inputs of largest moment first. B stacked weights (experts), N outputs, K inputs. Inputs come first in memory, so that
one input of all outputs lies together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...scheme.base import Parts
from ...scheme.grouped import Grouped
from ...scheme.ladder import Ladder, inverse
from ..hessian import Factor, Hessian, factor
from . import on_gpu, search

BLOCK = 64  # inputs whose corrections are carried to the rest at once


@dataclass
class Grid:
    """What a value may become: a level of the ladder * scale + low. scale, low and begin are [B, N, K].

    begin: where a value's own table begins in the ladder's, int32; None where it has one.
    """

    scale: torch.Tensor
    low: torch.Tensor | None
    begin: torch.Tensor | None
    ladder: Ladder


def solve(scheme: Grouped, w: torch.Tensor, hessian: Hessian, known: Factor | None = None) -> Parts:
    """[..., N, K] in `scheme`, for inputs with such second moments; `known`: their `whole`'s factor."""
    meta = search.fit(scheme, w, hessian.diagonal()[..., None, :])
    s, m = scheme.steps(meta)
    wide = [None if t is None else t.repeat_interleave(scheme.group, -1)[..., : w.shape[-1]] for t in (s, m)]
    assert wide[0] is not None
    codes = rounded(w, hessian, Grid(wide[0], wide[1], None, scheme.ladder(w.device)), known)
    return {"values": scheme.packed(codes), **meta}


def rounded(w: torch.Tensor, hessian: Hessian, grid: Grid, known: Factor | None = None) -> torch.Tensor:
    """Codes uint8 [..., N, K] of a weight, or of stacked ones."""
    found = known or factor(hessian.whole)
    order = found.order.expand(w.shape[0] if w.dim() > 2 else 1, -1)
    stretch = None if hessian.stretch is None else hessian.stretch.expand(*w.shape[:-2], w.shape[-1])

    def by_input(t: torch.Tensor, sized: bool) -> torch.Tensor:
        """[..., N, K] -> [B, K, N] in order, times the stretch where the values have the size of weights."""
        t = t if stretch is None or not sized else t * stretch[..., None, :]
        t = t.reshape(-1, *t.shape[-2:])
        return t.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, t.shape[1]))

    scale = by_input(grid.scale, True)
    low = None if grid.low is None else by_input(grid.low, True)
    begin = None if grid.begin is None else by_input(grid.begin, False)
    codes = _by_blocks(by_input(w.float(), True), found.upper, Grid(scale, low, begin, grid.ladder))
    place = order.argsort(-1)[:, :, None].expand_as(codes)
    return codes.gather(1, place).transpose(1, 2).reshape(w.shape)


def _by_blocks(w: torch.Tensor, upper: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [B, K, N] of w [B, K, N], which is used up; the grid's parts lie as it does."""
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    rounds = _block
    if on_gpu(w):
        from .gptq_cuda import block as rounds
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        some = [None if t is None else t[:, start:stop] for t in (grid.scale, grid.low, grid.begin)]
        assert some[0] is not None
        block = Grid(some[0], some[1], some[2], grid.ladder)
        lost = rounds(w[:, start:stop], upper[:, start:stop, start:stop], block, codes[:, start:stop])
        if stop < w.shape[1]:
            carried = upper[:, start:stop, stop:].transpose(1, 2).expand(len(w), -1, -1)
            w[:, stop:].baddbmm_(carried, lost, alpha=-1)
    return codes


def _block(w: torch.Tensor, upper: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Rounds a few inputs [B, k, N] into `codes`; what each lost, in units of the factor's diagonal, [B, k, N]."""
    lost = torch.empty_like(w)
    by = inverse(grid.scale)
    upper = upper.expand(len(w), -1, -1)
    for i in range(w.shape[1]):
        x = w[:, i] if grid.low is None else w[:, i] - grid.low[:, i]
        code, level = grid.ladder.nearest(x * by[:, i], None if grid.begin is None else grid.begin[:, i])
        codes[:, i] = code
        torch.sub(x, level.mul_(grid.scale[:, i]), out=lost[:, i]).div_(upper[:, i, i, None])
        w[:, i + 1 :].baddbmm_(upper[:, i, i + 1 :, None], lost[:, i, None], alpha=-1)
    return lost
