"""What a pass reads and multiplies on each rank, of what the rank holds; some of that all ranks of a stage repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..model.spec import ModelSpec
from . import cost
from .cost import Placed
from .cut import Cuts


@dataclass(frozen=True)
class Reads:
    """Of one rank. held: bytes in all, copies of experts among them. For passes: dense, embed and experts are bytes of
    what is read whole, by the token and by choice, experts without copies; work: its part of its stage's products,
    1 where it does them all."""

    held: int
    dense: int
    embed: int
    experts: float
    work: float

    def read(self, spec: ModelSpec, tokens: int, busiest: float) -> float:
        """Bytes of weights that a pass over so many tokens reads; busiest: `speeds.skew`."""
        looked_up = self.embed * min(1.0, tokens / spec.vocab)
        return self.dense + looked_up + self.experts * busiest * cost.chosen(spec, tokens)


def reads_of(cuts: Cuts, loaded: Sequence[Placed]) -> list[Reads]:
    """Of every rank. `loaded`: the rows of a plan that are."""
    mesh = cuts.mesh
    stages: dict[int, list[Placed]] = {stage: [] for stage in range(mesh.pp)}
    for p in loaded:
        for stage in stages:
            if cuts.held(p.weight, stage * mesh.inner):
                stages[stage].append(p)
    return [_reads(cuts, stages[mesh.stage(rank)], rank) for rank in range(mesh.size)]


def _reads(cuts: Cuts, own: Sequence[Placed], rank: int) -> Reads:
    spec, moe = cuts.spec, cuts.spec.moe
    found = {"dense": 0, "embed": 0, "experts": 0}
    held, mine, work = 0, 0.0, 0.0
    last = cuts.mesh.stage(rank) == cuts.mesh.pp - 1
    for p in own:
        size, weight = cuts.nbytes(p.weight, rank), p.weight
        held += size
        if weight.experts and moe:
            size = size * len(cuts.owned(rank)) // max(1, len(cuts.experts(rank, weight.layer or 0)))
        looked_up = weight.role == "embed" and not (spec.tied and last)
        found["experts" if weight.experts else "embed" if looked_up else "dense"] += size
        if weight.is_linear:
            each = weight.params * (moe.per_token / moe.experts if weight.experts and moe else 1.0)
            work, mine = work + each, mine + each * size / p.row.nbytes
    return Reads(held, found["dense"], found["embed"], found["experts"], mine / work if work else 0.0)
