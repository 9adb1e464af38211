"""A weight in dynamic blocks as the kernels take it: one row of addresses and counts, so that a kernel serves any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from ...scheme import Stored
from ...scheme.tiles import WIDTHS, Tiles

# places in the row
ORDER, SCALES, MULTIPLIERS, SECTIONS, TILES, LOG, RUNS = map(tl.constexpr, range(7))
RUN = tl.constexpr(5)  # numbers of a run: bits, address, tiles, tiles before them, and `late`
ENDS = 2  # runs of no bits and no tiles behind the others: kernels read two ahead
PROGRAMS = 132 * 20  # that a split of a linear's inputs aims at


@dataclass(frozen=True)
class Described:
    """A weight as the kernels take it. `row`: int64 on the device, addresses and counts; `parts`: what lies there."""

    row: torch.Tensor
    parts: list[torch.Tensor]
    stride: int  # inputs with the padding of sections
    split: int  # programs that share a block of 16 rows; 1 for stacked experts


def described(weight: Stored) -> Described:
    """The weight's description, worked out once and kept with it."""
    return weight.once("triton", _described)


def _described(weight: Stored) -> Described:
    scheme = weight.scheme
    assert isinstance(scheme, Tiles)
    parts = {name: part.detach() for name, part in weight.parts.items()}
    nothing = torch.zeros(16 * WIDTHS[-1] * scheme.cols, dtype=torch.uint8, device=weight.device)  # read at the ends
    sections = parts["order"].shape[-2]
    stride = sections * scheme.section
    split = 1
    if len(weight.shape) == 2:
        split = max(1, min(PROGRAMS // -(-weight.shape[0] // 16), stride // 256))
    log = (scheme.cols // 32).bit_length() - 1
    kept = [parts["order"], parts["scales"], parts["multipliers"]]
    row = [*(part.data_ptr() for part in kept), sections, len(scheme.widths), log]
    for run in _runs(scheme, split):
        values = parts.get(f"values{run[0]}", nothing)
        kept.append(values)
        row += [run[0], values.data_ptr(), *run[1:]]
    return Described(torch.tensor(row, device=weight.device), kept, stride, split)


def _runs(scheme: Tiles, split: int) -> list[tuple[int, int, int, int]]:
    """(bits, tiles, tiles before them, how many steps late part 0 begins) of each width that there is, and of the ends.

    Steps of 4 quanta go round the parts, over all widths of a section, so that parts differ by a step at most.
    """
    runs, tiles, steps = [], 0, 0
    for bits, count in (*scheme.counts, *[(0, 0)] * ENDS):
        runs.append((bits, count, tiles, -steps % split))
        tiles += count
        steps += -(-count * (scheme.cols // 32) // 4)
    return runs
