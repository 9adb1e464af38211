"""Makes a plan: chooses schemes by recipe and homes greedily, then predicts what it costs.

One device if it holds everything. Else GPUs take consecutive layers, and the routed experts that do not
fit beside them live and run on the CPU, where a token reads only the few that it chose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from .. import scheme as schemes
from ..errors import UsageError
from ..model.spec import ModelSpec
from ..model.weights import Weight, counts, weights
from . import cost
from .cost import WIDTH, Dtype, Placed
from .hardware import Device, Machine
from .plan import ContextPrediction, DevicePrediction, Kv, Limits, Plan, Predicted, Row, config_hash
from .recipes import scheme_of

BLOCK = 16  # tokens in a cache block
DEFAULT_CONTEXT = 4096
CHUNK = {"cpu": 512, "cuda": 4096}
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


def solve(name: str, config: dict[str, Any], spec: ModelSpec, machine: Machine, ask: Ask) -> Plan:
    """The plan for this model on this machine; where it does not fit, `fits` is false and `advice` says what would."""
    if ask.batch < 1 or (ask.context is not None and ask.context < 1):
        raise UsageError("--batch and --context start at 1.")
    if ask.mtp and not spec.mtp_layers:
        raise UsageError(f"{name} has no multi-token-prediction layer.", "Leave --mtp out.")
    if ask.device not in (None, "cpu"):
        raise UsageError(f"--device {ask.device!r} is not known.", "Known: cpu, which leaves GPUs out.")
    context = ask.context or min(DEFAULT_CONTEXT, spec.max_context)
    if context > spec.max_context:
        raise UsageError(f"--context {context}: {name} has at most {spec.max_context}.")
    plan = _plan(name, config, spec, machine, ask, context)
    if plan.fits:
        return plan
    return plan.model_copy(update={"advice": _advice(name, config, spec, machine, ask, plan)})


def _plan(name: str, config: dict, spec: ModelSpec, machine: Machine, ask: Ask, context: int) -> Plan:
    asked = ask.scheme or spec.native
    devices = _devices(machine, ask)
    kind = devices[0].kind
    compute: Dtype = "float32" if kind == "cpu" or asked == "fp32" else "bfloat16"
    cache: Dtype = ask.kv_dtype or ("float32" if asked == "fp32" else "bfloat16")
    known = list(weights(spec))
    chunk = min(CHUNK[kind], -(-context // BLOCK) * BLOCK)
    kv = Kv(
        dtype=cache,
        block_size=BLOCK,
        blocks=ask.batch * -(-context // BLOCK),
        bytes_per_token=spec.kv_bytes_per_token(WIDTH[cache]),
    )
    working = cost.activation_bytes(
        spec, chunk=chunk, batch=ask.batch, context=context, width=WIDTH[compute], kind=kind, scheme=asked
    )
    fixed = kv.blocks * BLOCK * kv.bytes_per_token
    homes = _place(known, spec, asked, devices, fixed, working, ask.mtp)
    placed = [Placed(_row(w, spec, asked, homes[w.name]), w) for w in known]
    loaded = [p for p in placed if p.row.store != "unloaded"]
    met = [p for p in loaded if not p.weight.mtp]  # by a token: nothing runs the MTP layers yet
    used = {d.name: d for d in devices if any(p.row.store == d.name for p in loaded)}
    total, active = counts(spec)
    prefill, decode = cost.seconds(
        met,
        spec,
        used,
        active=active,
        batch=ask.batch,
        context=context,
        chunk=chunk,
        kv_bytes=kv.bytes_per_token,
        compute=compute,
    )
    predictions = {d.name: _device_bytes(d, loaded, fixed, working) for d in used.values()}
    predicted = Predicted(
        devices=predictions,
        contexts=_contexts(spec, ask, kv, used, loaded, working),
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        decode_bytes_per_token=int(
            sum(cost.decode_bytes(met, spec, ask.batch, context, kv.bytes_per_token).values()) / ask.batch
        ),
        basis=_basis(used),
    )
    return Plan(
        model=name,
        model_hash=config_hash(config),
        architecture=spec.model_type,
        machine=machine.name,
        scheme=asked,
        compute_dtype=compute,
        parameters=total,
        active_parameters=active,
        tensors=sum(p.row.tensors for p in placed),
        rows=[p.row for p in placed],
        kv=kv,
        limits=Limits(context=context, batch=ask.batch, chunk=chunk),
        predicted=predicted,
        fits=all(p.fits for p in predictions.values()),
        notes=_notes(used),
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


def _usable(device: Device) -> int:
    return device.free_bytes


def _place(
    known: list[Weight], spec: ModelSpec, asked: str, devices: list[Device], fixed: int, working: int, mtp: bool
) -> dict[str, str]:
    """Weight name -> device."""
    size = {w.name: cost.row_bytes(w, scheme_of(w, spec, asked)) for w in known}
    wanted = [w for w in known if mtp or not w.mtp]
    homes = {w.name: "unloaded" for w in known}
    everything = sum(size[w.name] for w in wanted)
    gpus = [d for d in devices if d.kind != "cpu"]
    for device in gpus or devices:
        if everything + fixed + working + cost.RUNTIME[device.kind] <= _usable(device) or len(devices) == 1:
            return homes | {w.name: device.name for w in wanted}
    return homes | _spread(wanted, size, devices, fixed, working)


def _spread(
    wanted: list[Weight], size: dict[str, int], devices: list[Device], fixed: int, working: int
) -> dict[str, str]:
    """Layers in order over the GPUs by bytes; experts that find no room beside the rest go to the CPU."""
    gpus, cpu = [d for d in devices if d.kind != "cpu"], devices[-1]
    room = {d.name: _usable(d) - cost.RUNTIME[d.kind] - working - fixed // len(gpus) for d in gpus}
    whole = sum(size.get(w.name, 0) for w in wanted) <= sum(room.values())  # then experts count in the balance too
    staged = [w for w in wanted if whole or not w.experts]
    homes: dict[str, str] = {}
    filled, total, at = 0, sum(size[w.name] for w in staged), 0
    for _, layer in groupby(staged, key=lambda w: w.layer):
        members = list(layer)
        each = sum(size[w.name] for w in members)
        while at + 1 < len(gpus) and filled + each / 2 > total * (at + 1) / len(gpus):
            at += 1
        homes |= {w.name: gpus[at].name for w in members}
        filled += each
    stage = {w.layer: homes[w.name] for w in staged if w.role == "attention.o"}
    for name, home in homes.items():
        room[home] -= size[name]
    for w in wanted:
        if w.experts and not whole:
            home = stage[w.layer]
            fits = size[w.name] <= room[home]
            homes[w.name] = home if fits else cpu.name
            room[home] -= size[w.name] if fits else 0
    return homes


def _device_bytes(device: Device, placed: list[Placed], fixed: int, working: int) -> DevicePrediction:
    found = cost.device_bytes(device.name, placed, fixed, working)
    return DevicePrediction(bytes=found, available=_usable(device), fits=found.total <= _usable(device))


def _contexts(
    spec: ModelSpec, ask: Ask, kv: Kv, used: dict[str, Device], placed: list[Placed], working: int
) -> list[ContextPrediction]:
    lengths = [n for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072) if n < spec.max_context]
    found = []
    for length in [*lengths, spec.max_context]:
        fixed = ask.batch * -(-length // BLOCK) * BLOCK * kv.bytes_per_token
        each = {name: _device_bytes(d, placed, fixed, working) for name, d in used.items()}
        found.append(
            ContextPrediction(
                context=length,
                kv_bytes={n: e.bytes.kv for n, e in each.items()},
                total_bytes={n: e.bytes.total for n, e in each.items()},
                fits=all(e.fits for e in each.values()),
            )
        )
    return found


def _basis(used: dict[str, Device]) -> str:
    sources = {kind: {d.ceilings.source for d in used.values() if d.kind == kind} for kind in ("cuda", "cpu")}
    return ", ".join(f"{kind}: {' and '.join(sorted(found))} ceilings" for kind, found in sources.items() if found)


def _notes(used: dict[str, Device]) -> list[str]:
    if len(used) > 1:
        return ["This version runs a plan on one device; over several it only predicts."]
    return []


def _advice(name: str, config: dict, spec: ModelSpec, machine: Machine, ask: Ask, plan: Plan) -> str:
    """The largest context of this scheme that fits, or the first smaller scheme that does."""
    fitting = [c.context for c in plan.predicted.contexts if c.fits and c.context < plan.limits.context]
    if fitting:
        return f"With --context {max(fitting)} it fits."
    smaller = [s for s in CANDIDATES if s != plan.scheme]
    for scheme in smaller:
        tried = _plan(name, config, spec, machine, replace(ask, scheme=scheme), 1024)
        if tried.fits:
            return f"With --scheme {scheme} it fits (tried at --context 1024)."
    least = min((_weight_bytes(spec, s), s) for s in (*smaller, plan.scheme))
    memory = machine.free_bytes()
    return (
        f"Its smallest form here, {least[1]}, is {least[0] / 1e9:.0f} GB of weights; {machine.name} has "
        f"{memory / 1e9:.0f} GB free in all. See `undistilled doctor` for machines to plan for with --machine."
    )


def _weight_bytes(spec: ModelSpec, asked: str) -> int:
    return sum(cost.row_bytes(w, scheme_of(w, spec, asked)) for w in weights(spec) if not w.mtp)


__all__ = ["Ask", "schemes", "solve"]
