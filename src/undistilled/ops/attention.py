"""Grouped-query attention over a paged cache, for the tokens of one prompt and for rows of many requests.

L new tokens, C cached ones (the new among them), R rows, H heads, G key-value heads, D head width.
Slots are rows of the cache: token t of a row lies in slot table[t // size] * size + t % size.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from . import triton as cuda
from .cpu import native
from .registry import op


def context_slots(table_B: torch.Tensor, size: int, context: int) -> torch.Tensor:
    """The cache slots of tokens 0..context-1 of a row with this block table."""
    blocks = -(-context // size)
    offsets = torch.arange(size, device=table_B.device)
    return (table_B[:blocks, None].long() * size + offsets).flatten()[:context]


def causal(q_LHD: torch.Tensor, k_CHD: torch.Tensor, v_CHV: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q k^T scale) v, the last of L tokens seeing all C; returns [L, H, V] in the dtype of q."""
    fresh, seen = q_LHD.shape[0], k_CHD.shape[0]
    width = v_CHV.shape[-1]
    if width != q_LHD.shape[-1]:  # the fused kernels want values as wide as keys
        v_CHV = F.pad(v_CHV, (0, q_LHD.shape[-1] - width))
    if k_CHD.shape[1] != q_LHD.shape[1]:
        times = q_LHD.shape[1] // k_CHD.shape[1]
        k_CHD, v_CHV = k_CHD.repeat_interleave(times, 1), v_CHV.repeat_interleave(times, 1)
    if q_LHD.device.type == "cpu" and fresh > QUERIES:
        pieces = enumerate(q_LHD.split(QUERIES))
        done = [_fused(q, k_CHD, v_CHV, seen - fresh + i * QUERIES, scale) for i, q in pieces]
        return torch.cat(done)[..., :width]
    return _fused(q_LHD, k_CHD, v_CHV, seen - fresh, scale)[..., :width]


QUERIES = 128  # of a prompt that attend together on a CPU, so that keys which none of them sees cost nothing


def _fused(q_LHD: torch.Tensor, k_CHD: torch.Tensor, v_CHD: torch.Tensor, before: int, scale: float) -> torch.Tensor:
    """PyTorch's kernel on queries behind `before` cached tokens; keys past the last query are left out."""
    fresh = q_LHD.shape[0]
    seen = before + fresh
    q, k, v = (t.transpose(0, 1)[None] for t in (q_LHD, k_CHD[:seen], v_CHD[:seen]))
    mask = None
    if before and fresh > 1:
        last = torch.arange(before, seen, device=q.device)
        mask = torch.arange(seen, device=q.device)[None] <= last[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not before and fresh > 1, scale=scale)
    return out[0].transpose(0, 1)


@op
def packed(
    q_THD: torch.Tensor, k_THD: torch.Tensor, v_THV: torch.Tensor, bounds_S: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Causal attention within each of several documents, which lie in [bounds_S[i], bounds_S[i + 1]): [T, H, V]."""
    edges = bounds_S.tolist()
    spans = [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]
    return torch.cat([causal(q_THD[s], k_THD[s], v_THV[s], scale) for s in spans])


@packed.register("varlen", lambda q: q.device.type == "cuda" and q.dtype == torch.bfloat16, "PyTorch's FlashAttention")
def _varlen(q_THD, k_THD, v_THV, bounds_S, longest, scale):
    from torch.nn.attention.varlen import varlen_attn

    width = v_THV.shape[-1]
    v_THD = F.pad(v_THV, (0, q_THD.shape[-1] - width))  # the kernel wants values as wide as keys
    out: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        q_THD, k_THD, v_THD, bounds_S, bounds_S, longest, longest, scale=scale, window_size=(-1, 0)
    )
    return out[..., :width]


@op
def attend_rows(
    q_RHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table_RB: torch.Tensor,
    context_R: torch.Tensor,
    size: int,
    scale: float,
) -> torch.Tensor:
    """Row by row: each row sees the first context_R[r] tokens of its own block table. Caches [slots, G, D]."""
    out = torch.empty_like(q_RHD)
    for row, context in enumerate(context_R.tolist()):
        slots = context_slots(table_RB[row], size, context)
        k, v = k_cache[slots].to(q_RHD.dtype), v_cache[slots].to(q_RHD.dtype)
        out[row] = causal(q_RHD[row : row + 1], k, v, scale)[0]
    return out


@attend_rows.register("native", native.serves, "our C kernel: reads the pages in place")
def _native_rows(q_RHD, k_cache, v_cache, table_RB, context_R, size, scale):
    return native.attend_rows(q_RHD.contiguous(), k_cache, v_cache, table_RB, context_R, size, scale)


@attend_rows.register("triton", cuda.serves, "our Triton kernel: the pages in place, a context split over programs")
def _triton_rows(q_RHD, k_cache, v_cache, table_RB, context_R, size, scale):
    from .triton import attention as kernels

    return kernels.attend_rows(q_RHD, k_cache, v_cache, table_RB, context_R, size, scale)
