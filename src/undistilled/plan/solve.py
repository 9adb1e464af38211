"""Makes a plan: chooses schemes by recipe and homes greedily, then predicts what it costs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import scheme as schemes
from ..errors import UsageError
from ..model.spec import ModelSpec
from ..model.weights import LINEAR_ROLES, Weight, counts, weights
from ..scheme.across import Across
from . import cost
from .cost import Compute, Dtype, Placed
from .hardware import Device, Machine
from .layout import BLOCK, Layout, Layouts
from .mesh import Mesh
from .plan import Plan, Predicted, Row, config_hash
from .ranks import ONE, Degrees, RankLayouts, by_memory, layouts_of, mesh_for
from .recipes import INTEGERS, parse, products_of, rounds, scheme_of
from .speeds import speeds

DEFAULT_CONTEXT = 4096
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # of the table of contexts, and the model's own
CANDIDATES = ("fp8_block", "int8", "int4", "int4-sym")  # tried, in this order, when something does not fit


@dataclass(frozen=True)
class Ask:
    """What a person wants of a plan."""

    scheme: str | None = None  # None: as released
    context: int | None = None
    batch: int = 1
    mtp: bool = False
    device: str | None = None  # "cpu" keeps GPUs out
    kv_dtype: Dtype | None = None  # None: float32 where the scheme is fp32, else bfloat16
    dtype: str = "auto"  # of products: one of DTYPES; auto is what the device has its fast ones in
    degrees: Degrees = ONE


def check_device(asked: str | None) -> None:
    """UsageError where it is none that can be asked for."""
    if asked not in (None, "cpu"):
        raise UsageError(
            f"--device {asked!r} is not known.",
            "Known: cpu, which leaves GPUs out; without it a GPU is used if there is one.",
        )


def solve(name: str, config: dict[str, Any], spec: ModelSpec, machine: Machine, ask: Ask) -> Plan:
    """The plan for this model on this machine; where it does not fit, `fits` is false and `advice` says what would."""
    if ask.batch < 1 or (ask.context is not None and ask.context < 1):
        raise UsageError("--batch and --context start at 1.")
    if ask.mtp and not spec.mtp_layers:
        raise UsageError(f"{name} has no multi-token-prediction layer.", "Leave --mtp out.")
    check_device(ask.device)
    context = ask.context or min(DEFAULT_CONTEXT, spec.max_context)
    if context > spec.max_context:
        raise UsageError(f"--context {context}: {name} has at most {spec.max_context}.")
    scheme = ask.scheme or spec.native
    _check_dtype(ask, scheme)
    layouts = _layouts(spec, machine, ask, scheme, context)
    layout = layouts.at(context, ask.batch)
    homes = {p.weight.name: p.row for p in layout.placed}
    rows = [homes.get(w.name) or _row(w, spec, scheme, "unloaded") for w in weights(spec)]
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
        advice="" if layout.fits else _advice(layouts, machine, ask, context),
        notes=_notes(layouts, layout),
    )


def _layouts(spec: ModelSpec, machine: Machine, ask: Ask, scheme: str, context: int) -> Layouts:
    devices = _devices(machine, ask)
    wanted = [w for w in weights(spec) if ask.mtp or not w.mtp]
    loaded = [Placed(_row(w, spec, scheme, devices[0].name), w) for w in wanted]
    free = {d.name: d.free_bytes for d in devices}
    compute = _compute(ask, scheme, devices[0], [p.row for p in loaded])
    cache: Dtype = ask.kv_dtype or ("float32" if scheme == "fp32" else "bfloat16")
    if ask.degrees == ONE:
        return Layouts(spec, loaded, free, scheme=scheme, compute=compute, cache=cache)
    if ask.mtp:
        raise UsageError("The multi-token-prediction layer is not cut over ranks yet.", "Leave --mtp out.")
    over = partial(RankLayouts, spec, loaded, free, scheme=scheme, compute=compute, cache=cache, links=machine.links)
    made = over(mesh=mesh_for(ask.degrees, devices, spec, {p.row.name: p.row.scheme for p in loaded}, machine.links))
    # where what is asked for fits nowhere: the least that there is, so that advice is of stages that fit
    mesh = by_memory(made, made.at(context, ask.batch), devices) or by_memory(made, made.at(BLOCK, 1), devices)
    return over(mesh=mesh) if mesh else made


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


DTYPES = ("auto", "float32", "bfloat16", *INTEGERS)


def _check_dtype(ask: Ask, scheme: str) -> None:
    if ask.dtype not in DTYPES:
        raise UsageError(f"--dtype {ask.dtype!r} is not known.", f"Known: {', '.join(DTYPES)}.")
    if ask.dtype == "bfloat16" and not rounds(parse(scheme)[0]):
        raise UsageError(f"{scheme} weights multiply in float32.", "Leave --dtype out, or ask for another --scheme.")


def _compute(ask: Ask, scheme: str, device: Device, rows: list[Row]) -> Compute:
    """Of products. A CPU's activations are float32 between them, whatever it is."""
    coded = any(products_of(row.role, row.scheme, "cpu", "int16") for row in rows)
    if ask.dtype in INTEGERS:
        if device.kind != "cpu":
            raise UsageError(f"{device.name} has no products of {ask.dtype} activations.", "Add --device cpu.")
        if not coded:
            raise UsageError(f"{scheme} weights have no integers to multiply.", "Ask for --scheme int8 or int4, say.")
        return ask.dtype  # type: ignore[return-value]
    if ask.dtype == "float32" or scheme == "fp32":
        return "float32"
    if ask.dtype == "bfloat16" or device.kind != "cpu":
        return "bfloat16"
    if device.bf16_products and rounds(parse(scheme)[0]) and not (coded and _across(rows)):
        return "bfloat16"
    return "int16" if (device.int16_products or device.bf16_products) and coded else "float32"


