"""What the kernels must know of a scheme: how 32 inputs lie in bytes, what a code means, where its scale is.

A `Form` is what kernels are compiled for. Words: a quantum is 32 inputs of a row. A piece is the codes of a
quantum that one shift takes out of consecutive bytes; `unit` is their number. Codes of 4 bits make two pieces of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ...scheme import Stored, fp8_block, fp8_channel, grouped, int8
from ...scheme.packing import PLANES

NONE, FLOAT32, FLOAT16, E4M3, E8M0 = range(5)  # how a group's scale is stored


@dataclass(frozen=True)
class Form:
    """`group`: inputs that share a scale; 0 where only rows have one. `tall`: rows that share it."""

    kind: str  # int8, fp8, codes (evenly spaced) or table
    planes: tuple[int, ...]  # bits
    group: int
    tall: int = 1
    scale: int = NONE
    affine: bool = False
    by_row: bool = False  # a multiplier for each row
    offset: int = 0  # of kind codes: the value of code 0
    table: tuple[int, ...] = ()  # of kind table: value of each code, integers
    factor: float = 1.0  # what the table's values are multiplied by

    @property
    def unit(self) -> int:
        return 32 if self.planes == (8,) else 4 * self.planes[-1]

    @property
    def pieces(self) -> int:
        return 32 // self.unit

    @property
    def quantum_bytes(self) -> int:
        return 4 * sum(self.planes)

    @property
    def second(self) -> bool:
        """Whether a code has bits in a second plane."""
        return len(self.planes) == 2

    @property
    def runs(self) -> int:
        """Consecutive runs of `unit` bytes in the first plane of a quantum."""
        return self.planes[0] // self.planes[1] if self.second else 1

    @property
    def levels(self) -> int:
        return len(self.table)

    def taken(self, piece: int) -> tuple[int, int, int, int, int]:
        """How a piece comes out of its bytes: (shift right, mask), and of the second plane's (right, left, mask)."""
        first = self.planes[0]
        shift, mask = first * (piece // self.runs) % 8, (1 << first) - 1
        if not self.second:
            return (shift, mask, 0, 0, 0)
        width = self.planes[1]
        net = width * piece - first
        return (shift, mask, max(net, 0), max(-net, 0), ((1 << width) - 1) << first)

    def program(self, piece: int) -> str:
        """The PTX that does so."""
        from .ptx import program

        return program(self, piece)

    def columns(self, step: int, after: bool = True) -> int:
        """Columns that a row of activations takes in a step of inputs: one for each group there."""
        return max(1, step // self.group) if self.group and after else 1


@cache
def form_of(scheme: object) -> Form | None:
    """The form of a scheme that the kernels know, or None."""
    if isinstance(scheme, int8.Int8):
        if scheme.group == 0:
            return Form("int8", (8,), 0, by_row=True)
        return Form("int8", (8,), scheme.group, scale=FLOAT32)
    if isinstance(scheme, fp8_block.Fp8Block):
        return Form("fp8", (8,), fp8_block.BLOCK, tall=fp8_block.BLOCK, scale=FLOAT32)
    if isinstance(scheme, fp8_channel.Fp8Channel):
        return Form("fp8", (8,), 0, by_row=True)
    return _grouped(scheme) if isinstance(scheme, grouped.Grouped) else None


def _grouped(scheme: grouped.Grouped) -> Form | None:
    planes, levels = PLANES[scheme.bits], scheme.levels
    scale = {"float16": FLOAT16, "e4m3": E4M3, "e8m0": E8M0}[scheme.scale]
    by_row = scale == E4M3
    if scheme.even:
        offset = int(levels[0])
        return Form("codes", planes, scheme.group, 1, scale, scheme.affine, by_row, offset)
    if len(planes) > 1 and scheme.bits > 3:
        return None
    factor = 1.0 if all(level == int(level) for level in levels) else 0.5
    table = tuple(int(level / factor) for level in levels)
    return Form("table", planes, scheme.group, 1, scale, scheme.affine, by_row, table=table, factor=factor)


@dataclass(frozen=True)
class Arguments:
    """A weight as kernels take it. Parts that a form lacks are `values` again, never read."""

    form: Form
    parts: tuple  # values, scales, minimums, multipliers
    row_bytes: int
    groups: int  # scales in a row


def arguments(weight: Stored) -> Arguments:
    """The weight's arguments, worked out once and kept with it."""
    return weight.once("triton", _arguments)


def _arguments(weight: Stored) -> Arguments:
    import torch

    form = form_of(weight.scheme)  # type: ignore[arg-type]  # schemes are frozen
    assert form is not None
    parts, inputs = weight.parts, weight.shape[-1]
    values = _bytes(parts["values"].detach())
    row_bytes = inputs if form.planes == (8,) else -(-inputs // 32) * form.quantum_bytes
    scales = parts["scales"].detach()
    if form.scale == E4M3:
        scales = scales.view(torch.uint8)
    multipliers = values
    if form.by_row:
        multipliers = parts["multipliers"].detach() if "multipliers" in parts else scales
    lows = parts["minimums"].detach() if form.affine else values
    groups = -(-inputs // form.group) if form.group else 1
    return Arguments(form, (values, scales, lows, multipliers), row_bytes, groups)


def _bytes(values):
    import torch

    return values if values.dtype == torch.uint8 else values.view(torch.uint8)
