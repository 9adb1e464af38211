"""GPTQ (Frantar et al. 2023): input by input, what rounding one loses is made up for by those still to come.

Source: the paper's algorithm 1, with scales chosen beforehand (by search, weighted by the moments' diagonal) and the
inputs of largest moment first. B stacked weights (experts), N outputs, K inputs.
"""

from __future__ import annotations

import torch

from ...scheme.base import Parts
from ...scheme.grouped import Grouped
from . import search

DAMP = 0.01  # of the mean of the diagonal, added to it
BLOCK = 64  # inputs whose corrections are carried to the rest at once


def solve(scheme: Grouped, w: torch.Tensor, moments: torch.Tensor) -> Parts:
    """[..., N, K] in `scheme`, for inputs with second moments [..., K, K]."""
    shape = w.shape
    w_BNK = w.float().reshape(-1, *shape[-2:]).clone()
    h_BKK = moments.float().reshape(-1, *moments.shape[-2:]).clone()
    diagonal = h_BKK.diagonal(dim1=-2, dim2=-1)
    meta = search.fit(scheme, w_BNK, diagonal[:, None])
    damp = DAMP * diagonal.mean(-1, keepdim=True) + 1e-10
    diagonal += damp
    order = diagonal.argsort(-1, descending=True)
    codes = _rounded(scheme, w_BNK, _factor(h_BKK, order), order, meta)
    parts = {"values": scheme.packed(codes), **meta}
    return {name: part.reshape(*shape[:-2], *part.shape[1:]) for name, part in parts.items()}


def _factor(h_BKK: torch.Tensor, order_BK: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, inputs in `order`."""
    wide = order_BK[:, :, None].expand_as(h_BKK)
    h = h_BKK.gather(1, wide).gather(2, wide.transpose(1, 2))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


def _rounded(scheme: Grouped, w_BNK, u_BKK, order_BK, meta: Parts) -> torch.Tensor:
    """Codes uint8 [B, N, K] in the weight's own order."""
    b, n, k = w_BNK.shape
    scales, low = scheme.steps(meta)
    pick = order_BK[:, None].expand(b, n, k)
    w = w_BNK.gather(2, pick)
    s = scales.gather(2, pick // scheme.group)
    m = None if low is None else low.gather(2, pick // scheme.group)
    levels = torch.tensor(scheme.levels, device=w.device)
    codes = torch.empty(b, n, k, dtype=torch.uint8, device=w.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, lost = w[..., start:stop].clone(), torch.empty(b, n, stop - start, device=w.device)
        u = u_BKK[:, start:stop, start:stop]
        for i in range(stop - start):
            at = start + i
            low_i = None if m is None else m[..., at]
            code = scheme.nearest(block[..., i], s[..., at], low_i)
            value = levels[code.int()] * s[..., at]
            value = value if low_i is None else value + low_i
            codes[..., at] = code
            error = (block[..., i] - value) / u[:, i, i, None]
            block[..., i:] -= error[..., None] * u[:, i, None, i:]
            lost[..., i] = error
        w[..., stop:] -= lost @ u_BKK[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(2, pick, codes)
