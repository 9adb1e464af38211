"""The level nearest to a value in units of its scale, as data: PyTorch and the solvers' CUDA kernels read the same."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FINE = 4  # steps of a unit that separate the levels of every table here
SMALLEST = 2.0**-126  # float32 numbers that are smaller have no finite inverse


@dataclass(frozen=True)
class Ladder:
    """Levels from `least` to `most`, in steps of 1 / `fine`.

    `codes` uint8 and `levels` float32 [rungs]: those nearest to what lies in each step up to its end, so that no search
    is needed; a value halfway takes the lower level. Several tables may lie one after another: `begin` says where a
    value's own begins. None: levels are neighbouring integers, found by rounding (halves to even), with codes from 0.
    """

    least: int
    most: int
    fine: int = 1
    codes: torch.Tensor | None = None
    levels: torch.Tensor | None = None

    def rank(self, x: torch.Tensor) -> torch.Tensor:
        """Codes uint8 of the levels nearest to x."""
        import torch

        if self.codes is None:
            return (x - self.least).round_().clamp_(0, self.most - self.least).to(torch.uint8)
        return taken(self.codes, self._rung(x, None))

    def snapped(self, x: torch.Tensor) -> torch.Tensor:
        """The levels nearest to x, float32."""
        if self.levels is None:
            return x.round().clamp_(self.least, self.most)
        return taken(self.levels, self._rung(x, None))

    def nearest(self, x: torch.Tensor, begin: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and levels; begin: int32, of x's shape."""
        if self.codes is None or self.levels is None:
            codes = self.rank(x)
            return codes, codes.float() + self.least
        rung = self._rung(x, begin)
        return taken(self.codes, rung), taken(self.levels, rung)

    def _rung(self, x: torch.Tensor, begin: torch.Tensor | None) -> torch.Tensor:
        step = (x * self.fine).ceil_().clamp_(self.least * self.fine, self.most * self.fine)
        rung = step.sub_(self.least * self.fine).int()
        return rung if begin is None else rung.add_(begin)


def even(levels: tuple[float, ...]) -> bool:
    """Whether they are neighbouring integers, in order."""
    return all(b - a == 1 for a, b in pairwise(levels))


@cache
def ladder(levels: tuple[float, ...], device: torch.device) -> Ladder:
    """Of levels by code; its tables stay on the device, since a copy from the host makes a GPU's launches wait."""
    import torch

    order = sorted(range(len(levels)), key=lambda c: levels[c])
    rungs = [levels[c] for c in order]
    least, most = int(rungs[0]), int(rungs[-1])
    if even(levels):
        return Ladder(least, most)
    between = [(a + b) / 2 for a, b in pairwise(rungs)]
    assert all(float(x * FINE).is_integer() for x in between) and (least, most) == (rungs[0], rungs[-1])
    steps = range(least * FINE, most * FINE + 1)
    codes = torch.tensor([order[bisect_left(between, step / FINE)] for step in steps], dtype=torch.uint8)
    return Ladder(least, most, FINE, codes.to(device), taken(torch.tensor(levels), codes.int()).to(device))


@cache
def by_code(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The levels, float32, kept on the device."""
    import torch

    return torch.tensor(levels, device=device)


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scales, 0 where there is none: all values become level 0."""
    return scales.reciprocal().masked_fill_(scales.abs() < SMALLEST, 0.0)


def taken(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index], which takes a CPU three times as long."""
    return table.index_select(0, index.flatten()).view(index.shape)
