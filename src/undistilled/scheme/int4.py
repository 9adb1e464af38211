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
        w = w.float()
        groups = grouped(w, self.group)
        scales, offsets = self._symmetric(groups) if self.symmetric else self._asymmetric(groups, w)
        step = scales.float()
        inverse = step.reciprocal().masked_fill_(step == 0, 0.0)[..., None]
        shift = 8.0 if self.symmetric else -offsets.float()[..., None] * inverse
        q = groups.mul(inverse).add_(shift).round_().clamp_(0, 15).flatten(-2)
        values = pack(q[..., : -(-w.shape[-1] // QUANTUM) * QUANTUM])
        parts = {"values": values, "scales": scales}
        return parts if self.symmetric else {**parts, "minimums": offsets}

    def _symmetric(self, groups):
        """(scales, None): the value of largest magnitude becomes -8."""
        lowest, highest = groups.aminmax(dim=-1)
        return (highest.where(highest > -lowest, lowest) / -8).half(), None

    def _asymmetric(self, groups, w):
        """(scales, minimums): the lowest value becomes 0, the highest 15."""
        # padding must not widen the last group's range
        filled = groups if w.shape[-1] % self.group == 0 else self._edge_filled(groups, w)
        lowest, highest = filled.aminmax(dim=-1)
        return ((highest - lowest) / 15).half(), lowest.half()

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
