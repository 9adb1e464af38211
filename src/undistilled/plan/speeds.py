"""How fast ranks go: stages, the talk between them, and how unevenly experts fall on those that share them out."""

from __future__ import annotations

from functools import cache, partial
from random import Random
from typing import Any

from ..model.spec import Moe
from . import cost
from .hardware import Machine
from .layout import Layout, Layouts
from .mesh import Mesh
from .ranks import RankLayouts
from .reads import part

DRAWS = 2000  # tokens that `skew` draws, at least


@cache
def skew(moe: Moe, groups: tuple[tuple[int, int], ...], tokens: int) -> float:
    """How many of its experts the busiest group of ranks reads in a pass over so many tokens, as a multiple of what all
    groups do on average: expected by drawing, if routing is even. groups: experts [first, past the last) of each.
    Copies of experts are not counted."""
    draw, most, chosen = Random(0), 0.0, 0
    for _ in range(-(-DRAWS // tokens) if len(groups) > 1 else 0):
        met = {expert for _ in range(tokens) for expert in _choice(draw, moe)}
        most += max(sum(first <= expert < past for expert in met) / (past - first) for first, past in groups)
        chosen += len(met)
    return most * moe.experts / chosen if chosen else 1.0


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
    """The same, with as many parts of a batch in the pipeline as the mesh says."""
    mesh, limits = layouts.mesh, layout.limits
    parts = min(mesh.microbatches, limits.batch) if mesh.pp > 1 else 1
    rows = -(-limits.batch // parts)
    decode = [_decode_seconds(layouts, layout, machine, stage, rows) for stage in range(mesh.pp)]
    prefill = [_prefill_seconds(layouts, layout, machine, stage, active) for stage in range(mesh.pp)]
    return limits.chunk * parts / _through(mesh, prefill, parts), limits.batch / _through(mesh, decode, parts)


def _through(mesh: Mesh, seconds: list[float], parts: int) -> float:
    """In which so many passes go through stages of these seconds, again and again: one goes from stage to stage, and
    every device does its own of all."""
    busy: dict[str, float] = {}
    for stage, taken in enumerate(seconds):
        device = mesh.devices[stage * mesh.inner]
        busy[device] = busy.get(device, 0.0) + parts * taken
    return max(sum(seconds), *busy.values())


def _decode_seconds(layouts: RankLayouts, layout: Layout, machine: Machine, stage: int, rows: int) -> float:
    """Of a pass over so many rows through a stage, with its talk."""
    mesh, spec, cuts = layouts.mesh, layouts.spec, layouts.cuts
    cached = rows * layout.limits.context * cost.WIDTH[layout.kv.dtype]
    busiest = skew(spec.moe, cuts.bounds, rows) if spec.moe and layouts.kind == "cuda" else 1.0
    each = []
    for rank in mesh.peers(stage * mesh.inner):
        read = layouts.reads[rank].read(spec, rows, busiest) + cached * cuts.cache_values(rank)
        each.append(read / machine.device(mesh.devices[rank]).ceilings.read_bytes_per_s)
    return _together(layouts, each) + _small(layouts, layout, machine, stage, rows, True)


def _prefill_seconds(layouts: RankLayouts, layout: Layout, machine: Machine, stage: int, active: int) -> float:
    """Of a prompt's chunk through a stage, with its talk."""
    mesh, limits, spec, home = layouts.mesh, layout.limits, layouts.spec, f"stage:{stage}"
    met = [p for p in layout.placed if not p.weight.mtp]
    flops = cost.prefill_flops(spec, active, limits.context) * limits.chunk
    each, alike = [], dict[Any, float]()
    for rank in mesh.peers(stage * mesh.inner):
        device, share = machine.device(mesh.devices[rank]), partial(part, layouts.cuts, rank=rank)
        key = layouts.reads[rank], device.ceilings, device.features
        if key not in alike:
            products = cost.product_seconds(met, spec, home, device, layouts.compute, flops, share)
            unpacked = cost.unpacked_seconds(met, spec, home, device, limits.chunk, layouts.compute, share)
            alike[key] = products + unpacked
        each.append(alike[key])
    return _together(layouts, each) + _small(layouts, layout, machine, stage, limits.chunk, False)


def _together(layouts: RankLayouts, each: list[float]) -> float:
    """Seconds until all ranks of a stage are done. Processes of one CPU share its bandwidth and cores."""
    return max(each) if layouts.kind == "cuda" else sum(each)


def _small(layouts: RankLayouts, layout: Layout, machine: Machine, stage: int, tokens: int, recorded: bool) -> float:
    """Seconds of a pass through a stage that are not its bytes' nor its products': launches and talk."""
    mesh, spec = layouts.mesh, layouts.spec
    (first, past), rank = mesh.stages[stage], stage * mesh.inner
    device = machine.device(mesh.devices[rank])
    own = [p for p in layout.placed if p.row.compute == f"stage:{stage}" and not p.weight.mtp]
    small = cost.small_seconds(own, spec, device, tokens, layouts.compute, recorded)
    return (past - first) / spec.layers * small + layouts.talk(rank, tokens)
