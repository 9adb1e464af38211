"""Which experts a token goes to, in two launches where PyTorch has twenty. Shapes as in ops/router.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...model.spec import Moe
from .after import EARLY, after
from .decode import CODE
from .linear import counters, joined, left, padded

TILE = (32, 128)  # experts and inputs that meet at once
PROGRAMS = 132  # that the inputs are split among


@triton.jit(do_not_specialize=["T", "SPLIT"])  # a row must meet the same code in any company
def _logits(
    x, w, y, parts, counters, T, E, D, SPLIT, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    after()
    tile, part = tl.program_id(0), tl.program_id(1)
    e, m = tile * BE + tl.arange(0, BE), tl.arange(0, BM)
    steps = tl.cdiv(D, BK)
    acc = tl.zeros([BE, BM], tl.float32)
    for step in tl.range(steps * part // SPLIT, steps * (part + 1) // SPLIT):
        d = step * BK + tl.arange(0, BK)
        rated = tl.load(w + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)
        xs = tl.load(x + m[None, :] * D + d[:, None], mask=(m < T)[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(rated.to(CODE), xs.to(CODE), acc)
    at, mask = m[None, :] * E + e[:, None], (m < T)[None, :] & (e < E)[:, None]
    if left(acc, parts + at, mask, T * E, part, counters + tile, SPLIT):
        tl.store(y + at, joined(parts + at, mask, T * E, SPLIT), mask=mask)


def logits(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    """As ops.router.logits, for few tokens: both in bfloat16, whose products are exact in float32."""
    x, w = x_TD.contiguous(), w_ED.detach()
    (T, D), E = x.shape, len(w)
    y = x.new_empty(T, E, dtype=torch.float32)
    if T == 0:
        return y
    tiles = -(-E // TILE[0])
    split = max(1, min(PROGRAMS // tiles, -(-D // TILE[1])))
    parts = torch.empty(split * T * E, dtype=torch.float32, device=x.device)
    _logits[(tiles, split)](
        x, w, y, parts, counters(x.device, tiles), T, E, D, split,
        BE=TILE[0], BM=padded(T), BK=TILE[1], num_warps=4, num_stages=4, **EARLY,
    )  # fmt: skip
    return y


@triton.jit
def _scores(value, real, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-value))
    value = tl.where(real, value, float("-inf"))
    grown = tl.exp(value - tl.max(tl.max(value, 1), 0))
    return grown / tl.sum(tl.sum(grown, 1), 0)


@triton.jit
def _best_groups(choice, real, GP: tl.constexpr, WP: tl.constexpr, BEST: tl.constexpr, SIGMOID: tl.constexpr):
    """`choice` [GP, WP] where experts of other than the BEST groups are out of the question."""
    g, w = tl.arange(0, GP), tl.arange(0, WP)
    rating = tl.max(choice, 1)
    if SIGMOID:  # a group counts for its best two
        first = tl.argmax(choice, 1)
        rating += tl.max(tl.where(w[None, :] == first[:, None], float("-inf"), choice), 1)
    kept = g < 0
    for _ in tl.static_range(BEST):
        best = g == tl.argmax(rating, 0)
        kept = kept | best
        rating = tl.where(best, float("-inf"), rating)
    lowest = float("-inf") if SIGMOID else 0.0
    return tl.where(kept[:, None] | ~real, choice, lowest)


@triton.jit
def _route(
    logits, bias, ids, shares, scale, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BEST: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr,
    GP: tl.constexpr, WP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    after()
    t = tl.program_id(0).to(tl.int64)
    g, w, k = tl.arange(0, GP), tl.arange(0, WP), tl.arange(0, KP)
    expert = g[:, None] * WIDTH + w[None, :]
    real = (g < GROUPS)[:, None] & (w < WIDTH)[None, :]
    value = tl.load(logits + t * (GROUPS * WIDTH) + expert, mask=real, other=0.0)
    score = _scores(value, real, SIGMOID)
    choice = tl.where(real, score, float("-inf"))
    if BIASED:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    if GROUPS > 1:
        choice = _best_groups(choice, real, GP, WP, BEST, SIGMOID)
    choice = tl.reshape(choice, [GP * WP])
    score = tl.reshape(score, [GP * WP])
    expert = tl.reshape(expert, [GP * WP])
    lane = tl.arange(0, GP * WP)
    chosen, share = tl.zeros([KP], tl.int64), tl.zeros([KP], tl.float32)
    for i in tl.static_range(K):
        best = lane == tl.argmax(choice, 0)
        chosen = tl.where(k == i, tl.sum(tl.where(best, expert, 0), 0), chosen)
        share = tl.where(k == i, tl.sum(tl.where(best, score, 0.0), 0), share)
        choice = tl.where(best, float("-inf"), choice)
    if NORMALISE:
        share = share / (tl.sum(share, 0) + 1e-20)
    tl.store(ids + t * K + k, chosen, mask=k < K)
    tl.store(shares + t * K + k, share * scale, mask=k < K)


def route(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    """As ops.router.route; of equal choices the first."""
    logits = logits_TE.contiguous()
    tokens, experts = logits.shape
    ids = torch.empty((tokens, moe.per_token), dtype=torch.int64, device=logits.device)
    shares = torch.empty((tokens, moe.per_token), dtype=torch.float32, device=logits.device)
    width = experts // moe.groups
    wide = [triton.next_power_of_2(n) for n in (moe.groups, width, moe.per_token)]
    if tokens:
        _route[(tokens,)](
            logits, logits if bias_E is None else bias_E, ids, shares, moe.scale, GROUPS=moe.groups, WIDTH=width,
            BEST=moe.top_groups, K=moe.per_token, SIGMOID=moe.scoring == "sigmoid", BIASED=bias_E is not None,
            NORMALISE=moe.normalise, GP=wide[0], WP=wide[1], KP=wide[2], num_warps=1, **EARLY,
        )  # fmt: skip
    return ids, shares
