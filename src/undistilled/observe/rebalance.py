"""Runs a plan of several stages and writes one whose layers are shared out by what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.resolve import find
from ..errors import UsageError
from ..generate.engine import open_engine
from ..load.build import Progress
from ..model.weights import counts
from ..plan.hardware import load_machine
from ..plan.mesh import Mesh
from ..plan.plan import Plan, check_new, read_plan
from ..plan.solve import moved
from ..plan.stages import layer_bytes
from .bench import bench
from .ranks import rebalanced


def rebalance(
    model: str, plan_file: Path, output: Path, new_tokens: int, progress: Progress | None = None
) -> tuple[Mesh, Mesh, dict[str, Any]]:
    """(the mesh as it was, the new one, what `bench` measured). Writes the new plan."""
    plan = read_plan(plan_file)
    if plan.mesh is None or plan.mesh.pp < 2:
        raise UsageError(f"{plan_file} has one stage: there is nothing to share out.", "Plan with --pp.")
    check_new(output)
    engine = open_engine({"model": model, "plan": plan_file}, progress)
    try:
        room = max(1, min(128, plan.limits.context - new_tokens))
        result = bench(engine, room, new_tokens, plan.limits.batch, 2)
    finally:
        engine.close()
    made = _moved(model, plan, result)
    assert made.mesh is not None
    made.write(output)
    return plan.mesh, made.mesh, result


def _moved(model: str, plan: Plan, result: dict[str, Any]) -> Plan:
    assert plan.mesh is not None
    found = find(model)
    costs = layer_bytes(found.spec, {row.name: row.scheme for row in plan.rows if row.store != "unloaded"})
    mesh = rebalanced(plan.mesh, costs, [row["busy_s"] for row in result["ranks"]])
    return moved(plan, mesh, found.spec, load_machine("this"), counts(found.spec)[1])
