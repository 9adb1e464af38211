"""From a request's body to running sequences, and their outputs as they come."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact, RequestError
from ..schedule.request import Output, Request, Sampling
from .metrics import Metrics, Timer
from .schemas import MAX_PROMPTS, Generating
from .stream import Stream, merge

T = TypeVar("T")
INLINE_CHARS = 4096  # a shorter text is tokenised at once, a longer one in a thread
FROM_CHECKPOINT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PENALTIES = ("presence_penalty", "frequency_penalty")


class Client(Protocol):
    """What the routes need of an `EngineClient`."""

    name: str
    max_context: int
    vocab: int
    tokenizer: Tokenizer

    @property
    def alive(self) -> bool: ...

    @property
    def over(self) -> bool: ...

    @property
    def trouble(self) -> str: ...

    async def submit(self, request: Request) -> Stream: ...

    def stats(self) -> dict[str, float]: ...


@dataclass
class Sequence:
    """One answer of a response. `timer` starts when the request came in."""

    index: int
    request: Request
    timer: Timer
    copy: int = 0
    outputs: list[Output] = field(default_factory=list)

    @property
    def output(self) -> Output:
        """All that came, as one."""
        return merge(self.outputs)


class Generation:
    """The sequences of one HTTP request: `prompts` times `n`. Closing it aborts what still runs."""

    def __init__(self, kind: str, body: Generating, client: Client, metrics: Metrics) -> None:
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.body, self.client, self.metrics = body, client, metrics
        self.sequences: list[Sequence] = []
        self.prompt_tokens = 0
        self._streams: list[Stream] = []

    def add(self, prompts: list[list[int]], default_tokens: int | None, logprobs: int | None) -> None:
        """Make the sequences. RequestError where a parameter or a prompt is out of range, before any is copied."""
        copies = self.body.copies
        if len(prompts) * copies > MAX_PROMPTS:
            raise RequestError(f"prompts times n is at most {MAX_PROMPTS}.", param="n")
        samplings = [
            sampling_of(self.body, self.client, len(check_prompt(p, self.client)), default_tokens, logprobs)
            for p in prompts
        ]
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.prompt_tokens += len(prompt)
            for copy in range(copies):
                index = len(self.sequences)
                request = Request(f"{self.id}-{index}", prompt, _seeded(sampling, copy))
                self.sequences.append(Sequence(index, request, Timer(self.metrics, 0 if copy else len(prompt)), copy))

    async def start(self) -> None:
        """Returns once the engine has taken every sequence. RequestError where it refuses one."""
        tasks = [asyncio.create_task(self.client.submit(s.request)) for s in self.sequences]
        try:
            self._streams = list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._streams = [r for r in results if isinstance(r, Stream)]
            self.close()
            raise

    async def outputs(self) -> AsyncGenerator[tuple[Sequence, Output], None]:
        """Every sequence's news as it comes, until all have ended."""
        waiting = {self._next(s): s for s in self.sequences}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    sequence = waiting.pop(task)
                    output = _checked(task.result())
                    _observe(sequence.timer, output)
                    yield sequence, output
                    if output.finish_reason is None:
                        waiting[self._next(sequence)] = sequence
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            self.close()

    def _next(self, sequence: Sequence) -> asyncio.Task[Output]:
        return asyncio.create_task(self._streams[sequence.index].next())

    async def finish(self) -> list[Sequence]:
        """Run to the end; each sequence keeps its outputs."""
        async for sequence, output in self.outputs():
            sequence.outputs.append(output)
        return self.sequences

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def frame(self, object: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a chunk of one."""
        head = {"id": self.id, "object": object, "created": self.created, "model": self.client.name}
        return {**head, "choices": choices, **more}


def check_model(name: str | None, client: Client) -> None:
    """RequestError where the request is for another model, or where the engine is gone."""
    if not client.alive:
        status = 500 if client.over else 503
        raise RequestError(client.trouble, status=status, type="server_error", code="engine_dead")
    if name is None or name == client.name:
        return
    if ".." in name.split("/") or not name.isprintable():
        raise RequestError("model is a name, not a path.", param="model")
    raise RequestError(
        f"The model {name[:200]!r} does not exist; this server has {client.name!r}.",
        status=404,
        param="model",
        code="model_not_found",
    )


def check_prompt(ids: list[int], client: Client) -> list[int]:
    if not ids:
        raise RequestError("The prompt is empty.", param="prompt")
    if len(ids) >= client.max_context:
        raise RequestError(
            f"The prompt has {len(ids)} tokens; this server's context is {client.max_context}.",
            param="prompt",
            code="context_length_exceeded",
        )
    if min(ids) < 0 or max(ids) >= client.vocab:
        raise RequestError(f"The prompt has a token id outside 0 to {client.vocab - 1}.", param="prompt")
    return ids


def sampling_of(
    body: Generating, client: Client, prompt_length: int, default_tokens: int | None, logprobs: int | None
) -> Sampling:
    """The body's parameters over the checkpoint's defaults over OpenAI's. RequestError where one is out of range.

    default_tokens: max_tokens where the body says nothing; None: what is left of the context.
    """
    left = client.max_context - prompt_length
    asked = getattr(body, "max_completion_tokens", None)
    asked = body.max_tokens if asked is None else asked
    chosen = {name: default_of(name, body, client.tokenizer.generation) for name in (*FROM_CHECKPOINT, *PENALTIES)}
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sampling = Sampling(
        max_tokens=min(default_tokens or left, left) if asked is None else asked,
        seed=body.seed,
        logprobs=logprobs,
        stop=stop,
        stop_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logit_bias=_bias(body.logit_bias or {}),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    sampling.check(client.vocab)
    if sampling.max_tokens > left:
        raise RequestError(
            f"max_tokens is {sampling.max_tokens}, but {prompt_length} tokens of prompt leave {left} "
            f"of this server's context of {client.max_context}.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return sampling


def default_of(name: str, body: Generating, generation: dict[str, Any]) -> Any:
    """The body's value, else the checkpoint's where it is a number; None: the default of `Sampling`."""
    value = getattr(body, name)
    if value is None and name in FROM_CHECKPOINT:
        value = generation.get(name)
        value = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return 0 if name == "top_k" and value == -1 else value


def check_generation(generation: dict[str, Any]) -> None:
    """BadArtefact where the checkpoint's own sampling is out of range: every request would be refused for it."""
    values = {name: default_of(name, Generating(), generation) for name in FROM_CHECKPOINT}
    chosen = {name: value for name, value in values.items() if value is not None}
    top_k = chosen.get("top_k", 0)
    try:
        Sampling(**chosen).check(vocab=1)
        if not isinstance(top_k, int):
            raise RequestError(f"top_k is {top_k}, expected a whole number.")
    except RequestError as error:
        raise BadArtefact(f"generation_config.json: {error.message}", "Correct the field or remove it.") from None


def _bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in given):
        raise RequestError("logit_bias maps token ids to numbers.", param="logit_bias")
    return tuple((int(token), bias) for token, bias in given.items())


