"""Codes of 1 to 6 bits in bytes: 32 codes take 4 bytes for each bit, as planes of 4, 2 and 1 bits.

A plane of b bits holds 8 / b codes in a byte, those that lie 4 b apart, so that a vector unit takes them out with
one shift and one mask, in order, whatever the width: of 3 bits the lower two are one plane and the highest another.
Four bits are one plane: byte i holds code i in its low nibble and code i + 16 in its high one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

QUANTUM = 32
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers 0..2^bits - 1 [..., n * 32] -> bytes [..., n, 4 * bits]."""
    import torch

    blocks = codes.to(torch.uint8).unflatten(-1, (-1, QUANTUM))
    planes, shift = [], 0
    for width in PLANES[bits]:
        piece = (blocks >> shift) & ((1 << width) - 1)
        rows = piece.unflatten(-1, (8 // width, 4 * width))
        byte = rows[..., 0, :].clone()
        for j in range(1, 8 // width):
            byte |= rows[..., j, :] << (width * j)
        planes.append(byte)
        shift += width
    return torch.cat(planes, -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., n, 4 * bits] -> integers 0..2^bits - 1 [..., n * 32]."""
    import torch

    codes, at, shift = None, 0, 0
    for width in PLANES[bits]:
        plane = packed[..., at : at + 4 * width]
        pieces = [(plane >> (width * j)) & ((1 << width) - 1) for j in range(8 // width)]
        piece = torch.cat(pieces, -1)
        codes = piece if codes is None else codes | (piece << shift)
        at += 4 * width
        shift += width
    assert codes is not None
    return codes.flatten(-2)
