"""Runs a scheduler's step on the model: work in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from ..events import emit
from ..model.batch import Batch, Cache
from ..model.decoder import Decoder
from ..parallel.comm import Comm
from ..parallel.crew import Crew
from ..parallel.messages import Pass
from ..plan.plan import Plan
from ..schedule.scheduler import Step, Work
from .part import ROWS, Part, Submitted


def grouped(works: list[Work], limit: int) -> Iterator[list[Work]]:
    """Works in order, in groups of at most `limit` rows; a longer one is cut."""
    group: list[Work] = []
    room = limit
    for work in works:
        start = work.start
        while start < work.stop:
            stop = min(work.stop, start + room)
            group.append(replace(work, start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield group
                group, room = [], limit
    if group:
        yield group


@dataclass
class Flight:
    """A pass on its way. seconds: that this process has spent on it so far."""

    works: list[Work]
    prefill: bool
    handle: Submitted
    seconds: float


class Runner:
    """This process's part of the model, the other ranks where there are any, and passes made of work."""

    def __init__(self, decoder: Decoder, plan: Plan, crew: Crew | None = None, comm: Comm | None = None) -> None:
        self.part, self.plan, self.crew = Part(decoder, plan, comm), plan, crew
        self.decoder, self.size = decoder, plan.kv.block_size

    @property
    def device(self) -> torch.device:
        return self.part.device

    @property
    def caches(self) -> list[Cache]:
        return self.part.caches

    def batch(self, works: list[Work], prefill: bool) -> Batch:
        """What a pass over these works reads, as tensors."""
        return self.part.batch(self.passed(works, prefill))

    def run(self, step: Step) -> list[tuple[Work, torch.Tensor | None]]:
        """Each piece of work with the logits [vocab] after its last token, or None where none are needed."""
        return [result for flight in self.submit(step) for result in self.collect(flight)]

    def submit(self, step: Step) -> list[Flight]:
        """Send a step's passes on their way: without a pipeline, they are done."""
        passes = [([work], True) for work in step.prompts]
        passes += [(group, False) for group in grouped(step.rows, ROWS[self.device.type])]
        with self._guarded():
            return [self._submit(works, prefill) for works, prefill in passes]

    def collect(self, flight: Flight) -> list[tuple[Work, torch.Tensor | None]]:
        """What a pass brought; passes are collected in the order in which they were submitted."""
        began = perf_counter()
        with self._guarded():
            logits = iter(self.part.collect(flight.handle))
        tokens = sum(w.stop - w.start for w in flight.works)
        seconds = flight.seconds + perf_counter() - began
        emit("engine.pass", prefill=flight.prefill, tokens=tokens, requests=len(flight.works), seconds=seconds)
        return [(work, next(logits) if work.samples else None) for work in flight.works]

    def teach(self, work: Work, rows: list[int]) -> torch.Tensor:
        """Logits [rows, V] after these tokens of a prompt chunk, numbered within it: for scoring a text over ranks."""
        made = self.passed([work], True)
        made.last = rows
        return self.through(made)

    def through(self, made: Pass) -> torch.Tensor:
        """Logits [last, V] of one pass, on its own in all ranks."""
        with self._guarded():
            if self.crew:
                self.crew.tell(made)
            return self.part.collect(self.part.submit(made))

    def _submit(self, works: list[Work], prefill: bool) -> Flight:
        began, work = perf_counter(), self.passed(works, prefill)
        if self.crew:
            self.crew.tell(work)
        handle = self.part.submit(work)
        return Flight(works, prefill, handle, perf_counter() - began)

    def _guarded(self) -> AbstractContextManager[None]:
        return self.crew.guarded(self.part.beat) if self.crew else nullcontext()

    def passed(self, works: list[Work], prefill: bool) -> Pass:
        """One prompt chunk, or rows: every token of every piece of work with its own view of the cache."""
        made = Pass([], [], [], [], [], prefill, [])
        for work in works:
            blocks, span = work.sequence.blocks, range(work.start, work.stop)
            made.tokens += work.sequence.tokens[work.start : work.stop]
            made.positions += span
            made.slots += [blocks[t // self.size] * self.size + t % self.size for t in span]
            made.tables += [blocks] if prefill else [blocks] * len(span)
            made.contexts += [work.stop] if prefill else [t + 1 for t in span]
            made.last += [len(made.tokens) - 1] if work.samples else []
        longest = max(len(t) for t in made.tables)
        made.tables = [t + [0] * (longest - len(t)) for t in made.tables]
        return made
