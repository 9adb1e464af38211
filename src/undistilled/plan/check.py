"""Refuses a plan before a weight is read, naming the row and the reason."""

from __future__ import annotations

from .. import scheme as schemes
from ..errors import BadArtefact, DoesNotFit, UsageError
from ..model.spec import ModelSpec
from ..model.weights import weights
from .plan import Plan, Row, config_hash


def check(plan: Plan, spec: ModelSpec, config: dict) -> None:
    """BadArtefact (exit 3) for a plan of another model or a row that makes no sense; DoesNotFit (exit 4)."""
    if plan.model_hash != config_hash(config):
        raise BadArtefact(
            f"The plan was made for {plan.model!r} with another config.json.", "Make a new one with `undistilled plan`."
        )
    known = {w.name: w for w in weights(spec)}
    rows = {row.name: row for row in plan.rows}
    if len(rows) != len(plan.rows):
        raise BadArtefact("The plan names a weight twice.", "Was it edited?")
    for name in known.keys() - rows.keys():
        raise BadArtefact(f"The plan has no row for {name}.", "Was it edited?")
    for row in plan.rows:
        if row.name not in known:
            raise BadArtefact(f"Row {row.name}: the model has no such weight.")
        _check_row(row, known[row.name])
    _check_totals(plan, spec)
    if not plan.fits:
        raise DoesNotFit(f"{plan.model} does not fit {plan.machine} by this plan.", plan.advice)


def _check_row(row: Row, weight) -> None:
    try:
        scheme = schemes.get(row.scheme)
    except UsageError as error:
        raise BadArtefact(f"Row {row.name}: {error.message}", error.hint) from None
    if tuple(row.shape) != weight.shape:
        raise BadArtefact(f"Row {row.name}: shape {list(row.shape)}, the model has {list(weight.shape)}.")
    if row.experts != ((0, weight.experts) if weight.experts else None):
        raise BadArtefact(f"Row {row.name}: experts {row.experts}, the model has {weight.experts}.")
    need = schemes.bytes_of(scheme, weight.full_shape)
    if row.store != "unloaded" and row.nbytes != need:
        raise BadArtefact(f"Row {row.name}: {row.nbytes} bytes, but {row.scheme} takes {need}.", "Was the plan edited?")


def _check_totals(plan: Plan, spec: ModelSpec) -> None:
    if plan.limits.context > spec.max_context:
        raise BadArtefact(f"The plan's context is {plan.limits.context}; {plan.model} has at most {spec.max_context}.")
    if plan.kv.blocks * plan.kv.block_size < plan.limits.context:
        raise BadArtefact(
            f"The plan's {plan.kv.blocks} blocks of {plan.kv.block_size} do not hold "
            f"one context of {plan.limits.context}."
        )
    for device, prediction in plan.predicted.devices.items():
        stored = sum(row.nbytes for row in plan.rows if row.store == device)
        if stored != prediction.bytes.weights:
            raise BadArtefact(f"The plan's rows put {stored} bytes on {device}, its prediction says otherwise.")


def check_devices(plan: Plan, available: dict[str, int]) -> None:
    """DoesNotFit where this machine lacks a device of the plan, or memory on it. `available`: bytes by device."""
    for device, prediction in plan.predicted.devices.items():
        if device not in available:
            raise DoesNotFit(
                f"The plan uses {device}; this machine has {', '.join(available)}.", "Plan again with --machine this."
            )
        if prediction.bytes.total > available[device]:
            raise DoesNotFit(
                f"{plan.model} needs {prediction.bytes.total / 1e9:.2f} GB on {device}, "
                f"{available[device] / 1e9:.2f} GB are free.",
                "Plan again with a smaller --context or another --scheme.",
            )
