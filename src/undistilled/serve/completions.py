"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..checkpoint.tokenizer import Tokenizer
from ..errors import RequestError
from ..schedule.request import Output
from .generation import Client, Generation, Sequence, check_model, encode
from .logprobs import Offsets, completion_logprobs
from .metrics import Metrics
from .replies import EventStream, Json, unless_gone
from .schemas import CompletionBody

DEFAULT_TOKENS = 16  # OpenAI's
OBJECT = "text_completion"


def completion_routes(client: Client, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        generation = await unless_gone(request, _begin(body, client, metrics))
        if body.stream:
            return EventStream(_chunks(generation, body), generation.close)
        return Json(_whole(await unless_gone(request, generation.finish()), generation, body))

    return router


async def _begin(body: CompletionBody, client: Client, metrics: Metrics) -> Generation:
    check_model(body.model, client)
    if body.echo and body.logprobs is not None:
        raise RequestError(
            "echo with logprobs is not supported: prompts have no log-probabilities here.",
            param="echo",
            code="unsupported",
        )
    generation = Generation("cmpl", body, client, metrics)
    prompts = [
        await encode(client.tokenizer, p, body.parse_special) if isinstance(p, str) else p for p in body.prompts()
    ]
    generation.add(prompts, DEFAULT_TOKENS, body.logprobs)
    await generation.start()
    return generation


def _whole(sequences: list[Sequence], generation: Generation, body: CompletionBody) -> dict[str, Any]:
    tokenizer = generation.client.tokenizer
    choices, count = [], 0
    for sequence in sequences:
        output = sequence.output
        count += output.completion_tokens
        choice = _choice(sequence, output, tokenizer, Offsets(tokenizer))
        choice["text"] = _echo(sequence, body, tokenizer) + output.text
        choices.append(choice)
    return generation.frame(OBJECT, choices, usage=generation.usage(count))


def _choice(sequence: Sequence, output: Output, tokenizer: Tokenizer, offsets: Offsets) -> dict[str, Any]:
    return {
        "index": sequence.index,
        "text": output.text,
        "logprobs": completion_logprobs(tokenizer, output.logprobs, offsets),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _echo(sequence: Sequence, body: CompletionBody, tokenizer: Tokenizer) -> str:
    if not body.echo:
        return ""
    prompts = body.prompts()
    prompt = prompts[sequence.index // body.copies]
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


async def _chunks(generation: Generation, body: CompletionBody) -> AsyncGenerator[dict[str, Any], None]:
    tokenizer = generation.client.tokenizer
    offsets = [Offsets(tokenizer) for _ in generation.sequences]
    counts = [0] * len(offsets)
    usage = {"usage": None} if body.include_usage else {}
    outputs = generation.outputs()
    try:
        if body.echo:
            for sequence in generation.sequences:
                echo = Output(sequence.request.id, text=_echo(sequence, body, tokenizer))
                yield generation.frame(OBJECT, [_choice(sequence, echo, tokenizer, offsets[sequence.index])], **usage)
        async for sequence, output in outputs:
            counts[sequence.index] = output.completion_tokens
            if output.text or output.logprobs or output.finish_reason:
                choice = _choice(sequence, output, tokenizer, offsets[sequence.index])
                yield generation.frame(OBJECT, [choice], **usage)
        if body.include_usage:
            yield generation.frame(OBJECT, [], usage=generation.usage(sum(counts)))
    finally:
        await outputs.aclose()
