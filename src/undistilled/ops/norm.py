"""RMS norm (Zhang and Sennrich 2019), computed in float32 as transformers does."""

from __future__ import annotations

import torch

from . import triton as cuda
from .add import add
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
    apart = x_TD.dim() == 2 and x_TD.stride(1) == 1
    return native.norm_rows(x_TD if apart else x_TD.contiguous(), w_D, eps)


@rms_norm.register("triton", cuda.inference, "our Triton kernel: one pass over a row")
def _triton(x_TD: torch.Tensor, w_D: torch.Tensor, eps: float) -> torch.Tensor:
    from .triton import small

    return small.rms_norm(x_TD, w_D, eps)


@op
def add_norm(
    h_TD: torch.Tensor, y_TD: torch.Tensor, w_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + y, its RMS norm)."""
    total = add(h_TD, y_TD)
    return total, rms_norm(total, w_D, eps)


@add_norm.register("triton", cuda.inference, "our Triton kernel: one pass over a row")
def _triton_add_norm(h_TD, y_TD, w_D, eps):
    from .triton import small

    return small.add_norm(h_TD, y_TD, w_D, eps)


@op
def norm_head(x_TD: torch.Tensor, w_Z: torch.Tensor, eps: float) -> torch.Tensor:
    """The first Z of every row normalised, the others as they are; x may be overwritten."""
    z = w_Z.shape[0]
    return torch.cat((rms_norm(x_TD[:, :z], w_Z, eps), x_TD[:, z:]), -1)


@norm_head.register("native", native.serves, "our C kernel: in place")
def _native_head(x_TD: torch.Tensor, w_Z: torch.Tensor, eps: float) -> torch.Tensor:
    head = x_TD[:, : w_Z.shape[0]]
    native.norm_rows(head, w_Z, eps, out_RD=head)
    return x_TD
