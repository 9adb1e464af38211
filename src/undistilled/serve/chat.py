"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import RequestError
from ..schedule.request import Output
from .generation import Client, Generation, Sequence, check_model
from .logprobs import chat_logprobs
from .metrics import Metrics
from .reasoning import Piece, ReasoningSplitter
from .replies import EventStream, Json, unless_gone
from .schemas import ChatBody, Message
from .template import END_THINK, Prompt, chat_prompt, template_of


class Chat(Generation):
    """A generation whose answers may begin with reasoning."""

    def __init__(self, body: ChatBody, client: Client, metrics: Metrics, prompt: Prompt) -> None:
        super().__init__("chatcmpl", body, client, metrics)
        self.thinking = prompt.thinking
        self.reasons = prompt.thinking or END_THINK in client.tokenizer.control
        self.add([prompt.ids], None, (body.top_logprobs or 0) if body.logprobs else None)

    def splitter(self) -> ReasoningSplitter | None:
        """None where the model has no reasoning to cut off."""
        return ReasoningSplitter(self.thinking) if self.reasons else None


def chat_routes(client: Client, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        generation = await unless_gone(request, _begin(body, client, metrics))
        if body.stream:
            return EventStream(_chunks(generation, body), generation.close)
        return Json(_whole(await unless_gone(request, generation.finish()), generation))

    return router


async def _begin(body: ChatBody, client: Client, metrics: Metrics) -> Chat:
    check_model(body.model, client)
    tools = None if body.tool_choice == "none" else body.tools
    prompt = await conversation(client, body.messages, tools)
    generation = Chat(body, client, metrics, prompt)
    await generation.start()
    return generation


async def conversation(
    client: Client, messages: list[Message], tools: list[dict[str, Any]] | None = None, generating: bool = True
) -> Prompt:
    """The prompt of a conversation, rendered in a thread. RequestError where the model cannot chat."""
    template = template_of(client.tokenizer)
    if template is None:
        raise RequestError(f"{client.name} has no chat template; use /v1/completions.", code="unsupported")
    if tools and "tools" not in template:
        raise RequestError(f"{client.name}'s chat template has no tools.", param="tools", code="unsupported")
    turns = [m.model_dump(exclude_none=True) for m in messages]
    return await asyncio.to_thread(chat_prompt, client.tokenizer, template, turns, tools, generating)


def _split(splitter: ReasoningSplitter | None, output: Output) -> Piece:
    if splitter is None:
        return Piece(content=output.text)
    return splitter.push(output.text, last=output.finish_reason is not None)


def _both(reasoning: str) -> dict[str, str]:
    """DeepSeek's name for the reasoning, and the newer one."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}


def _whole(sequences: list[Sequence], generation: Chat) -> dict[str, Any]:
    tokenizer = generation.client.tokenizer
    choices, count = [], 0
    for sequence in sequences:
        output = sequence.output
        count += output.completion_tokens
        piece = _split(generation.splitter(), output)
        reasoning = _both(piece.reasoning) if piece.reasoning else {}
        choices.append(
            {
                "index": sequence.index,
                "message": {"role": "assistant", "content": piece.content, "refusal": None, **reasoning},
                "logprobs": chat_logprobs(tokenizer, output.logprobs),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
        )
    return generation.frame("chat.completion", choices, usage=generation.usage(count))


def _chunk(generation: Chat, index: int, delta: dict[str, Any], usage: dict[str, Any], **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return generation.frame("chat.completion.chunk", [choice], **usage)


async def _chunks(generation: Chat, body: ChatBody) -> AsyncGenerator[dict[str, Any], None]:
    splitters = [generation.splitter() for _ in generation.sequences]
    counts = [0] * len(splitters)
    usage = {"usage": None} if body.include_usage else {}
    outputs = generation.outputs()
    try:
        for sequence in generation.sequences:
            yield _chunk(generation, sequence.index, {"role": "assistant", "content": ""}, usage)
        async for sequence, output in outputs:
            counts[sequence.index] = output.completion_tokens
            for chunk in _news(generation, sequence.index, _split(splitters[sequence.index], output), output, usage):
                yield chunk
        if body.include_usage:
            yield generation.frame("chat.completion.chunk", [], usage=generation.usage(sum(counts)))
    finally:
        await outputs.aclose()


def _news(generation: Chat, index: int, piece: Piece, output: Output, usage: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunks for one output: reasoning, then content, then the end; log-probabilities go with the first."""
    deltas: list[dict[str, Any]] = []
    if piece.reasoning:
        deltas.append(_both(piece.reasoning))
    if piece.content or (output.logprobs and not deltas):
        deltas.append({"content": piece.content})
    chunks = [_chunk(generation, index, delta, usage) for delta in deltas]
    if chunks:
        chunks[0]["choices"][0]["logprobs"] = chat_logprobs(generation.client.tokenizer, output.logprobs)
    if output.finish_reason:
        end = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        chunks.append(_chunk(generation, index, {}, usage, **end))
    return chunks
