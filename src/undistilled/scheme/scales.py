"""How the scales of groups are stored: one row a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .fp8_block import LARGEST

if TYPE_CHECKING:
    import torch

    from .base import Parts


@dataclass(unsafe_hash=True)
class Float16:
    dtype: str = "float16"
    by_row: bool = False

    def compress(self, scales: torch.Tensor) -> Parts:
        return {"scales": scales.half()}

    def decompress(self, parts: Parts) -> torch.Tensor:
        return parts["scales"].float()


@dataclass(unsafe_hash=True)
class E4m3:
    """FP8 times one bfloat16 a row of the weight, which makes the row's largest scale 448 or a little less."""

    dtype: str = "float8_e4m3fn"
    by_row: bool = True

    def compress(self, scales: torch.Tensor) -> Parts:
        import torch

        rows = (scales.abs().amax(-1) / LARGEST).bfloat16()
        safe = rows.float().masked_fill_(~(rows > 0), 1.0)  # torch.where would copy the 1 to a GPU, and wait
        codes = (scales / safe[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"scales": codes, "multipliers": rows}

    def decompress(self, parts: Parts) -> torch.Tensor:
        return parts["scales"].float() * parts["multipliers"].float()[..., None]


@dataclass(unsafe_hash=True)
class E8m0:
    """2^(code - 127): the power of two that holds the group's largest value with the least loss of range."""

    dtype: str = "uint8"
    by_row: bool = False

    def compress(self, scales: torch.Tensor) -> Parts:
        import torch

        exponent = scales.masked_fill(~(scales > 0), 2.0**-127).log2().ceil()
        return {"scales": (exponent + 127).clamp(0, 254).to(torch.uint8)}

    def decompress(self, parts: Parts) -> torch.Tensor:
        import torch

        return torch.exp2(parts["scales"].float() - 127)


class Format(Protocol):
    """`by_row`: each row of the weight has a multiplier too."""

    dtype: str
    by_row: bool

    def compress(self, scales: torch.Tensor) -> Parts:
        """Scales [..., out, groups] in float32, rounded, as parts."""
        ...

    def decompress(self, parts: Parts) -> torch.Tensor:
        """The parts as float32 [..., out, groups]."""
        ...


FORMATS: dict[str, Format] = {"float16": Float16(), "e4m3": E4m3(), "e8m0": E8m0()}
