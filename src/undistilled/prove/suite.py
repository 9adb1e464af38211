"""Reasoning questions from reasoning-gym, graded from easy to hard, and which of them are held out.

A question is held out by a hash of its own text: no seed, size or number of questions can put one on both sides.
reasoning-gym (Apache-2.0) makes the questions and scores the answers; it is the extra `tasks`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UsageError
from .levels import LEVELS

HELD_OUT = 16  # one question in so many
RIGHT = 0.99  # reasoning-gym's score from which an answer counts as the right one
STRETCH = 1 << 24  # seeds that one stream of questions may use: reasoning-gym seeds question i with seed + i


@dataclass(frozen=True)
class Item:
    """One question. `level` counts from 0, easiest first; `entry` is reasoning-gym's own record of it."""

    task: str
    level: int
    entry: dict[str, Any]

    @property
    def question(self) -> str:
        return self.entry["question"].strip()


def held_out(question: str) -> bool:
    """Whether a question belongs to the test side; only the others may be trained on."""
    digest = hashlib.sha256(" ".join(question.split()).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT == 0


def stream(task: str, level: int, seed: int, *, test: bool) -> Iterator[Item]:
    """Questions of one level without end, of the test side or of the training side."""
    dataset = _dataset(task, level, seed)
    for index in range(STRETCH):
        item = Item(task, level, dataset[index])
        if held_out(item.question) == test:
            yield item


def test_items(task: str, count: int, seed: int = 0) -> list[Item]:
    """`count` different held-out questions of a task, its levels in turn. Fewer where a task has no more."""
    streams = [stream(task, level, seed, test=True) for level in range(len(LEVELS[task]))]
    found: dict[str, Item] = {}
    for turn in range(math.ceil(count / len(streams)) * 40):
        item = next(streams[turn % len(streams)])
        found.setdefault(item.question, item)
        if len(found) == count:
            break
    return list(found.values())


def score(item: Item, answer: str) -> float:
    """reasoning-gym's score of an answer, 0 to 1; what its scorer cannot read is worth 0."""
    try:
        return float(_dataset(item.task, item.level, 0).score_answer(answer.strip(), item.entry))
    except Exception:  # the scorers parse whatever a model wrote
        return 0.0


def right(item: Item, answer: str) -> bool:
    """Whether the answer is exactly right."""
    return score(item, answer) >= RIGHT


@lru_cache(maxsize=256)
def _dataset(task: str, level: int, seed: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError(
            f"The reasoning tasks need the package reasoning-gym ({error}).", "pip install 'undistilled[tasks]'"
        ) from None
    return reasoning_gym.create_dataset(task, seed=seed, size=STRETCH, **LEVELS[task][level])
