"""The way out where a plan does not fit: less context, smaller batches, another scheme, more ranks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from .ask import Ask, laid
from .hardware import Machine
from .layout import BLOCK, Layouts
from .ranks import RankLayouts

# tried in this order where something does not fit: what costs least in quality comes first
CANDIDATES = ("fp8_block", "int8", "experts-int4", "int4", "int4-sym", "experts-nl3", "experts-nl2")
DENSE = ("fp8_block", "int8", "int4", "int4-sym", "nl3-g64")


def advice(layouts: Layouts, machine: Machine, ask: Ask, context: int) -> str:
    """The largest context of this scheme that fits, else the largest batch, else the first scheme that does."""
    if options := _smaller(layouts, context, ask.batch):
        return f"With {options} it fits."
    spec, others = layouts.spec, []
    for scheme in CANDIDATES if spec.moe else DENSE:
        if scheme != layouts.scheme:
            others.append(laid(spec, machine, ask, scheme, context))
            if others[-1].at(context, ask.batch).fits:
                return f"With --scheme {scheme} it fits; `prove` says what that costs in quality.{_idle(layouts)}"
    for other in others:
        if options := _smaller(other, context, ask.batch):
            return f"With --scheme {other.scheme} {options} it fits; `prove` says what that costs in quality."
    return _lacking(min((layouts, *others), key=_weights), layouts, machine)


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
            f"{', '.join(used)} have {sum(used.values()) / 1e9:.1f} GB free in all.{_idle(asked)}"
        )
    free = min(machine.free_bytes(), sum(asked.free.values()))
    form = f"In {least.scheme}" if weighs > free else f"In {least.scheme} at --context {BLOCK}"
    return (
        f"{form} it takes {needs / 1e9:.1f} GB, {weighs / 1e9:.1f} GB of it weights; {machine.name} has "
        f"{free / 1e9:.1f} GB free in all. See `undistilled doctor` for machines to plan for with --machine."
    )


def _idle(layouts: Layouts) -> str:
    """Of a plan over ranks: that more of them would hold more, where there is something left for them."""
    left = set(layouts.free) - set(layouts.mesh.devices) if isinstance(layouts, RankLayouts) else set()
    left = {name for name in left if name.startswith("cuda")}
    return f" {len(left)} GPUs are idle: more ranks hold more (--ranks auto)." if left else ""


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
