"""The way out where a plan does not fit: less context, smaller batches, another scheme, more ranks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from .ask import Ask, laid
from .hardware import Machine
from .layout import BLOCK, Layouts
from .ranks import RankLayouts

CANDIDATES = ("fp8_block", "int8", "int4", "int4-sym")  # tried, in this order, when something does not fit


def advice(layouts: Layouts, machine: Machine, ask: Ask, context: int) -> str:
    """The largest context of this scheme that fits, else the largest batch, else the first scheme that does."""
    if options := _smaller(layouts, context, ask.batch):
        return f"With {options} it fits."
    others = [laid(layouts.spec, machine, ask, s, context) for s in CANDIDATES if s != layouts.scheme]
    for other in others:
        if other.at(context, ask.batch).fits:
            return f"With --scheme {other.scheme} it fits.{_idle(layouts)}"
    for other in others:
        if options := _smaller(other, context, ask.batch):
            return f"With --scheme {other.scheme} {options} it fits."
    least = min((layouts, *others), key=lambda o: sum(p.row.nbytes for p in o.loaded))
    weighs = sum(p.row.nbytes for p in least.loaded)
    needs = sum(d.bytes.total for d in least.at(BLOCK, 1).devices.values())
    free = min(machine.free_bytes(), sum(layouts.free.values()))
    if isinstance(least, RankLayouts):
        used = {name: layouts.free[name] for name in least.mesh.devices}
        return (
            f"In {least.scheme} at --context {BLOCK} it takes {needs / 1e9:.1f} GB over {least.mesh.size} ranks; "
            f"{', '.join(used)} have {sum(used.values()) / 1e9:.1f} GB free in all.{_idle(layouts)}"
        )
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
