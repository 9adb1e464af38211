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
    ranks = mesh.peers(stage * mesh.inner)
    cached = rows * layout.limits.context * cost.WIDTH[layout.kv.dtype]
    busiest = skew(spec.moe, mesh.ep, rows) if spec.moe and layouts.kind == "cuda" else 1.0
    devices = [machine.device(mesh.devices[rank]) for rank in ranks]
    read = [
        (layouts.reads[rank].read(spec, rows, busiest) + cached * cuts.cache_values(rank))
        / device.ceilings.read_bytes_per_s
        for rank, device in zip(ranks, devices, strict=True)
    ]
    return _together(layouts, read) + _small(layouts, layout, machine, stage, rows, True)


def _prefill_seconds(layouts: RankLayouts, layout: Layout, machine: Machine, stage: int, active: int) -> float:
    """Of a prompt's chunk through a stage, with its talk."""
    mesh, limits, spec, home = layouts.mesh, layout.limits, layouts.spec, f"stage:{stage}"
    met = [p for p in layout.placed if not p.weight.mtp]
    own = [p for p in met if p.row.compute == home]
    flops = cost.prefill_flops(spec, active, limits.context) * limits.chunk
    ranks, whole = mesh.peers(stage * mesh.inner), dict[str, float]()
    for name in {mesh.devices[rank] for rank in ranks}:
        device = machine.device(name)
        whole[name] = cost.product_seconds(met, spec, home, device, layouts.compute, flops)
        whole[name] += cost.unpacked_seconds(own, spec, home, device, limits.chunk, layouts.compute)
    each = [whole[mesh.devices[rank]] * layouts.reads[rank].work for rank in ranks]
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
