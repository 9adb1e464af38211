"""A model's own answers to questions, as it would write them when it is used: reasoning is most of what R1 writes,
and reads nothing like a book."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint.resolve import Model
from ..errors import UndistilledError
from ..generate.engine import open_engine
from ..plan.hardware import load_machine
from ..plan.solve import Ask, solve
from ..schedule.request import Request, Sampling
from ..serve.template import chat_prompt, template_of

LONGEST = 512  # tokens of an answer
TEMPERATURE, TOP_P = 0.6, 0.95  # what R1's makers recommend
BATCH = 8  # answers at once


def traces(model: Model, questions: list[str], tokens: int, device: str, say: Callable[[str], None]) -> list[list[int]]:
    """Token ids of questions with their answers, about `tokens` in all; fewer where the questions end.

    The question is a conversation's first message, or, where the model has no chat template, the text to go on from.
    DoesNotFit where the model as released does not fit this machine.
    """
    options = _options(model, device)
    context, engine = options["context"], open_engine(options)
    template = template_of(engine.tokenizer)
    found: list[list[int]] = []
    for first in range(0, len(questions), BATCH):
        say(f"answers to calibrate on: {sum(map(len, found))} of {tokens} tokens")
        prompts = [_prompt(engine.tokenizer, template, q) for q in questions[first : first + BATCH]]
        long = [prompt for prompt in prompts if len(prompt) > context // 2]
        if long:
            say(f"{len(long)} questions of more than {context // 2} tokens are left out")
        prompts = [prompt for prompt in prompts if len(prompt) <= context // 2]
        found += _answered(engine, prompts, first)
        if sum(map(len, found)) >= tokens:
            break
    return _first(found, tokens)


def fits(model: Model, device: str) -> bool:
    """Whether the model as released can answer here."""
    options = _options(model, device)
    ask = Ask(None, options["context"], BATCH, device=options["device"])
    return solve(model.name, model.config, model.spec, load_machine("this"), ask).fits


def _options(model: Model, device: str) -> dict[str, Any]:
    context, home = min(2 * LONGEST, model.spec.max_context), "cpu" if device == "cpu" else None
    return {"model": model.said, "context": context, "batch": BATCH, "device": home}


def _prompt(tokenizer, template: str | None, question: str) -> list[int]:
    if template is None:
        return tokenizer.encode_prompt(question, control=False)
    return chat_prompt(tokenizer, template, [{"role": "user", "content": question}]).ids


def _answered(engine, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Each prompt with its answer. Seeds are by question, so that a batch does not matter."""
    found = {str(at): list(prompt) for at, prompt in enumerate(prompts)}
    for at, prompt in enumerate(prompts):
        most = min(LONGEST, engine.max_context - len(prompt))
        sampling = Sampling(max_tokens=most, temperature=TEMPERATURE, top_p=TOP_P, seed=seed + at)
        engine.add(Request(str(at), prompt, sampling))
    while not engine.idle:
        for output in engine.step():
            if output.finish_reason == "error":
                raise UndistilledError(f"The model could not answer a question to calibrate on: {output.error}")
            found[output.id] += output.tokens
    return list(found.values())


def _first(answers: list[list[int]], tokens: int) -> list[list[int]]:
    kept: list[list[int]] = []
    for answer in answers:
        answer = answer[: tokens - sum(map(len, kept))]
        if len(answer) > 1:
            kept.append(answer)
    return kept
