"""Sums of few rows over GPUs that write into each other's memory, where NCCL takes several times as long.

PyTorch's symmetric memory (https://docs.pytorch.org/docs/2.11/symmetric_memory.html) maps it; multicast is not used.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

DTYPES = (torch.bfloat16, torch.float32)


class Counted(dist.Store):
    """A store in which exchanges count from 0 in each process. PyTorch numbers those of symmetric memory by process,
    over all runs, and ranks whose numbers differ wait for each other for good: rank 0 may have been one before."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store = store
        self.first: dict[str, int] = {}

    def key(self, key: str) -> str:
        """Of "what/number" or "what/number/rank", the number since the first of `what` that was asked for."""
        what, *rest = key.split("/")
        if not rest or not rest[0].isdecimal():
            return key
        first = self.first.setdefault(what, int(rest[0]))
        return "/".join((what, str(int(rest[0]) - first), *rest[1:]))

    def set(self, key: str, value: str) -> None:
        self.store.set(self.key(key), value)

    def get(self, key: str) -> bytes:
        return self.store.get(self.key(key))

    def add(self, key: str, amount: int) -> int:
        return self.store.add(self.key(key), amount)

    def check(self, keys: list[str]) -> bool:
        return self.store.check([self.key(key) for key in keys])

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self.store.wait([self.key(key) for key in keys], *timeout)


class OneShot:
    """Memory of a stage's GPUs for sums of up to `limit` bytes. Every rank makes it, then the same sums in one order.

    name: of the stage in this run, and never used again: PyTorch keeps what it knows of a name. rank: of `size` in it.
    store: where all ranks of the run meet.
    Raises RuntimeError where the GPUs cannot reach each other's memory, or ImportError without Triton.
    """

    def __init__(self, name: str, store: dist.Store, rank: int, size: int, device: torch.device, limit: int) -> None:
        from torch._C._distributed_c10d import ProcessGroup, _register_process_group
        from torch.distributed import _symmetric_memory as symmetric

        from ..ops.triton.pushed import CHUNK

        # a group without a backend: what maps memory asks for its ranks and their store alone, and does not keep it
        self.store = Counted(dist.PrefixStore(name, store))
        self.group = ProcessGroup(self.store, rank, size)
        _register_process_group(name, self.group)  # type: ignore[arg-type]
        self.limit, self.rank = limit, rank
        ranks, chunks = range(size), limit // CHUNK
        room, counts = 2 * size * limit, size * chunks
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
