"""The routed experts of a MoE layer, without a word to the host. Shapes as in ops/experts.py.

P = T k pairs (token, choice) are put in the order of their experts. A tile is up to BM pairs of one expert; the grid
has as many tiles as there can be, and those that are not there end at once. Gate and up share a program, so that
silu(g) * u is all that is written; where programs would be too few for the GPU they have one each, and the later one
takes the other's result. Down's results are written a pair each, and a token's are added in the order of its choices:
nothing depends on which program ran first, nor on the other tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...scheme import Stored
from .after import EARLY, after
from .form import arguments
from .linear import BK, counters
from .small import silu_mul
from .tile import multiplied, product

FEW = 512  # pairs; above, tiles of many tokens and weights scaled before the product
SMALL, LARGE = 8, 128  # pairs in a tile
APART = 512  # programs up to which gate and up have one each
ROWS = {True: (64, 4, 5), False: (64, 4, 3)}  # few: rows of a weight in a program, warps, depth of the pipeline


@triton.jit
def arrange(ids, order, experts, starts, counts, P, E, BM: tl.constexpr, PP: tl.constexpr, STEP: tl.constexpr):
    """One program: each pair's place by expert and, where a tile begins there, its expert, start and count."""
    i = tl.arange(0, PP)
    mine = tl.load(ids + i, mask=i < P, other=E).to(tl.int32)
    mine = tl.where((mine >= 0) & (mine < E), mine, E)
    place = tl.zeros([PP], tl.int32)
    rank = tl.zeros([PP], tl.int32)
    total = tl.zeros([PP], tl.int32)
    for first in range(0, P, STEP):
        j = first + tl.arange(0, STEP)
        other = tl.load(ids + j, mask=j < P, other=E).to(tl.int32)
        other = tl.where((other >= 0) & (other < E), other, E)
        there = (j < P)[None, :]
        same = (other[None, :] == mine[:, None]) & there
        before = same & (j[None, :] < i[:, None])
        place += tl.sum((before | ((other[None, :] < mine[:, None]) & there)).to(tl.int32), 1)
        rank += tl.sum(before.to(tl.int32), 1)
        total += tl.sum(same.to(tl.int32), 1)
    begins = (mine < E) & (rank % BM == 0)
    tl.store(order + place, i, mask=i < P)
    tl.store(experts + place, mine, mask=i < P)
    tl.store(starts + place, place, mask=i < P)
    tl.store(counts + place, tl.where(begins, tl.minimum(total - rank, BM), 0), mask=i < P)


@triton.jit(do_not_specialize=["P"])
def _arrange(ids, order, experts, starts, counts, P, E, BM: tl.constexpr, PP: tl.constexpr, STEP: tl.constexpr):
    after()
    arrange(ids, order, experts, starts, counts, P, E, BM, PP, STEP)


