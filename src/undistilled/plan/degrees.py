"""How many ranks a model is cut over, along each axis: what a person asks for, or leaves to the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError
from ..model.spec import ModelSpec

AUTO = "auto"  # as many ranks as are fastest, one a GPU at most


@dataclass(frozen=True)
class Degrees:
    """How many ranks a person asks for, along each axis; `microbatches` None: as many as there are stages."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    microbatches: int | None = None
    copies: int = 0  # of experts, a layer, at most
    counts: str | None = None  # the file that says which experts are chosen often
    ranks: int | None = None  # how many a plan may cut as it finds fastest (fastest.py); 0: up to all GPUs

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Degrees:
        """Of options by their names; degrees that are not there, or None, are 1."""
        given = [name for name in ("tp", "pp", "ep") if options.get(name)]
        tp, pp, ep = (options.get(name) or 1 for name in ("tp", "pp", "ep"))
        copied = options.get("expert_copies") or 0, options.get("expert_counts")
        ranks = _ranks(options.get("ranks"))
        if ranks is not None and given:
            raise UsageError(f"--ranks chooses --{given[0]} by itself.", "Give one or the other.")
        return cls(tp, pp, ep, options.get("microbatches"), *copied, ranks)

    def __str__(self) -> str:
        """For people: "tp 2 x pp 2"."""
        each = (("tp", self.tp), ("pp", self.pp), ("ep", self.ep))
        return " x ".join(f"{name} {degree}" for name, degree in each if degree > 1) or "one process"

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.ep

    def check(self, layers: int) -> None:
        """UsageError where they make no sense for a model of so many layers."""
        for option, value in (("--tp", self.tp), ("--pp", self.pp), ("--ep", self.ep)):
            if value < 1:
                raise UsageError(f"{option} {value}: it starts at 1.")
        if self.pp > layers:
            raise UsageError(f"--pp {self.pp}: the model has {layers} layers.")
        if self.size > MOST or (self.microbatches or 1) > 64:
            raise UsageError(f"{self.size} ranks, {self.microbatches or 1} microbatches.", f"At most {MOST} and 64.")
        if (self.microbatches or 1) > 1 and self.pp == 1:
            raise UsageError("--microbatches are parts of a batch in a pipeline.", "Give --pp too.")
        if bool(self.copies) != bool(self.counts):
            raise UsageError(
                "--expert-copies says how many, --expert-counts which experts are chosen often.", "Give both."
            )


ONE = Degrees()
MOST = 1024  # ranks


def _ranks(asked: Any) -> int | None:
    """Of `--ranks`; 0 is `auto`."""
    if asked in (None, AUTO):
        return None if asked is None else 0
    try:
        count = int(asked)
    except ValueError:
        count = 0
    if not 1 <= count <= MOST:
        raise UsageError(f"--ranks {asked}: a number from 1 to {MOST}, or {AUTO}.")
    return count


def candidates(asked: Degrees, spec: ModelSpec, gpus: int) -> Iterator[Degrees]:
    """Every way to cut the model over the ranks asked for; the fewest stages first."""
    for size in range(1, max(gpus, 1) + 1) if asked.ranks == 0 else (asked.ranks or 1,):
        for pp in (n for n in range(1, spec.layers + 1) if size % n == 0):
            inner = size // pp
            for ep in (n for n in range(1, inner + 1) if inner % n == 0 and (n == 1 or spec.moe)):
                parts = asked.microbatches if pp > 1 else None
                yield replace(asked, tp=inner // ep, pp=pp, ep=ep, microbatches=parts, ranks=None)
