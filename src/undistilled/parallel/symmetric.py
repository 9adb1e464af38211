"""Sums of few rows over GPUs that read each other's memory: one kernel, where NCCL takes several times as long.

PyTorch's symmetric memory, https://docs.pytorch.org/docs/2.11/symmetric_memory.html. Multicast is not used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

ALIGNED = 16  # bytes that the kernel reads at once


class OneShot:
    """A group's memory for sums of up to `limit` bytes. Every rank makes it, and then the same sums in the same order.

    Raises RuntimeError where the GPUs cannot read each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit: int) -> None:
        self.group, self.device, self.limit = group, device, limit
        self.slots = {dtype: self._slot(dtype) for dtype in (torch.bfloat16, torch.float32)}

    def _slot(self, dtype: torch.dtype) -> torch.Tensor:
        from torch.distributed import _symmetric_memory as symmetric

        slot = symmetric.empty(self.limit // dtype.itemsize, dtype=dtype, device=self.device)
        if symmetric.rendezvous(slot, self.group.group_name) is None:
            raise RuntimeError("the GPUs of this stage do not map each other's memory")
        return slot

    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype in self.slots and x.nbytes <= self.limit and x.nbytes % ALIGNED == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' contiguous x, of its shape: in the order of the ranks, the same bits on each."""
        slot = self.slots[x.dtype][: x.numel()]
        name = self.group.group_name
        return torch.ops.symm_mem.one_shot_all_reduce_copy(slot, x.view(-1), "sum", name).view_as(x)
