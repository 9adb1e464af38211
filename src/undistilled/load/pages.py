"""Memory for weights on a CPU, in huge pages where the system has them.

Every token reads all weights once, from one end to the other: with pages of 4 KB a processor looks up an address, and
starts to foresee the next ones, 512 times as often as with pages of 2 MB. Where a process runs on cores of several
nodes, pages lie in the memory of all of these in turn, so that every thread reads at the speed of all.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import platform

import torch
from torch import Tensor

from ..plan.probe import node_cores

PAGE = 2 << 20  # bytes of a huge page
STRETCH = 256 << 20  # what is asked for at a time; what is never touched takes no memory
LINE = 64  # tensors begin on lines of the cache
MBIND, GET_MEMPOLICY = {"x86_64": 237, "aarch64": 235}, {"x86_64": 239, "aarch64": 236}  # system calls' numbers
DEFAULT, INTERLEAVE = 0, 3  # policies


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
    memory = memory[-memory.data_ptr() % PAGE :]
    nodes = tuple(node_cores())
    if len(nodes) > 1 and unbound():
        spread(memory, nodes)
    return memory


def unbound() -> bool:
    """Whether nobody said where this process' memory lies, as numactl does."""
    mode = ctypes.c_int(DEFAULT)
    number = GET_MEMPOLICY.get(platform.machine())
    known = number is not None and ctypes.CDLL(None).syscall(number, ctypes.byref(mode), None, 0, None, 0) == 0
    return known and mode.value == DEFAULT


def spread(memory: Tensor, over: tuple[int, ...]) -> bool:
    """Has pages of memory that was not touched yet come from these nodes in turn; whether the system took it."""
    number = MBIND.get(platform.machine())
    if number is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    mask = (ctypes.c_uint8 * (max(over) // 64 * 8 + 8))()
    for node in over:
        mask[node // 8] |= 1 << node % 8
    at, nbytes = ctypes.c_void_p(memory.data_ptr()), ctypes.c_ulong(memory.numel() // PAGE * PAGE)
    return ctypes.CDLL(None).syscall(number, at, nbytes, INTERLEAVE, mask, ctypes.c_ulong(8 * len(mask) + 1), 0) == 0