def _seeded(sampling: Sampling, copy: int) -> Sampling:
    """The sampling of the copy: its seed follows from the request's, and the first copy keeps that."""
    if sampling.seed is None or copy == 0:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed}/{copy}".encode(), digest_size=8).digest()
    return Sampling(**{**sampling.__dict__, "seed": int.from_bytes(digest, "little", signed=True)})


def _checked(output: Output) -> Output:
    if output.finish_reason == "error":
        raise RequestError(output.error or "The engine failed.", status=500, type="server_error", code="engine_error")
    if output.finish_reason == "abort":
        raise RequestError("The request was aborted.", status=503, type="server_error", code="aborted")
    return output


def _observe(timer: Timer, output: Output) -> None:
    timer.tokens(len(output.tokens))
    if output.finish_reason:
        timer.end()


async def off_loop(size: int, work: Callable[..., T], *args: Any) -> T:
    """work(*args), in a thread where it is large, so that other requests' tokens go on."""
    return work(*args) if size < INLINE_CHARS else await asyncio.to_thread(work, *args)


async def encode(tokenizer: Tokenizer, text: str, control: bool, bos: bool = True) -> list[int]:
    """Ids of a text that a client wrote as a whole prompt."""
    work: Callable[[], list[int]] = (
        (lambda: tokenizer.encode_prompt(text, control=control))
        if bos
        else (lambda: tokenizer.encode(text, control=control))
    )
    return await off_loop(len(text), work)
