"""Decode passes as CUDA graphs: a pass is some hundred launches, which take Python longer than the GPU.

A graph is captured the second time that a pass of its size comes, and holds up to a number of rows and blocks that
are powers of two. Rows that are missing repeat the last one: they compute what it computes and write it to its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.batch import Batch, Cache
from ..model.decoder import Decoder
from ..model.layers import Linear, LocalBank
from ..ops import triton as cuda
from ..ops.experts import fused
from ..ops.linear import served
from ..ops.registry import forced

ROWS = 64  # above, launches are a small part of a pass
FEWEST_BLOCKS = 16


def capturable(decoder: Decoder) -> bool:
    """Whether no part of a decode pass asks the GPU for an answer."""
    if decoder.device.type != "cuda" or decoder.dtype is not torch.bfloat16 or forced() or cuda.why_missing():
        return False
    modules = list(decoder.modules())
    if not all(served(module.stored, decoder.dtype) for module in modules if isinstance(module, Linear)):
        return False
    banks = [module for module in modules if isinstance(module, LocalBank)]
    return all(fused(bank.gate.stored, bank.up.stored, bank.down.stored, decoder.dtype) for bank in banks)


def bucket(count: int) -> int:
    """The power of two from `count` on."""
    return 1 << (count - 1).bit_length()


class Graph:
    """One captured pass and the tensors it reads and writes."""

    def __init__(self, decoder: Decoder, caches: Sequence[Cache], rows: int, blocks: int, like: Batch) -> None:
        device = like.tokens_T.device

        def ids(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        contexts, tables = ids(rows, dtype=torch.int32), ids(rows, blocks, dtype=torch.int32)
        self.batch = Batch(ids(rows), ids(rows), ids(rows), tables, contexts, like.block_size, False)
        self.fill(like)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            decoder(self.batch, caches)  # compiles what is not compiled yet
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.h_TD = decoder(self.batch, caches)

    def fill(self, batch: Batch) -> None:
        """Take over a batch of at most as many rows and blocks."""
        rows, own = len(batch.tokens_T), self.batch
        pairs = (
            (own.tokens_T, batch.tokens_T),
            (own.positions_T, batch.positions_T),
            (own.slots_T, batch.slots_T),
            (own.contexts_R, batch.positions_T + 1),
            (own.tables_RB[:, : batch.tables_RB.shape[1]], batch.tables_RB),
        )
        for place, values in pairs:
            place[:rows].copy_(values)
            if rows < len(place):
                place[rows:].copy_(values[-1:].expand(len(place) - rows, *values.shape[1:]))

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.fill(batch)
        self.graph.replay()
        return self.h_TD[: len(batch.tokens_T)]


class Graphs:
    """A graph for each size of pass that came twice."""

    def __init__(self, decoder: Decoder, caches: Sequence[Cache]) -> None:
        self.decoder, self.caches = decoder, caches
        self.graphs: dict[tuple[int, int], Graph | None] = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, D] of a decode batch, good until the next call."""
        rows, blocks = len(batch.tokens_T), batch.tables_RB.shape[1]
        if rows > ROWS:
            return self.decoder(batch, self.caches)
        key = bucket(rows), max(FEWEST_BLOCKS, bucket(blocks))
        if key not in self.graphs:
            self.graphs[key] = None
            return self.decoder(batch, self.caches)
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = Graph(self.decoder, self.caches, *key, batch)
        return graph(batch)
