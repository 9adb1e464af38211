"""The paged cache that the plan counted: one tensor a layer and part, taken and touched before the first request."""

from __future__ import annotations

import torch

from ..model.batch import Cache
from ..model.spec import ModelSpec
from ..plan.plan import Kv


def parts_of_cache(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Shapes of one token's entries in a layer: MLA's latent, or keys and values."""
    if spec.mla:
        return ((spec.mla.cache_width,),)
    return ((spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim))


def allocate(spec: ModelSpec, kv: Kv, device: torch.device, layers: int | None = None) -> list[Cache]:
    """A cache for each layer, [blocks * block_size, ...]; written once so that the memory is really there."""
    dtype = getattr(torch, kv.dtype)
    slots = kv.blocks * kv.block_size
    shapes = parts_of_cache(spec)
    return [
        tuple(torch.empty((slots, *shape), dtype=dtype, device=device).fill_(0) for shape in shapes)
        for _ in range(spec.layers if layers is None else layers)
    ]
