"""Sums over ranks' memory, a rank after another: the last one finds all parts there, and must not wait.

Ranks that wait for each other are two GPUs' to try: tests/matrix/test_layouts_gpus.py. (Streams of one GPU would wait
for good where a kernel is loaded or memory is taken meanwhile.)
"""

import pytest
import torch

pytest.importorskip("triton")
from undistilled.ops.triton.pushed import CHUNK, summed

pytestmark = [pytest.mark.gpu, pytest.mark.interpreted]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 1 << 14
HERE = 1 << 30  # a count that keeps nobody waiting


class Ranks:
    def __init__(self, ranks, dtype):
        size, chunks = 2 * ranks * LIMIT // dtype.itemsize, LIMIT // CHUNK
        self.rooms = tuple(torch.zeros(size, dtype=dtype, device=DEVICE) for _ in range(ranks))
        self.counts = tuple(torch.zeros(ranks * chunks, dtype=torch.int32, device=DEVICE) for _ in range(ranks))
        self.calls = [torch.zeros(chunks, dtype=torch.int32, device=DEVICE) for _ in range(ranks)]

    def sum(self, parts, last):
        """What the rank `last` has after all others have said their part, without waiting."""
        for rank in (r for r in range(len(parts)) if r != last):
            before = self.counts[rank].clone()
            self.counts[rank].fill_(HERE)
            summed(parts[rank], self.rooms, self.counts, self.calls[rank], rank)
            self.counts[rank].copy_(before)
        return summed(parts[last], self.rooms, self.counts, self.calls[last], last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_are_added_in_the_order_of_ranks(ranks, dtype):
    """The same bits whoever adds: the float32 sum in the ranks' order, rounded once. Sizes in turn, rooms by turns."""
    for last in range(ranks):
        group = Ranks(ranks, dtype)
        for size in (1, 1000, LIMIT // dtype.itemsize, 17, 1024, LIMIT // dtype.itemsize - 5):
            parts = [torch.randn(size, device=DEVICE).to(dtype) for _ in range(ranks)]
            total = parts[0].float()
            for part in parts[1:]:
                total = total + part.float()
            assert torch.equal(group.sum(parts, last), total.to(dtype)), (last, size)


def test_a_part_lies_where_the_call_before_is_not_read():
    """Two calls' parts are there at once: who is a call ahead does not write over what the other still reads."""
    group, ones = Ranks(2, torch.float32), torch.ones(8, device=DEVICE)
    for call in (1, 2):
        group.counts[0].fill_(HERE)
        summed(ones * call, group.rooms, group.counts, group.calls[0], 0)
    assert summed(ones, group.rooms, group.counts, group.calls[1], 1).eq(2).all()
    assert summed(ones, group.rooms, group.counts, group.calls[1], 1).eq(3).all()
