"""The server's side of the engine's process: requests go in, streams of outputs come out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psutil
import zmq
import zmq.asyncio

from .. import interrupt
from ..checkpoint.tokenizer import Tokenizer
from ..errors import RequestError, UndistilledError, named
from ..parallel.blame import ended
from ..schedule.request import Output, Request
from ..wire import Wire, bounded, private_directory
from .messages import Abort, Add, Command, Failed, Loading, News, Ready, Refused, Report, Stop
from .stream import Stream
from .worker import ENGINE

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name
CLOSE_SECONDS = 5.0
PATIENCE = 60.0  # seconds that the engine's process may be stopped for


@dataclass
class Sockets:
    """The two local sockets, in a directory that only this user can enter."""

    directory: str
    context: zmq.asyncio.Context
    inbox: zmq.asyncio.Socket
    outbox: zmq.asyncio.Socket

    @classmethod
    def open(cls) -> Sockets:
        directory = private_directory()
        context = zmq.asyncio.Context()
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        bounded(inbox)
        inbox.bind(f"ipc://{directory}/reports")
        outbox.set(zmq.SNDHWM, 0)
        outbox.connect(f"ipc://{directory}/commands")
        return cls(directory, context, inbox, outbox)

    def close(self) -> None:
        self.context.destroy(linger=0)
        shutil.rmtree(self.directory, ignore_errors=True)


class EngineClient:
    """Starts the engine's process, and speaks with it. `alive` is False once that process ended.

    name, max_context, vocab and tokenizer describe the model after `start`. watchdog: seconds without a word
    from the engine, while requests run, after which it counts as hung and is killed.
    """

    name: str
    max_context: int
    vocab: int
    tokenizer: Tokenizer

    def __init__(self, progress: Progress | None = None, watchdog: float = 900.0) -> None:
        self.watchdog, self._progress = watchdog, progress
        self._key = secrets.token_hex(16)
        self._wire, self._sockets = Wire(self._key, Report), Sockets.open()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._streams: dict[str, Stream] = {}
        self._stats: dict[str, float] = {}
        self._died: str | None = None
        self.ranks = 1  # the engine's processes
        self._reason = ""  # what the engine said, or was seen, before its end
        self._since: float | None = None  # when its process was first seen stopped
        self.patience = PATIENCE
        self._heard = monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        options: dict[str, Any],
        *,
        factory: str = ENGINE,
        progress: Progress | None = None,
        watchdog: float = 900.0,
    ) -> EngineClient:
        """A client whose engine is ready. Raises what `open_engine` raised, as one of `errors`."""
        self = cls(progress, watchdog)
        self.patience = float(options.get("watchdog") or PATIENCE)
        try:
            await self._spawn({"factory": factory, "options": options})
            ready = await self._ready
            self.tokenizer = await asyncio.to_thread(Tokenizer.load, ready.tokenizer)
        except BaseException:
            await self.close()
            raise
        self.name, self.max_context, self.vocab = ready.name, ready.max_context, ready.vocab
        return self

    async def _spawn(self, boot: dict[str, Any]) -> None:
        command = [sys.executable, "-P", "-m", "undistilled.serve.worker"]
        with interrupt.shielded():
            process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        self._process = process
        self._background(self._listen())
        self._background(self._watch(process))
        boot |= {"key": self._key, "directory": self._sockets.directory, "parent": os.getpid()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(boot).encode() + b"\n")

    @property
    def alive(self) -> bool:
        return self._died is None

    @property
    def over(self) -> bool:
        """Whether no engine will answer any more."""
        return not self.alive

    @property
    def trouble(self) -> str:
        """Why there are no answers; "" while there are."""
        return "" if self._died is None else f"The engine has ended: {self._died}"

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    @property
    def pid(self) -> int:
        """Of the engine's process; 0 before it starts."""
        return self._process.pid if self._process else 0

    def stats(self) -> dict[str, float]:
        """The engine's gauges, at most a quarter of a second old while it is idle."""
        return self._stats

    async def submit(self, request: Request) -> Stream:
        """Hand a request to the engine. RequestError where it refuses. The caller closes the stream."""
        if self._died is not None:
            raise _dead(self._died)
        stream = Stream(request.id, self.abort)
        self._streams[request.id] = stream
        try:
            await self._say(Add(request))
            await stream.accepted
        except BaseException:
            stream.close()
            self._streams.pop(request.id, None)
            raise
        return stream

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """The request's outputs; leaving early aborts it."""
        stream = await self.submit(request)
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finish_reason:
                    return
        finally:
            stream.close()

    def abort(self, id: str) -> None:
        """The engine forgets the request, whether or not it runs."""
        self._streams.pop(id, None)
        if self._died is None:
            self._background(self._say(Abort(id)))

    async def close(self, grace: float = CLOSE_SECONDS) -> None:
        """Tell those who wait, end the engine's process, by a signal after `grace` seconds, and remove the sockets."""
        self._fail("The server is closing.")
        if self._process is not None:
            await self._end(self._process, grace)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._die("The server is closing.")
        self._sockets.close()

    async def _end(self, process: asyncio.subprocess.Process, grace: float) -> None:
        if process.returncode is None and self._ready.done() and not self._ready.cancelled():
            await self._say(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace)
        self._kill()
        await process.wait()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _say(self, command: Command) -> None:
        await self._sockets.outbox.send_multipart(self._wire.pack(command))

    async def _listen(self) -> None:
        while True:
            if await self._sockets.inbox.poll(1000):
                report = self._wire.unpack(await self._sockets.inbox.recv_multipart())
                if report is not None:
                    self._heard = monotonic()
                    self._hear(report)
            elif self._streams and monotonic() - self._heard > self.watchdog:
                self._kill(f"has not said a word for {self.watchdog:.0f} s")
            elif self._stopped() > self.patience:
                self._kill(f"has been stopped for {self.patience:.0f} s")

    def _stopped(self) -> float:
        """Seconds for which the engine's process has been stopped, by a signal or a debugger, as far as was seen."""
        process = self._process
        try:
            still = process is not None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            still = False
        self._since = self._since or monotonic() if still else None
        return monotonic() - self._since if self._since else 0.0

    def _kill(self, why: str = "") -> None:
        if self._process is not None and self._process.returncode is None:
            self._reason = self._reason or (self._told(why) + " It was ended." if why else "")
            self._process.kill()

    def _told(self, what: str) -> str:
        """What the engine's process did, and was in."""
        if not self._ready.done():
            who, was = "The engine's process", "starting"
        else:
            who = "Rank 0, the engine's process," if self.ranks > 1 else "The engine's process"
            was = f"answering {_requests(len(self._streams))}" if self._streams else "idle"
        return f"{who} {what}; it was {was}."

    def _hear(self, report: Report) -> None:
        match report:
            case News():
                self._news(report)
            case Loading(done, total, name):
                if self._progress:
                    self._progress(done, total, name)
            case Ready() if not self._ready.done():
                self.ranks = report.ranks
                self._ready.set_result(report)
            case Failed(kind, message, hint) if not self._ready.done():
                self._ready.set_exception((named(kind) or UndistilledError)(message, hint))
            case Failed(_, message, _):
                self._reason = message

    def _news(self, news: News) -> None:
        self._stats = news.stats
        for id in news.accepted:
            stream = self._streams.get(id)
            if stream and not stream.accepted.done():
                stream.accepted.set_result(None)
        for refused in news.refused:
            if stream := self._streams.pop(refused.id, None):
                stream.fail(_refusal(refused))
        for output in news.outputs:
            if stream := self._streams.get(output.id):
                stream.push(output)
                if output.finish_reason:
                    del self._streams[output.id]

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        await asyncio.sleep(0.05)  # its last words may still be in the socket
        self._die(self._reason or self._told(ended(code)))

    def _fail(self, message: str) -> None:
        """All requests in work."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(_dead(message))

    def _die(self, message: str) -> None:
        self._died = self._died or message
        self._fail(message)
        if not self._ready.done():
            self._ready.set_exception(UndistilledError(message, "What it said is above."))
            self._ready.exception()


def _requests(count: int) -> str:
    return f"{count} request{'s' * (count > 1)}"


def _dead(message: str) -> RequestError:
    return RequestError(message, status=500, type="server_error", code="engine_dead")


def _refusal(r: Refused) -> RequestError:
    return RequestError(r.message, status=r.status, type=r.type, param=r.param, code=r.code)
