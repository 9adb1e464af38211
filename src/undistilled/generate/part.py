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
from .graphs import Graphs, capturable
from .programs import Programs, recordable


@dataclass
class Submitted:
    """A pass on its way. `logits` [last, vocab] where they are here already."""

    last: int
    logits: torch.Tensor | None


def _replayed(decoder: Decoder, plan: Plan, caches: list[Cache]) -> Graphs | Programs | None:
    """What runs decode passes again by one call, where something does."""
    if capturable(decoder):
        return Graphs(decoder, caches)
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
        self.graphs = _replayed(decoder, plan, self.caches) if comm is None else None
        self.passes, self.busy = 0, 0.0

    @torch.inference_mode()
    def submit(self, work: Pass) -> Submitted:
        """Do this rank's part of a pass. On rank 0, `collect` gives the logits."""
        began, waited = perf_counter(), self.comm.waited if self.comm else 0.0
        h_TD = self.hidden(self.batch(work), self._before(work))
        logits = self._after(work, h_TD)
        self.passes += 1
        self.busy += perf_counter() - began - ((self.comm.waited if self.comm else 0.0) - waited)
        return Submitted(len(work.last), logits)

    def beat(self) -> Beat:
        """What this rank is in, of those that have others."""
        comm = self.comm
        assert comm is not None
        return Beat(comm.rank, comm.entered, comm.doing, comm.seconds, self.passes, self.busy, comm.waited)

    def collect(self, submitted: Submitted) -> torch.Tensor:
        """Logits [last, vocab] of a pass, in the order in which passes were submitted."""
        logits = submitted.logits
        if logits is None and submitted.last:
            assert self.comm is not None
            logits = self.comm.receive_back(submitted.last, self.decoder.spec.vocab)
        if self.comm:
            self.comm.settle()
        return torch.empty(0) if logits is None else logits

    def hidden(self, batch: Batch, h_TD: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, D] of every token, good until the next call."""
        if batch.prefill or self.graphs is None:
            return self.decoder(batch, self.caches, h_TD)
        return self.graphs(batch)

    def _before(self, work: Pass) -> torch.Tensor | None:
        if self.decoder.first:
            return None
        assert self.comm is not None
        return self.comm.receive((len(work.tokens), self.decoder.spec.hidden), self.decoder.dtype)

    def _after(self, work: Pass, h_TD: torch.Tensor) -> torch.Tensor | None:
        comm = self.comm
        if not self.decoder.last:
            assert comm is not None
            comm.send_on(h_TD)
            return None
        if not work.last:
            return None
        logits = self.decoder.logits(h_TD if len(work.last) == len(h_TD) else h_TD[work.last])
        if comm is None or comm.rank == 0:
            return logits
        if comm.mesh.pp > 1 and comm.mesh.within(comm.rank) == 0:
            comm.send_back(logits)
        return None

    def batch(self, work: Pass) -> Batch:
        """A pass's numbers as tensors where this rank computes."""

        def ids(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        seen = torch.tensor(work.contexts, dtype=torch.int32)
        tables = ids(work.tables, torch.int32)
        return Batch(ids(work.tokens), ids(work.positions), ids(work.slots), tables, seen, self.size, work.prefill)
