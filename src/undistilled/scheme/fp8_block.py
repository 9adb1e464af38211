"""FP8 E4M3 with one float32 multiplier for each 128 x 128 block: the format of R1's release.

The release calls the multipliers `weight_scale_inv`; they multiply. Blocks at the edges are partial
(R1's kv_a_proj has 576 rows). Source: the release's config and tensors, see R1's `quantization_config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dim

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn


def spread(scales, shape):
    """Block multipliers [..., ceil(out/128), ceil(in/128)] -> one for each element, [..., out, in]."""
    wide = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., : shape[-2], : shape[-1]]


@dataclass(frozen=True)
class Fp8Block:
    name: str = "fp8_block"

    def layout(self):
        return {
            "values": ("float8_e4m3fn", (Dim("out"), Dim("in"))),
            "scales": ("float32", (Dim("out", BLOCK), Dim("in", BLOCK))),
        }

    def compress(self, w):
        import torch
        import torch.nn.functional as F

        rows, cols = w.shape[-2:]
        padded = F.pad(w.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
        blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        scales = blocks.abs().amax(dim=(-3, -1)) / LARGEST
        safe = torch.where(scales > 0, scales, 1.0)
        values = (w.float() / spread(safe, w.shape)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"values": values, "scales": scales}

    def decompress(self, parts, shape, dtype):
        values, scales = parts["values"], parts["scales"]
        if shape[-1] % BLOCK or shape[-2] % BLOCK:
            return (values.float() * spread(scales, shape)).to(dtype)
        blocks = values.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).float()
        return (blocks * scales[..., :, None, :, None]).to(dtype).reshape(shape)


SCHEMES = (Fp8Block(),)
