"""How fast ranks go: stages, the talk between them, and how unevenly experts fall on those that share them out."""

from __future__ import annotations

from functools import cache
from random import Random

from ..model.spec import Moe
from . import cost
from .hardware import Machine
from .layout import Layout, Layouts
from .mesh import Mesh
from .ranks import RankLayouts

DRAWS = 2000  # tokens that `skew` draws, at least


@cache
def skew(moe: Moe, ranks: int, tokens: int) -> float:
    """What the busiest of `ranks` reads of the experts that a pass over so many tokens chooses, as a multiple of an
    equal share: expected by drawing, if routing is even. Copies of experts are not counted."""
    draw, most, chosen = Random(0), 0, 0
    for _ in range(-(-DRAWS // tokens) if ranks > 1 else 0):
        met = {expert for _ in range(tokens) for expert in _choice(draw, moe)}
        held = [0] * ranks
        for expert in met:
            held[expert * ranks // moe.experts] += 1
        most, chosen = most + max(held), chosen + len(met)
    return most * ranks / chosen if chosen else 1.0


def _choice(draw: Random, moe: Moe) -> list[int]:
    """A token's experts: of its best groups, where the router has groups."""
    if moe.groups < 2:
        return draw.sample(range(moe.experts), moe.per_token)
    width = moe.experts // moe.groups
    groups = draw.sample(range(moe.groups), moe.top_groups)
    return draw.sample([g * width + i for g in groups for i in range(width)], moe.per_token)


def speeds(layouts: Layouts, layout: Layout, machine: Machine, active: int) -> tuple[float, float]:
    """(prefill, decode) in tokens a second, of one process or of ranks; active: parameters that a token meets."""
    if isinstance(layouts, RankLayouts):
        return _over_ranks(layouts, layout, machine, active)
    return cost.seconds(
        [p for p in layout.placed if not p.weight.mtp],  # nothing runs the MTP layers yet
        layouts.spec,
        {name: machine.device(name) for name in layout.devices},
        active=active,
        batch=layout.limits.batch,
        context=layout.limits.context,
        chunk=layout.limits.chunk,
        kv_bytes=layout.kv.bytes_per_token,
        compute=layouts.compute,
    )


def _over_ranks(layouts: RankLayouts, layout: Layout, machine: Machine, active: int) -> tuple[float, float]:
    """The same, with as many parts of a batch in the pipeline as the mesh says; shares
    count as even."""
    mesh, limits = layouts.mesh, layout.limits
    parts = min(mesh.microbatches, limits.batch) if mesh.pp > 1 else 1
    each = [_stage_seconds(layouts, layout, machine, active, stage, parts) for stage in range(mesh.pp)]
    prefill, decode = ([seconds[i] for seconds in each] for i in (0, 1))
    return limits.chunk * parts / _through(mesh, prefill, parts), limits.batch / _through(mesh, decode, parts)


def _through(mesh: Mesh, seconds: list[float], parts: int) -> float:
    """In which so many passes go through stages of these seconds, again and again: one goes from stage to stage, and
    every device does its own of all."""
    busy: dict[str, float] = {}
    for stage, taken in enumerate(seconds):
        device = mesh.devices[stage * mesh.inner]
        busy[device] = busy.get(device, 0.0) + parts * taken
    return max(sum(seconds), *busy.values())


def _stage_seconds(
    layouts: RankLayouts, layout: Layout, machine: Machine, active: int, stage: int, parts: int
) -> tuple[float, float]:
    """(a prompt's chunk, a decode pass over one of `parts` of the batch) through a stage, with its talk. Processes of
    one CPU share its bandwidth and cores."""
    mesh, limits, spec = layouts.mesh, layout.limits, layouts.spec
    (first, past), rank, rows = mesh.stages[stage], stage * mesh.inner, -(-limits.batch // parts)
    device, row = machine.device(mesh.devices[rank]), f"stage:{stage}"
    cut = mesh.inner if device.kind == "cuda" else 1
    met = [p for p in layout.placed if not p.weight.mtp]
    own, part = [p for p in met if p.row.compute == row], (past - first) / spec.layers
    small, launched = (
        part * cost.small_seconds(own, spec, device, tokens, layouts.compute, recorded)
        for tokens, recorded in ((rows, True), (limits.chunk, False))
    )
    busiest = skew(spec.moe, mesh.ep, rows) if spec.moe and device.kind == "cuda" else 1.0
    read = sum(p.row.nbytes * cost.touched(p.weight, spec, rows) * (busiest if p.weight.experts else 1.0) for p in own)
    read += part * layout.kv.bytes_per_token * limits.context * rows
    decode = read / cut / device.ceilings.read_bytes_per_s + small + layouts.talk(rank, rows)
    flops = cost.prefill_flops(spec, active, limits.context) * limits.chunk
    products = cost.product_seconds(met, spec, row, device, layouts.compute, flops)
    unpacked = cost.unpacked_seconds(own, spec, row, device, limits.chunk, layouts.compute)
    return (products + unpacked) / cut + launched + layouts.talk(rank, limits.chunk), decode
