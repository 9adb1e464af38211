"""The product that every kernel shares: BN rows of a quantised weight times up to BM rows of activations.

The weight is the left operand, so that its codes go from bytes to the tensor cores' registers without a way through
shared memory. `AFTER`: codes are multiplied exactly and scales follow in float32, a group at a time; where several
groups lie in one step of BK inputs, the activations get a column for each group, zero outside it. Otherwise (many
tokens) weights are scaled and rounded to bfloat16 first, as the reference does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import CODE, codes, get, lifted, ones_like, scale


@triton.constexpr_function
def columns(form, step, after):
    return form.columns(step, after)


@triton.jit
def run_of(w, i: tl.constexpr, mask, EVEN: tl.constexpr):
    """A run of bytes of every quantum in a step."""
    return tl.load(w + i) if EVEN else tl.load(w + i, mask=mask, other=0)


@triton.jit
def next_scales(scales, lows, n, k, K, GR, S: tl.constexpr, G: tl.constexpr):
    """Scales and minimums [BN, G] as stored, asked for one step before they are needed; past the end none."""
    at = k // get(S, "group") + tl.arange(0, G)[None, :]
    rows = (n // get(S, "tall"))[:, None] * GR
    raw = tl.load(scales + rows + at, mask=at < GR, other=0.0)
    low = raw
    if get(S, "affine"):
        low = tl.load(lows + rows + at, mask=at < GR, other=0.0)
    return raw, low


@triton.constexpr_function
def scales_in(form, quanta):
    """Scales of a piece of `quanta` quanta; of groups of 16 a piece sees every other one."""
    if form.group >= 32:
        return max(1, 32 * quanta // form.group)
    return quanta


@triton.jit
def piece_scales(part, n, k, GR, S: tl.constexpr, p: tl.constexpr, PER: tl.constexpr):
    """Scales (or minimums) of a piece as stored, [BN, 1] or one for each code [BN, PER]. Groups of 16 or more."""
    G: tl.constexpr = scales_in(S, PER // get(S, "unit"))
    first = k // get(S, "group") + (p * get(S, "unit") // 16 if get(S, "group") == 16 else 0)
    rows = part + n // get(S, "tall") * GR
    if G == 1:  # [BN, 1] would be loaded as often as a thread has codes of a row
        return tl.load(rows + first, mask=first < GR, other=0.0)[:, None]
    else:
        at = first + (1 if get(S, "group") >= 32 else 2) * tl.arange(0, G)[None, :]
        found = tl.load(rows[:, None] + at, mask=at < GR, other=0.0)
        wide = tl.broadcast_to(found[:, :, None], [found.shape[0], G, PER // G])
        return tl.reshape(wide, [found.shape[0], PER])


@triton.jit
def coded(at, scales, lows, n, k, there, GR, S: tl.constexpr, p: tl.constexpr, PER: tl.constexpr,
          EVEN: tl.constexpr, AFTER: tl.constexpr):  # fmt: skip
    """A piece [BN, PER] of the step at input k: codes, or with `AFTER` false weights, in bfloat16."""
    U: tl.constexpr = get(S, "unit")
    R: tl.constexpr = get(S, "runs")
    bytes_ = run_of(at, (p % R) * U, there, EVEN)
    upper = run_of(at, R * U, there, EVEN) if get(S, "second") else bytes_
    c = codes(bytes_, upper, S, p)
    if get(S, "group") > 0 and not AFTER:
        c = by_groups(c, scales, lows, n, k, GR, S, p, PER).to(CODE)
    return c


@triton.jit
def by_groups(c, scales, lows, n, k, GR, S: tl.constexpr, p: tl.constexpr, PER: tl.constexpr):
    """Codes [BN, PER] of a piece times their groups' scales, with their minimums, in float32."""
    by_group = scale(piece_scales(scales, n, k, GR, S, p, PER), S)
    f = c.to(tl.float32) * by_group
    if get(S, "affine"):
        f += lifted(piece_scales(lows, n, k, GR, S, p, PER), by_group)
    return f


