"""FP8 E4M3 with one float32 multiplier for each output: what vLLM and compressed-tensors call FP8 by channel.

The parts are theirs: `weight` and, [out, 1], `weight_scale`. Source: compressed-tensors' `float-quantized` format with
the strategy `channel` for weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dim
from .fp8_block import LARGEST


@dataclass(frozen=True)
class Fp8Channel:
    name: str = "fp8_channel"

    def layout(self):
        return {
            "values": ("float8_e4m3fn", (Dim("out"), Dim("in"))),
            "scales": ("float32", (Dim("out"), Dim("in", 0))),
        }

    def compress(self, w):
        import torch

        w = w.float()
        scales = w.abs().amax(-1, keepdim=True) / LARGEST
        safe = torch.where(scales > 0, scales, 1.0)
        return {"values": (w / safe).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), "scales": scales}

    def decompress(self, parts, shape, dtype):
        return (parts["values"].float() * parts["scales"]).to(dtype)


SCHEMES = (Fp8Channel(),)
