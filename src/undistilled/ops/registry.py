"""One table of computations. The body of an op is its reference; a faster kernel registers with a predicate.

A kernel is chosen once for a weight (its scheme, device and shape) and remembered there.
`UNDISTILLED_REFERENCE=1`, or `force_reference`, makes every op run its reference body.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..events import emit

_forced = bool(os.environ.get("UNDISTILLED_REFERENCE"))
_said: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Kernel:
    """A way to compute an op. `when` sees what the op's `subject` is; `where` and `why` are for people."""

    name: str
    run: Callable[..., Any]
    when: Callable[..., bool]
    why: str


class Op:
    """A computation with a reference body and faster kernels, newest registration first."""

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name = name
        self.reference = Kernel("reference", reference, lambda *_: True, reference.__doc__ or "")
        self.kernels: list[Kernel] = []
        self._chosen: dict[tuple, Kernel] = {}

    def register(self, name: str, when: Callable[..., bool], why: str) -> Callable:
        """Decorator: a kernel that serves wherever `when(subject)` holds."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels.insert(0, Kernel(name, run, when, why))
            return run

        return add

    def resolve(self, *subject: Any) -> Kernel:
        """The kernel for these arguments of the predicates."""
        if not _forced:
            for kernel in self.kernels:
                if kernel.when(*subject):
                    return kernel
        return self.reference

    def __call__(self, x: Any, *arguments: Any) -> Any:
        """Run the kernel that serves tensors like `x`, for ops whose predicates see its device and dtype and
        whether anything is differentiated."""
        key = (x.device.type, x.dtype, torch.is_inference_mode_enabled(), _forced)
        kernel = self._chosen.get(key)
        if kernel is None:
            kernel = self._chosen[key] = self.resolve(x)
        return kernel.run(x, *arguments)


OPS: dict[str, Op] = {}


def op(reference: Callable[..., Any]) -> Op:
    """Decorator: makes a function the reference body of an op of its name."""
    OPS[reference.__name__] = Op(reference.__name__, reference)
    return OPS[reference.__name__]


def say_fallback(op_name: str, subject: str, device: str) -> None:
    """Emit "op.fallback", once for each op, subject and device."""
    key = (op_name, subject, device)
    if key not in _said:
        _said.add(key)
        emit("op.fallback", op=op_name, subject=subject, device=device)


def forced() -> bool:
    """Whether every op runs its reference body."""
    return _forced


@contextmanager
def force_reference() -> Iterator[None]:
    """Within the block, weights that have not yet resolved a kernel resolve to the reference."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
