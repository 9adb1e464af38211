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
    what is read whole, by the token and by choice, experts without copies."""

    held: int
    dense: float
    embed: float
    experts: float

    def read(self, spec: ModelSpec, tokens: int, busiest: float) -> float:
        """Bytes of weights that a pass over so many tokens reads; busiest: `speeds.skew`."""
        looked_up = self.embed * min(1.0, tokens / spec.vocab)
        return self.dense + looked_up + self.experts * min(1.0, busiest * cost.chosen(spec, tokens))


def part(cuts: Cuts, p: Placed, rank: int) -> float:
    """The share of a row's bytes that a rank reads and multiplies with: what it holds, but for copies of experts."""
    share = cuts.nbytes(p.weight, rank) / p.row.nbytes
    if p.weight.experts and share:
        share *= len(cuts.owned(rank)) / len(cuts.experts(rank, p.weight.layer or 0))
    return share


def reads_of(cuts: Cuts, loaded: Sequence[Placed]) -> list[Reads]:
    """Of every rank. `loaded`: the rows of a plan that are."""
    mesh = cuts.mesh
    stages = {stage: [p for p in loaded if cuts.held(p.weight, stage * mesh.inner)] for stage in range(mesh.pp)}
    return [_reads(cuts, stages[mesh.stage(rank)], rank) for rank in range(mesh.size)]


def _reads(cuts: Cuts, own: Sequence[Placed], rank: int) -> Reads:
    found = {"dense": 0.0, "embed": 0.0, "experts": 0.0}
    head_too = cuts.spec.tied and cuts.mesh.stage(rank) == cuts.mesh.pp - 1
    for p in own:
        kind = "experts" if p.weight.experts else "embed" if p.weight.role == "embed" and not head_too else "dense"
        found[kind] += part(cuts, p, rank) * p.row.nbytes
    return Reads(sum(cuts.nbytes(p.weight, rank) for p in own), **found)
