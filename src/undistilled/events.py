"""Events: what happened, emitted by any stage, consumed by metrics, traces and progress bars.

With no subscriber, `emit` costs one truth test.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass(slots=True)
class Event:
    """`name` is dotted ("load.tensor", "engine.step"); `seconds` is a time stamp of `perf_counter`."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    seconds: float = field(default_factory=perf_counter)


Consumer = Callable[[Event], None]
_consumers: list[Consumer] = []


def emit(name: str, **fields: Any) -> None:
    """Tell every consumer that `name` happened."""
    if _consumers:
        event = Event(name, fields)
        for consumer in tuple(_consumers):
            consumer(event)


@contextmanager
def subscribed(consumer: Consumer) -> Iterator[None]:
    """Within the block, `consumer` receives every event."""
    _consumers.append(consumer)
    try:
        yield
    finally:
        _consumers.remove(consumer)


SENTENCES = {
    "op.fallback": "{op} for {subject} on {device} has no fast kernel here: the PyTorch reference runs",
    "plan.comparing": "comparing {count} ways to share {model} out over ranks",
    "plan.layouts": "of {count} ways {fit} fit; {said}",
    "engine.compiling": "compiling kernels, {done} of {total} sizes of passes done",
}


def sentence(event: Event) -> str | None:
    """What a person should know of what happened, where that is something."""
    said = SENTENCES.get(event.name)
    return said.format(**event.fields) if said else None
