"""Codes of a few bits one after another in int32 words, lowest bits first, as GPTQ and compressed-tensors pack them."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., 32 n / bits], rounded down; 1 to 8 bits, also across words."""
    held = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return held[..., None].bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1).flatten(-2)
    count = 8 * held.shape[-1] // bits
    place = torch.arange(count) * bits
    low = held[..., place // 8].int()
    high = held[..., (place // 8 + 1).clamp(max=held.shape[-1] - 1)].int()
    return ((low | high << 8) >> (place % 8) & (1 << bits) - 1).to(torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n] -> int32 [..., bits n / 32], rounded up, zeros at the end; 2, 4 or 8 bits."""
    share = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (4 * share)))
    pieces = padded.unflatten(-1, (-1, share))
    held = pieces[..., 0].clone()
    for at in range(1, share):
        held |= pieces[..., at] << (bits * at)
    return held.view(torch.int32)
