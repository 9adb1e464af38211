"""The plans that a receipt needs: the one that is proven, its original's, and both with room for many questions."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.resolve import Model, find
from ..errors import BadArtefact, DoesNotFit, UsageError
from ..generate.engine import plan_for
from ..generate.part import ROWS
from ..model.spec import OURS, ModelSpec
from ..plan.check import bytes_needed, check, check_devices, contexts_of, decode_bytes
from ..plan.hardware import load_machine
from ..plan.plan import DevicePrediction, Plan, RankPrediction
from ..plan.ranks import RankLayouts, layouts_of
from ..plan.solve import Ask, solve

DEFAULT_CONTEXT = 1024  # tokens that a plan made here has room for: the speed run fills it
ORIGINAL_CONTEXT = 4096  # tokens; the original only ever scores windows and questions
AT_ONCE = {"cpu": ROWS["cpu"], "cuda": 256}  # questions in one pass: more rows are no faster


def proven_plan(
    model: Model, plan_file: Path | None, scheme: str | None, context: int | None, dtype: str | None = None
) -> Plan:
    """The plan of a file, of one device or of ranks, or one made now for the other options. The model has weights."""
    if plan_file and (scheme or context or dtype):
        raise UsageError("A plan file decides scheme, context and dtype.", "Give --plan alone, or the options alone.")
    if not model.has_weights:
        raise BadArtefact(f"{model.path} has no weights to prove anything about.")
    if plan_file:
        plan = plan_for(model, {"plan": plan_file})
    else:
        context = context or min(DEFAULT_CONTEXT, model.spec.max_context)
        plan = plan_for(model, {"scheme": scheme, "context": context, "dtype": dtype})
    home_of(plan)
    return plan


def original_of(model: Model, name: str | None) -> Model:
    """The model to compare with: the one of that name, or what `model` was compressed from, or itself.

    UsageError where it cannot answer the same questions, or where a compressed model's original is not there.
    """
    made = model.config.get(OURS)
    if name is None and made is None:
        return model
    made = made or {}
    said = name or str(made.get("model"))
    try:
        base = find(said)
    except BadArtefact as error:
        raise UsageError(f"{model.name} was made from {said!r}: {error.message}", "Say --original.") from None
    if name is None and base.fingerprint() != made.get("fingerprint"):
        raise UsageError(f"{said} is not what {model.name} was made from: it changed.", "Say --original.")
    if base.spec.vocab != model.spec.vocab:
        raise UsageError(f"{base.name} has {base.spec.vocab} tokens, {model.name} {model.spec.vocab}.")
    return base


def home_of(plan: Plan) -> str:
    """The one device that the plan uses, or the devices of its ranks. UsageError for a plan that only predicts."""
    if plan.mesh:
        return f"{', '.join(dict.fromkeys(plan.mesh.devices))} ({plan.mesh.size} ranks)"
    used = {row.store for row in plan.rows} - {"unloaded"}
    if len(used) != 1:
        raise UsageError(f"The plan spreads over {', '.join(sorted(used))}; only a plan on one device can be proven.")
    return used.pop()


def _kind(plan: Plan) -> str:
    return next(iter(plan.predicted.devices)).split(":")[0]


def original_plan(model: Model, plan: Plan) -> Plan:
    """The weights as released on this machine: where the plan runs, else on the CPU. DoesNotFit where on neither.

    On a CPU its products are float32, so that a receipt shows what BF16 products cost too; on a GPU they are what the
    plan's are.
    """
    machine = load_machine("this")
    free = {d.name: d.free_bytes for d in machine.devices}
    context = min(plan.limits.context, ORIGINAL_CONTEXT)
    for device in ("cpu",) if _kind(plan) == "cpu" else (None, "cpu"):
        wide = device == "cpu" or plan.compute_dtype == "float32"
        ask = Ask(None, context, 1, False, device, dtype="float32" if wide else "auto")
        made = solve(model.name, model.config, model.spec, machine, ask)
        if made.fits and len({row.store for row in made.rows} - {"unloaded"}) == 1:
            check(made, model.spec, model.config)
            check_devices(made, free)
            return made
    raise DoesNotFit(
        f"The original of {model.name} ({made.scheme}) does not fit this machine, and a receipt measures against it.",
        "Prove on a machine that holds it.",
    )


def suite_plan(plan: Plan, spec: ModelSpec, context: int, questions: int) -> Plan:
    """The same weights at the same home, with a cache for as many questions at once as are fast and fit.

    DoesNotFit where not even one of `context` tokens does.
    """
    free = {d.name: d.free_bytes for d in load_machine("this").devices}
    batch = min(questions, AT_ONCE[_kind(plan)])
    made = with_limits(plan, spec, context, batch)
    while batch > 1 and any(d.bytes.total > free.get(name, 0) for name, d in made.predicted.devices.items()):
        batch //= 2
        made = with_limits(plan, spec, context, batch)
    check_devices(made, free)
    return made


def with_limits(plan: Plan, spec: ModelSpec, context: int, batch: int) -> Plan:
    """`plan` with other limits, its bytes computed again; its speeds stay those of the old ones."""
    made = plan.model_copy(
        update={
            "kv": plan.kv.model_copy(update={"blocks": batch * -(-context // plan.kv.block_size)}),
            "limits": plan.limits.model_copy(update={"context": context, "batch": batch}),
        }
    )
    devices, ranks = _needed(made, spec)
    predicted = plan.predicted.model_copy(
        update={
            "devices": devices,
            "ranks": ranks,
            "contexts": contexts_of(made, spec, [each.context for each in plan.predicted.contexts]),
            "decode_bytes_per_token": decode_bytes(made, spec),
        }
    )
    return made.model_copy(update={"predicted": predicted, "fits": all(device.fits for device in devices.values())})


def _needed(plan: Plan, spec: ModelSpec) -> tuple[dict[str, DevicePrediction], list[RankPrediction]]:
    """What the plan's limits take on each device, and on each rank where there are several."""
    layouts = layouts_of(plan, spec)
    if isinstance(layouts, RankLayouts):
        layout = layouts.over(plan.limits, plan.kv)
        return layout.devices, layout.ranks
    devices = {}
    for name, needed in bytes_needed(plan, spec).items():
        available = plan.predicted.devices[name].available
        devices[name] = DevicePrediction(bytes=needed, available=available, fits=needed.total <= available)
    return devices, []
