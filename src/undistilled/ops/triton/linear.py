"""y = x W^T for quantised weights. T tokens, K inputs, N outputs; shapes as in ops/linear.py.

Up to FEW tokens one kernel decodes and multiplies. The inputs are split among programs where N alone would not fill
the GPU; the last program of a tile adds the parts in their order, so that the sum is the same every time, and the
split depends on the weight's shape alone. Rows are computed alike in any company of up to 8, of 9 to 16, and so on:
wider tiles run other instructions of the tensor cores and round otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...scheme import Stored
from . import FEW
from .after import EARLY, after
from .decode import get
from .form import arguments
from .room import depth
from .tile import bytes_of, multiplied, product, weights

BK = 128
ROWS = (64, 4, 4)  # rows of the weight in a program, warps, depth of the pipeline
SMALL = 1 << 25  # codes of a weight; joining many parts would take it as long as they do
PROGRAMS = (132 * 2, 132 * 5)  # that a split aims at: of small weights, and of others
AHEAD = tl.constexpr(8)
_counters: dict[tuple[int, int, int], torch.Tensor] = {}


@triton.jit(do_not_specialize=["T", "SPLIT", "TILES"])  # a row must meet the same code in any company
def _linear(
    x, y, parts, counters, w, scales, lows, multipliers, w2, scales2, lows2, multipliers2,
    T, N, N2, K, WR, GR, SPLIT, TILES,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    EVEN: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """y [T, N], and with `TWO` behind it [T, N2] of the second weight, whose tiles come behind the first's TILES."""
    after()
    tile, part = tl.program_id(0), tl.program_id(1)
    counter, whole = counters + tile, T * (N + N2)
    if TWO and tile >= TILES:
        tile -= TILES
        w, scales, lows, multipliers = w2, scales2, lows2, multipliers2
        y += T * N
        parts += T * N
        N = N2
    rows = tile * BN + tl.arange(0, BN)
    n = tl.minimum(rows, N - 1)
    m = tl.arange(0, G * BM) % BM
    steps = tl.cdiv(K, BK)
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    live = m < T
    acc, _ = product(
        x, m * K, live, w, scales, lows, w, scales, lows, n, first, last, K, WR, GR, S, BN, BM, BK, EVEN, True, False
    )
    t = tl.arange(0, BM)
    at = t[None, :] * N + rows[:, None]
    mask = (t[None, :] < T) & (rows[:, None] < N)
    if SPLIT > 1:
        if left(acc, parts + at, mask, whole, part, counter, SPLIT):
            acc = joined(parts + at, mask, whole, SPLIT)
            tl.store(y + at, multiplied(acc, multipliers, n, S).to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(y + at, multiplied(acc, multipliers, n, S).to(y.dtype.element_ty), mask=mask)


@triton.jit
def left(acc, parts, mask, whole, part, counter, SPLIT):
    """Leave a program's part. Whether it is the last of SPLIT: then the counter is zero again."""
    tl.store(parts + part * whole, acc, mask=mask)
    tl.debug_barrier()  # every thread's part is written before this program is counted
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def joined(parts, mask, whole, SPLIT):
    """The sum of the parts, in their order; AHEAD of them are on their way at once."""
    acc = tl.zeros(parts.shape, tl.float32)
    for i in range(0, SPLIT, AHEAD):
        found: tl.tuple = ()
        for j in tl.static_range(AHEAD):
            there = mask & (i + j < SPLIT)
            found += (tl.load(parts + (i + j) * whole, mask=there, other=0.0, cache_modifier=".cg"),)
        for j in tl.static_range(AHEAD):
            acc += found[j]
    return acc


def linear(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """The kernel for few tokens, cuBLAS on a dense copy for many; any number of leading dimensions."""
    x = x_TK.reshape(-1, x_TK.shape[-1])
    if len(x) > FEW:
        return F.linear(x_TK, dense(weight))
    y = few(x.contiguous(), weight)
    return y.view(*x_TK.shape[:-1], weight.shape[0])


def few(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """At most FEW tokens."""
    return _few(x_TK, weight, None).view(len(x_TK), weight.shape[0])


def few_of_both(x_TK: torch.Tensor, weight: Stored, second: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    """At most FEW tokens by two weights of one form, with the same inputs, in one launch."""
    y, (N, _), T = _few(x_TK, weight, second), weight.shape, len(x_TK)
    return y[: T * N].view(T, N), y[T * N :].view(T, second.shape[0])


def _few(x_TK: torch.Tensor, weight: Stored, second: Stored | None) -> torch.Tensor:
    """[T * N], then the second weight's [T * N2]."""
    (N, K), T, N2 = weight.shape, len(x_TK), 0 if second is None else second.shape[0]
    a, b = arguments(weight), arguments(second or weight)
    y = x_TK.new_empty(T * (N + N2))
    if T == 0:
        return y
    (rows, warps, deep), split = ROWS, splits(N + N2, K)
    first = -(-N // rows)
    tiles = first + -(-N2 // rows)
    parts = torch.empty(split * len(y) if split > 1 else 0, dtype=torch.float32, device=y.device)
    bm = padded(T)
    columns = bm * a.form.columns(BK)
    stages = depth(deep if columns <= 32 else 3, BK * (2 * columns + rows), y.device)
    _linear[(tiles, split)](
        x_TK, y, parts, counters(y.device, tiles), *a.parts, *b.parts, T, N, N2, K, a.row_bytes, a.groups, split, first,
        S=a.form, BN=rows, BM=bm, BK=BK, G=a.form.columns(BK), EVEN=K % BK == 0, TWO=second is not None,
        num_warps=warps, num_stages=stages, **EARLY,
    )  # fmt: skip
    return y


def padded(rows: int, least: int = 8) -> int:
    """Rows that a program computes; of tensor cores' left operand 16 at least, of their right one 8."""
    return max(least, triton.next_power_of_2(rows))


def splits(outputs: int, inputs: int) -> int:
    """Parts that the inputs are cut into: of the weight's shape alone."""
    programs = PROGRAMS[outputs * inputs > SMALL]
    return max(1, min(programs // -(-outputs // ROWS[0]), inputs // BK // 2))


def counters(device: torch.device, tiles: int) -> torch.Tensor:
    """Zeros that the kernel leaves zero; of each stream, for kernels of two streams run side by side. They stay where
    they are when more are asked for: captured passes go on with them."""
    size = max(4096, triton.next_power_of_2(tiles))
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream, size)
    if key not in _counters:
        _counters[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return _counters[key]


@triton.jit
def _dense(
    out, w, scales, lows, multipliers, N, K, WR, GR,
    S: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    NP: tl.constexpr = get(S, "pieces")
    PER: tl.constexpr = BK // NP
    k = tl.program_id(0) * BK
    rows = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    n = tl.minimum(rows, N - 1)
    at, there, inside = bytes_of(w, n, k, K, WR, S, PER)
    for p in tl.static_range(NP):
        f = weights(at, scales, lows, multipliers, n, k, there, GR, S, p, PER)
        column = k + inside + p * get(S, "unit")
        mask = (rows[:, None] < N) & (column[None, :] < K)
        tl.store(out + rows[:, None] * K + column[None, :], f.to(out.dtype.element_ty), mask=mask)


def dense(weight: Stored) -> torch.Tensor:
    """The weight [N, K] in bfloat16."""
    N, K = weight.shape
    a = arguments(weight)
    out = torch.empty(N, K, dtype=torch.bfloat16, device=weight.device)
    grid = (-(-K // 256), -(-N // 32))
    _dense[grid](out, *a.parts, N, K, a.row_bytes, a.groups, S=a.form, BN=32, BK=256, num_warps=4)
    return out