@triton.jit
def _up(
    x, h, order, experts, starts, counts, k_each, parts, counters,
    gw, gs, gl, gm, uw, us, ul, um, W, K, WR, GR,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    EVEN: tl.constexpr, AFTER: tl.constexpr, TALL: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """TWO: the grid's third axis is the weight, with parts [slots, tiles, 2, BN, BM] and zeros [slots, tiles]."""
    after()
    slot = tl.program_id(1)
    count = tl.load(counts + slot)
    if count == 0:
        return
    e = tl.load(experts + slot).to(tl.int64)
    start = tl.load(starts + slot)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(rows, W - 1)
    m = tl.arange(0, G * BM) % BM
    live = m < count
    row = (tl.load(order + start + m, mask=live, other=0) // k_each).to(tl.int64) * K
    w_at, s_at = e * W * WR, e * ((W + TALL - 1) // TALL) * GR
    steps = tl.cdiv(K, BK)
    w, s, low, w2, s2, low2 = gw + w_at, gs + s_at, gl + s_at, uw + w_at, us + s_at, ul + s_at
    t = tl.arange(0, BM)
    at = h + (start + t).to(tl.int64)[None, :] * W + rows[:, None]
    mask = (t < count)[None, :] & (rows < W)[:, None]
    if TWO:
        up = tl.program_id(2) == 1
        if up:
            w, s, low, gm = w2, s2, low2, um
        mine, _ = product(x, row, live, w, s, low, w, s, low, n, 0, steps, K, WR, GR, S, BN, BM, BK, EVEN, AFTER, False)
        _gated(multiplied(mine, gm + e * W, n, S), up, parts, counters, at, mask)
        return
    if AFTER:  # in turn: measured faster by 8% at one token and 4 bits
        g, _ = product(x, row, live, w, s, low, w, s, low, n, 0, steps, K, WR, GR, S, BN, BM, BK, EVEN, AFTER, False)
        u, _ = product(
            x, row, live, w2, s2, low2, w2, s2, low2, n, 0, steps, K, WR, GR, S, BN, BM, BK, EVEN, AFTER, False
        )
    else:
        g, u = product(x, row, live, w, s, low, w2, s2, low2, n, 0, steps, K, WR, GR, S, BN, BM, BK, EVEN, AFTER, True)
    g = multiplied(g, gm + e * W, n, S)
    u = multiplied(u, um + e * W, n, S)
    value = g / (1.0 + tl.exp(-g)) * u
    tl.store(at, value.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _gated(mine, up, parts, counters, at, mask):
    """Leave the product [BN, BM] of gate, or of `up`; who comes second writes silu(g) * u."""
    BN: tl.constexpr = mine.shape[0]
    BM: tl.constexpr = mine.shape[1]
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    part = parts + place * (2 * BN * BM) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    tl.store(part + up * (BN * BM), mine)
    tl.debug_barrier()  # every thread's part is written before this program is counted
    if tl.atomic_add(counters + place, 1, sem="acq_rel") == 1:
        other = tl.load(part + (1 - up) * (BN * BM), cache_modifier=".cg")
        tl.store(counters + place, 0)
        g = tl.where(up, other, mine)
        value = g / (1.0 + tl.exp(-g)) * tl.where(up, mine, other)
        tl.store(at, value.to(at.dtype.scalar.element_ty), mask=mask)


@triton.jit
def _one(
    x, y, order, experts, starts, counts, shares, k_each,
    dw, ds, dl, dm, D, K, WR, GR,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    EVEN: tl.constexpr, AFTER: tl.constexpr, TALL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One product of each pair. LAST: of what lies in the order of experts, times the pair's share, into the pair's
    place; else of its token, into the order of experts."""
    after()
    slot = tl.program_id(1)
    count = tl.load(counts + slot)
    if count == 0:
        return
    e = tl.load(experts + slot).to(tl.int64)
    start = tl.load(starts + slot)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(rows, D - 1)
    m = tl.arange(0, G * BM) % BM
    live = m < count
    row = start + m
    if not LAST:
        row = tl.load(order + row, mask=live, other=0) // k_each
    w_at, s_at = e * D * WR, e * ((D + TALL - 1) // TALL) * GR
    w, s, low = dw + w_at, ds + s_at, dl + s_at
    acc, _ = product(
        x, row.to(tl.int64) * K, live, w, s, low, w, s, low, n, 0, tl.cdiv(K, BK), K, WR, GR, S, BN, BM, BK, EVEN,
        AFTER, False,
    )  # fmt: skip
    acc = multiplied(acc, dm + e * D, n, S)
    t = tl.arange(0, BM)
    place = start + t
    if LAST:
        place = tl.load(order + place, mask=t < count, other=0)
        acc = acc * tl.load(shares + place, mask=t < count, other=0.0)[None, :]
    at = y + place.to(tl.int64)[None, :] * D + rows[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(t < count)[None, :] & (rows < D)[:, None])


@triton.jit
def _sum(y, ids, out, D, E, k_each: tl.constexpr, BLOCK: tl.constexpr):
    """A token's results in the order of its choices, in float32; choices of other banks add nothing."""
    after()
    t = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(k_each):
        e = tl.load(ids + t * k_each + j)
        mask = (d < D) & (e >= 0) & (e < E)
        total += tl.load(y + (t * k_each + j) * D + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)


def arranged(ids: torch.Tensor, experts: int) -> tuple[int, torch.Tensor]:
    """As `tiles`, of up to SMALL pairs, for FEW pairs at most."""
    pairs = ids.numel()
    made = torch.empty(4, pairs, dtype=torch.int32, device=ids.device)
    padded = max(16, triton.next_power_of_2(pairs))
    _arrange[(1,)](ids, *made, pairs, experts, BM=SMALL, PP=padded, STEP=min(padded, 32), num_warps=8, **EARLY)
    return pairs, made


def tiles(ids: torch.Tensor, experts: int, size: int) -> tuple[int, torch.Tensor]:
    """(tiles of up to `size` pairs there can be, int32 [4, P]: order, and expert, start and count of each tile), all
    on the device."""
    pairs = ids.numel()
    made = torch.empty(4, pairs, dtype=torch.int32, device=ids.device)
    flat = ids.flatten()
    flat = flat.where((flat >= 0) & (flat < experts), experts).int()
    by_expert, order = flat.sort(stable=True)
    edges = torch.searchsorted(by_expert, torch.arange(experts + 1, dtype=torch.int32, device=ids.device))
    need = (edges.diff() + size - 1) // size
    ends = need.cumsum(0)
    most = min(pairs, experts + pairs // size)
    tile = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp_(max=experts - 1)
    start = edges[expert] + (tile - (ends - need)[expert]) * size
    count = (edges[expert + 1] - start).clamp(0, size).where(tile < ends[-1], 0)
    made[0] = order
    for row, found in zip(made[1:], (expert, start, count), strict=True):
        row[:most] = found
    return most, made


def summed(y: torch.Tensor, ids: torch.Tensor, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """The sums [T, D] of the results [P, D] of each token's choices."""
    (T, k), D = ids.shape, y.shape[1]
    out = y.new_empty(T, D, dtype=dtype)
    _sum[(-(-D // 1024), T)](y, ids, out, D, experts, k_each=k, BLOCK=1024, **EARLY)
    return out


def experts(
    x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, gate: Stored, up: Stored, down: Stored
) -> torch.Tensor:
    """The op's meaning, in [T, D] of x's dtype, for one token at least."""
    (T, D), k, (E, W, _) = x_TD.shape, ids_Tk.shape[1], gate.shape
    few = T * k <= FEW
    x, ids = x_TD.contiguous(), ids_Tk.contiguous()
    slots, made = arranged(ids, E) if few else tiles(ids, E, LARGE)
    h = x.new_empty(T * k, W)
    y = torch.empty(T * k, D, dtype=torch.float32 if few else x.dtype, device=x.device)
    a, b, settings = arguments(gate), arguments(up), _settings(arguments(gate), D, few)
    programs = -(-W // settings["BN"]) * slots
    two = few and programs <= APART
    parts = torch.empty(2 * programs * settings["BN"] * settings["BM"] if two else 0, device=x.device)
    zeros = counters(x.device, programs if two else 1)
    _up[(programs // slots, slots, 1 + two)](
        x, h, *made, k, parts, zeros, *a.parts, *b.parts, W, D, a.row_bytes, a.groups, **settings, TWO=two,
    )  # fmt: skip
    one(h, y, down, (slots, made), k, few, shares=weights_Tk.float().contiguous())
    return summed(y, ids, E, x.dtype)


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
    """y [P, N], in the order of experts, of each pair's token in x [T, K]. With shares [T, k], float32 and contiguous:
    y in the order of pairs, times them, of x [P, K], or of silu(x) * up, in the order of experts.

    `arranged`: as `tiles` has it.
    """
    (slots, made), (_, N, K), c = arranged, weight.shape, arguments(weight)
    if up is not None:
        x = silu_mul(x, up).bfloat16()
    _one[lambda meta: (-(-N // meta["BN"]), slots)](
        x, y, *made, y if shares is None else shares, k, *c.parts, N, K, c.row_bytes, c.groups,
        **_settings(c, K, few), LAST=shares is not None,
    )  # fmt: skip


def _settings(a, inputs: int, few: bool) -> dict:
    """Compile-time arguments. Half the step where a piece of it still feeds a product of 16 inputs."""
    form = a.form
    step = BK if few or form.pieces == 8 else BK // 2
    rows, warps, depth = ROWS[few]
    return {
        "S": form, "BN": rows, "BM": SMALL if few else LARGE, "BK": step, "G": form.columns(step, few),
        "EVEN": inputs % step == 0, "AFTER": few, "TALL": form.tall,
        **EARLY, "num_warps": warps, "num_stages": depth if form.columns(step, few) == 1 else 3,
    }  # fmt: skip
