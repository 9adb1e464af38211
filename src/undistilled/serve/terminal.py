"""A conversation in the terminal, by the same template and reasoning rules as the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import interrupt
from ..errors import RequestError
from ..generate.engine import Engine
from ..generate.once import complete
from ..schedule.request import Sampling
from .reasoning import ReasoningSplitter
from .template import END_THINK, chat_prompt, needed_template

Show = Callable[[str], None]


class Conversation:
    """Messages so far with one engine."""

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        self.template = needed_template(engine.tokenizer, engine.name, "Use `undistilled generate`.")
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def say(
        self,
        text: str,
        sampling: Sampling,
        on_content: Show,
        on_reasoning: Show,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """One turn: the answer streams to `on_content`, what the model thinks to `on_reasoning`. Where it is `stopped`,
        what there is of it stays in the conversation.

        RequestError where it is refused, as when the context is outgrown; the conversation is then as before.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer(sampling, on_content, on_reasoning, stopped)
        except RequestError:
            self.messages.pop()
            raise

    def _answer(
        self, sampling: Sampling, on_content: Show, on_reasoning: Show, stopped: Callable[[], bool]
    ) -> dict[str, Any]:
        tokenizer = self.engine.tokenizer
        prompt = chat_prompt(tokenizer, self.template, self.messages)
        reasons = prompt.thinking or END_THINK in tokenizer.control
        splitter = ReasoningSplitter(prompt.thinking) if reasons else None
        answer: list[str] = []
        thought = False

        def show(piece: str, last: bool = False) -> None:
            nonlocal thought
            found = splitter.push(piece, last) if splitter else None
            reasoning, content = (found.reasoning, found.content) if found else ("", piece)
            if reasoning:
                on_reasoning(reasoning)
                thought = True
            if content:
                if thought and not any(answer):
                    on_reasoning("\n\n")  # the splitter keeps no line ends around a tag
                on_content(content)
            answer.append(content)

        result = complete(self.engine, prompt.ids, sampling, show, stopped)
        show("", last=True)
        self.messages.append({"role": "assistant", "content": "".join(answer)})
        return result


def converse(
    engine: Engine,
    *,
    system: str | None,
    max_tokens: int,
    temperature: float,
    ask: Callable[[], str],
    on_text: Show,
    on_thought: Show,
) -> None:
    """Turns until an empty line, the end of input or SIGINT while it waits for a line; in an answer that stops it."""
    conversation = Conversation(engine, system)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=0.95)
    while True:
        try:
            text = ask()
        except (EOFError, KeyboardInterrupt):
            return
        if not text.strip():
            return
        try:
            with interrupt.stoppable() as stopped:
                conversation.say(text, sampling, on_text, on_thought, stopped)
            if stopped():
                on_thought(" (stopped)")
        except RequestError as error:
            on_text(str(error))
        on_text("\n")
