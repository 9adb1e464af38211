"""The engine in its own process: `python -m undistilled.serve.worker`, started by `EngineClient`.

Its standard input begins with one line of JSON: where the sockets lie, the key, and what to open.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

import zmq

from ..checkpoint.tokenizer import Tokenizer
from ..errors import RankLost, RequestError, UndistilledError
from ..events import Event, sentence, subscribed
from ..schedule.request import Output, Request
from ..wire import Wire, bounded, die_with, told
from .messages import Abort, Add, Command, Failed, Loading, News, Ready, Refused, Report, Stop

ENGINE = "undistilled.generate.engine:open_engine"
HEARTBEAT = 0.25  # seconds between reports of an idle engine


class Engine(Protocol):
    """What the worker needs of an engine."""

    tokenizer: Tokenizer
    max_context: int
    name: str
    ranks: int
    spec: Any

    @property
    def idle(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, id: str) -> None: ...

    def step(self) -> list[Output]: ...

    def stats(self) -> dict[str, float]: ...


class Worker:
    """Between the sockets and the engine. A request that goes wrong takes no other with it, where it is known."""

    def __init__(self, engine: Engine, inbox: zmq.Socket[bytes], send: Callable[[Report], None], wire: Wire) -> None:
        self.engine, self.inbox, self.send, self.wire = engine, inbox, send, wire
        self.running: set[str] = set()
        self.stopped = False
        self.news = News()
        self.reported = 0.0

    def run(self, parent: int) -> None:
        """Turn after turn, until told to stop or left by the process that started this one."""
        while not self.stopped and os.getppid() == parent:
            if self.inbox.poll(int(HEARTBEAT * 1000) if self.engine.idle else 0):
                self.receive()
            if not self.engine.idle:
                self.step()
            self.report()

    def receive(self) -> None:
        """Do all that waits in the inbox."""
        while True:
            try:
                command = self.wire.unpack(self.inbox.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if command is not None:
                self.obey(command)

    def obey(self, command: Command) -> None:
        match command:
            case Add(request):
                self.add(request)
            case Abort(id):
                self.abort(id)
            case Stop():
                self.stopped = True

    def add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except RequestError as error:
            self.news.refused.append(
                Refused(request.id, error.message, error.status, error.type, error.param, error.code)
            )
        except Exception as error:
            self._failed(error)
            self.news.refused.append(Refused(request.id, _says(error), 500, "server_error"))
        else:
            self.running.add(request.id)
            self.news.accepted.append(request.id)

    def abort(self, id: str) -> None:
        self.running.discard(id)
        self.engine.abort(id)
        self.reported = 0.0

    def step(self) -> None:
        """One turn. An exception ends the request it names in `request_id`, or else all that run."""
        try:
            outputs = self.engine.step()
        except RankLost:
            raise
        except Exception as error:
            self._failed(error)
            named = getattr(error, "request_id", None)
            ended = [named] if named in self.running else list(self.running)
            outputs = [Output(id, finish_reason="error", error=_says(error)) for id in ended]
            for id in ended:
                self.engine.abort(id)
        self.running -= {output.id for output in outputs if output.finish_reason}
        self.news.outputs += outputs

    def report(self) -> None:
        """Send what is new, and a sign of life now and then."""
        news = self.news
        if news.outputs or news.accepted or news.refused or monotonic() - self.reported >= HEARTBEAT:
            news.stats = self.engine.stats()
            self.send(news)
            self.news, self.reported = News(), monotonic()

    def _failed(self, error: Exception) -> None:
        """Tell the log; raise again where the device is lost, so that the process ends."""
        traceback.print_exception(error)
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            raise error


def _says(error: Exception) -> str:
    return f"The engine failed on this request: {type(error).__name__}."


def _open(factory: str, options: dict[str, Any], send: Callable[[Report], None]) -> Engine:
    """The engine that "module:function" opens; the function takes options and progress(done, total, name)."""
    shown = 0.0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal shown
        if monotonic() - shown > 0.2 or done == total:
            send(Loading(done, total, name))
            shown = monotonic()

    module, _, function = factory.partition(":")
    engine: Engine = getattr(importlib.import_module(module), function)(options, progress)
    return engine


def tell(event: Event) -> None:
    """A consumer of events: slow is no error, but a person should know."""
    if said := sentence(event):
        print(said, file=sys.stderr, flush=True)


@contextmanager
def _sockets(directory: str) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """Where commands come from, and where reports go."""
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        outbox.set(zmq.SNDHWM, 0)
        outbox.set(zmq.LINGER, 2000)
        outbox.connect(f"ipc://{directory}/reports")
        bounded(inbox)
        inbox.bind(f"ipc://{directory}/commands")
        yield inbox, outbox


def _work(boot: dict[str, Any], inbox: zmq.Socket[bytes], send: Callable[[Report], None], wire: Wire) -> int:
    """Open the engine and answer until the end; the exit code."""

    def last_words(event: Event) -> None:
        """Of a process that hangs in a collective and is about to be ended by its watchdog."""
        if event.name == "rank.hung":
            send(Failed(event.fields["kind"], event.fields["message"], event.fields["hint"]))

    try:
        with subscribed(last_words):
            engine = _open(boot["factory"], boot["options"], send)
            made = engine.spec.vocab, engine.ranks, engine.tokenizer.dump()
            send(Ready(engine.name, engine.max_context, *made))
            Worker(engine, inbox, send, wire).run(boot["parent"])
    except UndistilledError as error:
        send(Failed(type(error).__name__, error.message, error.hint))
        return error.exit_code
    return 0


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a signal to the group is the server's to answer
    boot = told()
    die_with(boot["parent"])
    wire = Wire(boot["key"], Command)
    with subscribed(tell), _sockets(boot["directory"]) as (inbox, outbox):

        def send(report: Report) -> None:
            outbox.send_multipart(wire.pack(report))

        return _work(boot, inbox, send, wire)


if __name__ == "__main__":
    sys.exit(main())
