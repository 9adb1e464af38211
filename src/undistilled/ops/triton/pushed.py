"""The sum over GPUs that write into each other's memory: one launch, one way through the link.

Each rank has a room for every rank's part, twice, which calls use in turn, and a count of what has arrived. A program
takes CHUNK bytes: it writes its part into the others' rooms, says so in their counts, waits for theirs, and adds all
parts in the order of the ranks. A rank is two calls ahead of another at no time, since a call ends with what the others
have written in theirs; so no room is written before it was read. Programs of one chunk wait for each other alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .after import EARLY, after

CHUNK = 2048  # bytes


@triton.jit
def _sum(
    x, y, rooms, counts, mine, arrived, calls, count, LIMIT, CHUNKS,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rooms, counts: of every rank, [2, RANKS, LIMIT] and [RANKS, CHUNKS]; mine, arrived: this rank's own of these."""
    after()
    chunk = tl.program_id(0)
    call = tl.load(calls + chunk) + 1
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    value = tl.load(x + at, mask=there, other=0.0)
    room = call % 2 * RANKS * LIMIT + at
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(rooms[rank] + RANK * LIMIT + room, value, mask=there)
    tl.debug_barrier()  # every thread's part is written before it is said to be there
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.atomic_xchg(counts[rank] + RANK * CHUNKS + chunk, call, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            while tl.atomic_add(arrived + rank * CHUNKS + chunk, 0, sem="acquire", scope="sys") < call:
                pass
    tl.debug_barrier()
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += value.to(tl.float32)
        else:
            total += tl.load(mine + rank * LIMIT + room, mask=there, other=0.0, volatile=True).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there)
    tl.store(calls + chunk, call)


def summed(
    x: torch.Tensor, rooms: tuple[torch.Tensor, ...], counts: tuple[torch.Tensor, ...], calls: torch.Tensor, rank: int
) -> torch.Tensor:
    """The sum of all ranks' contiguous x, of its shape; the same bits on each rank.

    rooms [2 * ranks * limit] of x's dtype and counts [ranks * chunks] int32: of every rank, as this GPU sees them, zero
    at first. calls [chunks] int32: this rank's.
    """
    y = torch.empty_like(x)
    if x.numel():
        ranks, block = len(rooms), CHUNK // x.element_size()
        _sum[(triton.cdiv(x.numel(), block),)](
            x, y, rooms, counts, rooms[rank], counts[rank], calls, x.numel(), len(rooms[0]) // (2 * ranks), len(calls),
            RANK=rank, RANKS=ranks, BLOCK=block, **EARLY,
        )  # fmt: skip
    return y
