"""An engine without a model: it answers with what its options say, a byte a turn, and obeys words in the prompt."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))  # the engine's process does not read conftest.py

from byte_tokens import byte_tokenizer
from undistilled.checkpoint.tokenizer import Detokenizer
from undistilled.errors import BadArtefact, RequestError
from undistilled.ops.registry import say_fallback
from undistilled.schedule.request import Output, Request, TokenLogprob


@dataclass
class Running:
    request: Request
    reply: list[int]
    detokenizer: Detokenizer
    done: int = 0
    text: str = ""
    blocks: int = field(default=1)


class FakeEngine:
    """Prompts with these words: `boom` (the turn raises), `die` (the process ends), `seed?` (answers its seed),
    `long` (never stops by itself)."""

    def __init__(self, options: dict) -> None:
        self.tokenizer = byte_tokenizer(options.get("chat_template"), options.get("generation"))
        self.spec = SimpleNamespace(vocab=300)
        self.max_context = options.get("context", 4096)
        self.name, self.ranks = options.get("name", "fake"), 1
        self.reply, self.delay = options.get("reply", "Hello, wörld 🤖!"), options.get("delay", 0.0)
        self.running: dict[str, Running] = {}
        self.aborted = self.added = 0

    def add(self, request: Request) -> None:
        request.sampling.check(self.spec.vocab)
        text = self.tokenizer.decode(request.prompt)
        if "refuse" in text:
            raise RequestError("refused", param="prompt", code="refused")
        reply = str(request.sampling.seed) if "seed?" in text else self.reply
        ids = self.tokenizer.encode(reply, control=True)
        self.added += 1
        self.running[request.id] = Running(request, ids, Detokenizer(self.tokenizer))

    def abort(self, id: str) -> None:
        self.aborted += self.running.pop(id, None) is not None

    @property
    def idle(self) -> bool:
        return not self.running

    def step(self) -> list[Output]:
        time.sleep(self.delay)
        for running in self.running.values():
            text = self.tokenizer.decode(running.request.prompt)
            if "die" in text:
                os._exit(7)
            if "boom" in text:
                error = ValueError("boom")
                if "named" in text:
                    error.request_id = running.request.id  # type: ignore[attr-defined]
                raise error
        outputs = [self._turn(running) for running in self.running.values()]
        for output in outputs:
            if output.finish_reason:
                del self.running[output.id]
        return outputs

    def _turn(self, running: Running) -> Output:
        request, sampling = running.request, running.request.sampling
        endless = "long" in self.tokenizer.decode(request.prompt)
        token = running.reply[running.done % len(running.reply)]
        running.done += 1
        text = running.detokenizer.push([token])
        running.text += text
        ended = running.done == len(running.reply) and not endless
        reason = "stop" if ended else "length" if running.done >= sampling.max_tokens else None
        matched = next((s for s in sampling.stop if s in running.text), None)
        if matched:
            reason, text = "stop", text[: -len(matched)] if len(matched) <= len(text) else ""
        if reason:
            text += running.detokenizer.flush()
        logprobs = []
        if sampling.logprobs is not None:
            top = [(token, -0.5), (65, float("-inf")), (66, -2.0)][: sampling.logprobs]
            logprobs = [TokenLogprob(token, -0.5, top)]
        return Output(request.id, [token], text, logprobs, reason, matched, len(request.prompt), running.done)

    def stats(self) -> dict[str, float]:
        return {
            "running": len(self.running),
            "waiting": 0,
            "kv_blocks_used": sum(r.blocks for r in self.running.values()),
            "kv_blocks_total": 100,
            "aborted": self.aborted,
            "added": self.added,
        }


def open_engine(options: dict, progress=None) -> FakeEngine:
    if options.get("bad"):
        raise BadArtefact("The model is bad.", "Get another.")
    if options.get("fallback"):
        say_fallback("op", "model", "cpu")
    if options.get("load"):
        for at in range(10):
            progress(at, 10, "weight")
            time.sleep(options["load"] / 10)
    return FakeEngine(options)
