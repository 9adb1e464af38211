"""Runs of a model for a receipt: in this process for its quality, in a fresh one for its memory and speed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint.resolve import Model
from ..errors import UndistilledError
from ..generate.engine import Engine, open_planned
from ..load.build import build
from ..model.decoder import Decoder
from ..plan.plan import Plan

T = TypeVar("T")
Command = Callable[[list[str]], str]  # argv -> what it printed; raises UndistilledError where it failed
NEW_TOKENS = 64
LONGEST_PROMPT = 4096  # tokens; a longer context is predicted, not measured
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def with_model(model: Model, plan: Plan, work: Callable[[Decoder], T]) -> T:
    """Load the model as planned, do the work, and give all memory back before returning."""
    try:
        return work(build(plan, model.spec, model.source()))
    finally:
        free()


def with_ranks(model: Model, plan: Plan, work: Callable[[Engine], T]) -> T:
    """Start the plan's ranks, do the work, and end them."""
    threads, engine = torch.get_num_threads(), open_planned(model, plan, {})
    try:
        return work(engine)
    finally:
        engine.close()
        torch.set_num_threads(threads)
        free()


def free() -> None:
    """Return what Python and the allocators hold to the system, as far as they let go of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)


def run_command(argv: list[str]) -> str:
    """Standard output of a command; UndistilledError with the end of its standard error where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UndistilledError(
            f"Measuring memory and speed failed (exit {done.returncode}): {done.stderr.strip()[-800:] or 'no message'}",
            f"It ran: {' '.join(argv)}",
        )
    return done.stdout


def bench_conditions(plan: Plan) -> dict[str, int]:
    """Tokens and requests of the speed run: it fills the context that the plan predicts for, up to LONGEST_PROMPT."""
    context = plan.limits.context
    new = max(2, min(NEW_TOKENS, context // 2))
    return {
        "prompt_tokens": max(1, min(context - new, LONGEST_PROMPT)),
        "new_tokens": new,
        "batch": plan.limits.batch,
        "context": context,
    }


def load_average() -> float | None:
    """Processes that wanted a core over the last minute; None where the system does not say.

    Work of others slows the run, and a receipt that hides it would blame the plan.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def bench(model_name: str, plan: Plan, run: Command = run_command) -> dict[str, Any]:
    """Peak bytes and tokens a second of `plan` in a fresh process, with the conditions they were measured under."""
    at: dict[str, Any] = bench_conditions(plan) | {"cores": os.cpu_count() or 1, "load_before": load_average()}
    with tempfile.TemporaryDirectory(prefix="undistilled-") as folder:
        file = Path(folder) / "plan.json"
        plan.write(file)
        printed = run(
            [
                sys.executable,
                "-m",
                "undistilled",
                "bench",
                model_name,
                "--plan",
                str(file),
                "--batch",
                str(at["batch"]),
                "--prompt-tokens",
                str(at["prompt_tokens"]),
                "--new-tokens",
                str(at["new_tokens"]),
                "--json",
            ]
        )
    try:
        found = json.loads(printed)
        speed = {name: {k: _positive(found[name][k]) for k in ("median", "min", "max")} for name in SPEEDS}
        peaks = [rank["peak_bytes"] for rank in found.get("ranks", [])] or [found["peak_bytes"]]
        return {"peak_bytes": sum(int(_positive(peak)) for peak in peaks), "speed": speed, "conditions": at}
    except (ValueError, KeyError, TypeError) as error:
        raise UndistilledError(
            f"`undistilled bench` printed no measurement ({type(error).__name__}: {error}): {printed[:200]!r}"
        ) from None


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is no measurement")
    return value
