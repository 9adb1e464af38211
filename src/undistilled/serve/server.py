"""`undistilled serve`: bind, load, listen, and end well."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
import socket
import sys
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn

from .. import interrupt
from ..errors import CannotBind, UsageError
from .again import Again, open_client
from .client import CLOSE_SECONDS, EngineClient, Progress
from .generation import check_generation
from .limits import Gate, Limits
from .openai import make_app
from .protocol import Protocol
from .template import check_template, template_of
from .worker import ENGINE

DRAIN_TICK = 0.05  # seconds


class Server(uvicorn.Server):
    """uvicorn's, but SIGTERM first lets requests in work finish while new ones get 503; SIGINT ends now."""

    def __init__(self, config: uvicorn.Config, gate: Gate, shutdown_timeout: float) -> None:
        super().__init__(config)
        self.gate, self.shutdown_timeout = gate, shutdown_timeout
        self._drain_until: float | None = None
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: drain. A second one, or SIGINT: end now."""
        self.interrupted = self.interrupted or sig == signal.SIGINT
        if self.gate.draining or self.interrupted:
            self.should_exit = self.force_exit = True
        self.gate.draining = True
        self._drain_until = self._drain_until or monotonic() + self.shutdown_timeout

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None and (not self.gate.inside or monotonic() > self._drain_until):
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens already: until it does, SO_REUSEADDR lets a second server bind the same port.

    CannotBind says why not, and what to do.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen()
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotBind(
            f"Cannot listen on {host} port {port}: {reason}.",
            "Choose another with --port, or end what uses it (`ss -ltnp` shows who).",
        ) from error
    return bound


def serve(
    options: dict[str, Any],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    shutdown_timeout: float = 30.0,
    *,
    limits: Limits | None = None,
    factory: str = ENGINE,
    progress: Progress | None = None,
) -> int:
    """Serve the model that `options` name until a signal. Returns 0, 130 after SIGINT, or 1 where the engine died.

    Raises UsageError and CannotBind before the model is read, and what `open_engine` raises while it is.
    """
    if api_key is not None and not api_key.strip():
        raise UsageError("The API key is empty.", "Give one, or leave --api-key out to serve without.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with bind(host, port) as bound:
        try:
            return asyncio.run(_serve(bound, options, api_key, shutdown_timeout, limits, factory, progress))
        except asyncio.CancelledError:  # SIGTERM before there was a server to answer it
            return 0
        except KeyboardInterrupt:
            return interrupt.CODE


async def _serve(
    bound: socket.socket,
    options: dict[str, Any],
    api_key: str | None,
    shutdown_timeout: float,
    limits: Limits | None,
    factory: str,
    progress: Progress | None,
) -> int:
    client, grace = await _load(options, factory, progress or progress_lines()), CLOSE_SECONDS
    gate = Gate()
    try:
        template = template_of(client.tokenizer)
        if template is not None:
            check_template(template)
        check_generation(client.tokenizer.generation)
        app = make_app(client, api_key=api_key, limits=limits, gate=gate)
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            server_header=False,
            date_header=True,
        )
        server = Server(config, gate, shutdown_timeout)
        announce(client, bound, api_key)
        watching = asyncio.create_task(_end_with(client, server))
        await server.serve([bound])
        watching.cancel()
        if server.interrupted:
            grace = interrupt.SECONDS
            return interrupt.CODE
        return 1 if client.over else 0
    finally:
        await client.close(grace)
        await _answered(gate)


async def _answered(gate: Gate, seconds: float = 0.5) -> None:
    """Until those who waited have been told that the server ends, or would not listen."""
    until = monotonic() + seconds
    while gate.inside and monotonic() < until:
        await asyncio.sleep(0.01)


async def _load(options: dict[str, Any], factory: str, progress: Progress) -> EngineClient | Again:
    """The engine's client. SIGTERM meanwhile cancels, and so ends the engine's process too."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await open_client(options, factory=factory, progress=progress)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def _end_with(client: EngineClient | Again, server: Server, linger: float = 2.0) -> None:
    """A server whose engine died says so for two seconds, then ends, so that its supervisor starts a new one."""
    while not client.over:
        await asyncio.sleep(0.2)
    logging.getLogger("undistilled.serve").error("%s The server ends too.", client.trouble)
    await asyncio.sleep(linger)
    server.should_exit = True


def progress_lines(seconds: float = 30.0) -> Progress:
    """On stderr, which may be a log: a line for each tenth of what is loaded, and no longer apart than `seconds`."""
    told, tenth = 0.0, -1

    def show(done: int, total: int, _name: str) -> None:
        nonlocal told, tenth
        now = 10 * done // total if total else 0
        if now == tenth and monotonic() - told < seconds:
            return
        told, tenth = monotonic(), now
        unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        share = f"{done / total:4.0%}" if total else ""
        print(f"loading {share} {done / unit:.1f} of {total / unit:.1f} {name}", file=sys.stderr, flush=True)

    return show


def announce(client: EngineClient | Again, bound: socket.socket, api_key: str | None) -> None:
    """Where the server listens, and a line to try it with."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host)
    shown = ("[::1]" if address.version == 6 else "127.0.0.1") if address.is_unspecified else host
    if ":" in shown and not shown.startswith("["):
        shown = f"[{shown}]"
    base = f"http://{shown}:{port}/v1"
    key = ' -H "Authorization: Bearer $UNDISTILLED_API_KEY"' if api_key else ""
    chat = template_of(client.tokenizer) is not None
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]} if chat else {"prompt": "Once"}
    path = "/chat/completions" if chat else "/completions"
    print(f"{client.name} at {base} (context {client.max_context} tokens). Try:")
    print(f"  curl {base}{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(ask)}'", flush=True)
    if not api_key and not address.is_loopback:
        print("Anybody who reaches this address can use it: set an API key.", file=sys.stderr, flush=True)
