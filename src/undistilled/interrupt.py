"""Ctrl-C: it ends a process in bounded time, also where its main thread is in native code, which Python lets finish.
While a terminal sends it to a whole group, it is for the process that a person started to answer.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

CODE = 130  # what shells say of a process that SIGINT ended
SECONDS = 1.2  # that an orderly end may take
LAST: list[Callable[[], None]] = []  # what is done, shortly, before an end that is not
_LOST = b"\0"  # the interrupt thread is told so; signals write their numbers, which start at 1
_KEPT: list[socket.socket] = []
_SPARED: list[int] = []  # signals to come that do not mean the end


def bound(seconds: float = SECONDS) -> None:
    """From now on this process is gone `seconds` after SIGINT at the latest. For a main thread, in a program in which
    Ctrl-C always means the end."""
    _SPARED.clear()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _raise_again(writer)
    threading.Thread(target=_wait, args=(reader, seconds, threading.get_ident()), name="interrupt", daemon=True).start()
    _KEPT.append(writer)  # C writes to its number


def _wait(reader: socket.socket, seconds: float, main: int) -> None:
    heard = _ending(reader)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if _LOST in heard:
            time.sleep(0.01)  # until what lost it is over
            signal.pthread_kill(main, signal.SIGINT)
        reader.settimeout(left)
        try:
            heard = reader.recv(64)
        except TimeoutError:
            break
    try:
        for call in tuple(LAST):
            call()
    finally:
        os._exit(CODE)


def _ending(reader: socket.socket) -> bytes:
    """Until a SIGINT that means the end, or one was lost; what came with it."""
    while True:
        heard = reader.recv(64)
        if _LOST in heard:
            return heard
        for _ in range(heard.count(signal.SIGINT)):
            try:
                _SPARED.pop()
            except IndexError:
                return heard


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT ends nothing: it has the function that this gives say True. The next one ends, as ever.
    For a main thread. Where the process ignores SIGINT, as what a shell runs in the background does, it still does."""
    asked, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield asked.is_set
        return

    def first(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    _SPARED.append(signal.SIGINT)
    signal.signal(signal.SIGINT, first)
    try:
        yield asked.is_set
    finally:
        if not asked.is_set():
            _SPARED.clear()  # before another one may mean the end again
        signal.signal(signal.SIGINT, before)


def _raise_again(writer: socket.socket) -> None:
    """Where Python cannot pass KeyboardInterrupt on (in a finalizer, or a callback of a weak reference, as imports have
    them), it prints and forgets it: here it comes again instead, a moment later."""
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            return before(lost)
        with suppress(BlockingIOError):  # then the thread has much to hear, SIGINT among it
            writer.send(_LOST)

    sys.unraisablehook = hook


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started within do not see SIGINT, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
