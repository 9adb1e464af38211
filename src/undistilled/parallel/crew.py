"""The driver's side of the other ranks: starts them, tells them each pass, and watches that none is lost.

The driver is rank 0 and computes too, so a thread watches: it hears the ranks' signs of life, and ends the run where
blame.py finds one lost.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator

import zmq

from .. import interrupt
from ..errors import RankLost, UndistilledError, named
from ..events import emit
from ..wire import Wire, bounded
from .blame import FAILED, Limits, Verdict, dead, silent, stalled
from .messages import Beat, Broke, Command, Handed, Here, Loading, Moved, Pass, Ready, Report, Stop, Watch
from .places import Place

WATCHDOG = 60.0  # seconds
GRACE = 5.0  # seconds that the driver has to notice that its collective failed
LAST_WORDS = 0.1  # seconds that what an ended rank said may take to be here
BLAME = 2.0  # seconds in which it shows that another rank is at fault for the driver's error
SIGN = 0.5  # seconds between the driver's own signs of life
PATIENCE = 10.0  # seconds, at least, that a rank goes on without one
STARTED = 300.0  # seconds for a process to give its first sign of life
CLOSING = 2.0  # seconds that a place may take to be given up, where this process must end
OVER = "Open the engine again."


class Crew:
    """Ranks 1 and on of one run. `fault` says what went wrong, once something did."""

    def __init__(self, place: Place, watchdog: float = WATCHDOG) -> None:
        self.place, self.watchdog = place, watchdog
        self.fault: UndistilledError | None = None
        self.beats: dict[int, Beat] = {}
        self.moves: dict[int, list[Handed]] = {}  # of ranks that `watch` asked for them
        self.release: Callable[[], None] = lambda: None  # has the driver not wait for ranks that were lost
        self._step: Callable[[], Beat] | None = None  # while the driver is in a step
        self._left = False  # a pass by the driver, whose error explains that the others wait
        self._heard = dict.fromkeys(range(1, place.size), time.monotonic() + STARTED)
        self._ready: set[int] = set()
        self._ended = 0.0  # when the first rank was seen to have ended
        self._lock, self._saying = threading.Lock(), threading.Lock()
        self._said = 0.0  # when the others last heard that this process lives
        self._closing = self._closed = False
        key = secrets.token_hex(16)
        self._wire = Wire(key, Report)
        try:
            self._open()
            told = {"key": key, "patience": max(PATIENCE, 3 * watchdog)}  # the driver's own verdict comes first
            self.processes = {rank: place.start(rank, told) for rank in range(1, place.size)}
        except BaseException:
            place.close()
            raise
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        interrupt.LAST.append(self._abandon)

    def _open(self) -> None:
        """The sockets, where the place has them."""
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        bounded(self._inbox)
        self._out = self._context.socket(zmq.PUB)
        self._out.set(zmq.SNDHWM, 0)
        self._out.set(zmq.LINGER, 1000)
        self.place.bind(self._out, self._inbox)

    def wait_ready(self) -> None:
        """Until every rank has its weights. Raises what a rank could not do."""
        while len(self._ready) < len(self.processes):
            self.check()
            time.sleep(0.02)

    def tell(self, message: Pass) -> None:
        """Every other rank does this pass too."""
        self.check()
        self._say(message)

    def _say(self, message: Command) -> None:
        with self._saying:
            self._out.send_multipart(self._wire.pack(message))

    def watch(self) -> None:
        """Have the others say when they hand over; call it while no pass is on its way."""
        self.moves.clear()
        self._say(Watch())

    def check(self) -> None:
        """RankLost, or what a rank could not do, where the run cannot go on."""
        if self.fault is not None:
            raise self.fault

    @contextlib.contextmanager
    def guarded(self, beat: Callable[[], Beat]) -> Iterator[None]:
        """A step of the driver, whose state `beat` tells. Where another rank is at fault, that is what it raises."""
        self._step = beat
        try:
            yield
        except Exception as error:
            self._left, self._step = True, None
            until = time.monotonic() + BLAME
            while self.fault is None and time.monotonic() < until:
                time.sleep(0.02)
            # the others are in a pass that this rank left: no later one could be told from it
            self._end(RankLost(f"Rank 0 failed: {type(error).__name__}: {error}", "Start the run again."))
            assert self.fault is not None
            raise self.fault from error
        except BaseException:  # Ctrl-C: before what this rank leaves behind tells the others, who would say so
            self._closing = True
            self.fault = self.fault or RankLost("A pass was interrupted, which ended the other ranks.", OVER)
            self._kill()
            raise
        finally:
            self._step = None

    def close(self) -> None:
        """End the other ranks' processes, those that would not hear of it by a signal, and remove the sockets."""
        if self._closed:
            return
        listen = not self._closing and len(self._ready) == len(self.processes)
        self._closed = self._closing = True
        if listen:
            self._say(Stop())
            until = time.monotonic() + GRACE
            for process in self.processes.values():
                process.wait(max(0.0, until - time.monotonic()))
        self._kill()
        interrupt.LAST.remove(self._abandon)
        self._thread.join(2)
        self._out.close()
        self._inbox.close()
        self._context.term()
        self.place.close()

    def _kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait(GRACE)

    def _abandon(self) -> None:
        """End the others and leave nothing behind, before an end of this process that is not orderly."""
        self._kill()
        closing = threading.Thread(target=self.place.close, daemon=True)
        closing.start()
        closing.join(CLOSING)

    def _watch(self) -> None:
        while not self._closing and self.fault is None:
            try:
                self._look()
            except Exception as error:
                self._end(RankLost(f"The watchdog failed: {type(error).__name__}: {error}", "Start the run again."))

    def _look(self) -> None:
        """Hear what there is, then judge."""
        began = time.monotonic()
        if began - self._said > SIGN:
            self._say(Here())
            self._said = began
        wait = 50
        while self._inbox.poll(wait):
            self._hear(self._wire.unpack(self._inbox.recv_multipart()))
            wait = 0
        late = time.monotonic() - began > 1
        verdict = self._judged(late)
        if verdict and not self._closing:
            self._end(self._lost(verdict))

    def _hear(self, report: Report | None) -> None:
        if report is None:
            return
        self._heard[report.rank] = time.monotonic()
        match report:
            case Ready(rank):
                self._ready.add(rank)
            case Loading(rank, done, total):
                emit("load.rank", rank=rank, done=done, total=total)
            case Moved(rank, moves):
                self.moves.setdefault(rank, []).extend(moves)
            case Beat(rank):
                self.beats[rank] = report
                emit("rank", rank=rank, passes=report.passes, busy=report.busy, waited=report.waited)
            case Broke(rank, kind, message, hint):
                known = named(kind)
                if known is not None and known is not RankLost:
                    self._end(known(message, hint))
                elif not self._ended_others(rank):
                    self._end(RankLost(f"{self._name(rank)} failed: {kind}: {message}", "What it said is above."))

    def _ended_others(self, rank: int) -> bool:
        """Whether another rank has died, which explains that this one's collective failed."""
        time.sleep(0.2)
        codes = {r: code for r, code in self._codes().items() if r != rank and code != FAILED}
        found = dead(codes, self.beats)
        if found is not None:
            self._end(self._lost(found))
        return found is not None

    def _codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended."""
        polled = {rank: process.poll() for rank, process in self.processes.items()}
        return {rank: code for rank, code in polled.items() if code is not None}

    def _judged(self, late: bool) -> Verdict | None:
        """late: this process was stopped, or busy, so that the others may have spoken meanwhile."""
        codes, now = self._codes(), time.monotonic()
        if codes:
            self._ended = self._ended or now
            return dead(codes, self.beats) if now - self._ended > LAST_WORDS else None
        if late:
            return None
        limits, step = Limits(self.watchdog), self._step
        beats = self.beats | ({0: step()} if step else {})
        found = silent(self._heard, self.beats, now, limits)
        return found or (None if self._left else stalled(beats, limits))

    def _lost(self, verdict: Verdict) -> RankLost:
        return RankLost(f"{self._name(verdict.rank)} {verdict.said}", verdict.hint)

    def _name(self, rank: int) -> str:
        where = self.processes[rank].where if rank else ""
        return f"Rank {rank} on {where}" if where else f"Rank {rank}"

    def _end(self, fault: UndistilledError) -> None:
        """Tell, end the others, and see that this process does not hang in a collective that cannot end."""
        with self._lock:
            if self.fault is not None:
                return
            self.fault = fault
        emit("rank.lost", message=fault.message)
        self._kill()
        self.release()
        until = time.monotonic() + GRACE
        while self._step is not None:
            if time.monotonic() > until:
                emit("rank.hung", kind=type(fault).__name__, message=fault.message, hint=fault.hint)
                print(f"{fault.message} {fault.hint}", file=sys.stderr, flush=True)
                time.sleep(0.2)  # for who was told by the event
                self._abandon()
                os._exit(fault.exit_code)
            time.sleep(0.05)
