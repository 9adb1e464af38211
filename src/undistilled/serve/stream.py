"""What comes back for one request, for as long as somebody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..errors import RequestError
from ..schedule.request import Output


class Stream:
    """Outputs of one request. What nobody has read yet is merged, so that a slow reader costs no more than text."""

    def __init__(self, id: str, abort: Callable[[str], None]) -> None:
        self.id = id
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._abort, self._changed = abort, asyncio.Event()
        self._pending: list[Output] = []
        self._error: RequestError | None = None
        self._ended = False

    def push(self, output: Output) -> None:
        self._pending.append(output)
        self._ended = self._ended or output.finish_reason is not None
        self._changed.set()

    def fail(self, error: RequestError) -> None:
        """The stream ends with `error`, now or where the next output is asked for."""
        self._error, self._ended = error, True
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._changed.set()

    async def next(self) -> Output:
        """All that came since the last call, at least one output. RequestError where the engine failed."""
        await self._changed.wait()
        if self._pending:
            news, self._pending = self._pending, []
            if self._error is None:
                self._changed.clear()
            return merge(news)
        raise self._error or RuntimeError("the stream was read past its end")

    def close(self) -> None:
        """Forget the stream; the engine aborts what has not ended."""
        if not self._ended:
            self._ended = True
            self._abort(self.id)
        if self.accepted.done() and not self.accepted.cancelled():
            self.accepted.exception()  # a failure that nobody awaited is no news


def merge(outputs: list[Output]) -> Output:
    """Successive outputs of one request as one."""
    last = outputs[-1]
    return Output(
        last.id,
        [t for o in outputs for t in o.tokens],
        "".join(o.text for o in outputs),
        [p for o in outputs for p in o.logprobs],
        last.finish_reason,
        last.stop_reason,
        last.prompt_tokens,
        last.completion_tokens,
        last.error,
    )
