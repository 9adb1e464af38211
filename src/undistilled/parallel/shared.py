"""Memory that the processes of a stage share, where they run on one machine: a sum of few rows is a copy and a look,
where sockets take hundreds of microseconds.

Every rank writes its part, then the number of the exchange; who sees the numbers of all reads all parts. Parts have two
places, by turns: who writes a place again has seen that the others were past reading it. That needs a processor that
lets nobody see two stores in another order, and two loads neither, since Python has no fences: x86.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import tempfile
import time
from functools import lru_cache

import torch

WORD = 8  # bytes of a number
LINE = 64  # bytes from one number to the next
LOOKS, YIELDS = 200, 2000  # before it lets others have the core, and before it sleeps
SHAPES = 64  # whose places are kept
NAP = 50e-6  # seconds
ORDERED = platform.machine() in ("x86_64", "AMD64")


def _made(path: str, nbytes: int) -> int:
    """The number of a new file with all of its memory taken: OSError here, where later it would be SIGBUS."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(number, 0, nbytes)
    except OSError:
        os.close(number)
        os.unlink(path)
        raise
    return number


class Shared:
    """Parts of up to `limit` bytes, of `ranks` processes of which this is number `mine`; the first one makes the
    memory, and `path` names it to the others. OSError where that is on another machine."""

    def __init__(self, path: str, ranks: int, mine: int, limit: int) -> None:
        self.ranks, self.mine, self.limit = ranks, mine, limit
        head = ranks * LINE
        nbytes = head + 2 * ranks * limit
        number = os.open(path, os.O_RDWR) if mine else _made(path, nbytes)
        self._memory = mmap.mmap(number, nbytes)
        os.close(number)
        self._numbers = memoryview(self._memory)[:head].cast("q")
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8, offset=head).view(ranks, 2, limit)
        self._number = 0
        self._parts = lru_cache(SHAPES)(self._places)  # a view takes PyTorch as long as a sum
        self.left = False  # by another rank: who waits gives up

    def gathered(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, of one contiguous shape; good until the next but one."""
        self._number += 1
        parts = self._parts(x.shape, x.dtype)[self._number % 2]
        parts[self.mine].copy_(x)
        self._numbers[self.mine * LINE // WORD] = self._number
        for rank in range(self.ranks):
            self._wait(rank * LINE // WORD)
        return parts

    @torch.inference_mode(False)  # they are written within that mode and without
    def _places(self, shape: torch.Size, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """By turn and rank, where parts of this shape lie."""
        nbytes = shape.numel() * dtype.itemsize
        return [
            [self._bytes[rank, turn, :nbytes].view(dtype).view(shape) for rank in range(self.ranks)] for turn in (0, 1)
        ]

    def _wait(self, at: int) -> None:
        numbers, number, looks = self._numbers, self._number, 0
        while numbers[at] < number:
            looks += 1
            if looks > LOOKS:
                os.sched_yield() if looks < YIELDS else time.sleep(NAP)
                if self.left:
                    raise RuntimeError("a rank of this stage was lost")


def place() -> str:
    """A name for such memory, in RAM where there is a file system for it."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return f"{folder}/undistilled-{secrets.token_hex(8)}"
