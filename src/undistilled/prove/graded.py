"""The reasoning suite of a receipt: what is asked, how a loaded model answers it, and the two sides' figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any

from ..errors import UsageError
from ..generate.engine import Engine
from ..plan.plan import Plan
from .answers import MAX_TOKENS, Answer, answers
from .interval import compared
from .levels import LEVELS
from .suite import Item, test_items

QUESTIONS = 100  # of each task
NEWS = 20  # times that progress is told


@dataclass(frozen=True)
class Wanted:
    """What a person wants asked: tasks by name (none: all of them), with reasoning or without, tokens of an answer."""

    tasks: tuple[str, ...] = ()
    thinking: bool = True
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class Suite:
    """The questions by task, and both sides' plans, which have the same context."""

    tasks: dict[str, list[Item]]
    wanted: Wanted
    original: Plan
    plan: Plan


def wanted(suite: bool, names: Sequence[str], thinking: bool) -> Wanted | None:
    """What the options ask for, a task naming the suite too; None without, UsageError where others make no sense."""
    suite = suite or bool(names)
    if not suite and not thinking:
        raise UsageError("--no-thinking is about the reasoning suite.", "Add --suite.")
    return Wanted(tuple(names), thinking) if suite else None


def held_out_items(names: Sequence[str], limit: int | None) -> dict[str, list[Item]]:
    """`limit` held-out questions (None: 100) of each task; UsageError lists the tasks where a name is none of them."""
    if limit is not None and limit < 1:
        raise UsageError("--limit starts at 1.")
    strangers = [name for name in names if name not in LEVELS]
    if strangers:
        raise UsageError(f"There is no reasoning task {strangers[0]!r}.", f"Known: {', '.join(LEVELS)}.")
    return {name: test_items(name, limit or QUESTIONS) for name in dict.fromkeys(names or LEVELS)}


def flat(tasks: dict[str, list[Item]]) -> list[Item]:
    """All questions, task by task."""
    return [item for items in tasks.values() for item in items]


def ask(suite: Suite, engine: Engine, say: Callable[[str], None]) -> dict[str, list[Answer]]:
    """A model's answers by task, from an engine over its side's plan of the suite."""
    items = flat(suite.tasks)
    step = -(-len(items) // NEWS)

    def progress(done: int, total: int) -> None:
        if done % step == 0:
            say(f"{done} of {total} reasoning questions")

    found = iter(
        answers(engine, items, thinking=suite.wanted.thinking, max_tokens=suite.wanted.max_tokens, progress=progress)
    )
    return {name: [next(found) for _ in questions] for name, questions in suite.tasks.items()}


def figures(suite: Suite, original: dict[str, list[Answer]], plan: dict[str, list[Answer]]) -> dict[str, Any]:
    """The receipt's `suite`. In `mean`, original and plan are means over tasks, the rest is over all questions."""
    tasks = {name: _task(items, original[name], plan[name]) for name, items in suite.tasks.items()}
    before, after = ([a for name in suite.tasks for a in side[name]] for side in (original, plan))
    by_task = {side: fmean(task[side] for task in tasks.values()) for side in ("original", "plan")}
    pooled = _compared(before, after)
    for only_by_task in ("original_interval", "plan_interval", "kept"):
        del pooled[only_by_task]
    return {
        "tasks": tasks,
        "mean": pooled | by_task,
        "thinking": suite.wanted.thinking,
        "max_tokens": suite.wanted.max_tokens,
        "context": suite.plan.limits.context,
        "batch": {"original": suite.original.limits.batch, "plan": suite.plan.limits.batch},
        "unfinished": _sides(before, after, lambda a: a.finish_reason == "length"),
        "questions_sha256": fingerprint(flat(suite.tasks)),
        "reasoning_gym": version("reasoning-gym"),
    }


def _sides(original: list[Answer], plan: list[Answer], value: Callable[[Answer], float]) -> dict[str, float]:
    return {"original": fmean(map(value, original)), "plan": fmean(map(value, plan))}


def _compared(original: list[Answer], plan: list[Answer]) -> dict[str, Any]:
    shares = compared([a.right for a in original], [a.right for a in plan])
    return shares | {"tokens_per_answer": _sides(original, plan, lambda a: a.tokens)}


def _task(items: list[Item], original: list[Answer], plan: list[Answer]) -> dict[str, Any]:
    """One task's figures, and each level's, easiest first; a level without questions has None for its shares."""
    levels: list[dict[str, Any]] = []
    for level in range(len(LEVELS[items[0].task])):
        pairs = [(o, p) for i, o, p in zip(items, original, plan, strict=True) if i.level == level]
        shares = (fmean(a.right for a in side) for side in zip(*pairs, strict=True)) if pairs else (None, None)
        levels.append({"n": len(pairs), **dict(zip(("original", "plan"), shares, strict=True))})
    return _compared(original, plan) | {"levels": levels}


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 of the questions in order, with their tasks, levels and expected answers."""
    rows = [[i.task, i.level, i.question, str(i.entry["answer"])] for i in items]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()
