"""What stands between the network and the routes: the key, sizes, times, the queue, the end. Pure ASGI."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from dataclasses import dataclass
from time import perf_counter
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from .metrics import Metrics
from .replies import ClientGone, error_response

log = logging.getLogger("undistilled.serve")

OPEN_ROUTES = frozenset({"/health"})
GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
KNOWN_ROUTES = GENERATING | OPEN_ROUTES | {"/v1/models", "/metrics", "/tokenize", "/detokenize", "/version"}


@dataclass
class Limits:
    """Bytes, seconds and counts that a client may use. queue: generating requests in the server at once."""

    max_body: int = 4 * 1024 * 1024
    max_depth: int = 100
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    queue: int = 256


class Gate:
    """Counts generating requests, and shuts when the server is told to end."""

    def __init__(self) -> None:
        self.inside = 0
        self.draining = False


class Guard:
    """Refuses what a route should never see, before it is read, parsed or tokenised."""

    def __init__(self, app: ASGIApp, gate: Gate, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self.app, self.gate, self.limits, self.metrics = app, gate, limits, metrics
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, Sender(scope, send, self.limits, self.metrics))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Sender) -> None:
        generating = scope["path"] in GENERATING and scope["method"] == "POST"
        try:
            self._admit(scope, generating)
            self.gate.inside += generating
            try:
                await self.app(scope, await self._read(scope, receive), send)
            finally:
                self.gate.inside -= generating
        except RequestError as error:
            response = error_response(error)
            response.headers["Connection"] = "close"
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
        except ClientGone:
            send.log(499)

    def _admit(self, scope: Scope, generating: bool) -> None:
        if self.gate.draining and scope["path"] not in OPEN_ROUTES:
            raise _unavailable("The server is shutting down.", "shutting_down")
        if scope["path"] not in OPEN_ROUTES and not self._has_key(scope):
            raise RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")
        if generating and self.gate.inside >= self.limits.queue:
            raise _unavailable(f"{self.limits.queue} requests are in work already.", "queue_full")

    def _has_key(self, scope: Scope) -> bool:
        if self.api_key is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, then a `receive` that gives it again. RequestError past a limit."""
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            raise RequestError("The request's body came too slowly.", status=408, code="timeout") from None
        if too_deep(body, self.limits.max_depth):
            raise RequestError("The JSON is nested too deeply.", code="invalid_json")
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        body = bytearray()
        more = True
        while more:
            if len(body) > self.limits.max_body or any(int(n) > self.limits.max_body for n in lengths):
                raise RequestError(
                    f"The request is larger than {self.limits.max_body} bytes.", status=413, code="request_too_large"
                )
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)


class Sender:
    """`send`, with a limit on how long the client may leave it waiting, and a line of log for each answer."""

    def __init__(self, scope: Scope, send: Send, limits: Limits, metrics: Metrics) -> None:
        self._scope, self._send, self._limits, self._metrics = scope, send, limits, metrics
        self._began = perf_counter()
        self._logged = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.log(message["status"])
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await self._send(message)
        except TimeoutError:
            raise ClientGone from None

    def log(self, status: int) -> None:
        if self._logged:
            return
        self._logged = True
        path = self._scope["path"]
        route = path if path in KNOWN_ROUTES else "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
        self._metrics.requests.labels(route, str(status)).inc()
        client = (self._scope.get("client") or ("-",))[0]
        milliseconds = (perf_counter() - self._began) * 1000
        log.info("%s %s %s %d %.0f ms", client, self._scope["method"], quote(path)[:200], status, milliseconds)


def _unavailable(message: str, code: str) -> RequestError:
    return RequestError(message, status=503, type="server_error", code=code)


# From any quote on it matches, at the latest at the body's end, and never steps back: that is what makes it linear.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def too_deep(body: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than `limit`; linear, and without recursion."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for bracket in _STRINGS.sub(b"", body).translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > limit:
            return True
    return False


_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
