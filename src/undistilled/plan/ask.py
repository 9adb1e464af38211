"""What a person asks of a plan, laid out over devices or ranks: schemes by recipe, products by device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .. import scheme as schemes
from ..errors import UsageError
from ..model.spec import ModelSpec
from ..model.weights import LINEAR_ROLES, Weight, weights
from ..scheme.across import Across
from . import cost
from .cost import Compute, Dtype, Placed
from .degrees import ONE, Degrees
from .hardware import Device, Machine
from .layout import BLOCK, Layouts
from .plan import Row
from .ranks import RankLayouts, by_memory, mesh_for
from .recipes import INTEGERS, parse, products_of, rounds, scheme_of

DEFAULT_CONTEXT = 4096
UNCUT = "The multi-token-prediction layer is not cut over ranks yet."
DTYPES = ("auto", "float32", "bfloat16", *INTEGERS)


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


def asked(name: str, spec: ModelSpec, ask: Ask) -> tuple[str, int]:
    """(scheme, context). UsageError where what is asked for makes no sense for the model of this name."""
    if ask.batch < 1 or (ask.context is not None and ask.context < 1):
        raise UsageError("--batch and --context start at 1.")
    if ask.mtp and not spec.mtp_layers:
        raise UsageError(f"{name} has no multi-token-prediction layer.", "Leave --mtp out.")
    check_device(ask.device)
    context = ask.context or min(DEFAULT_CONTEXT, spec.max_context)
    if context > spec.max_context:
        said = f"A context of {context} tokens: {name} has at most {spec.max_context}."
        raise UsageError(said, "Ask for less by --context; `bench` adds --prompt-tokens and --new-tokens.")
    scheme = ask.scheme or spec.native
    _check_dtype(ask, scheme)
    return scheme, context


def laid(spec: ModelSpec, machine: Machine, ask: Ask, scheme: str, context: int) -> Layouts:
    """In this scheme, with stages that fit this context where there are any."""
    devices = _devices(machine, ask)
    wanted = [w for w in weights(spec) if ask.mtp or not w.mtp]
    loaded = [Placed(row_of(w, spec, scheme, devices[0].name), w) for w in wanted]
    free = {d.name: d.free_bytes for d in devices}
    compute = _compute(ask, scheme, devices[0], [p.row for p in loaded])
    cache: Dtype = ask.kv_dtype or ("float32" if scheme == "fp32" else "bfloat16")
    if ask.degrees == ONE:
        return Layouts(spec, loaded, free, scheme=scheme, compute=compute, cache=cache)
    if ask.mtp:
        raise UsageError(UNCUT, "Leave --mtp out.")
    over = partial(RankLayouts, spec, loaded, free, scheme=scheme, compute=compute, cache=cache, links=machine.links)
    made = over(mesh=mesh_for(ask.degrees, devices, spec, {p.row.name: p.row.scheme for p in loaded}, machine.links))
    # where what is asked for fits nowhere: the least that there is, so that advice is of stages that fit
    mesh = by_memory(made, made.at(context, ask.batch), devices) or by_memory(made, made.at(BLOCK, 1), devices)
    return over(mesh=mesh) if mesh else made


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


def gpus_of(machine: Machine, ask: Ask) -> list[Device]:
    return [d for d in machine.devices if d.kind != "cpu" and ask.device != "cpu"]


def _devices(machine: Machine, ask: Ask) -> list[Device]:
    """GPUs first, then the CPU, unless its memory is the GPU's."""
    gpus = gpus_of(machine, ask)
    shared = any(d.unified for d in gpus)
    cpus = [d for d in machine.devices if d.kind == "cpu" and not shared]
    return [*gpus, *cpus]


def row_of(weight: Weight, spec: ModelSpec, asked: str, home: str) -> Row:
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
