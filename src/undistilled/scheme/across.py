"""Codes of 4 or 8 bits and FP8 as CPU kernels read them fastest: 16 outputs side by side. Never in a file.

`values` are, for 16 outputs and 32 inputs, a vector of 16 lanes for every eight inputs (of 4 bits) or four (of 8); a
lane is an output's 4 bytes of these inputs. A byte's low and high nibble are inputs 4 apart, and the bytes hold inputs
0, 2, 1, 3, so that even bytes are neighbours, and odd ones. All other parts have the outputs last: [out/16, ..., 16];
what many outputs share stays as it is. The bytes are as many as before, in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Dim
from .fp8_block import BLOCK, Fp8Block
from .grouped import Grouped
from .int8 import Int8
from .packing import QUANTUM, pack, unpack

if TYPE_CHECKING:
    import torch

    from .base import Parts

LANES = 16  # outputs side by side


@dataclass(frozen=True)
class Across:
    """`of`, a scheme by rows, lying across."""

    of: Int8 | Grouped | Fp8Block

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def group(self) -> int:
        return BLOCK if isinstance(self.of, Fp8Block) else self.of.group

    @property
    def bits(self) -> int:
        return getattr(self.of, "bits", 8)

    @staticmethod
    def suits(scheme: object, shape: tuple[int, ...]) -> bool:
        """Whether a weight [..., out, in] of that scheme can lie so: whole blocks, none of which two scales share."""
        return Across.takes(scheme) and len(shape) > 1 and shape[-2] % LANES == 0 and shape[-1] % QUANTUM == 0

    @staticmethod
    def takes(scheme: object) -> bool:
        """Whether a scheme's codes can lie so, where the shape allows."""
        if isinstance(scheme, Fp8Block):
            return True
        bits = 8 if isinstance(scheme, Int8) else scheme.bits if isinstance(scheme, Grouped) else None
        return bits in (4, 8) and scheme.group % QUANTUM == 0  # type: ignore[attr-defined]

    def layout(self):
        values = ("uint8", (Dim("out", LANES), Dim("in", QUANTUM), Dim(None, size=LANES * QUANTUM * self.bits // 8)))
        parts = {}
        for name, (dtype, (out, *dims)) in self.of.layout().items():
            across = dtype, (Dim("out", LANES), *dims, Dim(None, size=LANES))
            parts[name] = values if name == "values" else across if out.quantum == 1 else (dtype, (out, *dims))
        return parts

    def compress(self, w: torch.Tensor) -> Parts:
        return self.arranged(self.of.compress(w))

    def decompress(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.of.decompress(self.by_rows(parts), shape, dtype)

    def arranged(self, parts: Parts) -> Parts:
        """Parts by rows -> parts across."""
        return {n: self._bytes(p) if n == "values" else self._outputs_last(n, p) for n, p in parts.items()}

    def by_rows(self, parts: Parts) -> Parts:
        """Parts across -> parts by rows."""
        return {n: self._values(p) if n == "values" else self._outputs_first(n, p) for n, p in parts.items()}

    def _bytes(self, values: torch.Tensor) -> torch.Tensor:
        import torch

        codes = values.view(torch.uint8) if self.bits == 8 else unpack(values, self.bits)
        codes = codes.unflatten(-1, (-1, self.bits, 8 // self.bits, 4)).unflatten(-5, (-1, LANES))
        few, *more = codes.movedim(-5, -3).unbind(-2)  # [panels, blocks, vectors, LANES, 4], by place in a byte
        joined = few | more[0] << self.bits if more else few
        return _even_first(joined).flatten(-3)

    def _values(self, across: torch.Tensor) -> torch.Tensor:
        import torch

        held = _even_first(across.unflatten(-1, (self.bits, LANES, 4)))
        pieces = [held >> shift & ((1 << self.bits) - 1) for shift in range(0, 8, self.bits)]
        codes = torch.stack(pieces, -2).movedim(-3, -5).flatten(-4).flatten(-3, -2)  # [rows, inputs]
        return pack(codes, self.bits) if self.bits < 8 else codes.view(getattr(torch, self.of.layout()["values"][0]))

    def _outputs(self, name: str) -> int | None:
        """Where a part has its outputs, by rows; None where several share what it holds."""
        _, (out, *inputs) = self.of.layout()[name]
        return -1 - len(inputs) if out.quantum == 1 else None

    def _outputs_last(self, name: str, part: torch.Tensor) -> torch.Tensor:
        at = self._outputs(name)
        return part if at is None else part.unflatten(at, (-1, LANES)).movedim(at, -1)

    def _outputs_first(self, name: str, part: torch.Tensor) -> torch.Tensor:
        at = self._outputs(name)
        return part if at is None else part.movedim(-1, at).flatten(at - 1, at)


def _even_first(fours: torch.Tensor) -> torch.Tensor:
    """Inputs 0, 2, 1, 3 of each [..., 4]; its own inverse."""
    return fours.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2)
