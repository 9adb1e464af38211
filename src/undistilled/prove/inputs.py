"""What both models of a receipt are given, read and checked before anything long begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..checkpoint.resolve import Model
from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact, UsageError
from ..plan.plan import Plan
from . import divergence, graded
from . import tasks as questions
from .answers import prompts
from .plans import suite_plan

CHARACTERS = 64  # of a text for each token wanted: more than a token holds, less than a whole library


@dataclass(frozen=True)
class Asked:
    """What to compare on, as `receipt.prove` explains it."""

    text: Path | None
    tasks: Sequence[Path]
    tokens: int
    limit: int | None
    window: int
    suite: graded.Wanted | None


@dataclass(frozen=True)
class Inputs:
    """Windows of token ids, multiple-choice questions with their ids, reasoning questions with both sides' plans."""

    text: dict[str, Any]
    windows: list[list[int]]
    tasks: list[questions.Task]
    encoded: list[list[questions.Encoded]]
    suite: graded.Suite | None


def read_inputs(model: Model, plan: Plan, original: Plan, asked: Asked) -> Inputs:
    """The inputs in the model's tokens. UsageError, BadArtefact or DoesNotFit names what is wrong with them."""
    if asked.tokens < 2 or asked.window < 2:
        raise UsageError("--tokens and the window start at 2.")
    tokenizer = model.tokenizer()
    room = min(plan.limits.context, original.limits.context)
    name, content = read_text(asked.text)
    bos = tokenizer.bos if tokenizer.add_bos else None
    ids = tokenizer.encode(content[: asked.tokens * CHARACTERS], control=False)
    _check_vocab(model, ids)
    cut = divergence.windows(ids, min(asked.window, room), asked.tokens, bos)
    read = questions.read_tasks(list(asked.tasks), asked.limit)
    described = {
        "name": name,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "tokens": sum(len(w) - (bos is not None) for w in cut),
        "window": min(asked.window, room),
    }
    encoded = [questions.encode_task(t, tokenizer, room) for t in read]
    return Inputs(described, cut, read, encoded, _suite(model, tokenizer, plan, original, asked))


def _suite(model: Model, tokenizer: Tokenizer, plan: Plan, original: Plan, asked: Asked) -> graded.Suite | None:
    """The reasoning questions, and both plans with the least context that holds each of them and an answer."""
    if asked.suite is None:
        return None
    tasks = graded.held_out_items(asked.suite.tasks, asked.limit)
    items = graded.flat(tasks)
    asked_ids = [p.ids for p in prompts(tokenizer, items, model.name, thinking=asked.suite.thinking)]
    _check_vocab(model, [max(ids) for ids in asked_ids])
    longest, room = max(map(len, asked_ids)), min(plan.limits.context, original.limits.context)
    if longest >= room:
        raise UsageError(
            f"A reasoning question has {longest} tokens; the plan's context is {room}.", "Plan with a larger --context."
        )
    context = min(room, longest + asked.suite.max_tokens)
    both = (suite_plan(p, model.spec, context, len(items)) for p in (original, plan))
    return graded.Suite(tasks, asked.suite, *both)


def _check_vocab(model: Model, ids: list[int]) -> None:
    if ids and max(ids) >= model.spec.vocab:
        raise BadArtefact(
            f"The tokenizer gives id {max(ids)}; the model has {model.spec.vocab} rows.", "Is it another model's?"
        )


def read_text(file: Path | None) -> tuple[str, str]:
    """(name, content) of a UTF-8 text; without a file, of the excerpt that comes with the program."""
    if file is None:
        data = resources.files(__package__).joinpath("data/austen.txt")
        return "Jane Austen, Persuasion (excerpt, built in)", data.read_text(encoding="utf-8")
    try:
        return Path(file).name, Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", "Name a text file, or none for the excerpt built in.") from None
    except UnicodeDecodeError as error:
        raise BadArtefact(f"{file}: not UTF-8 text ({error}).", "Save it as UTF-8.") from None
