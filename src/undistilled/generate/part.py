"""What one rank does of a pass: its layers, on its share of the weights; alone, all of it."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch

from ..model.batch import Batch, Cache
from ..model.decoder import Decoder
from ..ops.linear import LARGE
from ..parallel.comm import Comm
from ..parallel.messages import Beat, Pass
from ..plan.plan import Plan
from .cache import allocate
from .clock import Clock
from .graphs import Graphs, Ran, capturable
from .programs import Programs, recordable

# Rows in one pass, and of a head at once. The CPU's kernels give a row the same bits in any company below LARGE.
ROWS = {"cpu": LARGE - 1, "cuda": 4096}


@dataclass
class Submitted:
    """A pass on its way. `logits` [last, vocab] where they are here already; number: of the pass, in all ranks."""

    last: int
    logits: torch.Tensor | None
    number: int


def _replayed(decoder: Decoder, plan: Plan, caches: list[Cache], comm: Comm | None) -> Graphs | Programs | None:
    """What runs decode passes again by one call, where something does."""
    captured = capturable(decoder)
    if comm.agreed(captured) if comm else captured:
        return Graphs(decoder, caches, plan.kv.block_size)
    if recordable(decoder):
        blocks = -(-plan.limits.context // plan.kv.block_size)
        return Programs(decoder, caches, LARGE - 1, blocks, plan.kv.block_size)
    return None


class Part:
    """The decoder, its cache, and what comes from and goes to other ranks."""

    def __init__(self, decoder: Decoder, plan: Plan, comm: Comm | None = None) -> None:
        self.decoder, self.comm, self.size = decoder, comm, plan.kv.block_size
        self.device = decoder.device
        self.caches = allocate(decoder.spec, plan.kv, self.device, len(decoder.layers))
        self.graphs = _replayed(decoder, plan, self.caches, comm)
        self.clock, self.passes = Clock(self.device, comm), 0
        self.begun, self.at, self._entered = 0, 0, 0  # passes; the one that this rank is in; `comm.entered` before it

    @property
    def busy(self) -> float:
        """Seconds of computing so far (clock.py)."""
        return self.clock.seconds()

    @torch.inference_mode()
    def submit(self, work: Pass) -> Submitted:
        """Do this rank's part of a pass. On rank 0, `collect` gives the logits."""
        self._begin()
        before = self._before(work)
        with self.clock.during():
            ran = self._run(work, before)
            logits = self._logits(work, ran)
        logits = self._after(work, ran.h_TD, logits)
        self.passes += 1
        return Submitted(len(work.last), logits, self.begun)

    def _begin(self) -> None:
        self.begun += 1
        self.at, self._entered = self.begun, self.comm.entered if self.comm else 0

    def beat(self) -> Beat:
        """What this rank is in, of those that have others."""
        comm = self.comm
        assert comm is not None
        doing, since, awaits = comm.state
        entered, seconds = comm.entered - self._entered, perf_counter() - since
        return Beat(comm.rank, self.at, entered, doing, seconds, self.passes, self.busy, comm.waited, awaits)

    def collect(self, submitted: Submitted) -> torch.Tensor:
        """Logits [last, vocab] of a pass, in the order in which passes were submitted."""
        logits, self.at = submitted.logits, submitted.number
        if logits is None and submitted.last:
            assert self.comm is not None
            logits = self.comm.receive_back(submitted.last, self.decoder.spec.vocab)
        if self.comm:
            self.comm.settle()
        return torch.empty(0) if logits is None else logits

    def hidden(self, work: Pass, h_TD: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, D] of every token, good until the next call."""
        return self._run(work, h_TD).h_TD

    def _run(self, work: Pass, h_TD: torch.Tensor | None) -> Ran:
        if self.graphs is None or work.prefill:
            return Ran(self.decoder(self.batch(work), self.caches, h_TD))
        if isinstance(self.graphs, Graphs):
            return self.graphs(work, self.batch, h_TD)
        return self.graphs(self.batch(work), h_TD)

    def _before(self, work: Pass) -> torch.Tensor | None:
        if self.decoder.first:
            return None
        assert self.comm is not None
        return self.comm.receive((len(work.tokens), self.decoder.spec.hidden), self.decoder.dtype)

    def _logits(self, work: Pass, ran: Ran) -> torch.Tensor | None:
        """Of the rows that are wanted, [last, vocab], on every rank of the last stage."""
        if not self.decoder.last or not work.last:
            return None
        whole = len(work.last) == len(ran.h_TD)
        if ran.logits_TV is not None:
            return ran.logits_TV if whole else ran.logits_TV[work.last]
        wanted = ran.h_TD if whole else ran.h_TD[work.last]
        parts = [self.decoder.logits(rows_RD) for rows_RD in wanted.split(ROWS[self.device.type])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _after(self, work: Pass, h_TD: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor | None:
        """Send on what others need; the logits where this is the driver's rank and they are here."""
        comm = self.comm
        if comm is None:
            return logits
        if not self.decoder.last:
            comm.send_on(h_TD)
        elif logits is not None and comm.rank > 0 and comm.mesh.pp > 1 and comm.mesh.within(comm.rank) == 0:
            comm.send_back(logits)
        return logits if comm.rank == 0 else None

    def batch(self, work: Pass) -> Batch:
        """A pass's numbers as tensors where this rank computes."""

        def ids(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        seen = torch.tensor(work.contexts, dtype=torch.int32)
        tables = ids(work.tables, torch.int32)
        return Batch(ids(work.tokens), ids(work.positions), ids(work.slots), tables, seen, self.size, work.prefill)
