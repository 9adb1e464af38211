"""Answers in OpenAI's shapes: errors, and streams of server-sent events that notice who left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import RequestError

T = TypeVar("T")
KEEP_ALIVE = 15.0  # seconds of silence before a comment that keeps proxies from hanging up
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


class Json(Response):
    """A response of JSON: msgspec is quick, and writes NaN as null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_body(
    message: str, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_response(error: RequestError) -> Json:
    headers = {"Retry-After": "5"} if error.status == 503 else {}
    return Json(error_body(error.message, error.type, error.param, error.code), error.status, headers)


def status_response(status: int, message: str, headers: dict[str, str] | None = None) -> Json:
    """An error that is known by its HTTP status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return Json(error_body(message, kind, None, CODES.get(status)), status, headers)


async def gone(receive: Receive) -> None:
    """Returns once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled where the client leaves first. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. `chunks` yields objects. `close` is called when it ends and when the client leaves,
    also where it never began.

    A RequestError within it becomes an error event, since the status has gone out already.
    """

    def __init__(self, chunks: AsyncGenerator[Any, None], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.chunks, self.close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events(watcher)) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        except ClientGone:
            pass
        finally:
            watcher.cancel()
            await self.chunks.aclose()
            self.close()

    async def _events(self, watcher: asyncio.Task[None]) -> AsyncGenerator[bytes, None]:
        """Each chunk's bytes, and comments while none comes. Raises ClientGone."""
        while True:
            task = asyncio.ensure_future(anext(self.chunks, None))
            try:
                while not task.done():
                    waited = {task, watcher}
                    done, _ = await asyncio.wait(waited, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                    if watcher.done():
                        raise ClientGone
                    if not done:
                        yield b": waiting\n\n"
                chunk = task.result()
            except RequestError as error:
                chunk = error_body(error.message, error.type, error.param, error.code)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            if chunk is None:
                return
            yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
