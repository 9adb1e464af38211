"""Ranks: how many processes share a model, and which of its layers each one has.

A rank is numbered (stage, expert, tensor), the last fastest. Stages are ranges of layers, one after another. Within a
stage all `inner` = ep * tp ranks cut every weight but the routed experts; these are cut ep ways by expert and tp ways
by width, so that one all-reduce over a stage's ranks ends each half of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Mesh(BaseModel):
    """`stages`: layers [first, past the last) of each. `devices`: where each rank computes. `shares`: how much of what
    is cut each rank of a stage takes, in any unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tp: int = Field(default=1, gt=0, le=1024)
    ep: int = Field(default=1, gt=0, le=1024)
    stages: tuple[tuple[int, int], ...] = Field(min_length=1)
    devices: tuple[str, ...] = Field(min_length=1)
    shares: tuple[float, ...] = ()
    microbatches: int = Field(default=1, gt=0, le=64)  # parts of a decode batch that are in the pipeline together
    copies: tuple[tuple[int, int, int], ...] = ()  # (layer, expert, group that holds it too): copies.py

    @model_validator(mode="after")
    def _agrees(self) -> Mesh:
        if len(self.devices) != self.size:
            raise ValueError(f"{len(self.devices)} devices for {self.size} ranks")
        ends = [0, *(end for _, end in self.stages)]
        if any(stage != (a, b) or a >= b for stage, a, b in zip(self.stages, ends, ends[1:], strict=False)):
            raise ValueError("stages do not follow one another from layer 0")
        if self.shares and (len(self.shares) != self.inner or min(self.shares) <= 0):
            raise ValueError(f"shares: want {self.inner} positive numbers")
        return self

    @property
    def pp(self) -> int:
        return len(self.stages)

    @property
    def inner(self) -> int:
        """Ranks of a stage."""
        return self.ep * self.tp

    @property
    def size(self) -> int:
        return self.pp * self.inner

    @property
    def weights(self) -> list[float]:
        """How much each rank of a stage takes of what is cut."""
        return list(self.shares) or [1.0] * self.inner

    def stage(self, rank: int) -> int:
        return rank // self.inner

    def layers(self, rank: int) -> range:
        return range(*self.stages[self.stage(rank)])

    def within(self, rank: int) -> int:
        """A rank's place in its stage."""
        return rank % self.inner

    def peers(self, rank: int) -> range:
        """The ranks of a rank's stage."""
        first = rank - self.within(rank)
        return range(first, first + self.inner)

    def stage_of(self, layer: int | None, last: bool = False) -> int:
        """The stage of a layer; of what belongs to none: the first, or the last."""
        if layer is None:
            return self.pp - 1 if last else 0
        return next((s for s, (a, b) in enumerate(self.stages) if a <= layer < b), self.pp - 1)


def even(count: int, parts: int) -> list[tuple[int, int]]:
    """[0, count) in `parts` ranges as equal as can be."""
    return ranges([1.0] * parts, count)


def ranges(shares: Sequence[float], count: int) -> list[tuple[int, int]]:
    """[0, count) in consecutive ranges, one for each share and about as large; some empty where there is not enough."""
    least, total = int(count >= len(shares)), sum(shares)
    sizes = [max(least, int(share / total * count)) for share in shares]  # what each is owed at least
    if sum(sizes) > count:
        sizes = [least] * len(shares)
    for _ in range(count - sum(sizes)):  # the next one goes to whom most is owed
        owed = [share / total * count - size for share, size in zip(shares, sizes, strict=True)]
        sizes[owed.index(max(owed))] += 1
    found, start = [], 0
    for size in sizes:
        found.append((start, start + size))
        start += size
    return found
