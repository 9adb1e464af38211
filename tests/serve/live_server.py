"""A real server over the fake engine (or another), in a thread of this process; the engine has its own process."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import openai
import uvicorn

from undistilled.serve.again import open_client
from undistilled.serve.limits import Gate
from undistilled.serve.openai import make_app
from undistilled.serve.protocol import Protocol
from undistilled.serve.server import bind

http = httpx.Client(timeout=30, verify=False)  # one for all: a certificate store takes 30 ms to open
FACTORY = "fake_engine:open_engine"
PATIENCE = 30.0  # seconds for what takes a fraction of one, on a machine that is busy with something else


@dataclass
class Running:
    """A server in a thread. `base` is its address."""

    options: dict
    settings: dict = field(default_factory=dict)
    header_seconds: float = 10.0
    factory: str = FACTORY

    def __enter__(self) -> Running:
        self.started, self.error = threading.Event(), None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.thread.start()
        assert self.started.wait(2 * PATIENCE)
        if self.error:
            raise self.error
        self.wait_for(bool)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)

    async def _run(self) -> None:
        try:
            self.client = await open_client(self.options, factory=self.factory)
        except BaseException as error:
            self.error = error
            self.started.set()
            return
        self.gate = Gate()
        bound = bind("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        protocol = type("Timed", (Protocol,), {"header_seconds": self.header_seconds})
        app = make_app(self.client, gate=self.gate, **self.settings)
        self.server = uvicorn.Server(
            uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        )
        self.started.set()
        await self.server.serve([bound])
        await self.client.close()

    def openai(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base + "/v1", api_key="none", max_retries=0, http_client=http, **options)

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return http.post(self.base + path, json=body, **options)

    def get(self, path: str) -> httpx.Response:
        return http.get(self.base + path)

    def stats(self) -> dict[str, float]:
        return self.client.stats()

    def wait_for(self, condition: Callable[[dict], bool], seconds: float = PATIENCE) -> float:
        """Seconds until the engine's stats meet the condition."""
        began = time.monotonic()
        while not condition(self.stats()):
            assert time.monotonic() - began < seconds, self.stats()
            time.sleep(0.02)
        return time.monotonic() - began


def run_serve(**arguments: object) -> list[str]:
    """The command line of a process that serves the fake engine."""
    return [
        sys.executable,
        "-c",
        f"""
import sys
from undistilled.serve.server import serve
from undistilled.errors import UndistilledError
try:
    sys.exit(serve(factory={FACTORY!r}, **{arguments!r}))
except UndistilledError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
""",
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
