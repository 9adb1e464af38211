"""Runs a scheduler's step on the model: work in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from time import perf_counter

import torch

from ..events import emit
from ..model.batch import Batch, Cache
from ..model.decoder import Decoder
from ..ops.linear import LARGE
from ..parallel.comm import Comm
from ..parallel.crew import Crew
from ..parallel.messages import Beat, Pass
from ..plan.plan import Plan
from ..schedule.scheduler import Step, Work
from .part import Part

# Rows in one pass. The CPU's kernels give a row the same bits in any company below ops.linear.LARGE.
ROWS = {"cpu": LARGE - 1, "cuda": 4096}


def grouped(works: list[Work], limit: int) -> Iterator[list[Work]]:
    """Works in order, in groups of at most `limit` rows; a longer one is cut."""
    group: list[Work] = []
    room = limit
    for work in works:
        start = work.start
        while start < work.stop:
            stop = min(work.stop, start + room)
            group.append(Work(work.sequence, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield group
                group, room = [], limit
    if group:
        yield group


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
        with self.crew.guarded(self._beat) if self.crew else nullcontext():
            began = perf_counter()
            passes = [([work], True) for work in step.prompts]
            passes += [(group, False) for group in grouped(step.rows, self._limit(step))]
            submitted = [(works, prefill, self._submit(works, prefill)) for works, prefill in passes]
            results: list[tuple[Work, torch.Tensor | None]] = []
            for works, prefill, handle in submitted:
                logits = iter(self.part.collect(handle))
                results += [(work, next(logits) if work.samples else None) for work in works]
                tokens, seconds = sum(w.stop - w.start for w in works), perf_counter() - began
                emit("engine.pass", prefill=prefill, tokens=tokens, requests=len(works), seconds=seconds)
                began = perf_counter()
            return results

    def _limit(self, step: Step) -> int:
        """Rows of a pass: what a device takes, or of a pipeline a share, so that every stage has some."""
        rows = sum(work.stop - work.start for work in step.rows)
        parts = self.plan.mesh.microbatches if self.plan.mesh else 1
        return max(1, min(ROWS[self.device.type], -(-rows // parts)))

    def _submit(self, works: list[Work], prefill: bool):
        work = self.passed(works, prefill)
        if self.crew:
            self.crew.tell(work)
        return self.part.submit(work)

    def _beat(self) -> Beat:
        comm, part = self.part.comm, self.part
        assert comm is not None
        return Beat(0, comm.entered, comm.doing, comm.seconds, part.passes, part.busy, comm.waited)

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