@triton.jit
def bytes_of(w, n, k, K, WR, S: tl.constexpr, PER: tl.constexpr):
    """Of the step at input k: where each code of piece 0 has its byte [BN, PER], whether it is there [1, PER], and
    which input of the step it meets [PER]."""
    U: tl.constexpr = get(S, "unit")
    QB: tl.constexpr = get(S, "quantum_bytes")
    kk = tl.arange(0, PER)
    inside = kk // U * 32 + kk % U
    at = w + n[:, None] * WR + (k // 32 * QB + kk // U * QB + kk % U)[None, :]
    return at, (k + (inside if get(S, "pieces") == 1 else kk // U * 32))[None, :] < K, inside


@triton.jit
def weights(at, scales, lows, multipliers, n, k, there, GR, S: tl.constexpr, p: tl.constexpr, PER: tl.constexpr):
    """A piece [BN, PER] of the step at input k in float32, scaled; `at`, `there`: of `bytes_of`."""
    f = coded(at, scales, lows, n, k, there, GR, S, p, PER, False, True).to(tl.float32)
    if get(S, "group"):
        f = by_groups(f, scales, lows, n, k, GR, S, p, PER)
    return multiplied(f, multipliers, n, S)


@triton.jit
def scaled(acc, part, sums, raw, low, S: tl.constexpr, G: tl.constexpr):
    """acc + a step's groups, each times its scale, and its minimum times the activations' sum."""
    by_group = scale(raw, S)
    if G == 1:
        acc += part * by_group
        if get(S, "affine"):
            acc += sums * lifted(low, by_group)
    else:
        shape: tl.constexpr = [part.shape[0], G, part.shape[1] // G]
        each = tl.reshape(part, shape) * by_group[:, :, None]
        if get(S, "affine"):
            each += tl.reshape(sums, shape) * lifted(low, by_group)[:, :, None]
        acc += tl.sum(each, 1)
    return acc


@triton.jit
def product(
    x, row, live, w, scales, lows, w2, scales2, lows2, n, first, last, K, WR, GR,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, AFTER: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """[BN, BM] in float32 over steps [first, last) of BK inputs, without the rows' multipliers; with `TWO` also the
    second weight's.

    x: activations; row, live [COLS]: where each column's row starts, and whether it is there. n [BN]: rows of the
    weight, all within it. WR: bytes of a row, GR: scales of a row.
    """
    U: tl.constexpr = get(S, "unit")
    NP: tl.constexpr = get(S, "pieces")
    QB: tl.constexpr = get(S, "quantum_bytes")
    PER: tl.constexpr = BK // NP
    G: tl.constexpr = columns(S, BK, AFTER)
    SCALES: tl.constexpr = get(S, "group") > 0 and AFTER
    kk = tl.arange(0, PER)
    inside = kk // U * 32 + kk % U  # of a step: the input of each code of piece 0
    group = tl.arange(0, G * BM) // BM
    w_at = n[:, None] * WR + (kk // U * QB + kk % U)[None, :]
    x_at = x + row[None, :] + inside[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    acc2 = acc
    if SCALES:
        raw, low = next_scales(scales, lows, n, first * BK, K, GR, S, G)
        if TWO:
            raw2, low2 = next_scales(scales2, lows2, n, first * BK, K, GR, S, G)
    for step in tl.range(first, last):
        k = step * BK
        there = (k + (inside if NP == 1 else kk // U * 32))[None, :] < K
        at = w_at + step * (BK // 32 * QB)
        if SCALES:
            raw_now, low_now = raw, low
            raw, low = next_scales(scales, lows, n, k + BK, K, GR, S, G)
            part = tl.zeros([BN, G * BM], tl.float32)
            sums = part
            part2 = part
            if TWO:
                raw2_now, low2_now = raw2, low2
                raw2, low2 = next_scales(scales2, lows2, n, k + BK, K, GR, S, G)
        for p in tl.static_range(NP):
            wanted = live[None, :]
            if not EVEN:
                wanted = wanted & (k + inside[:, None] + p * U < K)
            if G > 1:
                if get(S, "group") >= 32:
                    wanted = wanted & ((kk // (U * get(S, "group") // 32))[:, None] == group[None, :])
                else:
                    wanted = wanted & ((kk // U * 2 + p * U // 16)[:, None] == group[None, :])
            xs = tl.load(x_at + k + p * U, mask=wanted, other=0.0).to(CODE)
            c = coded(w + at, scales, lows, n, k, there, GR, S, p, PER, EVEN, AFTER)
            if TWO:
                c2 = coded(w2 + at, scales2, lows2, n, k, there, GR, S, p, PER, EVEN, AFTER)
            if SCALES:
                part = tl.dot(c, xs, part)
                if TWO:
                    part2 = tl.dot(c2, xs, part2)
                if get(S, "affine"):
                    sums = tl.dot(ones_like(c), xs, sums)  # every row: the sums of each column's activations
            else:
                acc = tl.dot(c, xs, acc)
                if TWO:
                    acc2 = tl.dot(c2, xs, acc2)
        if SCALES:
            acc = scaled(acc, part, sums, raw_now, low_now, S, G)
            if TWO:
                acc2 = scaled(acc2, part2, sums, raw2_now, low2_now, S, G)
    return acc, acc2


@triton.jit
def multiplied(acc, multipliers, n, S: tl.constexpr):
    """The accumulator times the rows' multipliers where there are some."""
    if get(S, "by_row"):
        return acc * tl.load(multipliers + n).to(tl.float32)[:, None]
    else:
        return acc * (1.0 if get(S, "group") else get(S, "factor"))
