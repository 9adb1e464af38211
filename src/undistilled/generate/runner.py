"""Runs a scheduler's step on the model: work in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import torch

from ..events import emit
from ..model.batch import Batch
from ..model.decoder import Decoder
from ..ops.linear import LARGE
from ..plan.plan import Plan
from ..schedule.scheduler import Step, Work
from .cache import allocate
from .graphs import Graphs, capturable
from .programs import Programs, recordable

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
    """The decoder, its cache, and the arithmetic that turns work into batches."""

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        self.decoder, self.plan = decoder, plan
        self.device = decoder.embed_tokens.stored.device
        self.caches = allocate(decoder.spec, plan.kv, self.device)
        self.size = plan.kv.block_size
        self.graphs: Graphs | Programs | None = None
        if capturable(decoder):
            self.graphs = Graphs(decoder, self.caches)
        elif recordable(decoder):
            blocks = -(-plan.limits.context // self.size)
            self.graphs = Programs(decoder, self.caches, ROWS["cpu"], blocks, self.size)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Work, torch.Tensor | None]]:
        """Each piece of work with the logits [vocab] after its last token, or None where none are needed."""
        results: list[tuple[Work, torch.Tensor | None]] = []
        for work in step.prompts:
            results += self._timed([work], prefill=True)
        for group in grouped(step.rows, ROWS[self.device.type]):
            results += self._timed(group, prefill=False)
        return results

    def _timed(self, works: list[Work], prefill: bool) -> list[tuple[Work, torch.Tensor | None]]:
        began = perf_counter()
        h_TD = self.hidden(works, prefill)
        wanted: list[Work] = []
        last: list[int] = []
        row = 0
        for work in works:
            row += work.stop - work.start
            if work.samples:
                wanted.append(work)
                last.append(row - 1)
        logits = self.decoder.logits(h_TD if len(last) == row else h_TD[last]) if last else h_TD[:0]
        emit("engine.pass", prefill=prefill, tokens=row, requests=len(works), seconds=perf_counter() - began)
        found = {id(work): logits[i] for i, work in enumerate(wanted)}
        return [(work, found.get(id(work))) for work in works]

    def hidden(self, works: list[Work], prefill: bool) -> torch.Tensor:
        """Hidden states [T, D] of every token of the works, good until the next call."""
        batch = self.batch(works, prefill)
        if prefill or self.graphs is None:
            return self.decoder(batch, self.caches)
        return self.graphs(batch)

    def batch(self, works: list[Work], prefill: bool) -> Batch:
        """One prompt chunk, or rows: every token of every piece of work with its own view of the cache."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[list[int]] = []
        contexts: list[int] = []
        for work in works:
            blocks, span = work.sequence.blocks, range(work.start, work.stop)
            tokens += work.sequence.tokens[work.start : work.stop]
            positions += span
            slots += [blocks[t // self.size] * self.size + t % self.size for t in span]
            tables += [blocks] if prefill else [blocks] * len(span)
            contexts += [work.stop] if prefill else [t + 1 for t in span]
        longest = max(len(t) for t in tables)
        padded = [t + [0] * (longest - len(t)) for t in tables]

        def ids(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        seen = torch.tensor(contexts, dtype=torch.int32)
        return Batch(ids(tokens), ids(positions), ids(slots), ids(padded, torch.int32), seen, self.size, prefill)
