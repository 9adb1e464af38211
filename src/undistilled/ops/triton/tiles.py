"""Products with dynamic blocks (scheme/tiles.py), of linears and of stacked experts; shapes as in ops/linear.py.

A warp takes 16 rows of a weight and, at a time, 4 quanta of 32 inputs from a run of tiles of one width: thread
4 g + t the quantum t of rows g and g + 8, whole, from memory to the tensor cores (levels.py, lanes.py). A level times
its tile row's FP8 scale has 11 bits, so it is exact in float16, and so are activations after a power of two a row
(halves.py, which also puts them in the order that codes come in). Only the sums round, in float32, and in an order
that the weight's shape alone decides: a row has the same bits in any company.

Which widths there are and how many tiles of each, a kernel reads (described.py): its code has a loop for every width,
branch-free inside, and passes by those that a weight lacks. So one kernel serves every weight, and what is compiled
does not depend on how a model spends its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...scheme import Stored
from . import FEW
from . import experts as routed
from .blocks_dense import dense
from .described import LOG, MULTIPLIERS, ORDER, RUN, RUNS, SCALES, SECTIONS, TILES, described
from .halves import COLUMNS, begun, halves
from .lanes import (
    kept4,
    kept_byte,
    kept_float,
    kept_short,
    kept_word,
    mma,
    others,
    passing,
    passing_some,
    put,
    settled,
)
from .levels import eight, scale_pair
from .linear import counters

LINEAR, UP, DOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # whose rows a product reads and writes
LARGE = 32  # pairs that a program of many takes; 64 took twice as long to compile
REGISTERS = {1: 80}  # by groups of columns: more of them, fewer warps at a time and less of the memory's bandwidth


@triton.jit
def _run(weight, i, at, log, part, SPLIT):
    """The i-th run of tiles of one width, of a section of a block: bits, first word, quanta, tiles before it, and the
    part's first step."""
    entry = weight + RUNS + i * RUN
    bits = tl.load(entry).to(tl.int32)
    count = tl.load(entry + 2).to(tl.int32)
    words = tl.load(entry + 1).to(tl.pointer_type(tl.int32)) + at * count * (16 * bits << log)
    first = part + tl.load(entry + 4).to(tl.int32)
    first -= tl.where(first >= SPLIT, SPLIT, 0)
    return bits, words, count << log, tl.load(entry + 3).to(tl.int32), first


@triton.jit
def _fetched(run, step, order, scales, tiles, log, g, t, BITS: tl.constexpr):
    """What does not depend on activations of a thread's quantum: words of both rows, tile, scales of both rows.

    Past the end of the run it is the last one with scales of zero. BITS: 0 for a width that only the run knows, whose
    words are then six.
    """
    bits, values, quanta, place, _ = run
    wanted = 4 * step + t
    at = tl.maximum(tl.minimum(wanted, quanta - 1), 0)
    tile, inside = at >> log, at & ((1 << log) - 1)
    if BITS:
        row = BITS << log  # words
        words = values + ((tile * 16 + g) * row + inside * BITS)
        first, second = passing(words, BITS), passing(words + 8 * row, BITS)
    else:
        row = bits << log
        words = values + ((tile * 16 + g) * row + inside * bits)
        first, second = passing_some(words, bits), passing_some(words + 8 * row, bits)
    there = (wanted < quanta).to(tl.int32)
    place = tl.minimum(place + tile, tiles - 1)
    scale = scales + place * 16 + g
    quantum = (kept_short(order + place) << log) + inside
    found = (first, second, quantum, kept_byte(scale, there), kept_byte(scale + 8, there))
    settled(t)
    return found


@triton.jit
def _multiplied(acc, x, rows, fetched, BITS: tl.constexpr):
    """acc + 16 rows x 4 quanta times the activations of each group of 8 columns."""
    first2, bias2 = scale_pair(fetched[3])
    second2, bias2_too = scale_pair(fetched[4])
    x += fetched[2] * 16
    for j in tl.static_range(4):
        a = eight(fetched[0], first2, bias2, BITS, j)
        b = eight(fetched[1], second2, bias2_too, BITS, j)
        total: tl.tuple = ()
        for i in tl.static_range(len(rows)):
            y = kept4(x + rows[i] + 4 * j)
            c = acc[4 * i : 4 * i + 4]
            c = mma(a[0], b[0], a[1], b[1], y[0], y[1], c[0], c[1], c[2], c[3])
            total = total + mma(a[2], b[2], a[3], b[3], y[2], y[3], c[0], c[1], c[2], c[3])
        acc = total
    return acc


