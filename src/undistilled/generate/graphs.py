"""Decode passes as CUDA graphs: a pass is some hundred launches, which take Python longer than the GPU.

A graph is captured the second time that a pass of its size comes, and holds up to a number of rows and blocks that
are powers of two. Rows that are missing repeat the last one: they compute what it computes and write it to its place.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..model.batch import Batch, Cache
from ..model.decoder import Decoder
from ..model.layers import Linear, LocalBank
from ..ops import triton as cuda
from ..ops.experts import fused
from ..ops.linear import served
from ..ops.registry import forced
from ..parallel.messages import Pass

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


@dataclass
class Ran:
    """What came of a pass: hidden states [T, D], and logits [T, vocab] where the pass made them too."""

    h_TD: torch.Tensor
    logits_TV: torch.Tensor | None = None


class Graph:
    """One captured pass. Its numbers lie in one tensor, so that one copy brings them."""

    def __init__(self, graphs: Graphs, rows: int, blocks: int, like: Pass, h_TD: torch.Tensor | None) -> None:
        decoder = graphs.decoder
        self.rows, self.blocks, self.size = rows, blocks, graphs.size
        self.numbers = torch.zeros(rows * (3 + blocks), dtype=torch.int32, device=decoder.device)
        self.before = None if h_TD is None else h_TD.new_zeros(rows, h_TD.shape[1])
        self.fill(like, h_TD)
        stream = torch.cuda.Stream(decoder.device)
        stream.wait_stream(torch.cuda.current_stream(decoder.device))
        with torch.cuda.stream(stream):
            self._pass(decoder, graphs.caches)  # compiles what is not compiled yet
        torch.cuda.current_stream(decoder.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads of the process, NCCL's and the one that tells of this rank, may ask the GPU meanwhile
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.ran = self._pass(decoder, graphs.caches)

    def _pass(self, decoder: Decoder, caches: Sequence[Cache]) -> Ran:
        rows = self.rows
        tokens, positions, slots, tables = self.numbers.split([rows, rows, rows, rows * self.blocks])
        wide = (tokens.long(), positions.long(), slots.long())
        batch = Batch(*wide, tables.view(rows, self.blocks), positions + 1, self.size, False)
        h_TD = decoder(batch, caches, self.before)
        return Ran(h_TD, decoder.logits(h_TD) if decoder.last else None)

    def fill(self, work: Pass, h_TD: torch.Tensor | None) -> None:
        """Take over a pass of at most as many rows and blocks."""
        # not pinned: CUDA takes such a copy's bytes at once, so that the next pass may follow before it is done
        self.numbers.copy_(numbers(work, self.rows, self.blocks), non_blocking=True)
        if h_TD is not None and self.before is not None:
            count = len(work.tokens)
            self.before[:count].copy_(h_TD)
            self.before[count:].copy_(h_TD[-1:].expand(self.rows - count, -1))

    def __call__(self, work: Pass, h_TD: torch.Tensor | None) -> Ran:
        self.fill(work, h_TD)
        self.graph.replay()
        count, logits_TV = len(work.tokens), self.ran.logits_TV
        return Ran(self.ran.h_TD[:count], None if logits_TV is None else logits_TV[:count])


def numbers(work: Pass, rows: int, blocks: int) -> torch.Tensor:
    """A pass's tokens, positions, slots and tables as int32 in host memory, made up to so many rows and blocks."""
    flat, more = array("i"), rows - len(work.tokens)
    for values in (work.tokens, work.positions, work.slots):
        flat.extend(values)
        flat.extend(values[-1:] * more)
    for table in (*work.tables, *work.tables[-1:] * more):
        flat.extend(table)
        flat.frombytes(bytes(4 * (blocks - len(table))))
    return torch.frombuffer(flat, dtype=torch.int32)


class Graphs:
    """A graph for each size of pass that came twice. On several ranks all capture the same passes."""

    def __init__(self, decoder: Decoder, caches: Sequence[Cache], size: int) -> None:
        self.decoder, self.caches, self.size = decoder, caches, size
        self.graphs: dict[tuple[int, int], Graph | None] = {}

    def __call__(self, work: Pass, batch: Callable[[Pass], Batch], h_TD: torch.Tensor | None = None) -> Ran:
        """A decode pass, good until the next call; `batch` makes tensors of one that is not captured, `h_TD` is of the
        stage before this one."""
        rows, blocks = len(work.tables), len(work.tables[0])
        key = bucket(rows), max(FEWEST_BLOCKS, bucket(blocks))
        if rows > ROWS or key not in self.graphs:
            if rows <= ROWS:
                self.graphs[key] = None
            return Ran(self.decoder(batch(work), self.caches, h_TD))
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = Graph(self, *key, work, h_TD)
        return graph(work, h_TD)
