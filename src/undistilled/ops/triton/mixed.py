"""Experts whose three weights no one set of kernels serves: each product by the kernels of its own weight.

A budget gives each projection of a layer's experts what it deserves: one may be in dynamic blocks and another in INT8.
Shapes as in ops/experts.py. Pairs lie in one order for all three products, whatever the tiles that they are cut into.
"""

from __future__ import annotations

import torch

from ...scheme import Stored
from ...scheme.tiles import Tiles
from . import experts as routed
from . import tiles


def experts(
    x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, gate: Stored, up: Stored, down: Stored
) -> torch.Tensor:
    """The op's meaning, in [T, D] of x's dtype, for one token at least."""
    (T, D), k, (E, W, _) = x_TD.shape, ids_Tk.shape[1], gate.shape
    pairs, few = T * k, T * k <= routed.FEW
    x, ids, shares = x_TD.contiguous(), ids_Tk.contiguous(), weights_Tk.float().contiguous()
    together = routed.arranged(ids, E) if few else None
    of = [tiles if isinstance(w.scheme, Tiles) else routed for w in (gate, up, down)]
    arranged = {kernels: together or routed.tiles(ids, E, kernels.LARGE) for kernels in set(of)}
    dtype = torch.float32 if few else x.dtype
    g, u, y = (x.new_empty(pairs, size, dtype=dtype) for size in (W, W, D))
    of[0].one(x, g, gate, arranged[of[0]], k, few)
    of[1].one(x, u, up, arranged[of[1]], k, few)
    of[2].one(g, y, down, arranged[of[2]], k, few, u, shares)
    return routed.summed(y, ids, E, x.dtype)