def _across(rows: list[Row]) -> bool:
    """Whether all linear layers are codes of 4 or 8 bits, whose products of INT16 are faster and finer than of BF16, or
    FP8, which has its own in float32 whatever a plan says."""
    return all(Across.takes(schemes.get(row.scheme)) for row in rows if row.role.split(".")[0] in LINEAR_ROLES)


def _predicted(layouts: Layouts, layout: Layout, machine: Machine, active: int) -> Predicted:
    spec, limits, used = layouts.spec, layout.limits, {name: machine.device(name) for name in layout.devices}
    met = [p for p in layout.placed if not p.weight.mtp]  # by a token: nothing runs the MTP layers yet
    prefill, decode = _speeds(layouts, layout, machine, met, active)
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


def _speeds(
    layouts: Layouts, layout: Layout, machine: Machine, met: list[cost.Placed], active: int
) -> tuple[float, float]:
    """(prefill, decode) in tokens a second."""
    if isinstance(layouts, RankLayouts):
        return speeds(layouts, layout, machine, active)
    return cost.seconds(
        met,
        layouts.spec,
        {name: machine.device(name) for name in layout.devices},
        active=active,
        batch=layout.limits.batch,
        context=layout.limits.context,
        chunk=layout.limits.chunk,
        kv_bytes=layout.kv.bytes_per_token,
        compute=layouts.compute,
    )


def _devices(machine: Machine, ask: Ask) -> list[Device]:
    """GPUs first, then the CPU, unless its memory is the GPU's."""
    gpus = [d for d in machine.devices if d.kind != "cpu" and ask.device != "cpu"]
    shared = any(d.unified for d in gpus)
    cpus = [d for d in machine.devices if d.kind == "cpu" and not shared]
    return [*gpus, *cpus]


def _row(weight: Weight, spec: ModelSpec, asked: str, home: str) -> Row:
    scheme = scheme_of(weight, spec, asked)
    scaled = spec.native == "fp8_block" and weight.is_linear
    return Row(
        name=weight.name,
        role=weight.role,
        layer=weight.layer,
        experts=(0, weight.experts) if weight.experts else None,
        shape=weight.shape,
        tensors=weight.count * (2 if scaled else 1),
        scheme=scheme,
        store=home,
        compute=home,
        nbytes=0 if home == "unloaded" else cost.row_bytes(weight, scheme),
    )


def _basis(used: dict[str, Device]) -> str:
    sources = {kind: {d.ceilings.source for d in used.values() if d.kind == kind} for kind in ("cuda", "cpu")}
    return ", ".join(f"{kind}: {' and '.join(sorted(found))} ceilings" for kind, found in sources.items() if found)


def _notes(layouts: Layouts, layout: Layout) -> list[str]:
    if isinstance(layouts, RankLayouts):
        return layouts.said(layout.limits.batch)
    if len(layout.devices) > 1 and not layout.ranks:
        return ["Without --tp, --pp or --ep one process runs a plan, on one device; over several it only predicts."]
    return []


def _advice(layouts: Layouts, machine: Machine, ask: Ask, context: int) -> str:
    """The largest context of this scheme that fits, else the largest batch, else the first scheme that does."""
    if options := _smaller(layouts, context, ask.batch):
        return f"With {options} it fits."
    others = [_layouts(layouts.spec, machine, ask, s, context) for s in CANDIDATES if s != layouts.scheme]
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
    return f" {len(left)} GPUs are idle: more ranks hold more (--tp, --pp, --ep)." if left else ""


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


__all__ = ["Ask", "schemes", "solve"]
