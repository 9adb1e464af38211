"""What the ranks of a run took and did: memory beside the plan, time computing, time waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..events import emit, subscribed
from ..generate.engine import Engine
from ..memory import peak_on
from ..parallel.moves import Moves, overlap
from ..plan.mesh import Mesh
from ..plan.stages import balanced

SETTLE = 0.4  # seconds after which every rank's last sign of life is of the time after the last pass


@dataclass(frozen=True)
class Clocks:
    """Seconds that each rank has computed and waited so far."""

    busy: list[float]
    waited: list[float]

    @classmethod
    def read(cls, engine: Engine) -> Clocks:
        crew, part = engine.runner.crew, engine.runner.part
        assert crew is not None and part.comm is not None
        time.sleep(SETTLE)
        beats = [crew.beats[rank] for rank in sorted(crew.beats)]
        return cls([part.busy, *(b.busy for b in beats)], [part.comm.waited, *(b.waited for b in beats)])

    def __sub__(self, before: Clocks) -> Clocks:
        pairs = (self.busy, before.busy), (self.waited, before.waited)
        return Clocks(*([a - b for a, b in zip(now, then, strict=True)] for now, then in pairs))


def peaks(engine: Engine) -> list[int]:
    """What every rank has taken on its device at most so far, bytes."""
    crew = engine.runner.crew
    assert crew is not None
    return [peak_on(engine.runner.device), *(beat.peak for _, beat in sorted(crew.beats.items()))]


@contextmanager
def watched(engine: Engine) -> Iterator[Moves | None]:
    """What rank 0 hands over within the block, while the other ranks keep what they do; None where the ranks are
    GPUs, whose messages no host's clock sees, or of several hosts, whose clocks differ."""
    crew, mesh = engine.runner.crew, engine.plan.mesh
    if crew is None or mesh is None or mesh.pp == 1 or crew.place.hosts > 1 or engine.runner.device.type == "cuda":
        yield None
        return
    moves = Moves()
    crew.watch()
    with subscribed(moves):
        yield moves


def report(engine: Engine, spent: Clocks, elapsed: float, moves: Moves | None = None) -> dict[str, Any]:
    """Of `elapsed` seconds: each rank's peak beside its plan, the pipeline's bubble, how uneven its stages are, and
    how much of what was handed over (`watched`) was hidden behind computing. An event "ranks" has the same."""
    plan, crew = engine.plan, engine.runner.crew
    assert plan.mesh is not None and crew is not None
    stages = stage_seconds(plan.mesh, spent.busy)
    rows = [
        {"device": p.device, "peak_bytes": peak, "planned_bytes": p.bytes.total, "busy_s": busy, "waited_s": waited}
        for p, peak, busy, waited in zip(plan.predicted.ranks, peaks(engine), spent.busy, spent.waited, strict=True)
    ]
    met = overlap(plan.mesh, {0: moves.take(), **crew.moves}) if moves else None
    shared = {
        "elapsed_s": elapsed,
        "stages": len(stages),
        "bubble": 1 - sum(stages) / len(stages) / elapsed,
        "imbalance": max(stages) / (sum(stages) / len(stages)),
        "transfer_s": met and met.seconds,
        "overlap": met and met.efficiency,
    }
    emit("ranks", **shared)
    return {"ranks": rows, **shared}


def stage_seconds(mesh: Mesh, busy: list[float]) -> list[float]:
    """Seconds of computing of each stage: of its slowest rank."""
    return [max(busy[at : at + mesh.inner]) for at in range(0, mesh.size, mesh.inner)]


def rebalanced(mesh: Mesh, costs: list[float], busy: list[float]) -> Mesh:
    """The mesh with layers shared out anew: each stage's speed is what it was measured to do of `costs`, of layers."""
    seconds = stage_seconds(mesh, busy)
    speeds = [sum(costs[a:b]) / max(s, 1e-9) for (a, b), s in zip(mesh.stages, seconds, strict=True)]
    return mesh.model_copy(update={"stages": tuple(balanced(costs, speeds))})
