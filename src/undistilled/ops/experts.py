"""The chosen experts' SwiGLU for every token, weighted and summed.

T tokens, D hidden, W expert width, E experts, k chosen. Stacked weights: gate and up [E, W, D], down [E, D, W].
"""

from __future__ import annotations

import torch

from ..scheme import Stored
from ..scheme.across import Across
from . import triton as cuda
from .cpu import native
from .linear import LARGE, apply, checked, integers_ready, native_ready, rounds_ready
from .registry import op
from .swiglu import silu_mul

SCRATCH = 32 << 20  # bytes, about, that the C kernel may take beside its result


def swiglu(x_TD: torch.Tensor, gate: Stored, up: Stored, down: Stored) -> torch.Tensor:
    """down(silu(gate x) * up x)."""
    return apply(silu_mul(apply(x_TD, gate), apply(x_TD, up)), down)


@op
def experts(
    x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, gate: Stored, up: Stored, down: Stored
) -> torch.Tensor:
    """A loop over the experts that any token chose, in the order of their numbers.

    A token's sum runs over its own experts in that order, whoever else is in the batch.
    Ids outside [0, E) belong to another bank and add nothing.
    """
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert, (rows, picks) in by_expert(ids_Tk, gate.shape[0]):
        y = swiglu(x_TD[rows], *(_one(w, expert) for w in (gate, up, down)))
        out_TD.index_add_(0, rows, y.float() * weights_Tk[rows, picks, None])
    return out_TD.to(x_TD.dtype)


def by_expert(ids_Tk: torch.Tensor, experts: int):
    """(expert, (rows, which of the row's picks)) for every expert that was chosen."""
    flat, order = ids_Tk.flatten().sort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    k, start = ids_Tk.shape[1], 0
    for expert, count in enumerate(counts):
        if count:
            at = order[start : start + count]
            yield expert, (at // k, at % k)
        start += count


def _one(weight: Stored, expert: int) -> Stored:
    """An expert's view, kept so that its kernel is resolved once."""
    found = weight.kernels.get(expert)
    if found is None:
        found = weight.kernels[expert] = weight.expert(expert)
    return found  # type: ignore[return-value]


def _ready(w: Stored, dtype: torch.dtype) -> bool:
    return native_ready(w, dtype) or rounds_ready(w, dtype) or integers_ready(w, dtype)


@experts.register("native", _ready, "our C kernel: a chosen expert's weights read once for many rows")
def _native(
    x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, gate: Stored, up: Stored, down: Stored
) -> torch.Tensor:
    three = (gate, up, down)
    most = SCRATCH // native.pair_bytes(gate.shape[1], x_TD.shape[1], any(w.products is None for w in three))
    few = ids_Tk.numel() < LARGE * gate.shape[0] or all(w.products not in (None, "int16") for w in three)
    at_any_length = all(isinstance(w.scheme, Across) for w in three)
    ready = all(_ready(w, x_TD.dtype) for w in three)
    if not ready or not (at_any_length or (few and ids_Tk.numel() <= most)):
        return experts.reference.run(x_TD, ids_Tk, weights_Tk, gate, up, down)
    chosen, shares = ids_Tk.int().contiguous(), weights_Tk.contiguous()
    return native.experts_rows(x_TD.contiguous(), checked(gate), checked(up), checked(down), chosen, shares, most)


@experts.register("triton", cuda.multiplies, "our Triton kernels: pairs sorted by expert, no word to the host")
def _triton(
    x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, gate: Stored, up: Stored, down: Stored
) -> torch.Tensor:
    three = (gate, up, down)
    if not fused(*three, x_TD.dtype) or not len(x_TD):
        return experts.reference.run(x_TD, ids_Tk, weights_Tk, *three)
    from .triton import experts as codes
    from .triton import mixed, tiles

    blocks = [cuda.tiles_ready(w, x_TD.dtype) for w in three]
    one_form = gate.scheme == up.scheme and not any(blocks)
    kernels = tiles if all(blocks) else codes if one_form else mixed
    return kernels.experts(x_TD, ids_Tk, weights_Tk, *three)


def fused(gate: Stored, up: Stored, down: Stored, dtype: torch.dtype) -> bool:
    """Whether Triton kernels serve these three, which the choice by `gate` alone does not say."""
    return all(cuda.multiplies(w, dtype) for w in (gate, up, down))
