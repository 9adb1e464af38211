"""RMS norm (Zhang and Sennrich 2019), computed in float32 as transformers does."""

from __future__ import annotations

import torch

from . import triton as cuda
from .cpu import native
from .registry import op


@op
def rms_norm(x_TD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * w; the dtype of x is kept."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (w_D * x.to(x_TD.dtype)).to(x_TD.dtype)


@rms_norm.register("native", native.serves, "our C kernel: one pass over a row")
def _native(x_TD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    x = x_TD.contiguous()
    return native.norm_rows(x.view(-1, x.shape[-1]), w_D, eps).view(x.shape)


@rms_norm.register("triton", cuda.inference, "our Triton kernel: one pass over a row")
def _triton(x_TD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    from .triton import small

    return small.rms_norm(x_TD, w_D, eps)
