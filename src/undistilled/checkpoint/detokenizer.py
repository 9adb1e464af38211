"""From token ids back to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

CONTEXT_TOKENS = 6  # decoded again before new tokens, where a decoder looks at neighbours


class Detokenizer:
    """Text from a stream of ids, at a linear cost: what `push` returns never ends within a character.

    after: ids before them, such as a prompt's. A text begins, and its first space may be dropped, where there are none
    or the last one is a control token; else the stream goes on where they ended.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        begins = not after or tokenizer.is_control(after[-1])
        self._strip = begins and tokenizer.drops_space
        self._ids = [] if begins else list(after[-CONTEXT_TOKENS:])
        self._shown = len(self._ids)

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        ids = [id for id in ids if not (self._skip and self._tokenizer.is_special(id))]
        if self._tokenizer.kind == "other":
            return self._push_prefix(ids)
        return self._begin(self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, ids))))

    def flush(self) -> str:
        """What is left when no more ids come; U+FFFD for bytes that never became a character."""
        other = self._tokenizer.kind == "other"
        return self._push_prefix([], final=True) if other else self._begin(self._utf8.decode(b"", final=True))

    def _begin(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _push_prefix(self, ids: list[int], final: bool = False) -> str:
        """For decoders that look at neighbours: decode a few known ids again, and keep what is new."""
        self._ids += ids
        decode = self._tokenizer._tokenizer.decode
        known = decode(self._ids[: self._shown], skip_special_tokens=False)
        text = decode(self._ids, skip_special_tokens=False)
        if text.endswith("\ufffd") and not final and len(self._ids) < 4 * CONTEXT_TOKENS:
            return ""
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._shown = len(self._ids)
        return text[len(known) :]
