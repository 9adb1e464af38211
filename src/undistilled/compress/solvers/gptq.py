"""GPTQ (Frantar et al. 2023): input by input, what rounding one loses is made up for by those still to come.

Source: the paper's algorithm 1, with scales chosen beforehand (by search, weighted by the moments' diagonal) and the
inputs of largest moment first. B stacked weights (experts), N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...scheme.base import Parts
from ...scheme.grouped import Grouped
from . import search

DAMP = 0.01  # of the mean of the diagonal, added to it
BLOCK = 64  # inputs whose corrections are carried to the rest at once

Nearest = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Grid:
    """What a value may become: level * scale + low. scale, low and kind are [B, N, K].

    `nearest` takes values in units of their scale, and their kind, whatever that is, and gives codes and levels.
    """

    scale: torch.Tensor
    low: torch.Tensor | None
    kind: torch.Tensor | None
    nearest: Nearest


def solve(scheme: Grouped, w: torch.Tensor, moments: torch.Tensor) -> Parts:
    """[..., N, K] in `scheme`, for inputs with second moments [..., K, K]."""
    w_BNK, h_BKK = stacked(w), stacked(moments)
    meta = search.fit(scheme, w_BNK, h_BKK.diagonal(dim1=-2, dim2=-1)[:, None])
    s, m = scheme.steps(meta)
    wide = [None if t is None else t.repeat_interleave(scheme.group, -1)[..., : w.shape[-1]] for t in (s, m)]
    assert wide[0] is not None
    codes = rounded(w_BNK, h_BKK, Grid(wide[0], wide[1], None, _nearest(scheme)))
    parts = {"values": scheme.packed(codes), **meta}
    return {name: part.reshape(*w.shape[:-2], *part.shape[1:]) for name, part in parts.items()}


def stacked(t: torch.Tensor) -> torch.Tensor:
    """[..., A, B] -> [experts or 1, A, B] in float32, a copy."""
    return t.float().reshape(-1, *t.shape[-2:]).clone()


def _nearest(scheme: Grouped) -> Nearest:
    def nearest(x: torch.Tensor, _kind: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        codes = scheme.rank(x)
        return codes, scheme.level(codes)

    return nearest


def rounded(w_BNK: torch.Tensor, h_BKK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes uint8 [B, N, K]; both tensors are used up."""
    diagonal = h_BKK.diagonal(dim1=-2, dim2=-1)
    diagonal += DAMP * diagonal.mean(-1, keepdim=True) + 1e-10
    order = diagonal.argsort(-1, descending=True)
    u_BKK, pick = _factor(h_BKK, order), order[:, None].expand_as(w_BNK)
    w = w_BNK.gather(2, pick)
    scale, low, kind = (None if t is None else t.gather(2, pick) for t in (grid.scale, grid.low, grid.kind))
    assert scale is not None
    inverse = scale.reciprocal().masked_fill_(scale == 0, 0.0)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, w.shape[-1], BLOCK):
        stop = min(start + BLOCK, w.shape[-1])
        block, lost = w[..., start:stop].clone(), torch.empty_like(w[..., start:stop])
        u = u_BKK[:, start:stop, start:stop]
        for i in range(stop - start):
            at = start + i
            offset = 0.0 if low is None else low[..., at]
            code, level = grid.nearest(
                (block[..., i] - offset) * inverse[..., at], None if kind is None else kind[..., at]
            )
            codes[..., at] = code
            error = (block[..., i] - level * scale[..., at] - offset) / u[:, i, i, None]
            block[..., i:] -= error[..., None] * u[:, i, None, i:]
            lost[..., i] = error
        w[..., stop:] -= lost @ u_BKK[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(2, pick, codes)


def _factor(h_BKK: torch.Tensor, order_BK: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, inputs in `order`."""
    wide = order_BK[:, :, None].expand_as(h_BKK)
    h = h_BKK.gather(1, wide).gather(2, wide.transpose(1, 2))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
