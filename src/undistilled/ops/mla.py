"""Multi-head latent attention over a cache of latents (DeepSeek-V2, section 2.1; V3, section 2.1.1).

L new tokens, C cached, R rows, H heads, N nope width, P rope width, V value width, Z latent width (kv_lora_rank).
The cache holds [latent | rotated key] for a token: Z + P values, never the heads.
Naive: lift the latents to keys and values of every head. Absorbed: fold the lift into the query and the
output, and attend in latent space; fewer bytes and operations when few tokens look at a long context.
"""

from __future__ import annotations

import torch

from ..scheme import Stored
from . import triton as cuda
from .attention import causal, context_slots
from .cpu import native
from .cpu.matrix import Matrix
from .linear import checked, dense, native_reads
from .norm import norm_head
from .registry import forced, op
from .rope import Turn, rotate_tail
from .table import write_rows

Lift = torch.Tensor | Matrix | Stored  # kv_b dense [H, N + V, Z], or [H * (N + V), Z] as our C and CUDA kernels take it


def naive(
    q_LHX: torch.Tensor, cached_CW: torch.Tensor, lift_HYZ: torch.Tensor, nope: int, scale: float
) -> torch.Tensor:
    """Attention of L tokens over C lifted latents: q [L, H, N + P], cached [C, Z + P], lift [H, N + V, Z]."""
    return causal(q_LHX, *lifted(cached_CW, lift_HYZ, nope), scale)


def lifted(cached_CW: torch.Tensor, lift_HYZ: torch.Tensor, nope: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [C, H, N + P] and values [C, H, V] of every head, from the latents."""
    latent = lift_HYZ.shape[-1]
    return parted(torch.einsum("cz,hyz->chy", cached_CW[:, :latent], lift_HYZ), cached_CW[:, latent:], nope)


def parted(both_CHY: torch.Tensor, rope_CP: torch.Tensor, nope: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [C, H, N + P] and values [C, H, V] from both lifted [C, H, N + V] and the keys' common rotated part."""
    rope_key = rope_CP[:, None].expand(-1, both_CHY.shape[1], -1)
    return torch.cat((both_CHY[..., :nope], rope_key), -1), both_CHY[..., nope:]


def lift_of(stored: Stored, heads: int, rows: int, dtype: torch.dtype) -> Lift:
    """kv_b for `absorb` and `release` of so many rows: as it is stored where our kernels read it, else dense."""
    if native_reads(stored, dtype) and not forced():
        return checked(stored)
    if cuda.lifts(stored, rows, dtype) and not forced():
        return stored
    return dense(stored, dtype).unflatten(0, (heads, -1))


@op
def absorb(q_RHX: torch.Tensor, lift_HYZ: torch.Tensor, nope: int, turn: Turn) -> torch.Tensor:
    """Queries in latent space, their tails rotated: [R, H, N + P] -> [R, H, Z + P]; q may be overwritten."""
    q_RHX = rotate_tail(q_RHX, *turn, q_RHX.shape[-1] - nope)
    inside = _by_row("rhn,hnz->rhz", q_RHX[..., :nope], lift_HYZ[:, :nope])
    return torch.cat((inside, q_RHX[..., nope:]), -1)


@absorb.register("native", lambda lift: isinstance(lift, Matrix), "our C kernel: kv_b read where it lies")
def _native_absorb(q_RHX: torch.Tensor, lift: Matrix, nope: int, turn: Turn) -> torch.Tensor:
    return native.absorb(rotate_tail(q_RHX, *turn, q_RHX.shape[-1] - nope).contiguous(), lift, nope)


@absorb.register("triton", lambda lift: isinstance(lift, Stored), "our Triton kernel: kv_b as stored, in one launch")
def _triton_absorb(q_RHX: torch.Tensor, lift: Stored, nope: int, turn: Turn) -> torch.Tensor:
    from .triton import mla as kernels

    return kernels.absorb(q_RHX, lift, nope, turn)


@op
def release(out_RHZ: torch.Tensor, lift_HYZ: torch.Tensor, nope: int) -> torch.Tensor:
    """Attended latents to values: [R, H, Z] -> [R, H, V]."""
    return _by_row("rhz,hvz->rhv", out_RHZ, lift_HYZ[:, nope:])


@release.register("native", lambda lift: isinstance(lift, Matrix), "our C kernel: kv_b read where it lies")
def _native_release(out_RHZ: torch.Tensor, lift: Matrix, nope: int) -> torch.Tensor:
    return native.release(out_RHZ, lift, nope)


@release.register("triton", lambda lift: isinstance(lift, Stored), "our Triton kernel: kv_b as stored, in one launch")
def _triton_release(out_RHZ: torch.Tensor, lift: Stored, nope: int) -> torch.Tensor:
    from .triton import mla as kernels

    return kernels.release(out_RHZ, lift, nope)


def _by_row(formula: str, rows: torch.Tensor, lift: torch.Tensor) -> torch.Tensor:
    """On a CPU one row at a time: a product over all would round a row differently in different company."""
    if rows.device.type != "cpu" or len(rows) == 1:
        return torch.einsum(formula, rows, lift)
    return torch.cat([torch.einsum(formula, rows[r : r + 1], lift) for r in range(len(rows))])


def latents(both_TW: torch.Tensor, w_Z: torch.Tensor, eps: float, turn: Turn) -> torch.Tensor:
    """What a cache holds of tokens, from kv_a's output: latents normalised, keys rotated, [T, Z + P]."""
    both_TW = norm_head(both_TW, w_Z, eps)
    return rotate_tail(both_TW[:, None], *turn, both_TW.shape[-1] - w_Z.shape[0])[:, 0]


@op
def keep(
    both_TW: torch.Tensor, w_Z: torch.Tensor, eps: float, turn: Turn, cache: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """`latents` into the cache's rows slots_T, in its dtype; both may be overwritten."""
    write_rows(latents(both_TW, w_Z, eps, turn), cache, slots_T)


@keep.register("triton", cuda.inference, "our Triton kernel: normalised, rotated and written in one launch")
def _triton_keep(both_TW, w_Z, eps, turn, cache, slots_T):
    from .triton import mla as kernels

    kernels.keep(both_TW, w_Z, eps, turn, cache, slots_T)


@op
def mla_rows(
    q_RHW: torch.Tensor,
    cache: torch.Tensor,
    table_RB: torch.Tensor,
    context_R: torch.Tensor,
    size: int,
    latent: int,
    scale: float,
) -> torch.Tensor:
    """Row by row in latent space: q [R, H, Z + P], cache [slots, Z + P] -> [R, H, Z]."""
    out = q_RHW.new_empty(*q_RHW.shape[:2], latent)
    for row, context in enumerate(context_R.tolist()):
        seen = cache[context_slots(table_RB[row], size, context)].to(q_RHW.dtype)
        scores = (q_RHW[row] @ seen.T).float() * scale
        out[row] = scores.softmax(-1).to(q_RHW.dtype) @ seen[:, :latent]
    return out


@mla_rows.register("native", native.serves, "our C kernel: reads the pages in place, each latent once for all heads")
def _native_rows(q_RHW, cache, table_RB, context_R, size, latent, scale):
    return native.mla_rows(q_RHW.contiguous(), cache, table_RB, context_R, size, latent, scale)


@mla_rows.register("triton", cuda.serves, "our Triton kernel: reads the pages in place, a context split over programs")
def _triton_rows(q_RHW, cache, table_RB, context_R, size, latent, scale):
    from .triton import attention as kernels

    return kernels.mla_rows(q_RHW, cache, table_RB, context_R, size, latent, scale)
