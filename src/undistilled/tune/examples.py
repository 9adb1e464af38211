"""What r1-nano learns from: reasoning questions with the steps written out, some answered at once, and prose."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact
from ..prove import suite
from ..prove.levels import LEVELS
from ..serve.template import END_THINK, R1_ASSISTANT, THINK
from . import vocabulary
from .traces import TRACES

LONGEST = 640  # tokens of a document; longer ones are left out
PROSE_TOKENS = 512
PROSE_SHARE = 0.003  # of the documents: about five times over the prose in 14.5 minutes on an H100
AT_ONCE_SHARE = 0.05  # of the questions: answered without thinking, so that suppressed thinking is no foreign text
BEGIN, END, _ = vocabulary.FIRST
THINKING, AT_ONCE = f"{THINK}\n", f"{THINK}\n\n{END_THINK}\n\n"


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first `given` are not learned. `kind`: a task's name or "prose"."""

    ids: list[int]
    given: int
    kind: str


def answer_text(item: suite.Item) -> tuple[str, str]:
    """(what the model shall think, its answer) for a question."""
    return TRACES[item.task](item.entry)


def encode(item: suite.Item, tokenizer: Tokenizer, thinking: bool = True) -> Document:
    """A question as its chat template writes it, and the wanted answer, tokenised apart as they are when served.

    Written here, since rendering a template takes longer than all the rest; a test holds the two together.
    """
    thought, answer = answer_text(item)
    opening = THINKING if thinking else AT_ONCE
    prompt = tokenizer.encode(f"{BEGIN}<｜User｜>{item.question}{R1_ASSISTANT}{opening}", control=True)
    rest = f"{thought}\n{END_THINK}\n\n{answer}{END}" if thinking else f"{answer}{END}"
    return Document(prompt + tokenizer.encode(rest, control=True), len(prompt), item.task)


class Mixture:
    """Documents without end. The same seed gives the same documents."""

    def __init__(self, tokenizer: Tokenizer, prose: np.ndarray, seed: int) -> None:
        self.tokenizer, self.prose = tokenizer, prose
        self.random = Random(f"mixture {seed}")
        self.tasks = sorted(LEVELS)
        self.streams = {
            (task, level): suite.stream(task, level, self.random.randrange(1 << 40), test=False)
            for task in self.tasks
            for level in range(len(LEVELS[task]))
        }

    def __iter__(self) -> Iterator[Document]:
        while True:
            document = self._prose() if self.random.random() < PROSE_SHARE else self._question()
            if len(document.ids) <= LONGEST:
                yield document

    def _question(self) -> Document:
        task = self.random.choice(self.tasks)
        levels = range(len(LEVELS[task]))
        level = self.random.choices(levels, weights=[2 + at for at in levels])[0]  # the hard need more practice
        thinking = self.random.random() >= AT_ONCE_SHARE
        return encode(next(self.streams[task, level]), self.tokenizer, thinking)

    def _prose(self) -> Document:
        at = self.random.randrange(max(1, len(self.prose) - PROSE_TOKENS))
        ids = self.prose[at : at + PROSE_TOKENS].tolist()
        assert self.tokenizer.bos is not None
        return Document([self.tokenizer.bos, *ids], 1, "prose")


def read_prose(path: Path) -> str:
    """A text file, gzipped or not. BadArtefact where it cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise BadArtefact(f"{path}: {error}", "Give a UTF-8 text, or one in gzip.") from None
