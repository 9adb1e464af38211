"""The native CPU kernels: tensors in, tensors out.

Every function keeps a row's bits independent of the other rows in the call and of the number of
threads: as many as PyTorch's, our own (pool.h).

Shape suffixes: M rows of activations, N outputs, K inputs, R rows (one per sequence), H heads,
D head width, W cache width, B blocks of a table. Activations are float32 and contiguous.
"""

import torch
from torch import Tensor

from .loader import FLOATS, build, crosses, kernels, library, pointer, rounds, serves, sized, tiles, why_missing
from .matrix import Matrix, check
from .rows import (
    PIECE,
    absorb,
    norm_rows,
    pick_rows,
    pointwise,
    read,
    release,
    rope_rows,
    route,
    silu_mul,
    write_rows,
)

__all__ = [
    "PIECE",
    "absorb",
    "attend_rows",
    "build",
    "crosses",
    "dequantise",
    "experts_rows",
    "library",
    "linear",
    "mla_rows",
    "norm_rows",
    "pair_bytes",
    "pick_rows",
    "pointwise",
    "read",
    "release",
    "rope_rows",
    "rounds",
    "route",
    "serves",
    "silu_mul",
    "sized",
    "tiles",
    "why_missing",
    "write_rows",
]


def linear(x_MK: Tensor, weight: Matrix) -> Tensor:
    """y [..., N] = x [..., K] @ W^T; x rounded first where the weight's products do."""
    n, k = weight.n, weight.k
    if x_MK.dtype is not torch.float32 or not x_MK.is_contiguous() or not x_MK.is_cpu or x_MK.shape[-1] != k:
        raise ValueError(f"x: want a contiguous float32 tensor [..., {k}] on the CPU")
    check(weight.experts is None, "weight: want one matrix, not experts")
    m = x_MK.numel() // k
    y_MN = x_MK.new_empty(m, n)
    sized()
    run = kernels.linear_rounded if _arranged(weight) else kernels.linear
    run(weight.pointer, x_MK.data_ptr(), y_MN.data_ptr(), m)
    return y_MN if x_MK.dim() == 2 else y_MN.view(*x_MK.shape[:-1], n)


def _arranged(weight: Matrix) -> bool:
    """Whether the kernels lay out x before the product."""
    check(weight.products != "bfloat16" or rounds(), "products: no bfloat16 in this build")
    return weight.struct.rounds != 0


def dequantise(weight: Matrix, rows: tuple[int, int] | None = None) -> Tensor:
    """A stored weight [N, K], or its rows [n0, n1), as float32."""
    n0, n1 = rows or (0, weight.n)
    check(0 <= n0 <= n1 <= weight.n and weight.experts is None, "rows: outside the weight")
    sized()
    out = torch.empty((n1 - n0, weight.k))
    kernels.dequantise(weight.pointer, out.data_ptr(), n0, n1)
    return out


def attend_rows(
    q_RHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    context_R: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Grouped-query attention of one query per row over its first context_R[r] tokens.

    The caches are [slots, Hkv, D] in float32, float16 or bfloat16; token t of row r lies in slot
    block_table_RB[r, t // block_size] * block_size + t % block_size. Table and context are int32.
    A row without context gets zeros. Returns [R, H, D].
    """
    r, h, d = q_RHD.shape
    kv_heads = k_cache.shape[-2]
    check(k_cache.shape == v_cache.shape and k_cache.shape[-1] == d and h % kv_heads == 0, "cache: wrong shape")
    check(block_table_RB.shape[0] == r and context_R.shape == (r,), "block table or context: wrong shape")
    sized()
    dtype = k_cache.dtype
    out_RHD = torch.empty_like(q_RHD)
    kernels.attend_rows(
        FLOATS[dtype],
        pointer(q_RHD, torch.float32, "q"),
        pointer(k_cache, dtype, "k_cache"),
        pointer(v_cache, dtype, "v_cache"),
        pointer(block_table_RB, torch.int32, "block table"),
        pointer(context_R, torch.int32, "context"),
        out_RHD.data_ptr(),
        r,
        h,
        kv_heads,
        d,
        block_table_RB.shape[1],
        block_size,
        scale,
    )
    return out_RHD


def mla_rows(
    q_RHW: Tensor,
    cache: Tensor,
    block_table_RB: Tensor,
    context_R: Tensor,
    block_size: int,
    latent: int,
    scale: float,
) -> Tensor:
    """Absorbed latent attention: scores over all W of a cache row, values its first `latent`.

    The cache is [slots, W]; paging and types as in `attend_rows`. Returns [R, H, latent].
    """
    r, h, w = q_RHW.shape
    check(cache.shape[-1] == w and latent <= w, "cache: wrong shape")
    check(block_table_RB.shape[0] == r and context_R.shape == (r,), "block table or context: wrong shape")
    sized()
    dtype = cache.dtype
    out_RHL = q_RHW.new_empty((r, h, latent))
    kernels.mla_rows(
        FLOATS[dtype],
        pointer(q_RHW, torch.float32, "q"),
        pointer(cache, dtype, "cache"),
        pointer(block_table_RB, torch.int32, "block table"),
        pointer(context_R, torch.int32, "context"),
        out_RHL.data_ptr(),
        r,
        h,
        w,
        latent,
        block_table_RB.shape[1],
        block_size,
        scale,
    )
    return out_RHL


def pair_bytes(inner: int, width: int, floats: bool) -> int:
    """About what a row and one of its experts take: results, and inputs of products, as words and in tiles or as
    `floats`; beside 150 bytes for each of all pairs."""
    return 4 * (2 * inner + width) + (2 * width + inner) * (4 if floats else 6 if tiles() else 2)


def experts_rows(
    x_RD: Tensor, gate: Matrix, up: Matrix, down: Matrix, chosen_RT: Tensor, weights_RT: Tensor, most: int = 1 << 20
) -> Tensor:
    """Sum over t of weights_RT * down(silu(gate x) * (up x)), each with expert chosen_RT (int32), by experts' numbers.

    A choice outside 0..E-1 adds nothing. No more than `most` results of rows and choices are in memory together, about
    `pair_bytes` each, and an expert's weights are read once for all of its rows among them. Returns [R, D].
    """
    r, t = chosen_RT.shape
    d = down.n
    check(x_RD.shape == (r, gate.k) and weights_RT.shape == (r, t), "x or weights: wrong shape")
    same = gate.n == up.n == down.k and gate.k == up.k and gate.experts == up.experts == down.experts
    check(same and gate.experts is not None, "gate, up and down do not fit")
    for weight in (gate, up, down):
        _arranged(weight)
    sized()
    out_RD = x_RD.new_empty((r, d))
    kernels.experts_rows(
        pointer(x_RD, torch.float32, "x"),
        gate.pointer,
        up.pointer,
        down.pointer,
        pointer(chosen_RT, torch.int32, "chosen"),
        pointer(weights_RT, torch.float32, "weights"),
        out_RD.data_ptr(),
        gate.experts,
        r,
        t,
        max(1, most),
    )
    return out_RD
