"""Intervals: what a finite measurement says about texts and questions like it. All are at 95%."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959963984540054  # of the normal distribution, two-sided 95%


def t_quantile(freedom: int) -> float:
    """Student's two-sided 95% quantile by Cornish and Fisher's expansion; 0.4% low at 7 degrees, better above."""
    z, v = Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean over all items and its standard error, with items in clusters that are independent of each other.

    A ratio estimator: se^2 = k / (k - 1) * sum((sum_c - count_c * mean)^2) / n^2. Clusters of one item give the
    textbook standard error. None for a single cluster, about which nothing can be said.
    """
    n, k = sum(counts), len(counts)
    mean = math.fsum(sums) / n
    if k < 2:
        return mean, None
    spread = math.fsum((s - c * mean) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(k / (k - 1) * spread) / n


def around(mean: float, error: float | None, clusters: int) -> list[float] | None:
    """[low, high] by Student's distribution."""
    if error is None:
        return None
    reach = t_quantile(clusters - 1) * error
    return [mean - reach, mean + reach]


def wilson(hits: int, n: int) -> list[float]:
    """[low, high] of a proportion (Wilson's score interval), never empty and never outside 0 to 1."""
    p, zz = hits / n, Z * Z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    reach = Z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def paired(gained: int, lost: int, n: int) -> list[float]:
    """[low, high] of the difference of two proportions on the same n questions (Agresti and Min, 2005).

    `gained`: only the second was right; `lost`: only the first. Half a question is added to each of the four
    cells, so that few discordant questions do not look like certainty.
    """
    size = n + 2
    difference = (gained - lost) / size
    reach = Z * math.sqrt(max(0.0, gained + lost + 1 - (gained - lost) ** 2 / size)) / size
    return [max(-1.0, difference - reach), min(1.0, difference + reach)]


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test: how surprising the discordant counts are if both are as good."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * math.fsum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n < 1000 else _normal(gained, lost)


def compared(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Shares of right answers, 0 to 1, of the original and of the plan on the same questions, one or more.

    `difference` is plan - original; gained, lost: questions that only the plan, only the original got right;
    `kept` is plan / original, None where the original got nothing right.
    """
    n, first, second = len(before), sum(before), sum(after)
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = gained - second + first
    return {
        "original": first / n,
        "plan": second / n,
        "n": n,
        "original_interval": wilson(first, n),
        "plan_interval": wilson(second, n),
        "difference": (second - first) / n,
        "difference_interval": paired(gained, lost, n),
        "gained": gained,
        "lost": lost,
        "mcnemar_p": mcnemar(gained, lost),
        "kept": second / first if first else None,
    }


def _normal(gained: int, lost: int) -> float:
    z = max(0.0, abs(gained - lost) - 1) / math.sqrt(gained + lost)
    return math.erfc(z / math.sqrt(2))
