"""INT4 by groups of inputs, symmetric or asymmetric; "int4" is groups of 128, asymmetric.

32 elements take 16 bytes: byte i holds element i in its low nibble and element i + 16 in its high
one, so that a vector unit unpacks both halves in order. Asymmetric: w = q * scale + minimum.
Symmetric: w = (q - 8) * scale. GGUF's Q4_1 and Q4_0 are the groups of 32, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dim
from .int8 import grouped

QUANTUM = 32


def pack(q):
    """Integers 0..15 [..., n * 32] -> bytes [..., n, 16]."""
    import torch

    blocks = q.to(torch.uint8).unflatten(-1, (-1, 2, QUANTUM // 2))
    return blocks[..., 0, :] | (blocks[..., 1, :] << 4)


def unpack(packed):
    """Bytes [..., n, 16] -> integers 0..15 [..., n * 32]."""
    import torch

    return torch.cat((packed & 15, packed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Int4:
    name: str = "int4"
    group: int = 128
    symmetric: bool = False

    def layout(self):
        scale = ("float16", (Dim("out"), Dim("in", self.group)))
        values = ("uint8", (Dim("out"), Dim("in", QUANTUM), Dim(None, size=QUANTUM // 2)))
        parts = {"values": values, "scales": scale}
        return parts if self.symmetric else {**parts, "minimums": scale}

    def compress(self, w):
        import torch

        w = w.float()
        padded = grouped(w, self.group)
        if self.symmetric:
            extreme = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))[..., 0]
            scales, low = (extreme / -8).half(), None
            shift = 8.0
        else:
            # padding must not widen the last group's range
            filled = padded if w.shape[-1] % self.group == 0 else self._edge_filled(padded, w)
            lowest, highest = filled.amin(-1), filled.amax(-1)
            scales, low = ((highest - lowest) / 15).half(), lowest.half()
            shift = -low.float()[..., None]
        step = scales.float()
        inverse = torch.where(step == 0, 0.0, 1.0 / step)[..., None]
        q = (padded * inverse + shift if self.symmetric else (padded + shift) * inverse).round_().clamp_(0, 15)
        q = q.flatten(-2)[..., : -(-w.shape[-1] // QUANTUM) * QUANTUM]
        parts = {"values": pack(q), "scales": scales}
        return parts if low is None else {**parts, "minimums": low}

    def _edge_filled(self, padded, w):
        filled = padded.clone()
        rest = w.shape[-1] % self.group
        filled[..., -1, rest:] = w[..., -1:]
        return filled

    def decompress(self, parts, shape, dtype):
        q = grouped(unpack(parts["values"]).float(), self.group)
        scales = parts["scales"].float()[..., None]
        dense = (q - 8) * scales if self.symmetric else q * scales + parts["minimums"].float()[..., None]
        return dense.flatten(-2)[..., : shape[-1]].to(dtype)


SCHEMES = (
    Int4(),
    *(Int4(f"int4-g{g}", g) for g in (32, 64)),
    Int4("int4-sym", 128, True),
    *(Int4(f"int4-g{g}-sym", g, True) for g in (32, 64)),
)
