"""A weight in dynamic blocks as the kernels take it: one row of addresses and counts, so that a kernel serves any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from ...scheme import Stored
from ...scheme.tiles import WIDTHS, Tiles

# places in the row after the five widths' values; counts from 8 on
ORDER, SCALES, MULTIPLIERS, COUNTS, SECTIONS, TILES, LOG = tl.constexpr(5), *map(tl.constexpr, (6, 7, 8, 13, 14, 15))


@dataclass(frozen=True)
class Described:
    """A weight as the kernels take it. `row`: int64 on the device, addresses and counts; `parts`: what lies there."""

    row: torch.Tensor
    parts: list[torch.Tensor]
    set: int  # bit b: there are tiles of b bits
    stride: int  # inputs with the padding of sections


def described(weight: Stored) -> Described:
    """The weight's description, worked out once and kept with it."""
    return weight.once("triton", _described)


def _described(weight: Stored) -> Described:
    scheme, parts = weight.scheme, weight.parts
    assert isinstance(scheme, Tiles)
    counts = dict(scheme.counts)
    names = [*(f"values{bits}" for bits in WIDTHS), "order", "scales", "multipliers"]
    nothing = torch.zeros(16 * 6 * scheme.cols, dtype=torch.uint8, device=weight.device)  # read, where a run is empty
    kept = [parts[name].detach() if name in parts else nothing for name in names]
    sections = parts["order"].shape[-2]
    numbers = [counts.get(bits, 0) for bits in WIDTHS]
    rest = (sections, len(scheme.widths), (scheme.cols // 32).bit_length() - 1)
    row = torch.tensor([*(part.data_ptr() for part in kept), *numbers, *rest], device=weight.device)
    return Described(row, kept, sum(1 << bits for bits in counts), sections * scheme.section)
