"""Reasoning written out, step by step: for each task a function of the question alone.

Every next token of a thought is meant to be a simple function of what is already visible, so that a small model can
learn it; nothing is chosen with hindsight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import algebra, arithmetic, countdown, lists, logic, strings

Trace = Callable[[dict[str, Any]], tuple[str, str]]  # reasoning-gym's entry -> (thought, answer)

TRACES: dict[str, Trace] = {
    name: trace
    for module in (arithmetic, algebra, lists, strings, logic, countdown)
    for name, trace in module.TRACES.items()
}
