"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from typing import Any

from ..checkpoint.tokenizer import Detokenizer, Tokenizer
from ..schedule.request import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


def label(tokenizer: Tokenizer, id: int) -> str:
    """The token as text, or its bytes spelled out where they are part of a character."""
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, found: list[TokenLogprob]) -> dict[str, Any] | None:
    """`choices[].logprobs` of chat, or None where there are none."""
    if not found:
        return None
    content = [
        {**_entry(tokenizer, p.token, p.logprob), "top_logprobs": [_entry(tokenizer, *top) for top in p.top]}
        for p in found
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(id)
    return {"token": label(tokenizer, id), "logprob": max(logprob, LOWEST), "bytes": list(raw)}


class Offsets:
    """Where each token of a sequence begins in its text, in characters. A character's bytes all begin where it does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text, self._at = Detokenizer(tokenizer), 0

    def next(self, id: int) -> int:
        at = self._at
        self._at += len(self._text.push([id]))
        return at


def completion_logprobs(tokenizer: Tokenizer, found: list[TokenLogprob], offsets: Offsets) -> dict[str, Any] | None:
    """`choices[].logprobs` of completions; `offsets` has seen the sequence's tokens before these."""
    if not found:
        return None
    return {
        "tokens": [label(tokenizer, p.token) for p in found],
        "token_logprobs": [max(p.logprob, LOWEST) for p in found],
        "top_logprobs": [_ranked(tokenizer, p) for p in found],
        "text_offset": [offsets.next(p.token) for p in found],
    }


def _ranked(tokenizer: Tokenizer, p: TokenLogprob) -> dict[str, float]:
    """The best alternatives, and the chosen token where it is none of them."""
    return {label(tokenizer, id): max(logprob, LOWEST) for id, logprob in [*p.top, (p.token, p.logprob)]}
