"""Which experts a token goes to, in one kernel where PyTorch launches seventeen. Shapes as in ops/router.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...model.spec import Moe
from .after import EARLY, after


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
    padded = [triton.next_power_of_2(n) for n in (moe.groups, width, moe.per_token)]
    if tokens:
        _route[(tokens,)](
            logits, logits if bias_E is None else bias_E, ids, shares, moe.scale, GROUPS=moe.groups, WIDTH=width,
            BEST=moe.top_groups, K=moe.per_token, SIGMOID=moe.scoring == "sigmoid", BIASED=bias_E is not None,
            NORMALISE=moe.normalise, GP=padded[0], WP=padded[1], KP=padded[2], num_warps=1, **EARLY,
        )  # fmt: skip
    return ids, shares
