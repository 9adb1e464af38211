"""Refuses a plan before a weight is read, naming the row and the reason."""

from __future__ import annotations

import re

from pydantic import BaseModel

from .. import scheme as schemes
from ..errors import BadArtefact, DoesNotFit, UsageError
from ..model.spec import ModelSpec
from ..model.weights import Weight, counts, weights
from . import cost
from .plan import Bytes, ContextPrediction, Plan, Row, config_hash
from .ranks import RankLayouts, layouts_of, placed_of
from .recipes import INTEGERS, ROUNDED_OFF, label, products_of


def check(plan: Plan, spec: ModelSpec, config: dict) -> None:
    """BadArtefact (exit 3) for a plan of another model or a row that makes no sense; DoesNotFit (exit 4).

    Whatever follows from the model and the plan's own choices is computed again, not believed.
    """
    if plan.model_hash != config_hash(config):
        raise BadArtefact(
            f"The plan was made for {plan.model!r}, or for another config.json of that name.",
            "Make one for this model with `undistilled plan`.",
        )
    known = {w.name: w for w in weights(spec)}
    _check_rows(plan, spec, known)
    _check_same("architecture", plan.architecture, spec.model_type)
    _check_same("parameters", (plan.parameters, plan.active_parameters), counts(spec))
    _check_same("tensors", plan.tensors, sum(row.tensors for row in plan.rows))
    _check_same("scheme", plan.scheme, label([(known[r.name], r.scheme) for r in plan.rows], spec, plan.scheme))
    _check_totals(plan, spec)
    _check_bytes(plan, spec)
    _check_predicted(plan, spec)
    if not plan.fits:
        raise DoesNotFit(f"{plan.model} does not fit {plan.machine} by this plan.", plan.advice)


def _check_rows(plan: Plan, spec: ModelSpec, known: dict[str, Weight]) -> None:
    """A row that makes sense for each weight, by its name."""
    named = {row.name for row in plan.rows}
    if len(named) != len(plan.rows):
        raise BadArtefact("The plan names a weight twice.", "Was it edited?")
    for name in known.keys() - named:
        raise BadArtefact(f"The plan has no row for {name}.", "Was it edited?")
    for row in plan.rows:
        if row.name not in known:
            raise BadArtefact(f"Row {row.name}: the model has no such weight.")
        _check_row(row, known[row.name], plan, spec)


def _check_same(what: str, said: object, real: object) -> None:
    if said != real:
        what, said, real = _differing(what, said, real)
        hint = "Was the plan edited? `undistilled plan` makes it again."
        raise BadArtefact(f"The plan's {what} is {said}; it works out as {real}.", hint)


def _differing(what: str, said: object, real: object) -> tuple[str, object, object]:
    """The innermost thing that differs, named."""
    if isinstance(said, BaseModel) and type(said) is type(real):
        for name in type(said).model_fields:
            one, other = getattr(said, name), getattr(real, name)
            if one != other:
                return _differing(f"{what}, {name}", one, other)
    if isinstance(said, tuple) and isinstance(real, tuple) and len(said) == len(real):
        return next(_differing(what, one, other) for one, other in zip(said, real, strict=True) if one != other)
    return what, said, real


# What a role's weights can be stored as; roles that are not here take any scheme.
PLAIN = ("bf16", "fp16", "fp32")
ALLOWED = {"norm": ("fp32",), "bias": ("fp32",), "router_bias": ("fp32",), "router": PLAIN, "mtp.eh_proj": PLAIN}


