"""Sums of few rows over GPUs that write into each other's memory, where NCCL takes several times as long.

PyTorch's symmetric memory (https://docs.pytorch.org/docs/2.11/symmetric_memory.html) maps it; multicast is not used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

DTYPES = (torch.bfloat16, torch.float32)


class OneShot:
    """Memory of a group's GPUs for sums of up to `limit` bytes. Every rank makes it, then the same sums in one order.

    name: of this group in this run, and never used again: PyTorch keeps what it knows of a name.
    Raises RuntimeError where the GPUs cannot reach each other's memory, or ImportError without Triton.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, device: torch.device, limit: int) -> None:
        from torch._C._distributed_c10d import _register_process_group
        from torch.distributed import _symmetric_memory as symmetric

        from ..ops.triton.pushed import CHUNK

        # its own name is a number, which the next run's group has too
        _register_process_group(name, group)  # type: ignore[arg-type]
        self.limit, self.rank = limit, group.rank()
        ranks, chunks = range(group.size()), limit // CHUNK
        room, counts = 2 * len(ranks) * limit, len(ranks) * chunks
        memory = symmetric.empty(room + 4 * counts, dtype=torch.uint8, device=device).zero_()
        found = symmetric.rendezvous(memory, name)  # type: ignore[arg-type]
        if found is None:
            raise RuntimeError("the GPUs of this stage do not map each other's memory")
        found.barrier()  # all is zero before anybody writes
        self.rooms = {d: tuple(found.get_buffer(r, (room // d.itemsize,), d) for r in ranks) for d in DTYPES}
        self.counts = tuple(found.get_buffer(r, (counts,), torch.int32, room // 4) for r in ranks)
        self.calls = torch.zeros(chunks, dtype=torch.int32, device=device)
        self.memory = memory

    def takes(self, nbytes: int, dtype: torch.dtype) -> bool:
        return dtype in self.rooms and nbytes <= self.limit

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' contiguous x, of its shape: in the order of the ranks, the same bits on each."""
        from ..ops.triton.pushed import summed

        return summed(x, self.rooms[x.dtype], self.counts, self.calls, self.rank)
