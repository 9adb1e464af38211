"""How long a rank computes: on a CPU by its own clock, on a GPU by the GPU's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from time import perf_counter

import torch

from ..parallel.comm import Comm

PENDING = 512  # passes whose GPU time was not read yet; older ones are not counted


class Clock:
    """Seconds between the beginnings and ends of what `during` surrounds. On a CPU without what `comm` waited; on a GPU
    with the waits inside, but a pass is begun when what the stage before sent is there. A GPU without other ranks is
    not timed: nobody asks, and two events took 24 of the 95 µs that a step's host works."""

    def __init__(self, device: torch.device, comm: Comm | None) -> None:
        self.device, self.comm, self.done = device, comm, 0.0
        self.lock = Lock()  # others ask how much it is while this one computes
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=PENDING)
        self.spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # read, to be recorded again

    @contextmanager
    def during(self) -> Iterator[None]:
        if self.device.type == "cuda" and self.comm is None:
            yield
            return
        if self.device.type == "cuda":
            ends = self.spare.pop() if self.spare else (_event(), _event())
            ends[0].record()
            yield
            ends[1].record()
            self.pending.append(ends)
            return
        began, waited = perf_counter(), self._waited
        yield
        self.done += perf_counter() - began - (self._waited - waited)

    @property
    def _waited(self) -> float:
        return self.comm.waited if self.comm else 0.0

    def seconds(self) -> float:
        """Of all that has ended."""
        with self.lock:
            while self.pending and self.pending[0][1].query():
                began, ended = self.pending.popleft()
                self.done += began.elapsed_time(ended) / 1e3
                self.spare.append((began, ended))
            return self.done


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
