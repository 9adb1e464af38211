"""Shares out bytes: of each group's options, one, so that the sum of losses is least and the bytes fit.

A multiple-choice knapsack (Sinha and Zoltners 1979), as one integer programme for HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DoesNotFit

GAP = 1e-4  # of the optimum: how far from it a solution may be
SECONDS = 50.0
STEPS = 40  # halvings of the range in which a price lies

Option = tuple[float, int]  # (loss, bytes)


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option taken in each group. DoesNotFit where even the smallest options exceed `budget`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, vstack

    least = sum(min(size for _, size in options) for options in groups)
    if least > budget:
        raise DoesNotFit(
            f"The smallest schemes take {least / 1e9:.3f} GB; the budget is {budget / 1e9:.3f} GB.",
            "Give more --bytes or --bits.",
        )
    kept = [(g, i) for g, options in enumerate(groups) for i in _efficient(options)]
    loss = np.array([groups[g][i][0] for g, i in kept])
    size = np.array([groups[g][i][1] for g, i in kept], float)
    rows = np.array([g for g, _ in kept])
    one_each = csr_matrix((np.ones(len(kept)), (rows, np.arange(len(kept)))), (len(groups), len(kept)))
    within = csr_matrix(size[None] / budget)
    ones = np.ones(len(groups))
    found = milp(
        loss / max(loss.max(), 1e-30),
        constraints=LinearConstraint(vstack([one_each, within]), np.append(ones, 0), np.append(ones, 1)),
        integrality=np.ones(len(kept)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:  # it ran out of time, before it had any
        return _by_price(groups, budget)
    chosen = [-1] * len(groups)
    for (g, i), share in zip(kept, found.x, strict=True):
        if share > 0.5:
            chosen[g] = i
    return chosen


def _by_price(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """What each group takes at the lowest price of a byte at which all fit (Everett 1963): the best of its size, but
    not always all of the budget."""

    def taken(price: float) -> list[int]:
        return [min((_cost(option, price), i) for i, option in enumerate(each))[1] for each in groups]

    def fits(chosen: list[int]) -> bool:
        return sum(each[i][1] for each, i in zip(groups, chosen, strict=True)) <= budget

    low, high = 0.0, float("inf")
    if fits(cheapest := taken(low)):
        return cheapest
    price = 1e-30
    while not fits(taken(price)) and price < 1e30:
        low, price = price, price * 1e3
    high = price
    for _ in range(STEPS):
        middle = (low * high) ** 0.5 if low else high / 2
        low, high = (low, middle) if fits(taken(middle)) else (middle, high)
    return taken(high) if fits(taken(high)) else taken(float("inf"))


def _cost(option: Option, price: float) -> tuple[float, float]:
    loss, size = option
    return (size, loss) if price == float("inf") else (loss + price * size, size)


def _efficient(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other beats in both loss and bytes."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0])):
        if not kept or options[i][0] < options[kept[-1]][0]:
            kept.append(i)
    return kept
