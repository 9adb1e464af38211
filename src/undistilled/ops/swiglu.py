"""silu(g) * u, the middle of every feed-forward layer (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import triton as cuda
from .cpu import native
from .registry import op


@op
def silu_mul(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """silu(g) * u, element by element."""
    return F.silu(g) * u


@silu_mul.register("native", native.serves, "our C kernel: one pass")
def _native(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return native.silu_mul(g, u)


@silu_mul.register("triton", cuda.inference, "our Triton kernel: one pass")
def _triton(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    from .triton import small

    return small.silu_mul(g, u)