def _check_row(row: Row, weight: Weight, plan: Plan, spec: ModelSpec) -> None:
    try:
        scheme = schemes.get(row.scheme)
    except UsageError as error:
        raise BadArtefact(f"Row {row.name}: {error.message}", error.hint) from None
    by_rows = schemes.row_quantum(scheme) == 1
    if row.scheme not in ALLOWED.get(weight.role, (row.scheme,)) or (weight.role == "embed" and not by_rows):
        raise BadArtefact(f"Row {row.name}: a weight of role {weight.role} is never stored as {row.scheme}.")
    scaled = spec.native == "fp8_block" and weight.is_linear
    for what, said, real in (
        ("shape", tuple(row.shape), weight.shape),
        ("experts", row.experts, (0, weight.experts) if weight.experts else None),
        ("role and layer", (row.role, row.layer), (weight.role, weight.layer)),
        ("tensors", row.tensors, weight.count * (2 if scaled else 1)),
        ("compute", row.compute, row.store),
    ):
        if said != real:
            raise BadArtefact(f"Row {row.name}: its {what} is {said}, expected {real}.", "Was the plan edited?")
    unloaded = row.store == "unloaded" and weight.mtp
    homes = [f"stage:{s}" for s in range(plan.mesh.pp)] if plan.mesh else plan.predicted.devices
    if not unloaded and row.store not in homes:
        raise BadArtefact(f"Row {row.name}: stored on {row.store!r}, which is no device of the plan.")
    need = 0 if unloaded else schemes.bytes_of(scheme, weight.full_shape)
    if row.nbytes != need:
        raise BadArtefact(f"Row {row.name}: {row.nbytes} bytes, but {row.scheme} takes {need}.", "Was the plan edited?")


def _check_totals(plan: Plan, spec: ModelSpec) -> None:
    if plan.limits.context > spec.max_context:
        raise BadArtefact(f"The plan's context is {plan.limits.context}; {plan.model} has at most {spec.max_context}.")
    if plan.kv.blocks * plan.kv.block_size < plan.limits.context:
        raise BadArtefact(
            f"The plan's {plan.kv.blocks} blocks of {plan.kv.block_size} do not hold "
            f"one context of {plan.limits.context}."
        )
    _check_same("kv.bytes_per_token", plan.kv.bytes_per_token, spec.kv_bytes_per_token(cost.WIDTH[plan.kv.dtype]))
    _check_compute(plan)


def _check_compute(plan: Plan) -> None:
    said, cpu = plan.compute_dtype, list(plan.predicted.devices) == ["cpu"]
    if cpu and said == "float16":
        raise BadArtefact("The plan computes in float16 on a CPU.", "There, compute_dtype is float32 or bfloat16.")
    if said in INTEGERS and not (cpu and any(products_of(r.role, r.scheme, "cpu", said) for r in plan.rows)):
        raise BadArtefact(f"The plan computes in {said}, but no weight has integers to multiply.", "Was it edited?")
    if said != "float32" and (plan.scheme == "fp32" or (cpu and plan.scheme in ROUNDED_OFF)):
        raise BadArtefact(f"The plan computes in {said}; {plan.scheme} multiplies in float32.", "Was the plan edited?")


def bytes_needed(plan: Plan, spec: ModelSpec) -> dict[str, Bytes]:
    """What the plan's rows, cache and limits take on each of its devices."""
    placed = placed_of(plan, spec)
    working = layouts_of(plan, spec).working(spec, plan.limits)
    cache = plan.kv.blocks * plan.kv.block_size * plan.kv.bytes_per_token
    return {name: cost.device_bytes(name, placed, cache, working) for name in plan.predicted.devices}


def _check_bytes(plan: Plan, spec: ModelSpec) -> None:
    for name in plan.predicted.devices:
        if not re.fullmatch(r"cpu|cuda:\d+", name):
            raise BadArtefact(f"The plan has a device {name!r}.", "Devices are cpu and cuda:0, cuda:1, ...")
    if plan.mesh:
        return _check_ranks(plan, spec)
    for name, needed in bytes_needed(plan, spec).items():
        _check_same(f"prediction for {name}", plan.predicted.devices[name].bytes, needed)


