"""Where a decode step's time goes: each kind of kernel beside the time that its weights take to be read."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from ..errors import UsageError
from ..generate.engine import Engine
from ..generate.programs import Programs
from ..ops.cpu import native
from ..ops.cpu.program import Arena, Program, StepTime

READ = 256 << 20  # bytes read for the bandwidth: over any cache that one person's CPU has
TIMES = 20


def bandwidth(times: int = 5) -> float:
    """Bytes a second that our threads read from memory; the best of some runs."""
    memory = torch.ones(READ, dtype=torch.uint8)
    best = 0.0
    for _ in range(times):
        began = perf_counter()
        native.read(memory)
        best = max(best, READ / (perf_counter() - began))
    return best


@torch.inference_mode()
def explain(engine: Engine, rows: int) -> list[dict[str, Any]]:
    """The kernels of the decode pass of that many rows that ran last, and of its head, by kind: how many, seconds,
    bytes of weights, and `floor`, the seconds in which those are read. Each step is timed with all threads waiting
    before and after it, so that the sum is a little over a pass's time.

    UsageError where no such pass was recorded: on a GPU, or where a part of it has no kernel of ours; and over ranks.
    """
    if engine.runner.crew:
        raise UsageError("--explain times one process, which has the whole pass.", "Leave --ranks and the like out.")
    programs = engine.runner.part.graphs
    found = programs.programs.get(rows) if isinstance(programs, Programs) else None
    if found is None:
        raise UsageError(
            f"No decode pass of {rows} rows was recorded, so its kernels cannot be timed one by one.",
            "--explain is for a CPU, and for schemes that have kernels of ours.",
        )
    program, h_TD = found
    head = Program(Arena())
    with head.recording():
        engine.decoder.logits(h_TD)
    rate = bandwidth()
    table = _by_kind(program.timed(TIMES)) + [r | {"name": f"head: {r['name']}"} for r in _by_kind(head.timed(TIMES))]
    return [row | {"floor": row["bytes"] / rate, "bandwidth": rate} for row in table]


def _by_kind(steps: list[StepTime]) -> list[dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for step in steps:
        row = kinds.setdefault(step.name, {"name": step.name, "count": 0, "seconds": 0.0, "bytes": 0})
        row["count"] += 1
        row["seconds"] += step.seconds
        row["bytes"] += step.weights
    return sorted(kinds.values(), key=lambda row: -row["seconds"])
