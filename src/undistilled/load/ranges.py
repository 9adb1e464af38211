"""One tensor into its place, range by range of rows: read, checked, turned into the planned scheme, copied."""

from __future__ import annotations

import math

import torch

from .. import scheme as schemes
from ..checkpoint.source import Source
from ..errors import BadArtefact
from ..ops.cpu.matrix import lay
from ..ops.linear import dense
from ..plan.cost import RANGE
from ..plan.cut import Slice
from ..scheme import Stored
from ..scheme.across import Across
from ..scheme.base import Parts, Scheme, quantum

WHOLE = Slice()


def fill(target: Stored, source: Source, name: str, place: Slice = WHOLE) -> None:
    """Stream `place` of one tensor into `target`, each range of rows checked for NaN and infinity."""
    if 0 in target.shape:  # a rank without a part of a SwiGLU
        return
    rows, matrix = target.shape[0], len(target.shape) > 1
    window = Window(target, source, name, place)
    step = window.step if matrix else rows
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        parts = window.parts(start, stop)
        if isinstance(target.scheme, Across):
            parts = lay(target.scheme, parts)
        into = target.narrow("out", start, stop) if matrix else target
        for part, tensor in into.parts.items():
            tensor.copy_(parts[part])


def apart(scheme: Scheme) -> bool:
    """Whether a range of inputs has the same parts alone as in its row: no part belongs to a whole row."""
    return all(any(d.axis == "in" and d.quantum for d in dims) for _, dims in scheme.layout().values())


class Window:
    """Rows of what a rank holds of one tensor, in the scheme that it holds it in, by rows."""

    def __init__(self, target: Stored, source: Source, name: str, place: Slice) -> None:
        self.target, self.source, self.name = target, source, name
        self.scheme = target.scheme.of if isinstance(target.scheme, Across) else target.scheme
        self.native = source.scheme(name)
        self.shape = tuple(source.shape(name))
        self.first = place.start if place.axis == "out" else 0
        self.columns = (place.start, place.stop) if place.axis == "in" else None

    @property
    def step(self) -> int:
        """Rows in a range: about RANGE elements, whole quanta of both schemes."""
        together = math.lcm(schemes.row_quantum(self.target.scheme), self._together("out"))
        return max(1, RANGE // self.target.shape[1] // together) * together

    def _together(self, axis: str) -> int:
        return quantum(schemes.get(self.native), axis) if self.native is not None else 1

    def parts(self, start: int, stop: int) -> Parts:
        """Rows [start, stop) of the target; what was read is checked before it is turned into anything."""
        start, stop = start + self.first, stop + self.first
        if self.native == self.scheme.name:
            parts = self.source.parts(self.name, start, stop, self.columns)
            self._check_finite(parts)
            return parts
        if self.columns is None or apart(self.scheme):
            return self._compressed(self._values(start, stop, self.columns))
        whole = self._compressed(self._values(start, stop, None))
        return Stored(self.scheme, (stop - start, self.shape[1]), whole).narrow("in", *self.columns).parts

    def _values(self, start: int, stop: int, columns: tuple[int, int] | None) -> torch.Tensor:
        """Dense rows [start, stop), of these columns; reads whole quanta of the scheme that they are stored in."""
        if self.native is None:
            values = self.source.dense(self.name, start, stop)
            self._check_finite({"values": values})
            return values if columns is None else values[:, slice(*columns)]
        rows = _whole(start, stop, self._together("out"), self.shape[0])
        wide = columns and _whole(*columns, self._together("in"), self.shape[1])
        parts = self.source.parts(self.name, *rows, wide)
        self._check_finite(parts)
        extent = (rows[1] - rows[0], *((wide[1] - wide[0],) if wide else self.shape[1:]))
        values = dense(Stored(schemes.get(self.native), extent, parts), torch.float32)[start - rows[0] : stop - rows[0]]
        return values[:, columns[0] - wide[0] : columns[1] - wide[0]] if columns and wide else values

    def _compressed(self, values: torch.Tensor) -> Parts:
        """float16 overflows where the values that were read do not."""
        parts = self.scheme.compress(values)
        if any(t.dtype is torch.float16 and not t.isfinite().all() for t in parts.values()):
            raise BadArtefact(
                f"{self._where} overflows the float16 numbers of {self.scheme.name}.",
                "Use bf16, int8 or fp8_block.",
            )
        return parts

    def _check_finite(self, parts: Parts) -> None:
        for part, tensor in parts.items():
            if tensor.dtype is torch.float8_e4m3fn:
                bad = ((tensor.view(torch.uint8) & 127) == 127).any()
            elif tensor.dtype.is_floating_point:
                bad = ~tensor.isfinite().all()
            else:
                continue
            if bad:
                raise BadArtefact(f"{self._where} holds NaN or infinity ({part}).", "Download it again.")

    @property
    def _where(self) -> str:
        return f"{self.source.files[0].parent}: tensor {self.name!r}"


def _whole(start: int, stop: int, together: int, size: int) -> tuple[int, int]:
    """[start, stop) grown to whole quanta of an axis of `size`."""
    return start - start % together, min(size, -(-stop // together) * together)
