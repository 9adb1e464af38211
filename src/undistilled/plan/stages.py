"""Which layers each stage of a pipeline has: by the time that a decode step spends in them, not by their number; and
fewer than that gives it where a stage's devices would not hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from ..model.spec import ModelSpec
from ..model.weights import weights
from . import cost
from .cost import Placed

if TYPE_CHECKING:
    from .layout import Layout
    from .ranks import RankLayouts

Fits = Callable[[int, int, int], bool]  # a stage, its first layer, past its last
NEVER = float("inf")


def layer_bytes(spec: ModelSpec, stored: Mapping[str, str]) -> list[float]:
    """Bytes that a decode step of one request reads in each layer; the head counts with the last."""
    read = [0.0] * spec.layers
    for weight in weights(spec):
        if not weight.mtp and weight.name in stored and weight.role != "embed":
            size = cost.row_bytes(weight, stored[weight.name])
            read[spec.layers - 1 if weight.layer is None else weight.layer] += size * cost.touched(weight, spec, 1)
    return read


def balanced(costs: Sequence[float], speeds: Sequence[float]) -> list[tuple[int, int]]:
    """Layers [first, past the last) of each stage, so that the slowest stage takes the least time.

    costs: of each layer, in any unit; speeds: units a second of each stage.
    """
    found = held(costs, speeds, lambda *_: True)
    assert found is not None
    return found


def held(costs: Sequence[float], speeds: Sequence[float], fits: Fits) -> list[tuple[int, int]] | None:
    """As `balanced`, among stages that fit; None where none do."""
    count, sums = len(costs), [0.0, *accumulate(costs)]
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(NEVER, 0)] * count]
    for stage, speed in enumerate(speeds):
        row = [(NEVER, 0)] * (count + 1)
        for end in range(1, count + 1):
            row[end] = min(
                (max(best[-1][start][0], (sums[end] - sums[start]) / speed), start)
                if best[-1][start][0] < NEVER and fits(stage, start, end)
                else (NEVER, 0)
                for start in range(end)
            )
        best.append(row)
    if best[-1][count][0] == NEVER:
        return None
    found, end = [], count
    for row in reversed(best[1:]):
        start = row[end][1]
        found.append((start, end))
        end = start
    return found[::-1]


class Room:
    """What each rank's device holds, of a layout whose stages were cut without regard to it. For GPUs: processes of one
    CPU share its memory, however layers are shared out."""

    def __init__(self, layouts: RankLayouts, layout: Layout) -> None:
        self.mesh, self.cuts, ranks = layouts.mesh, layouts.cuts, layout.ranks
        self.load = cost.load_bytes(layouts.loaded)
        self.work = [layouts.work(rank, layout.limits) for rank in range(self.mesh.size)]
        self.room = [layouts.free[r.device] - r.bytes.runtime for r in ranks]
        self.cache = [r.bytes.kv // len(self.mesh.layers(rank)) for rank, r in enumerate(ranks)]  # a layer
        self.each = [self._bytes(layouts.loaded, place) for place in range(self.mesh.inner)]

    def _bytes(self, loaded: Sequence[Placed], place: int) -> tuple[list[int], int, int]:
        """Of the ranks with this place in their stage: sums over the first layers, and what belongs to none of them, in
        the first and in the last stage."""
        layers, ends = [0] * self.cuts.spec.layers, [0, 0]
        last = (self.mesh.pp - 1) * self.mesh.inner + place
        for p in loaded:
            if p.weight.layer is None:
                ends[0] += self.cuts.nbytes(p.weight, place)
                ends[1] += self.cuts.nbytes(p.weight, last)
            else:
                rank = self.mesh.stage_of(p.weight.layer) * self.mesh.inner + place
                layers[p.weight.layer] += self.cuts.nbytes(p.weight, rank)
        return [0, *accumulate(layers)], ends[0], ends[1]

    def fits(self, stage: int, start: int, end: int) -> bool:
        """Whether a stage's ranks all have room for these layers."""
        first = stage * self.mesh.inner
        return all(self._need(rank, start, end) <= self.room[rank] for rank in range(first, first + self.mesh.inner))

    def _need(self, rank: int, start: int, end: int) -> int:
        sums, first, last = self.each[self.mesh.within(rank)]
        held, cache = sums[end] - sums[start], self.cache[rank] * (end - start)
        held += first * (self.mesh.stage(rank) == 0) + last * (self.mesh.stage(rank) == self.mesh.pp - 1)
        return held + cache + max(self.work[rank], self.load - cache)
