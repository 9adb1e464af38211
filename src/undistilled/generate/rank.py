"""A rank's process but the first: `python -m undistilled.generate.rank`, started by the driver (parallel/crew.py).

Its standard input begins with one line of JSON: its number, the model and plan, where the sockets lie, and the key.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import msgspec
import torch
import zmq

from ..checkpoint.resolve import find
from ..errors import RankLost, UndistilledError
from ..events import subscribed
from ..load.build import build
from ..memory import peak_on
from ..parallel.comm import Comm
from ..parallel.cores import confine
from ..parallel.messages import (
    IDLE,
    JOINING,
    LOADING,
    Beat,
    Broke,
    Command,
    Loading,
    Moved,
    Pass,
    Ready,
    Report,
    Stop,
    Watch,
    largest,
)
from ..parallel.moves import Moves
from ..parallel.share import share
from ..plan.plan import Plan, read_plan
from ..plan.ranks import cuts_of
from ..wire import Wire, bounded, die_with, end_with_input, told, unveiled
from .part import ROWS, Part

HEARTBEAT = 0.25  # seconds


class Rank:
    """One process of the run. A thread of its own tells the driver that it lives and what it is in."""

    def __init__(self, boot: dict[str, Any], context: zmq.Context) -> None:
        self.boot, self.number = boot, int(boot["rank"])
        self.plan = read_plan(Path(boot["plan"])).on(self.number, boot["device"])
        self.context, self.wire = context, Wire(boot["key"], Command)
        self.inbox, self.outbox = context.socket(zmq.SUB), context.socket(zmq.PUSH)
        bounded(self.inbox, _largest(self.plan, boot["device"]))
        if public := boot.get("public"):
            unveiled(self.inbox, public)
            unveiled(self.outbox, public)
        self.inbox.connect(boot["passes"])
        self.inbox.subscribe(b"")
        self.outbox.set(zmq.LINGER, 2000)
        self.outbox.connect(boot["reports"])
        self.lock = threading.Lock()
        self.part: Part | None = None
        self.idle_since: float | None = monotonic()
        self.joining = 0.0  # since when
        self.moves, self.watched = Moves(), ExitStack()

    def say(self, report: Report) -> None:
        with self.lock:
            self.outbox.send_multipart(self.wire.pack(report))

    def beats(self) -> None:
        """Signs of life until the process ends."""
        device = torch.device(self.boot["device"])
        while True:
            if moves := self.moves.take():
                self.say(Moved(self.number, moves))
            self.say(msgspec.structs.replace(self.beat(), peak=peak_on(device)))
            time.sleep(HEARTBEAT)

    def beat(self) -> Beat:
        part, idle = self.part, self.idle_since
        if not self.joining:
            return Beat(self.number, 0, 0, LOADING, 0.0)
        if part is None:
            assert self.plan.mesh is not None
            others = tuple(rank for rank in range(self.plan.mesh.size) if rank != self.number)
            return Beat(self.number, 0, 1, JOINING, monotonic() - self.joining, awaits=others)
        if idle is None:
            return part.beat()
        return msgspec.structs.replace(part.beat(), doing=IDLE, seconds=monotonic() - idle, awaits=())

    def load(self) -> None:
        model, plan = find(self.boot["model"]), self.plan
        told = 0.0

        def progress(done: int, total: int, _name: str) -> None:
            nonlocal told
            if monotonic() - told > HEARTBEAT or done == total:
                self.say(Loading(self.number, done, total))
                told = monotonic()

        decoder = build(plan, model.spec, model.source(), rank=self.number, progress=progress)
        self.say(Ready(self.number))
        self.joining = monotonic()
        assert plan.mesh is not None
        comm = Comm(plan.mesh, self.number, self.boot["store"])
        share(decoder, cuts_of(plan, model.spec), self.number, comm)
        self.part = Part(decoder, plan, comm)
        self.say(self.beat())  # at once: a stop right behind it is none while loading

    def run(self) -> None:
        """Pass after pass, until told to stop."""
        assert self.part is not None
        while True:
            self.idle_since = monotonic()
            if not self.inbox.poll(self.boot["patience"] * 1000):
                raise RankLost(f"The driver has given no sign of life for {self.boot['patience']:.0f} s.")
            command = self.wire.unpack(self.inbox.recv_multipart())
            self.idle_since = None
            match command:
                case Stop():
                    return
                case Watch():
                    self.watched.close()
                    self.watched.enter_context(subscribed(self.moves))
                case Pass():
                    self.part.submit(command)

    def end(self, code: int) -> NoReturn:
        """Be gone once all is said: it takes Python and PyTorch half a second to take themselves down."""
        self.lock.acquire()  # the other thread says no more
        self.inbox.close()
        self.outbox.close()
        self.context.term()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _largest(plan: Plan, device: str) -> int:
    rows = ROWS[device.split(":")[0]]
    return largest(rows, plan.limits.chunk, -(-plan.limits.context // plan.kv.block_size))


def main() -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the driver's to answer
    boot = told()
    die_with(boot["parent"])
    end_with_input()
    confine(boot.get("cores", ()))
    torch.set_num_threads(boot["threads"])
    rank = Rank(boot, zmq.Context())
    threading.Thread(target=rank.beats, daemon=True).start()
    code = 0
    try:
        rank.load()
        rank.run()
    except UndistilledError as error:
        rank.say(Broke(rank.number, type(error).__name__, error.message, error.hint))
        code = error.exit_code
    except Exception as error:
        traceback.print_exception(error)
        rank.say(Broke(rank.number, type(error).__name__, str(error)[:500]))
        code = 1
    rank.end(code)


if __name__ == "__main__":
    main()
