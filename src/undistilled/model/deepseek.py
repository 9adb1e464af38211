"""Attention of DeepSeek V2, V3 and R1: multi-head latent attention. Only latents are cached.

T tokens, H heads, N nope width, P rope width, V value width, Z latent width. See ops/mla.py.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops import mla
from ..ops.attention import context_slots, packed
from ..ops.linear import dense
from ..ops.rope import Turn, rotate_tail
from .batch import Batch, Cache, Packed
from .layers import Linear, Make, Norm, both
from .spec import ModelSpec


class Attention(nn.Module):
    def __init__(self, make: Make, name: str, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.mla is not None
        self.spec, self.mla, self.absorbed = spec, spec.mla, True
        if self.mla.q_lora_rank:
            self.q_a_proj = Linear(make, f"{name}.q_a_proj")
            self.q_a_layernorm = Norm(make, f"{name}.q_a_layernorm", LATENT_EPS)
            self.q_b_proj = Linear(make, f"{name}.q_b_proj")
        else:
            self.q_proj = Linear(make, f"{name}.q_proj")
        self.kv_a_proj_with_mqa = Linear(make, f"{name}.kv_a_proj_with_mqa")
        self.kv_a_layernorm = Norm(make, f"{name}.kv_a_layernorm", LATENT_EPS)
        self.kv_b_proj = Linear(make, f"{name}.kv_b_proj")
        self.o_proj = Linear(make, f"{name}.o_proj")

    def forward(self, x_TD: torch.Tensor, batch: Batch | Packed, cache: Cache) -> torch.Tensor:
        q_THX, both_TW = self._projected(x_TD)
        into = self.kv_a_layernorm.values, LATENT_EPS, self._turn(batch)
        if isinstance(batch, Packed):
            return self.o_proj(self._packed(q_THX, batch, mla.latents(both_TW, *into)).flatten(-2))
        (latents,) = cache
        mla.keep(both_TW, *into, latents, batch.slots_T)
        attend = self._prefill if batch.prefill else self._decode
        return self.o_proj(attend(q_THX, batch, latents).flatten(-2))

    def _packed(self, q_THX: torch.Tensor, batch: Packed, fresh_TW: torch.Tensor) -> torch.Tensor:
        q_THX = self._rotated(q_THX, batch)
        latent_TZ, rope_TP = fresh_TW.split([self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], -1)
        both_THY = self.kv_b_proj(latent_TZ).unflatten(-1, (self.spec.heads, -1))
        keys, values = mla.parted(both_THY, rope_TP, self.mla.qk_nope_head_dim)
        return packed(q_THX, keys, values, batch.bounds_S, batch.longest, self.spec.softmax_scale)

    def _turn(self, batch: Batch | Packed) -> Turn:
        return batch.cos_TF, batch.sin_TF, self.spec.rope.interleaved

    def _rotated(self, q_THX: torch.Tensor, batch: Batch | Packed) -> torch.Tensor:
        return rotate_tail(q_THX, *self._turn(batch), self.mla.qk_rope_head_dim)

    def _projected(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, H, N + P], and latents with keys [T, Z + P]; not rotated yet: decode's kernels do that."""
        compressed = self.mla.q_lora_rank > 0
        q, both_TW = both(x_TD, self.q_a_proj if compressed else self.q_proj, self.kv_a_proj_with_mqa)
        if compressed:
            q = self.q_b_proj(self.q_a_layernorm(q))
        return q.unflatten(-1, (self.spec.heads, -1)), both_TW

    def _lift(self, dtype: torch.dtype) -> torch.Tensor:
        """kv_b as [H, N + V, Z]."""
        return dense(self.kv_b_proj.stored, dtype).unflatten(0, (self.spec.heads, -1))

    def _prefill(self, q_LHX: torch.Tensor, batch: Batch, latents: torch.Tensor) -> torch.Tensor:
        q_LHX = self._rotated(q_LHX, batch)
        slots = context_slots(batch.tables_RB[0], batch.block_size, int(batch.contexts_R[0]))
        cached = latents[slots].to(q_LHX.dtype)
        return mla.naive(q_LHX, cached, self._lift(q_LHX.dtype), self.mla.qk_nope_head_dim, self.spec.softmax_scale)

    def _decode(self, q_RHX: torch.Tensor, batch: Batch, latents: torch.Tensor) -> torch.Tensor:
        nope = self.mla.qk_nope_head_dim
        if not self.absorbed:
            return self._decode_naive(self._rotated(q_RHX, batch), batch, latents, self._lift(q_RHX.dtype))
        lift = mla.lift_of(self.kv_b_proj.stored, self.spec.heads, len(q_RHX), q_RHX.dtype)
        inside = mla.absorb.resolve(lift).run(q_RHX, lift, nope, self._turn(batch))
        rank, scale = self.mla.kv_lora_rank, self.spec.softmax_scale
        out = mla.mla_rows(inside, latents, batch.tables_RB, batch.contexts_R, batch.block_size, rank, scale)
        return mla.release.resolve(lift).run(out, lift, nope)

    def _decode_naive(
        self, q_RHX: torch.Tensor, batch: Batch, latents: torch.Tensor, lift: torch.Tensor
    ) -> torch.Tensor:
        rows = []
        for row, context in enumerate(batch.contexts_R.tolist()):
            cached = latents[context_slots(batch.tables_RB[row], batch.block_size, context)].to(q_RHX.dtype)
            rows.append(
                mla.naive(q_RHX[row : row + 1], cached, lift, self.mla.qk_nope_head_dim, self.spec.softmax_scale)
            )
        return torch.cat(rows)


LATENT_EPS = 1e-6  # of the norms inside MLA: the release's code and transformers leave theirs at the default
