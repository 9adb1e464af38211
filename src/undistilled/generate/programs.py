"""Decode passes as programs (ops/cpu/program.py): a pass is some hundred kernels, which take Python longer than a CPU.

The CPU's twin of graphs.py. The first pass of a number of rows is recorded while it runs; later ones copy what they are
about into the tensors that it read, and run it again. A pass with a part that has no kernel of ours is run as it is.
Over ranks a program has parts, between which Python sums (parallel/comm.py); each rank records for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..events import emit
from ..model.batch import Batch, Cache
from ..model.decoder import Decoder
from ..ops.cpu import native
from ..ops.cpu.program import Arena, Program
from ..ops.registry import forced
from .graphs import Ran

BY_ROW = ("tokens_T", "positions_T", "slots_T", "contexts_R", "cos_TF", "sin_TF")
ANGLES = 4 << 20  # bytes that rotary angles of all positions may take; otherwise each pass works out its own
TRIES = 2  # a first pass may still work out what later ones find ready


def recordable(decoder: Decoder) -> bool:
    """Whether the kernels are here and take this decoder's activations."""
    here = decoder.device.type == "cpu" and decoder.dtype is torch.float32
    return here and native.library() is not None


class Programs:
    """A program for each number of rows that came, up to `rows`, and tables of up to `blocks`."""

    def __init__(self, decoder: Decoder, caches: Sequence[Cache], rows: int, blocks: int, size: int) -> None:
        self.decoder, self.caches = decoder, caches
        long, short, angles = torch.int64, torch.int32, (rows, len(decoder.frequencies))
        tokens, positions, slots = (torch.zeros(rows, dtype=long) for _ in range(3))
        tables, contexts = torch.zeros(rows, blocks, dtype=short), torch.zeros(rows, dtype=short)
        cos, sin = torch.zeros(angles), torch.zeros(angles)
        self.before = None if decoder.first else torch.zeros(rows, decoder.spec.hidden)
        self.batch = Batch(tokens, positions, slots, tables, contexts, size, False, cos, sin)
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None
        if 2 * 4 * blocks * size * angles[1] <= ANGLES:
            whole = replace(self.batch, positions_T=torch.arange(blocks * size))
            decoder.prepare(whole)
            assert whole.cos_TF is not None and whole.sin_TF is not None
            self.angles = whole.cos_TF, whole.sin_TF
        self.arena = Arena()
        self.programs: dict[int, tuple[Program, torch.Tensor]] = {}
        self.refused: dict[int, int] = {}  # how often, by rows

    def __call__(self, batch: Batch, h_TD: torch.Tensor | None = None) -> Ran:
        """A decode batch's hidden states, good until the next call; `h_TD`: of the stage before this one."""
        rows, blocks = batch.tables_RB.shape
        held = self.batch.tables_RB.shape
        if rows > held[0] or blocks > held[1] or self.refused.get(rows, 0) >= TRIES or forced():
            return Ran(self.decoder(batch, self.caches, h_TD))
        self.fill(batch, h_TD)
        if rows not in self.programs:
            return Ran(self._record(rows))
        program, after_TD = self.programs[rows]
        program.run()
        return Ran(after_TD)

    def fill(self, batch: Batch, h_TD: torch.Tensor | None = None) -> None:
        """Take over what a batch is about."""
        self._turn(batch)
        if self.before is not None and h_TD is not None:
            self.before[: len(h_TD)].copy_(h_TD)
        rows, blocks = batch.tables_RB.shape
        own = self.batch
        own.tables_RB[:rows, :blocks].copy_(batch.tables_RB)
        for name in BY_ROW:
            getattr(own, name)[:rows].copy_(getattr(batch, name))

    def _turn(self, batch: Batch) -> None:
        if self.angles is None:
            self.decoder.prepare(batch)
        else:
            batch.cos_TF, batch.sin_TF = (table.index_select(0, batch.positions_T) for table in self.angles)

    def _first(self, rows: int) -> Batch:
        return replace(self.batch, **{name: getattr(self.batch, name)[:rows] for name in ("tables_RB", *BY_ROW)})

    def _record(self, rows: int) -> torch.Tensor:
        program, first = Program(self.arena), self._first(rows)
        with program.recording():
            h_TD = self.decoder.hidden(first, self.caches, None if self.before is None else self.before[:rows])
        if program.foreign:
            self.refused[rows] = self.refused.get(rows, 0) + 1
            emit("engine.program_refused", rows=rows, operation=program.foreign)
        else:
            self.programs[rows] = program, h_TD
        return h_TD
