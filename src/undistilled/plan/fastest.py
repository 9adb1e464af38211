"""Which way to cut a model over ranks is fastest, by the plan's own figures, of those that fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..events import emit
from ..model.spec import ModelSpec
from ..model.weights import counts
from .ask import UNCUT, Ask, gpus_of, laid
from .degrees import Degrees, candidates
from .hardware import Machine
from .speeds import speeds


@dataclass(frozen=True)
class Tried:
    """A layout. full: bytes over free bytes of its fullest device; prefill, decode: tokens a second; only_predicted:
    whether no run takes it yet; refused: why the model cannot be cut so."""

    degrees: Degrees
    full: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    only_predicted: bool = False
    refused: UsageError | None = None

    @property
    def fits(self) -> bool:
        return not self.refused and self.full <= 1

    @property
    def order(self) -> tuple[bool, bool, bool, float]:
        """Less is better: what a prompt's token and an answer's take together; where it does not fit, what lacks."""
        seconds = 1 / self.prefill + 1 / self.decode if self.fits else self.full
        return bool(self.refused), not self.fits, self.only_predicted, seconds


def fastest(name: str, spec: ModelSpec, machine: Machine, ask: Ask, scheme: str, context: int) -> Degrees:
    """Of the best layout of the model of this name; where none fits, of the one that lacks least. UsageError where none
    can be had."""
    ways = list(candidates(ask.degrees, spec, len(gpus_of(machine, ask))))
    if len(ways) > 1:
        if ask.mtp:
            raise UsageError(UNCUT, "Leave --mtp out.")
        emit("plan.comparing", count=len(ways), model=name)
    tried = compared(ways, spec, machine, ask, scheme, context)
    best, fit = tried[0], sum(t.fits for t in tried)
    if best.refused:
        raise best.refused
    if len(tried) > 1:
        how = "is predicted, but no run takes it yet" if best.only_predicted else "is the fastest, as predicted"
        said = f"{best.degrees} {how if fit else 'lacks least'}"
        emit("plan.layouts", tried=tried, count=len(tried), fit=fit, said=said)
    return best.degrees


def compared(
    ways: Iterable[Degrees], spec: ModelSpec, machine: Machine, ask: Ask, scheme: str, context: int
) -> list[Tried]:
    """These ways to cut the model, the best first; where several are, the one that comes first."""
    active = counts(spec)[1]
    tried = (_tried(spec, machine, replace(ask, degrees=way), scheme, context, active) for way in ways)
    return sorted(tried, key=lambda t: t.order)


def _tried(spec: ModelSpec, machine: Machine, ask: Ask, scheme: str, context: int, active: int) -> Tried:
    try:
        layouts = laid(spec, machine, ask, scheme, context)
        layout = layouts.at(context, ask.batch)
    except UsageError as error:
        return Tried(ask.degrees, refused=error)
    full = max(d.bytes.total / max(d.available, 1) for d in layout.devices.values())
    return Tried(ask.degrees, full, *speeds(layouts, layout, machine, active), layout.only_predicted)
