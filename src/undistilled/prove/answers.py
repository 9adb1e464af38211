"""A model's answers to reasoning questions: asked as a conversation, decoded greedily, scored by reasoning-gym."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.tokenizer import Tokenizer
from ..errors import UndistilledError, UsageError
from ..schedule.request import Output, Request, Sampling
from ..serve.reasoning import ReasoningSplitter
from ..serve.template import Prompt, chat_prompt, needed_template
from .suite import RIGHT, Item, score

if TYPE_CHECKING:
    from ..serve.worker import Engine

MAX_TOKENS = 512
IN_FLIGHT = 512  # requests that an engine is given at once; its queue holds 1024


@dataclass(frozen=True)
class Answer:
    """text: what came after the reasoning, empty where the reasoning never ended.

    tokens: all that were generated, the one that ends an answer included; thought_tokens: those of the reasoning,
    up to its closing tag. finish_reason: "stop" or "length". score: 0 to 1; right: whether that is full marks.
    """

    text: str
    thought_tokens: int
    tokens: int
    finish_reason: str
    right: bool
    score: float


def prompts(tokenizer: Tokenizer, items: Sequence[Item], name: str, *, thinking: bool = True) -> list[Prompt]:
    """Each question as the first message of a conversation with the model `name`; its text stays text.

    Without `thinking` the prompt ends in an empty reasoning. UsageError where the model has no chat template.
    """
    template = needed_template(tokenizer, name, "The reasoning suite asks in a conversation; --tasks needs none.")
    asked = [[{"role": "user", "content": item.question}] for item in items]
    return [chat_prompt(tokenizer, template, messages, thinking=thinking) for messages in asked]


def answers(
    engine: Engine,
    items: Sequence[Item],
    *,
    thinking: bool = True,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """The answers in the order of `items`, of at most `max_tokens` tokens each and no more than the context holds.

    progress: called with the answers that are there and all that will be. Requests of others on the same engine are
    let be. UsageError where there is no chat template or a question does not fit; UndistilledError where one fails.
    """
    asked = enumerate(zip(items, prompts(engine.tokenizer, items, engine.name, thinking=thinking), strict=True))
    replies = [_Reply(engine, f"suite-{i}", item, prompt, max_tokens) for i, (item, prompt) in asked]
    found: dict[str, Answer] = {}
    for id, answer in _run(engine, replies):
        found[id] = answer
        if progress:
            progress(len(found), len(replies))
    return [found[reply.request.id] for reply in replies]


def _run(engine: Engine, replies: list[_Reply]) -> Iterator[tuple[str, Answer]]:
    """Each request's id with its answer, in the order of their ends. Where it is cut short, the rest is aborted."""
    queue = deque(replies)
    going: dict[str, _Reply] = {}
    try:
        while queue or going:
            while queue and len(going) < IN_FLIGHT:
                reply = queue.popleft()
                engine.add(reply.request)
                going[reply.request.id] = reply
            for output in engine.step():
                if output.id in going and (answer := going[output.id].push(output)):
                    del going[output.id]
                    yield output.id, answer
    finally:
        for id in going:
            engine.abort(id)


class _Reply:
    """A question on its way: its request, and what has come of the answer."""

    def __init__(self, engine: Engine, id: str, item: Item, prompt: Prompt, max_tokens: int) -> None:
        room = engine.max_context - len(prompt.ids)
        if room < 1:
            raise UsageError(
                f"A question of {item.task} has {len(prompt.ids)} tokens; the context is {engine.max_context}.",
                "Plan with a larger --context.",
            )
        self.item, self.text, self.thought = item, "", 0
        self.request = Request(id, prompt.ids, Sampling(max_tokens=min(max_tokens, room), temperature=0))
        self.splitter = ReasoningSplitter(prompt.thinking)

    def push(self, output: Output) -> Answer | None:
        """The answer, once it is whole."""
        if output.finish_reason == "error":
            raise UndistilledError(f"A question of {self.item.task} failed: {output.error}")
        was_inside = self.splitter.inside
        piece = self.splitter.push(output.text, last=output.finish_reason is not None)
        self.text += piece.content
        if was_inside or self.splitter.inside or piece.reasoning:
            self.thought = output.completion_tokens
        if output.finish_reason is None:
            return None
        worth = score(self.item, self.text)
        text, right = self.text.strip(), worth >= RIGHT
        return Answer(text, self.thought, output.completion_tokens, output.finish_reason, right, worth)
