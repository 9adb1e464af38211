"""The way out where a plan does not fit: less context, smaller batches, another scheme, more ranks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from ..errors import UsageError
from ..model.spec import ModelSpec
from .ask import Ask, gpus_of, laid
from .degrees import ONE, Degrees, candidates
from .fastest import Tried, compared
from .hardware import Machine
from .layout import BLOCK, Layouts
from .ranks import RankLayouts

# tried in this order where something does not fit: what costs least in quality comes first
CANDIDATES = ("fp8_block", "int8", "experts-int4", "int4", "int4-sym", "experts-nl3", "experts-nl2")
DENSE = ("fp8_block", "int8", "int4", "int4-sym", "nl3-g64")
COSTS = "`prove` says what that costs in quality."


def advice(layouts: Layouts, machine: Machine, ask: Ask, context: int) -> str:
    """More ranks, where GPUs are idle; else the largest context of this scheme that fits, else the largest batch; else
    the first scheme that does, on these devices or on the CPU alone."""
    if more := _more_ranks(layouts, machine, ask, context):
        return more
    if options := _smaller(layouts, context, ask.batch):
        return f"With {options} it fits."
    forms, others = _forms(layouts), []
    for other in _in(forms, layouts, machine, ask, context):
        others.append(other)
        if other.at(context, ask.batch).fits:
            return f"With --scheme {other.scheme} it fits; {COSTS}"
    for other in others:
        if options := _smaller(other, context, ask.batch):
            return f"With --scheme {other.scheme} {options} it fits; {COSTS}"
    if _on_gpus(layouts) and "cpu" in layouts.free:
        alone = replace(ask, device="cpu", degrees=ONE)
        for other in _in([layouts.scheme, *forms], layouts, machine, alone, context):
            if other.at(context, ask.batch).fits:
                return f"With --device cpu --scheme {other.scheme}, without ranks, it fits."
    return _lacking(min((layouts, *others), key=_weights), layouts, machine)


def _forms(layouts: Layouts) -> list[str]:
    """Schemes beside the one that was asked for; the last takes the least."""
    return [form for form in (CANDIDATES if layouts.spec.moe else DENSE) if form != layouts.scheme]


def _in(schemes: list[str], asked: Layouts, machine: Machine, ask: Ask, context: int) -> Iterator[Layouts]:
    """The model in these schemes, one after another, but for those that ranks or products asked for do not go with."""
    for scheme in schemes:
        with suppress(UsageError):
            yield laid(asked.spec, machine, ask, scheme, context)


def _on_gpus(layouts: Layouts) -> bool:
    """Whether it is of ranks that are GPUs."""
    return isinstance(layouts, RankLayouts) and layouts.kind == "cuda"


def _more_ranks(layouts: Layouts, machine: Machine, ask: Ask, context: int) -> str:
    """Where some GPUs of a plan over ranks are idle and all of them would do."""
    gpus = sum(name.startswith("cuda") for name in layouts.free)
    if not _on_gpus(layouts) or ask.degrees.size == gpus:
        return ""
    best = _over_all(gpus, layouts.spec, machine, ask, layouts.scheme, context)
    return f"With --ranks {gpus} ({best.degrees}) it fits." if best.fits else ""


def over_ranks(layouts: Layouts, machine: Machine, ask: Ask, context: int) -> str:
    """Options with which the model runs over all GPUs as ranks, in the first other scheme that fits; "" where none
    does."""
    gpus = len(gpus_of(machine, ask))
    if gpus < 2:
        return ""
    best = partial(_over_all, gpus, layouts.spec, machine, ask, context=context)
    *forms, least = _forms(layouts)
    smallest = best(scheme=least)
    if not smallest.fits:  # nor does anything larger
        return ""
    others = ((form, found) for form in forms if (found := best(scheme=form)).fits)
    scheme, found = next(others, (least, smallest))
    return f"--scheme {scheme} --ranks {gpus} ({found.degrees})"


def _over_all(gpus: int, spec: ModelSpec, machine: Machine, ask: Ask, scheme: str, context: int) -> Tried:
    """The best way to have a rank on each GPU."""
    return compared(candidates(Degrees(ranks=gpus), spec, gpus), spec, machine, ask, scheme, context)[0]


def _weights(layouts: Layouts) -> int:
    """Bytes."""
    return sum(p.row.nbytes for p in layouts.loaded)


def _lacking(least: Layouts, asked: Layouts, machine: Machine) -> str:
    """What the smallest form takes, and what there is."""
    weighs, needs = _weights(least), sum(d.bytes.total for d in least.at(BLOCK, 1).devices.values())
    if isinstance(least, RankLayouts):
        used = {name: asked.free[name] for name in least.mesh.devices}
        return (
            f"In {least.scheme} at --context {BLOCK} it takes {needs / 1e9:.1f} GB over {least.mesh.size} ranks; "
            f"{', '.join(used)}: {sum(used.values()) / 1e9:.1f} GB free in all."
        )
    free = min(machine.free_bytes(), sum(asked.free.values()))
    form = f"In {least.scheme}" if weighs > free else f"In {least.scheme} at --context {BLOCK}"
    return (
        f"{form} it takes {needs / 1e9:.1f} GB, {weighs / 1e9:.1f} GB of it weights; {machine.name} has "
        f"{free / 1e9:.1f} GB free in all. See `undistilled doctor` for machines to plan for with --machine."
    )


def _smaller(layouts: Layouts, context: int, batch: int) -> str:
    """Options of less than `context`, else of less than `batch`, that fit; "" where not even one block does."""
    blocks = (context - 1) // BLOCK
    if n := _largest(blocks, lambda n: layouts.at(n * BLOCK, batch).fits):
        return f"--context {n * BLOCK}"
    if n := _largest(batch - 1, lambda n: layouts.at(context, n).fits):
        return f"--batch {n}"
    n = _largest(blocks, lambda n: layouts.at(n * BLOCK, 1).fits)
    return f"--context {n * BLOCK} --batch 1" if n else ""


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where all that are smaller do too; 0 where 1 does not."""
    if most < 1 or not fits(1):
        return 0
    return 1 + bisect_left(range(2, most + 1), True, key=lambda n: not fits(n))
