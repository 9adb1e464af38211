"""HTTP/1.1 by uvicorn and h11, with a limit on how long headers may take, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import http
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from .replies import error_body


class Protocol(H11Protocol):
    """A connection. One that does not complete a request's headers in `header_seconds` gets 408."""

    header_seconds = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._watch()
        super().data_received(data)
        if self._in_request():
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        if self._timer is None and not self._in_request():
            self._timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._in_request() and not self.transport.is_closing():
            self._refuse(408, "The request's headers came too slowly.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer past h11, whose state is of no use any more, and hang up."""
        body = msgspec.json.encode(error_body(message))
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if not self._in_request():  # else an answer is on its way, and this would cut into it
            self.transport.write(head.encode() + body)
        self.transport.close()
