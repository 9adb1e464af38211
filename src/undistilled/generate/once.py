"""One prompt, one answer: what `generate` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..schedule.request import Request, Sampling
from .engine import Engine


def complete(
    engine: Engine,
    prompt: list[int],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run one request to its end, or until it is `stopped`: text, token_ids, finish_reason and usage."""
    engine.add(Request("once", prompt, sampling))
    text, tokens, reason = "", [], None
    while not engine.idle:
        if reason is None and stopped():
            engine.abort("once")
            reason = "abort"
        for output in engine.step():
            text += output.text
            tokens += output.tokens
            reason = output.finish_reason or reason
            if on_text:
                on_text(output.text)
    return {
        "text": text,
        "token_ids": tokens,
        "finish_reason": reason,
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        },
    }


def generate_text(
    engine: Engine, prompt: str, sampling: Sampling, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Continue a text; it is encoded as text, so that nothing in it becomes a control token."""
    return complete(engine, engine.tokenizer.encode_prompt(prompt, control=False), sampling, on_text)
