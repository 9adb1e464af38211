"""What a scheme is: how a weight is stored, as named parts that follow the weight's logical axes.

A weight has the axes ("out", "in"), or ("expert", "out", "in") for stacked experts. A scheme says
which parts (values, scales, minimums) hold it, how many elements of an axis one index of a part
covers (its quantum), and turns a dense tensor into parts and back. It never computes a layer.
Nothing here imports torch at the top, so that planning 671 B parameters starts at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

Parts = dict[str, "torch.Tensor"]
T = TypeVar("T")

BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
}


@dataclass(frozen=True)
class Dim:
    """One dimension of a part: `quantum` elements of logical `axis` for each index.

    `axis` None marks a dimension inside a quantum (16 bytes that hold 32 nibbles); it is never cut.
    """

    axis: str | None
    quantum: int = 1  # 0: the whole axis shares one index
    size: int = 0  # only where axis is None


@dataclass(frozen=True)
class PartSpec:
    """Shape and dtype of one part of a weight of a given logical shape."""

    dtype: str
    dims: tuple[Dim, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


class Scheme(Protocol):
    """A storage format. Instances are immutable and equal by name."""

    @property
    def name(self) -> str: ...

    def layout(self) -> dict[str, tuple[str, tuple[Dim, ...]]]:
        """Part name -> (dtype, dims) for a weight of axes (out, in)."""
        ...

    def compress(self, w: torch.Tensor) -> Parts:
        """Dense [..., out, in] -> parts, by rounding to nearest. Rows are independent at `row_quantum`."""
        ...

    def decompress(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Parts -> dense [..., out, in] of `dtype`."""
        ...


def _extent(dim: Dim, sizes: dict[str, int]) -> int:
    if dim.axis is None:
        return dim.size
    return -(-sizes[dim.axis] // (dim.quantum or sizes[dim.axis] or 1))  # a rank may hold nothing of a weight


def parts_of(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, PartSpec]:
    """The parts of a weight of logical shape (out, in), (expert, out, in) or, for vectors, (in,)."""
    sizes = dict(zip(("expert", "out", "in")[-len(shape) :], shape, strict=True))
    specs = {}
    for name, (dtype, dims) in scheme.layout().items():
        own = tuple(d for d in dims if d.axis is None or d.axis in sizes)
        if "expert" in sizes:
            own = (Dim("expert"), *own)
        extent = tuple(_extent(d, sizes) for d in own)
        specs[name] = PartSpec(dtype, own, extent)
    return specs


def bytes_of(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes that a weight of this logical shape takes in `scheme`."""
    return sum(part.nbytes for part in parts_of(scheme, shape).values())


def quantum(scheme: Scheme, axis: str) -> int:
    """The number of elements of an axis that no slice parts."""
    return math.lcm(*(d.quantum for _, dims in scheme.layout().values() for d in dims if d.axis == axis and d.quantum))


def row_quantum(scheme: Scheme) -> int:
    """The number of rows (axis "out") that must be compressed together."""
    return quantum(scheme, "out")


def cut(dim: Dim, start: int, stop: int, size: int) -> slice:
    """The indices of a part's dimension that hold elements [start, stop) of an axis of `size`.

    Quantum 0 means that the part holds for the whole axis: every slice keeps all of it.
    Raises ValueError where the range would cut a quantum.
    """
    if dim.quantum == 0:
        return slice(None)
    quantum = dim.quantum
    if start % quantum or (stop % quantum and stop != size):
        raise ValueError(f"[{start}, {stop}) of axis {dim.axis} ({size} long) cuts a quantum of {quantum}")
    return slice(start // quantum, -(-stop // quantum))


@dataclass
class Stored:
    """A weight in memory: its scheme, logical shape and the parts that hold it."""

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Parts
    products: str | None = None  # the dtype that a product rounds its activations to; None: they stay as they are
    kernels: dict[object, object] = field(default_factory=dict, repr=False)  # what each op resolved to

    def once(self, key: object, make: Callable[[Stored], T]) -> T:
        """make(self), kept under `key` of `kernels` and made once."""
        if key not in self.kernels:
            self.kernels[key] = make(self)
        return self.kernels[key]  # type: ignore[return-value]

    def narrow(self, axis: str, start: int, stop: int) -> Stored:
        """A view of elements [start, stop) along a logical axis; the one slicer of every scheme."""
        names = ("expert", "out", "in")[-len(self.shape) :]
        at = names.index(axis)
        parts = {}
        for name, spec in parts_of(self.scheme, self.shape).items():
            index = tuple(cut(d, start, stop, self.shape[at]) if d.axis == axis else slice(None) for d in spec.dims)
            parts[name] = self.parts[name][index]
        shape = (*self.shape[:at], stop - start, *self.shape[at + 1 :])
        return Stored(self.scheme, shape, parts, self.products)

    def expert(self, index: int) -> Stored:
        """One expert of a stacked weight, without its expert axis."""
        return Stored(self.scheme, self.shape[1:], {n: p[index] for n, p in self.parts.items()}, self.products)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a plain tensor of `dtype`."""
        return self.scheme.decompress(self.parts, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device
