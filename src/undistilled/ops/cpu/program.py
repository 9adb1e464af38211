"""Recorded passes: the native steps of one run of some Python, to be run again by one call into C.

While a program records, every native op that this thread runs is kept as well, with its pointers and sizes. The
tensors that are made then lie in an `Arena`, which outlives them, so that memory is reused in a replay as it was in the
recording. Whatever else PyTorch computes is foreign: a replay would leave it out, so a program that met such an
operation is good for nothing, and says which it was. What says that it comes `between`, as sums over ranks do, divides
a program into parts: a replay is a call into C for each part and, after it, Python for what came there.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import native

LINE = 64  # bytes


class Arena:
    """Memory for tensors that come and go in the same order each time; what was given back is given out again."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lent: list[tuple[StorageWeakRef, int, torch.Tensor]] = []

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """An uninitialised contiguous tensor of the shape and dtype of this one."""
        if tensor.numel() == 0:
            return tensor
        self._collect()
        nbytes = -(-tensor.numel() * tensor.element_size() // LINE) * LINE
        spare = self._free.setdefault(nbytes, [])
        memory = spare.pop() if spare else torch.empty(nbytes, dtype=torch.uint8)
        made = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        self._lent.append((StorageWeakRef(made.untyped_storage()), nbytes, memory))
        return made

    def _collect(self) -> None:
        lent, self._lent = self._lent, []
        for entry in lent:
            storage, nbytes, memory = entry
            if storage.expired():
                self._free[nbytes].append(memory)
            else:
                self._lent.append(entry)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        spare = sum(nbytes * len(memories) for nbytes, memories in self._free.items())
        return spare + sum(nbytes for _, nbytes, _ in self._lent)


_MAKE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


class _Watch(TorchDispatchMode):
    """Lets PyTorch make tensors, in a program's arena, and views of them; notes the first operation that is neither."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.foreign = ""
        self.paused = False

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is within is none of the program's business."""
        self.paused = True
        self.program.record(False)
        try:
            yield
        finally:
            self.paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would load its compiler to be told that it has nothing to do here: 76 MB and a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        if func in _MAKE and out.is_cpu and out.is_contiguous():
            return self.program.arena.like(out)
        if not self.foreign and not _is_view(func, args, kwargs, out):
            self.foreign = str(func)
        return out


_here = threading.local()


def foreign(what: str) -> None:
    """To be called by what works on tensors behind PyTorch's back and is no native op: a pass with it in is not
    recorded. Nothing happens where nothing is being recorded."""
    watch = getattr(_here, "watch", None)
    if watch is not None:
        watch.foreign = watch.foreign or what


def between(call: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """call(*tensors), whatever that does. Where a pass is being recorded, each replay calls it again at this place,
    with what then lies where these contiguous tensors lay, and puts the result where the first one is."""
    watch: _Watch | None = getattr(_here, "watch", None)
    if watch is None or watch.paused:
        return call(*tensors)
    with watch.elsewhere():
        found = call(*tensors)
        kept = watch.program.arena.like(found).copy_(found)
    given, place = [_alias(t) for t in tensors], _alias(kept)
    watch.program.divide(lambda: place.copy_(call(*given)))
    return kept


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which this does not keep from being given back."""
    if not tensor.is_contiguous():
        raise ValueError("what lies between parts of a program takes contiguous tensors")
    if tensor.numel() == 0:
        return tensor
    memory = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _is_view(func: Any, args: tuple, kwargs: dict | None, out: Any) -> bool:
    """Whether all that came out lies in the memory of what went in, and nothing was written."""
    given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    got = tree_leaves(out)
    same = all(isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in given for t in got)
    return bool(got) and same and not func._schema.is_mutable


@dataclass(frozen=True)
class StepTime:
    """A step of a program: its kernel, the bytes of weights it reads, and the seconds that it took."""

    name: str
    weights: int
    seconds: float


class _Part:
    """Steps that one call into C runs."""

    def __init__(self, lib: Any) -> None:
        self.lib, self.at = lib, lib.native_program()
        weakref.finalize(self, lib.native_program_free, self.at)

    def __len__(self) -> int:
        return self.lib.native_program_steps(self.at)

    def run(self, seconds: Any = None) -> None:
        if len(self):
            self.lib.native_program_run(self.at, seconds)


class Program:
    """The native steps of what ran within `recording`, and what came between them. Pointers are kept, not tensors:
    inputs, weights and caches must stay where they are, and what is made in between lies in the arena."""

    def __init__(self, arena: Arena) -> None:
        lib = native.library()
        if lib is None:
            raise RuntimeError(native.why_missing())
        self._lib, self.arena = lib, arena
        self.foreign = ""  # the operation that a replay would leave out
        self.parts = [_Part(lib)]
        self.between: list[Callable[[], object]] = []  # after each part but the last

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Runs what is within, and keeps its native steps."""
        self.record()
        try:
            with _Watch(self) as watch:
                _here.watch = watch
                yield
        finally:
            _here.watch = None
            self.record(False)
        self.foreign = watch.foreign

    def divide(self, call: Callable[[], object]) -> None:
        """While this is being recorded: a part ends here, and `call` follows."""
        self.between.append(call)
        self.parts.append(_Part(self._lib))
        self.record()

    def record(self, on: bool = True) -> None:
        """Whether what this thread runs from now on goes into the last part."""
        self._lib.native_program_record(self.parts[-1].at if on else None)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def barriers(self) -> int:
        """Steps that wait for all threads before they begin."""
        return sum(self._lib.native_program_apart(part.at, i) for part in self.parts for i in range(len(part)))

    def run(self) -> None:
        """All steps, in their order, on what the inputs hold now."""
        native.sized()
        for part, call in zip(self.parts, self.between, strict=False):
            part.run()
            call()
        self.parts[-1].run()

    def timed(self, times: int) -> list[StepTime]:
        """Runs `times` times with a barrier around every step, without what comes between; each step's mean time."""
        native.sized()
        return [step for part in self.parts for step in self._timed(part, times)]

    def _timed(self, part: _Part, times: int) -> list[StepTime]:
        lib, seconds = self._lib, (ctypes.c_double * len(part))()
        for _ in range(times):
            part.run(ctypes.cast(seconds, ctypes.c_void_p))
        return [
            StepTime(lib.native_program_name(part.at, i).decode(), lib.native_program_weights(part.at, i), s / times)
            for i, s in enumerate(seconds)
        ]
