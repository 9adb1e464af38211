"""Makes a plan: chooses schemes by recipe, homes greedily and, where asked to, ranks; then predicts what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..model.spec import ModelSpec
from ..model.weights import counts, weights
from . import cost
from .advice import advice, over_ranks
from .ask import Ask, asked, laid, row_of
from .fastest import fastest
from .hardware import Device, Machine
from .layout import Layout, Layouts
from .mesh import Mesh
from .plan import Plan, Predicted, config_hash
from .ranks import RankLayouts, layouts_of
from .speeds import speeds

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # of the table of contexts, and the model's own


def solve(name: str, config: dict[str, Any], spec: ModelSpec, machine: Machine, ask: Ask) -> Plan:
    """The plan for this model on this machine; where it does not fit, `fits` is false and `advice` says what would."""
    scheme, context = asked(name, spec, ask)
    searched = ask.degrees.ranks is not None
    if searched:
        ask = replace(ask, degrees=fastest(name, spec, machine, ask, scheme, context))
    layouts = laid(spec, machine, ask, scheme, context)
    layout = layouts.at(context, ask.batch)
    runs = over_ranks(layouts, machine, ask, context) if searched and layout.only_predicted else ""
    homes = {p.weight.name: p.row for p in layout.placed}
    rows = [homes.get(w.name) or row_of(w, spec, scheme, "unloaded") for w in weights(spec)]
    total, active = counts(spec)
    return Plan(
        model=name,
        model_hash=config_hash(config),
        architecture=spec.model_type,
        machine=machine.name,
        scheme=scheme,
        compute_dtype=layouts.compute,
        parameters=total,
        active_parameters=active,
        tensors=sum(row.tensors for row in rows),
        rows=rows,
        kv=layout.kv,
        limits=layout.limits,
        mesh=layouts.mesh if isinstance(layouts, RankLayouts) else None,
        predicted=_predicted(layouts, layout, machine, active),
        fits=layout.fits,
        advice="" if layout.fits else advice(layouts, machine, ask, context),
        notes=_notes(layouts, layout, runs),
    )


def moved(plan: Plan, mesh: Mesh, spec: ModelSpec, machine: Machine, active: int) -> Plan:
    """The same plan over another mesh."""
    layouts = layouts_of(plan.model_copy(update={"mesh": mesh}), spec, machine.links)
    layout = layouts.at(plan.limits.context, plan.limits.batch)
    homes = {p.weight.name: p.row for p in layout.placed}
    return plan.model_copy(
        update={
            "mesh": mesh,
            "rows": [homes.get(row.name, row) for row in plan.rows],
            "predicted": _predicted(layouts, layout, machine, active),
            "fits": layout.fits,
        }
    )


def _predicted(layouts: Layouts, layout: Layout, machine: Machine, active: int) -> Predicted:
    spec, limits, used = layouts.spec, layout.limits, {name: machine.device(name) for name in layout.devices}
    met = [p for p in layout.placed if not p.weight.mtp]  # by a token: nothing runs the MTP layers yet
    prefill, decode = speeds(layouts, layout, machine, active)
    lengths = [n for n in LENGTHS if n < spec.max_context]
    read = cost.decode_bytes(met, spec, limits.batch, limits.context, layout.kv.bytes_per_token)
    return Predicted(
        devices=layout.devices,
        ranks=layout.ranks,
        contexts=[layouts.at(n, limits.batch).prediction for n in (*lengths, spec.max_context)],
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        decode_bytes_per_token=int(sum(read.values()) / limits.batch),
        basis=_basis(used),
    )


def _basis(used: dict[str, Device]) -> str:
    sources = {kind: {d.ceilings.source for d in used.values() if d.kind == kind} for kind in ("cuda", "cpu")}
    return ", ".join(f"{kind}: {' and '.join(sorted(found))} ceilings" for kind, found in sources.items() if found)


def _notes(layouts: Layouts, layout: Layout, runs: str) -> list[str]:
    """runs: options that do, where those of a plan do not."""
    if isinstance(layouts, RankLayouts):
        return layouts.said(layout.limits.batch)
    if layout.only_predicted:
        otherwise = "--device cpu runs, on the CPU alone" if "cpu" in layout.devices else "--ranks auto runs"
        way = f"{runs} runs" if runs else otherwise
        return [f"This is a prediction: no run takes one process over {', '.join(layout.devices)} yet; {way}."]
    return []


__all__ = ["Ask", "solve"]