def _check_ranks(plan: Plan, spec: ModelSpec) -> None:
    """The mesh cuts what it may, every row is in its stage, and the bytes of every rank follow."""
    layouts = layouts_of(plan, spec)
    assert isinstance(layouts, RankLayouts)
    mesh, kinds = layouts.mesh, {name.split(":")[0] for name in layouts.mesh.devices}
    if len(kinds) > 1 or (kinds == {"cuda"} and len(set(mesh.devices)) < mesh.size):
        raise BadArtefact(
            f"The plan's mesh has ranks on {', '.join(mesh.devices)}.", "A GPU for each, or the CPU for all."
        )
    for row in plan.rows:
        if row.store != "unloaded" and row.layer is not None and row.layer >= spec.layers:
            raise BadArtefact(f"Row {row.name}: a mesh has no multi-token-prediction layer.", "Plan without --mtp.")
    layout = layouts.over(plan.limits, plan.kv)
    homes = {p.row.name: p.row.store for p in layout.placed}
    for row in plan.rows:
        if row.store != homes.get(row.name, "unloaded"):
            raise BadArtefact(f"Row {row.name} is in {row.store}; its layer is in {homes.get(row.name, 'none')}.")
    _check_same("number of ranks", len(plan.predicted.ranks), plan.mesh.size if plan.mesh else 0)
    for rank, (said, found) in enumerate(zip(plan.predicted.ranks, layout.ranks, strict=True)):
        _check_same(f"prediction for rank {rank}", (said.device, said.bytes), (found.device, found.bytes))
    for name, device in layout.devices.items():
        _check_same(f"prediction for {name}", plan.predicted.devices[name].bytes, device.bytes)


def _check_predicted(plan: Plan, spec: ModelSpec) -> None:
    devices = plan.predicted.devices
    for name, device in devices.items():
        _check_same(f"predicted.devices.{name}.fits", device.fits, device.bytes.total <= device.available)
    _check_same("fits", plan.fits, all(device.fits for device in devices.values()))
    # memory of a device that the plan leaves alone is not known
    known = [said for said in plan.predicted.contexts if said.total_bytes.keys() <= devices.keys()]
    for said, found in zip(known, contexts_of(plan, spec, [said.context for said in known]), strict=True):
        _check_same(f"predicted.contexts at {said.context} tokens", said, found)
    _check_same("predicted.decode_bytes_per_token", plan.predicted.decode_bytes_per_token, decode_bytes(plan, spec))


def decode_bytes(plan: Plan, spec: ModelSpec) -> int:
    """Bytes read for one token of one of the batch's requests."""
    met = [p for p in placed_of(plan, spec) if not p.weight.mtp]
    read = cost.decode_bytes(met, spec, plan.limits.batch, plan.limits.context, plan.kv.bytes_per_token)
    return int(sum(read.values()) / plan.limits.batch)


def contexts_of(plan: Plan, spec: ModelSpec, contexts: list[int]) -> list[ContextPrediction]:
    """Plans for so many tokens each, or the most that the model takes, with these rows on these devices."""
    layouts = layouts_of(plan, spec)
    return [layouts.at(min(each, spec.max_context), plan.limits.batch).prediction for each in contexts]


def check_devices(plan: Plan, available: dict[str, int]) -> None:
    """DoesNotFit where this machine lacks a device of the plan, or memory on it. `available`: bytes by device."""
    for device, prediction in plan.predicted.devices.items():
        if device not in available:
            raise DoesNotFit(
                f"The plan uses {device}; this machine has {', '.join(available)}.", "Plan again with --machine this."
            )
        if prediction.bytes.total > available[device]:
            staged = plan.mesh is not None and plan.mesh.pp > 1
            raise DoesNotFit(
                f"{plan.model} needs {prediction.bytes.total / 1e9:.2f} GB on {device}, "
                f"{available[device] / 1e9:.2f} GB are free.",
                "Plan again: layers are then shared out by the memory that is free now. If that is not enough, "
                "with a smaller --context or another --scheme."
                if staged
                else "Plan again with a smaller --context or another --scheme.",
            )
    if len(plan.predicted.devices) > 1 and not plan.mesh:
        raise DoesNotFit(
            f"The plan spreads {plan.model} over {', '.join(plan.predicted.devices)}; one process runs one device.",
            "Plan with --pp or --tp for several GPUs, --device cpu, or a scheme that fits one GPU.",
        )
