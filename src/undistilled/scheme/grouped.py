"""Codes of 2 to 6 bits by groups of inputs: a value is level[code] * scale, plus a minimum where there is one.

Families, by their levels:

- int2 … int6: 0, 1, …, 2^b - 1 and a minimum a group ("asymmetric"); "-sym": the same less 2^(b-1), no minimum.
  Scales and minimums are float16. "int4" is groups of 128; GGUF's Q4_1 and Q4_0 are int4-g32 and int4-g32-sym.
- nl2 … nl6: the levels that lose least on a normal distribution (Max 1960, "Quantizing for minimum distortion"), as
  integers of 127ths. A scale is FP8 E4M3 times one bfloat16 a row.
- mxfp4: FP4 E2M1 in groups of 32, scales powers of two (OCP Microscaling Formats 1.0). nvfp4: groups of 16, scales
  FP8 E4M3 times one bfloat16 a row (NVIDIA's has one a tensor: all rows the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from .base import Dim
from .int8 import grouped
from .ladder import Ladder, by_code, even, inverse, ladder, taken
from .packing import QUANTUM, pack, unpack
from .scales import FORMATS

if TYPE_CHECKING:
    import torch

    from .base import Parts

POSITIVE = {
    2: (38, 127),
    3: (14, 45, 79, 127),
    4: (6, 18, 31, 44, 58, 75, 96, 127),
    5: (3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127),
    6: (
        1,
        3,
        6,
        8,
        10,
        13,
        15,
        17,
        20,
        22,
        24,
        27,
        30,
        32,
        35,
        38,
        40,
        43,
        46,
        49,
        53,
        56,
        60,
        64,
        68,
        73,
        78,
        84,
        91,
        99,
        110,
        127,
    ),
}
NORMAL = {bits: (*(-float(x) for x in reversed(half)), *map(float, half)) for bits, half in POSITIVE.items()}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Grouped:
    """`group` inputs share a scale. `levels` by code; `affine`: a minimum is stored too."""

    name: str
    bits: int
    group: int
    levels: tuple[float, ...]
    scale: str = "float16"  # a row of scales.FORMATS
    affine: bool = False

    def layout(self):
        form = FORMATS[self.scale]
        by_group = (Dim("out"), Dim("in", self.group))
        values = ("uint8", (Dim("out"), Dim("in", QUANTUM), Dim(None, size=4 * self.bits)))
        parts = {"values": values, "scales": (form.dtype, by_group)}
        if self.affine:
            parts["minimums"] = ("float16", by_group)
        if form.by_row:
            parts["multipliers"] = ("bfloat16", (Dim("out"),))
        return parts

    def compress(self, w: torch.Tensor) -> Parts:
        w = w.float()
        meta = self.fit(w)
        return {"values": self.packed(self.codes(w, meta)), **meta}

    def decompress(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        codes = unpack(parts["values"], self.bits)[..., : shape[-1]]
        return self.dense(codes, parts).to(dtype)

    def fit(self, w: torch.Tensor) -> Parts:
        """Scales (and minimums) of [..., out, in] for the whole range of every group: the parts beside `values`."""
        groups = grouped(w, self.group)
        if w.shape[-1] % self.group:
            groups = _edge_filled(groups, w.shape[-1] % self.group, w)
        lowest, highest = groups.aminmax(dim=-1)
        if self.affine:
            return self.stored((highest - lowest) / self.levels[-1], lowest)
        least, most = min(self.levels), max(self.levels)
        if -least > most:  # the value of largest magnitude becomes the lowest level
            return self.stored(highest.where(highest > -lowest, lowest) / least)
        return self.stored(highest.maximum(-lowest) / most)

    def stored(self, scales: torch.Tensor, minimums: torch.Tensor | None = None) -> Parts:
        """Scales [..., out, groups] in float32 as the parts that hold them, rounded."""
        parts = FORMATS[self.scale].compress(scales)
        return parts if minimums is None else {**parts, "minimums": minimums.half()}

    def steps(self, meta: Parts) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scales, minimums) [..., out, groups] in float32, as rounded."""
        low = meta.get("minimums")
        return FORMATS[self.scale].decompress(meta), None if low is None else low.float()

    def codes(self, w: torch.Tensor, meta: Parts) -> torch.Tensor:
        """The code of the level nearest to each of [..., out, in], uint8."""
        scales, low = self.steps(meta)
        groups = grouped(w, self.group)
        return self.nearest(groups, scales[..., None], None if low is None else low[..., None]).flatten(-2)[
            ..., : w.shape[-1]
        ]

    def nearest(self, w: torch.Tensor, scales: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
        """Codes of w for scales (and minimums) that broadcast with it."""
        by = inverse(scales)
        return self.rank(w * by if low is None else w.mul(by).add_(-low * by))

    def rank(self, x: torch.Tensor) -> torch.Tensor:
        """Codes uint8 of the levels nearest to x."""
        return self.ladder(x.device).rank(x)

    def snapped(self, x: torch.Tensor) -> torch.Tensor:
        """The levels nearest to x, float32."""
        return self.ladder(x.device).snapped(x)

    def ladder(self, device: torch.device) -> Ladder:
        """How the level nearest to a value is found there."""
        return ladder(self.levels, device)

    def level(self, codes: torch.Tensor) -> torch.Tensor:
        """The levels of codes, float32."""
        if self.even:
            return codes.float() + self.levels[0]
        return taken(by_code(self.levels, codes.device), codes.int())

    @cached_property
    def even(self) -> bool:
        """Whether levels are neighbouring integers."""
        return even(self.levels)

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., out, in] -> the part `values`."""
        import torch.nn.functional as F

        return pack(F.pad(codes, (0, -codes.shape[-1] % QUANTUM)), self.bits)

    def dense(self, codes: torch.Tensor, meta: Parts) -> torch.Tensor:
        """Codes [..., out, in] -> values in float32."""
        scales, low = self.steps(meta)
        value = self.level(grouped(codes, self.group)) * scales[..., None]
        return (value if low is None else value + low[..., None]).flatten(-2)[..., : codes.shape[-1]]


def _edge_filled(groups: torch.Tensor, rest: int, w: torch.Tensor) -> torch.Tensor:
    """Padding must not widen the last group's range."""
    filled = groups.clone()
    filled[..., -1, rest:] = w[..., -1:]
    return filled


@cache
def normal(bits: int, group: int) -> Grouped:
    """Levels of a normal distribution, by groups: nl2 … nl6."""
    return Grouped(f"nl{bits}-g{group}", bits, group, NORMAL[bits], "e4m3")


def _integers(bits: int):
    steps = tuple(float(q) for q in range(1 << bits))
    centred = tuple(q - (1 << (bits - 1)) for q in steps)
    for group in (128, 64, 32):
        name = f"int{bits}" if group == 128 else f"int{bits}-g{group}"
        yield Grouped(name, bits, group, steps, affine=True)
        yield Grouped(f"{name}-sym", bits, group, centred)


SCHEMES = (
    *(scheme for bits in (4, 6, 5, 3, 2) for scheme in _integers(bits)),
    *(normal(bits, group) for bits in (6, 5, 4, 3, 2) for group in (32, 64, 128, 16)),
    Grouped("mxfp4", 4, 32, FP4, "e8m0"),
    Grouped("nvfp4", 4, 16, FP4, "e4m3"),
)
