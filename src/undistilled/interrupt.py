"""Ctrl-C: it ends a process in bounded time, also where its main thread is in native code, which Python lets finish.
While a terminal sends it to a whole group, it is for the process that a person started to answer.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CODE = 130  # what shells say of a process that SIGINT ended
SECONDS = 1.2  # that an orderly end may take
LAST: list[Callable[[], None]] = []  # what is done, shortly, before an end that is not
_KEPT: list[socket.socket] = []


def bound(seconds: float = SECONDS) -> None:
    """From now on this process is gone `seconds` after SIGINT at the latest. For a main thread, in a program in which
    Ctrl-C always means the end."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGINT not in reader.recv(64):
            pass
        time.sleep(seconds)
        try:
            for call in tuple(LAST):
                call()
        finally:
            os._exit(CODE)

    threading.Thread(target=wait, name="interrupt", daemon=True).start()
    _KEPT.append(writer)  # C writes to its number


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started within do not see SIGINT, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