@triton.jit
def _section(acc, x, rows, weight, at, part, SPLIT, g, t):
    """acc + the part's share of a section of a block's tiles; a step's bytes are asked for a step before, and what
    says where a run lies a run before."""
    log = tl.load(weight + LOG).to(tl.int32)
    tiles = tl.load(weight + TILES).to(tl.int32)
    order = tl.load(weight + ORDER).to(tl.pointer_type(tl.int16)) + at * tiles
    scales = tl.load(weight + SCALES).to(tl.pointer_type(tl.uint8)) + at * tiles * 16
    run = _run(weight, 0, at, log, part, SPLIT)
    coming = _run(weight, 1, at, log, part, SPLIT)
    now = _fetched(run, run[4], order, scales, tiles, log, g, t, 0)
    i = 1
    for BITS in tl.static_range(2, 7):
        if run[0] == BITS:
            i += 1
            after = _fetched(coming, coming[4], order, scales, tiles, log, g, t, 0)
            mine = (now[0][:BITS], now[1][:BITS], now[2], now[3], now[4])
            for step in range(run[4], (run[2] + 3) // 4, SPLIT):
                ahead = _fetched(run, step + SPLIT, order, scales, tiles, log, g, t, BITS)
                acc = _multiplied(acc, x, rows, mine, BITS)
                mine = ahead
            now = after
            run = coming
            coming = _run(weight, i, at, log, part, SPLIT)
    return acc


@triton.jit(do_not_specialize=["N", "T", "STRIDE", "SPLIT", "k_each", "each"])
def _product(
    x, factors, y, parts, counters, weight, other, pairs, shares, T, N, STRIDE, SPLIT, k_each, each,
    STAGE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One block of 16 rows times up to 8 GROUPS tokens or pairs.

    pairs: (order, experts, starts, counts) of ops/triton/experts.py, `each` apart. STRIDE: words of a row of x.
    UP: the grid's third axis is the weight (`weight`, `other`), whose results [2, P, N] lie in the order of experts.
    """
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    part = 0
    expert, start, count = 0, 0, T
    if STAGE == LINEAR:
        part = tl.program_id(1)
    else:
        slot = tl.program_id(1)
        count = tl.load(pairs + 3 * each + slot)
        if count == 0:
            return
        expert = tl.load(pairs + each + slot)
        start = tl.load(pairs + 2 * each + slot)
    if STAGE == UP and tl.program_id(2) == 1:
        weight = other
        y += each.to(tl.int64) * N
    rows: tl.tuple = ()
    for i in tl.static_range(GROUPS):
        row = start + tl.minimum(8 * i + g, count - 1)
        if STAGE == UP:
            row = kept_word(pairs + row) // k_each
        rows += (row.to(tl.int64) * STRIDE,)
    acc: tl.tuple = ()
    for _ in tl.static_range(4 * GROUPS):
        acc += (tl.zeros([32], tl.float32),)
    sections = tl.load(weight + SECTIONS).to(tl.int32)
    at = (blocks.to(tl.int64) * expert + block) * sections
    for s in range(sections):
        inputs = tl.load(weight + TILES).to(tl.int32) << tl.load(weight + LOG).to(tl.int32)  # quanta of a section
        acc = _section(acc, x + s * inputs * 16, rows, weight, at + s, part, SPLIT, g, t)
    if SPLIT > 1:
        mine = parts + (block * 4 * GROUPS) * 32 + lane
        step = blocks * (4 * GROUPS) * 32
        for i in tl.static_range(4 * GROUPS):
            put(mine + part * step + i * 32, acc[i], 1)
        tl.debug_barrier()  # every thread's part is written before this program is counted
        if tl.atomic_add(counters + block, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(counters + block, 0)
        total: tl.tuple = ()
        for i in tl.static_range(4 * GROUPS):
            value = tl.zeros([32], tl.float32)
            for p in range(SPLIT):
                value += others(mine + p * step + i * 32)
            total += (value,)
        acc = total
    multipliers = tl.load(weight + MULTIPLIERS).to(tl.pointer_type(tl.int16))
    multipliers += (blocks.to(tl.int64) * expert + block) * 16
    for i in tl.static_range(4 * GROUPS):
        r = g + i % 4 // 2 * 8
        m = i // 4 * 8 + 2 * t + i % 2
        there = (m < count) & (block * 16 + r < N)
        row = start + tl.minimum(m, count - 1)
        source = row
        if STAGE == UP:
            source = kept_word(pairs + row) // k_each
        multiplier = (kept_short(multipliers + r) << 16).to(tl.float32, bitcast=True)  # from bfloat16
        value = acc[i] * multiplier * kept_float(factors + source)
        if STAGE == DOWN:
            row = kept_word(pairs + row)
            value *= kept_float(shares + row)
        put(y + row.to(tl.int64) * N + block * 16 + r, value.to(y.dtype.element_ty), there.to(tl.int32))


def linear(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """The kernel for few tokens, cuBLAS on a dense copy for many; any number of leading dimensions."""
    x = x_TK.reshape(-1, x_TK.shape[-1])
    if len(x) > FEW:
        return F.linear(x_TK, dense(weight))
    return few(x.contiguous(), weight).view(*x_TK.shape[:-1], weight.shape[0])


def few(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """At most FEW tokens."""
    (N, _), T = weight.shape, len(x_TK)
    y = x_TK.new_empty(T, N)
    if T == 0:
        return y
    d = described(weight)
    x, factors = halves(x_TK, None, d.stride)
    blocks, groups = -(-N // 16), groups_for(T)
    parts = torch.empty(blocks * d.split * groups * 128 if d.split > 1 else 0, dtype=torch.float32, device=y.device)
    _product[(blocks, d.split)](
        x.view(torch.int32), factors, y, parts, counters(y.device, blocks), d.row, d.row, counters(y.device, blocks),
        factors, T, N, d.stride // 2, d.split, 1, 0,
        STAGE=LINEAR.value, **_settings(groups),
    )  # fmt: skip
    return y


def _settings(groups: int) -> dict:
    """Compile-time arguments. Triton has nothing to pipeline here; without stages it does not look for it."""
    return {"GROUPS": groups, "num_warps": 1, "num_stages": 1, "maxnreg": REGISTERS.get(groups)}


def groups_for(rows: int) -> int:
    """Groups of 8 columns for so many rows of activations: a power of two."""
    return triton.next_power_of_2(-(-rows // COLUMNS))


def experts(
    x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, gate: Stored, up: Stored, down: Stored
) -> torch.Tensor:
    """The op's meaning, in [T, D] of x's dtype, for one token at least; the three weights may have different tiles."""
    (T, D), k, (E, W, _) = x_TD.shape, ids_Tk.shape[1], gate.shape
    pairs, few = T * k, T * k <= routed.FEW
    x, ids = x_TD.contiguous(), ids_Tk.contiguous()
    settings = _settings(1 if few else LARGE // COLUMNS)
    a, b = described(gate), described(up)
    stride = max(a.stride, b.stride)
    middle = x.new_empty(2, pairs, W, dtype=torch.float32 if few else x.dtype)
    y = x.new_empty(pairs, D, dtype=middle.dtype)
    shares, none = weights_Tk.float().contiguous(), middle
    if few:
        slots, made, half, factors = begun(x, ids, E, stride)
    else:
        slots, made = routed.tiles(ids, E, LARGE)
        half, factors = halves(x, None, stride)
    _product[(-(-W // 16), slots, 2)](
        half.view(torch.int32), factors, middle, none, none, a.row, b.row, made, shares,
        0, W, stride // 2, 1, k, pairs, STAGE=UP.value, **settings,
    )  # fmt: skip
    one(middle[0], y, down, (slots, made), k, few, middle[1], shares)
    return routed.summed(y, ids, E, x.dtype)


def one(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: Stored,
    arranged: tuple[int, torch.Tensor],
    k: int,
    few: bool,
    up: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
) -> None:
    """As ops.triton.experts.one."""
    (slots, made), (_, N, _), d = arranged, weight.shape, described(weight)
    half, factors = halves(x, up, d.stride)
    stage = UP if shares is None else DOWN
    _product[(-(-N // 16), slots)](
        half.view(torch.int32), factors, y, y, y, d.row, d.row, made, factors if shares is None else shares,
        0, N, d.stride // 2, 1, k, made.shape[1], STAGE=stage.value, **_settings(1 if few else LARGE // COLUMNS),
    )  # fmt: skip
