"""Attention of llama, mistral, qwen2 and qwen3: grouped queries, rotary positions, keys and values cached.

T tokens, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops.attention import attend_rows, causal, context_slots, packed
from ..ops.rope import rotate
from ..ops.table import write_rows
from .batch import Batch, Cache, Packed
from .layers import Linear, Make, Norm
from .spec import ModelSpec


class Attention(nn.Module):
    def __init__(self, make: Make, name: str, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        biased = spec.attention_bias
        self.q_proj = Linear(make, f"{name}.q_proj", bias="q" in biased)
        self.k_proj = Linear(make, f"{name}.k_proj", bias="k" in biased)
        self.v_proj = Linear(make, f"{name}.v_proj", bias="v" in biased)
        self.o_proj = Linear(make, f"{name}.o_proj", bias="o" in biased)
        self.q_norm = Norm(make, f"{name}.q_norm", spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = Norm(make, f"{name}.k_norm", spec.norm_eps) if spec.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, batch: Batch | Packed, cache: Cache) -> torch.Tensor:
        spec = self.spec
        q_THD = self.q_norm(self.q_proj(x).view(-1, spec.heads, spec.head_dim))
        k_TGD = self.k_norm(self.k_proj(x).view(-1, spec.kv_heads, spec.head_dim))
        v_TGD = self.v_proj(x).view(-1, spec.kv_heads, spec.head_dim)
        q_THD, k_TGD = (rotate(t, batch.cos_TF, batch.sin_TF, spec.rope.interleaved) for t in (q_THD, k_TGD))
        if isinstance(batch, Packed):
            out = packed(q_THD, k_TGD, v_TGD, batch.bounds_S, batch.longest, spec.softmax_scale)
            return self.o_proj(out.flatten(-2))
        k_cache, v_cache = cache
        write_rows(k_TGD, k_cache, batch.slots_T)
        write_rows(v_TGD, v_cache, batch.slots_T)
        return self.o_proj(self._attend(q_THD, batch, k_cache, v_cache).flatten(-2))

    def _attend(self, q_THD: torch.Tensor, batch: Batch, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        size, scale = batch.block_size, self.spec.softmax_scale
        if batch.prefill:
            slots = context_slots(batch.tables_RB[0], size, int(batch.contexts_R[0]))
            return causal(q_THD, k_cache[slots].to(q_THD.dtype), v_cache[slots].to(q_THD.dtype), scale)
        return attend_rows(q_THD, k_cache, v_cache, batch.tables_RB, batch.contexts_R, size, scale)
