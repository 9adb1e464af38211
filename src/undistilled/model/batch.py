"""What one pass through the decoder works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Cache = tuple[torch.Tensor, ...]  # of one layer: (keys, values) or (latents,), each [slots, ...]


@dataclass
class Batch:
    """T tokens of one prompt (`prefill`), or T rows that may belong to T requests (decode).

    tokens_T, positions_T, slots_T int64: ids, positions, and where each token's cache entry goes.
    tables_RB int32: block tables; R is 1 in prefill and T in decode. contexts_R int32: tokens seen,
    by row; in host memory, but in a captured pass (generate/graphs.py) on the device.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    tables_RB: torch.Tensor
    contexts_R: torch.Tensor
    block_size: int
    prefill: bool
    cos_TF: torch.Tensor | None = None
    sin_TF: torch.Tensor | None = None


@dataclass
class Packed:
    """T tokens of whole documents, one behind the other, that see themselves alone: no cache. For training.

    bounds_S int32: where documents begin, and T; equal neighbours are empty documents. longest: of a document.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    bounds_S: torch.Tensor
    longest: int
    cos_TF: torch.Tensor | None = None
    sin_TF: torch.Tensor | None = None
