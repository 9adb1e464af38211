"""Shares out bytes: of each group's options, one, so that the sum of losses is least and the bytes fit.

A multiple-choice knapsack (Sinha and Zoltners 1979), as one integer programme for HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DoesNotFit

GAP = 1e-4  # of the optimum: how far from it a solution may be
SECONDS = 50.0

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
    if found.x is None:
        raise RuntimeError(f"HiGHS found no allocation: {found.message}")
    chosen = [-1] * len(groups)
    for (g, i), share in zip(kept, found.x, strict=True):
        if share > 0.5:
            chosen[g] = i
    return chosen


def _efficient(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other beats in both loss and bytes."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0])):
        if not kept or options[i][0] < options[kept[-1]][0]:
            kept.append(i)
    return kept
