"""Multiple-choice questions: how many the original and the plan get right, on the same questions.

A choice scores the log-likelihood of " " + choice after the context, divided by its length in characters; the
highest wins, the first of equals.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact, UsageError
from .interval import compared
from .score import Scorer

LONGEST = 1 << 20  # characters of a line; more is not a question
LINE = "A line has context, choices (two or more) and answer."
FILE = f"--tasks takes a file of JSON objects, one a line (.jsonl, .jsonl.gz). {LINE}"


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice."""

    line: int
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """A file's first questions. `sha256` is of the whole file as it lies there."""

    name: str
    sha256: str
    questions: list[Question]


@dataclass(frozen=True)
class Encoded:
    """A question in token ids."""

    context: list[int]
    choices: list[list[int]]
    lengths: list[int]  # characters


def read_task(path: Path, limit: int | None = None) -> Task:
    """The first `limit` questions of a .jsonl or .jsonl.gz; BadArtefact names the file and the line at fault."""
    if limit is not None and limit < 1:
        raise UsageError("--limit starts at 1.")
    questions: list[Question] = []
    for number, line in _lines(path):
        if limit is not None and len(questions) == limit:
            break
        if line.strip():
            questions.append(_question(path, number, line))
    if not questions:
        raise BadArtefact(f"{path}: no questions.", 'A line is {"context": ..., "choices": [...], "answer": 0}.')
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Task(name, hashlib.sha256(path.read_bytes()).hexdigest(), questions)


def read_tasks(paths: list[Path], limit: int | None = None) -> list[Task]:
    """Several files; UsageError where two have one name, which a receipt could not tell apart."""
    tasks = [read_task(Path(p), limit) for p in paths]
    names = [t.name for t in tasks]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UsageError(f"Two task files are called {twice[0]!r}.", "Rename one.")
    return tasks


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            while line := file.readline(LONGEST):
                number += 1
                yield number, line
    except OSError as error:
        where = f"{path}: line {number + 1}" if number else str(path)
        raise BadArtefact(f"{where}: {error.strerror or error}.", FILE) from None
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise BadArtefact(f"{path}: line {number + 1}: {error}.", FILE) from None


def _question(path: Path, number: int, line: str) -> Question:
    def wrong(what: str) -> BadArtefact:
        return BadArtefact(f"{path}: line {number}: {what}.", LINE)

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise wrong("not a JSON object")
    context, choices, answer = row.get("context"), row.get("choices"), row.get("answer")
    if not isinstance(context, str) or not context:
        raise wrong("context is no text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise wrong("choices are not two or more texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise wrong(f"answer is {answer!r}, not the index of one of {len(choices)} choices")
    return Question(number, context, tuple(choices), answer)


def encode(question: Question, tokenizer: Tokenizer) -> Encoded:
    """Ids of the context and of each " " + choice. Control tokens in a question stay plain text.

    A choice is what encoding it together with the context adds; where that would change the context's own last
    token, it is encoded on its own.
    """
    context = tokenizer.encode_prompt(question.context, control=False)
    choices = []
    for choice in question.choices:
        whole = tokenizer.encode_prompt(f"{question.context} {choice}", control=False)
        joined = whole[: len(context)] == context and len(whole) > len(context)
        choices.append(whole[len(context) :] if joined else tokenizer.encode(f" {choice}", control=False))
    return Encoded(context, choices, [len(c) for c in question.choices])


def encode_task(task: Task, tokenizer: Tokenizer, room: int) -> list[Encoded]:
    """Every question in ids; UsageError names the first that is longer than `room` tokens."""
    encoded = [encode(q, tokenizer) for q in task.questions]
    for question, e in zip(task.questions, encoded, strict=True):
        longest = len(e.context) + max(map(len, e.choices))
        if longest > room:
            raise UsageError(
                f"{task.name}, line {question.line}: {longest} tokens; the plan's context is {room}.",
                "Plan with a larger --context.",
            )
    return encoded


def answers(scorer: Scorer, encoded: list[Encoded]) -> Iterator[int]:
    """The index that the model chooses for each question."""
    for e in encoded:
        likelihoods = scorer.choice_loglikelihoods(e.context, e.choices)
        scores = [total / length for total, length in zip(likelihoods, e.lengths, strict=True)]
        yield scores.index(max(scores))


def compare(task: Task, original: list[int], plan: list[int]) -> dict[str, Any]:
    """`interval.compared` of two lists of chosen indices; `chance` is what guessing gets, 0 to 1."""
    before, after = ([c == q.answer for q, c in zip(task.questions, side, strict=True)] for side in (original, plan))
    chance = sum(1 / len(q.choices) for q in task.questions) / len(task.questions)
    return compared(before, after) | {"chance": chance, "sha256": task.sha256}
