"""Sums of few rows over GPUs that read each other's memory: one kernel, where NCCL takes several times as long.

PyTorch's symmetric memory, https://docs.pytorch.org/docs/2.11/symmetric_memory.html. Multicast is not used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

ALIGNED = 16  # bytes that the kernel reads at once


class OneShot:
    """Memory of a group's GPUs for sums of up to `limit` bytes. Every rank makes it, then the same sums in one order.

    name: of this group in this run, and never used again: PyTorch keeps what it knows of a name.
    Raises RuntimeError where the GPUs cannot read each other's memory.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, device: torch.device, limit: int) -> None:
        from torch._C._distributed_c10d import _register_process_group

        self.name, self.device, self.limit = name, device, limit
        _register_process_group(name, group)  # type: ignore[arg-type]  # its own name is a number, which the next run's group has too
        self.slots = {dtype: self._slot(dtype) for dtype in (torch.bfloat16, torch.float32)}

    def _slot(self, dtype: torch.dtype) -> torch.Tensor:
        from torch.distributed import _symmetric_memory as symmetric

        slot = symmetric.empty(self.limit // dtype.itemsize, dtype=dtype, device=self.device)
        if symmetric.rendezvous(slot, self.name) is None:  # type: ignore[arg-type]
            raise RuntimeError("the GPUs of this stage do not map each other's memory")
        return slot

    def takes(self, nbytes: int, dtype: torch.dtype) -> bool:
        return dtype in self.slots and nbytes <= self.limit and nbytes % ALIGNED == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' contiguous x, of its shape: in the order of the ranks, the same bits on each."""
        slot = self.slots[x.dtype][: x.numel()]
        return torch.ops.symm_mem.one_shot_all_reduce_copy(slot, x.view(-1), "sum", self.name).view_as(x)
