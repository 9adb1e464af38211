"""Cuts a model's answer, as it streams, into its reasoning (`<think>...</think>`) and the rest."""

from __future__ import annotations

from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass
class Piece:
    """News of an answer; either part may be empty."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """`thinking`: the prompt already opened `<think>`. A tag may come in any number of pieces.

    Reasoning begins with the answer or not at all; the line ends around the tags belong to neither part.
    """

    def __init__(self, thinking: bool) -> None:
        self._state = "reasoning" if thinking else "start"
        self._held = ""
        self._trim = True

    @property
    def inside(self) -> bool:
        """Whether the answer so far ends in its reasoning."""
        return self._state == "reasoning"

    def push(self, text: str, last: bool = False) -> Piece:
        """What `text` adds. `last`: nothing follows, so what could have begun a tag is let go."""
        self._held += text
        piece = Piece()
        if self._state == "start":
            self._start(last)
        if self._state == "reasoning":
            piece.reasoning = self._reason(last)
        if self._state == "content":
            piece.content = self._shown(self._held)
            self._held = ""
        return piece

    def _start(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._state, self._held = "reasoning", begun[len(OPEN) :]
        elif last or not OPEN.startswith(begun):
            self._state, self._trim = "content", False

    def _reason(self, last: bool) -> str:
        shown, tag, rest = self._held.partition(CLOSE)
        if tag:
            text = self._shown(shown.rstrip("\n"))
            self._state, self._held, self._trim = "content", rest, True
            return text
        keep = 0 if last else self._undecided()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._shown(shown)

    def _undecided(self) -> int:
        """Characters at the end that may begin the closing tag, with the line ends before it."""
        text = self._held
        tag = next((n for n in range(min(len(text), len(CLOSE) - 1), 0, -1) if CLOSE.startswith(text[-n:])), 0)
        before = text[: len(text) - tag]
        return tag + len(before) - len(before.rstrip("\n"))

    def _shown(self, text: str) -> str:
        """`text` without the line ends that follow a tag."""
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text
