"""How long work of a known size still takes, by the pace that it has kept."""

from __future__ import annotations

from time import perf_counter


class Pace:
    """`size`: of all the work, in any unit."""

    def __init__(self, size: float) -> None:
        self.left, self.worked, self.began = size, 0.0, perf_counter()

    def found(self, size: float) -> None:
        """So much was there already."""
        self.left -= size

    def did(self, size: float) -> None:
        self.left -= size
        self.worked += size

    def __str__(self) -> str:
        """Nothing is known before something was done."""
        seconds = (perf_counter() - self.began) / self.worked * self.left if self.worked else 0.0
        return f"{seconds:.0f} s left"
