"""Memory for weights on a CPU, in huge pages where the system has them.

Every token reads all weights once, from one end to the other: with pages of 4 KB a processor looks up an address, and
starts to foresee the next ones, 512 times as often as with pages of 2 MB.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a huge page
STRETCH = 256 << 20  # what is asked for at a time; what is never touched takes no memory
LINE = 64  # tensors begin on lines of the cache


class Pages:
    """Tensors one behind another; their memory goes back to the system with the last of a stretch."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU that holds anything. OSError or RuntimeError where there is no memory."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        if nbytes > len(self._left):
            self._left = _stretch(max(nbytes, STRETCH))
        taken, self._left = self._left[:nbytes], self._left[-(-nbytes // LINE) * LINE :]
        return taken.view(dtype).view(shape)


def _stretch(nbytes: int) -> Tensor:
    """At least so many bytes, from the beginning of a page on."""
    area = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :]
