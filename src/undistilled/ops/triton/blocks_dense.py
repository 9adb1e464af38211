"""A weight in dynamic blocks as a plain matrix."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ...scheme import Stored
from ...scheme.grouped import NORMAL
from ...scheme.packing import PLANES
from ...scheme.tiles import WIDTHS, Tiles
from .decode import e4m3
from .described import MULTIPLIERS, ORDER, RUN, RUNS, SCALES, SECTIONS, TILES, described


@triton.jit
def _code(at, k, BITS: tl.constexpr, FIRST: tl.constexpr):
    """Code k of 32 whose bytes begin at `at`; FIRST: bits of the first plane."""
    code = (tl.load(at + k % (4 * FIRST)) >> (k // (4 * FIRST) * FIRST).to(tl.uint8)) & ((1 << FIRST) - 1)
    if BITS > FIRST:
        REST: tl.constexpr = BITS - FIRST
        byte = tl.load(at + 4 * FIRST + k % (4 * REST))
        code |= ((byte >> (k // (4 * REST) * REST).to(tl.uint8)) & ((1 << REST) - 1)) << FIRST
    return code


@triton.constexpr_function
def first_plane(bits):
    return PLANES[bits][0]


@triton.jit(do_not_specialize=["N", "K"])
def _dense(out, weight, levels, N, K, COLS: tl.constexpr, AT_ONCE: tl.constexpr):
    """AT_ONCE tiles of a section of a block of rows. levels: int8 [64] for each width from 2 bits on."""
    block, section = tl.program_id(1).to(tl.int64), tl.program_id(2)
    sections = tl.load(weight + SECTIONS).to(tl.int32)
    tiles = tl.load(weight + TILES).to(tl.int32)
    at = block * sections + section
    r, c = tl.arange(0, 16)[:, None], tl.arange(0, COLS)[None, :]
    row = block * 16 + r
    multiplier = tl.load(tl.load(weight + MULTIPLIERS).to(tl.pointer_type(tl.bfloat16)) + row).to(tl.float32)
    first = tl.program_id(0) * AT_ONCE
    for place in range(first, tl.minimum(first + AT_ONCE, tiles)):
        level = tl.zeros([16, COLS], tl.float32)
        run = weight + RUNS
        while place >= tl.load(run + RUN + 3):  # tiles before the next run
            run += RUN
        bits = tl.load(run).to(tl.int32)
        tile = at * tl.load(run + 2) + place - tl.load(run + 3)
        row_bytes = tl.load(run + 1).to(tl.pointer_type(tl.uint8)) + (tile * 16 + r) * (COLS // 8 * bits)
        for BITS in tl.static_range(2, 7):
            if bits == BITS:
                code = _code(row_bytes + c // 32 * (4 * BITS), c % 32, BITS, first_plane(BITS))
                level = tl.load(levels + (BITS - 2) * 64 + code).to(tl.float32)
        scales = tl.load(weight + SCALES).to(tl.pointer_type(tl.uint8))
        scale = e4m3(tl.load(scales + (at * tiles + place) * 16 + r))
        order = tl.load(weight + ORDER).to(tl.pointer_type(tl.int16))
        k = (section * tiles + tl.load(order + at * tiles + place).to(tl.int32)) * COLS + c
        value = level * (scale * multiplier)
        tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=(row < N) & (k < K))


def dense(weight: Stored) -> torch.Tensor:
    """The weight [N, K] in bfloat16."""
    (N, K), scheme, d = weight.shape, weight.scheme, described(weight)
    assert isinstance(scheme, Tiles)
    out = torch.empty(N, K, dtype=torch.bfloat16, device=weight.device)
    at_once = 512 // scheme.cols or 1
    grid = (-(-len(scheme.widths) // at_once), -(-N // 16), weight.parts["order"].shape[-2])
    _dense[grid](out, d.row, levels(weight.device), N, K, COLS=scheme.cols, AT_ONCE=at_once, num_warps=2)
    return out


@cache
def levels(device: torch.device) -> torch.Tensor:
    """int8 [widths, 64]: the level of each code of each width."""
    padded = [[int(level) for level in NORMAL[bits]] + [0] * (64 - (1 << bits)) for bits in WIDTHS]
    return torch.tensor(padded, dtype=torch.int8, device=device)
