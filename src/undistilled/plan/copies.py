"""Copies of experts that are chosen often, so that no group of ranks has all of them.

A group is the ranks that hold an expert together. A copy (layer, expert, group) says that a group holds an expert that
is another's by the cut. Tokens go to an expert's holders by turns (parallel/share.py), which evens out to equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import BadArtefact, UsageError
from ..model.spec import ModelSpec

MOST = 4  # groups that hold one expert; their turns repeat after 12 tokens at most
Copy = tuple[int, int, int]


class Counts(BaseModel):
    """How often each expert of each layer was chosen over `tokens` tokens of a text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    text: str
    tokens: int = Field(gt=0)
    layers: dict[int, list[int]]


def read_counts(file: Path, spec: ModelSpec) -> Counts:
    """What `undistilled routing` wrote. BadArtefact where it is of another model, or malformed."""
    how = "Make one with `undistilled routing MODEL -o FILE`."
    try:
        counts = Counts.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", how) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadArtefact(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}.", how) from None
    if spec.moe is None:
        raise UsageError("The model has no routed experts to copy.", "Leave --expert-copies out.")
    shape = {layer: spec.moe.experts for layer in range(spec.moe.first_dense, spec.layers)}
    if {layer: len(row) for layer, row in counts.layers.items()} != shape:
        raise BadArtefact(f"{file}: counts of another model's experts ({counts.model}).", how)
    return counts


def loads(counts: Sequence[float], holders: Sequence[Sequence[int]], groups: int) -> list[float]:
    """What each group computes of one layer's choices, where an expert's holders share its tokens equally."""
    found = [0.0] * groups
    for count, held in zip(counts, holders, strict=True):
        for group in held:
            found[group] += count / len(held)
    return found


def imbalance(load: Sequence[float]) -> float:
    """The busiest group's part over the mean."""
    return max(load) * len(load) / (sum(load) or 1)


def choose(counts: Counts, owners: Sequence[int], groups: int, number: int) -> tuple[Copy, ...]:
    """Up to `number` copies in each layer. `owners`: of each expert, its group by the cut."""
    return tuple(
        (layer, expert, group)
        for layer, row in sorted(counts.layers.items())
        for expert, group in _of_layer(row, owners, groups, number)
    )


def _of_layer(row: Sequence[int], owners: Sequence[int], groups: int, number: int) -> list[tuple[int, int]]:
    """(expert, group), one after another: from the busiest group to the idlest, what evens them out most."""
    holders = [[owner] for owner in owners]
    found: list[tuple[int, int]] = []
    for _ in range(number):
        load = loads(row, holders, groups)
        busy, idle = load.index(max(load)), load.index(min(load))
        tried = [
            (max(loads(row, [*holders[:e], [*held, idle], *holders[e + 1 :]], groups)), e)
            for e, held in enumerate(holders)
            if busy in held and idle not in held and len(held) < MOST
        ]
        if not tried or min(tried)[0] >= max(load):
            break
        expert = min(tried)[1]
        holders[expert].append(idle)
        found.append((expert, idle))
    return found
