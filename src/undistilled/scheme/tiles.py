"""Dynamic blocks: a weight in tiles of `rows` x `cols`, each of them in 2 to 6 bits.

Every block of `rows` rows has the same number of tiles of each width, `counts`; which columns get which width is the
block's own `order`. So the shapes follow from the name alone, a shard along "out" is a slice, and a kernel reads a
block's tiles of one width as one run, without a branch: only the place in x comes from `order`. Sections do the same
for a shard along "in": each of the weight's equal ranges of inputs has `counts` tiles.

A tile's values are levels of a normal distribution (scheme/grouped.py, nl2 … nl6) times a scale for each of its rows,
FP8 E4M3, times one bfloat16 a row of the weight. "tiles16x32-2x3-3x4-4x2": 9 tiles a section, 3 of them in 2 bits.
N rows, K inputs, B blocks of rows, S sections, T tiles a section, R rows and C columns of a tile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from .base import Dim
from .grouped import NORMAL, normal
from .ladder import inverse
from .packing import QUANTUM, pack, unpack
from .scales import E4m3

if TYPE_CHECKING:
    import torch

    from .base import Parts

NAME = re.compile(r"tiles(\d+)x(\d+)((?:-[2-6]x\d+)+)")
WIDTHS = tuple(NORMAL)


@dataclass(frozen=True)
class Tiles:
    """`counts`: (bits, tiles of that width in a section of a block of rows), bits ascending."""

    rows: int
    cols: int
    counts: tuple[tuple[int, int], ...]

    @cached_property
    def name(self) -> str:
        return f"tiles{self.rows}x{self.cols}" + "".join(f"-{b}x{n}" for b, n in self.counts)

    @property
    def section(self) -> int:
        """Inputs of a section."""
        return self.cols * sum(n for _, n in self.counts)

    @property
    def widths(self) -> list[int]:
        """Bits of the tiles in the order in which they are stored, for one section of a block."""
        return [b for b, n in self.counts for _ in range(n)]

    def layout(self):
        block, section = Dim("out", self.rows), Dim("in", self.section)
        tiles = Dim(None, size=len(self.widths))
        parts = {
            "order": ("int16", (block, section, tiles)),
            "scales": ("float8_e4m3fn", (block, section, tiles, Dim(None, size=self.rows))),
            "multipliers": ("bfloat16", (block, Dim(None, size=self.rows))),
        }
        for bits, count in self.counts:
            inside = (Dim(None, size=count), Dim(None, size=self.rows), Dim(None, size=self.cols // 8 * bits))
            parts[f"values{bits}"] = ("uint8", (block, section, *inside))
        return parts

    def tiled(self, w: torch.Tensor) -> torch.Tensor:
        """[..., N, K] -> [..., B, S, T, R, C], padded with zeros."""
        import torch.nn.functional as F

        padded = F.pad(w, (0, -w.shape[-1] % self.section, 0, -w.shape[-2] % self.rows))
        cut = padded.unflatten(-1, (-1, len(self.widths), self.cols)).unflatten(-4, (-1, self.rows))
        return cut.movedim(-4, -2)

    def flat(self, tiles: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """[..., B, S, T, R, C] -> [..., N, K]."""
        return tiles.movedim(-2, -4).flatten(-5, -4).flatten(-3)[..., : shape[-2], : shape[-1]]

    def compress(self, w: torch.Tensor) -> Parts:
        """Rounded to nearest; the tiles with the largest values get the most bits."""
        tiles = self.tiled(w.float())
        order = tiles.square().sum((-1, -2)).argsort(dim=-1, stable=True)
        return self.assemble(tiles, self.full_range(tiles, order), order)

    def full_range(self, tiles: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Scales [..., B, S, T, R] in stored order that reach each tile row's largest value."""
        return self.sorted(tiles.abs().amax(-1), order) / NORMAL[self.counts[0][0]][-1]

    def sorted(self, by_tile: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[..., B, S, T, ...] in stored order."""
        index = order.long()
        extra = by_tile.dim() - index.dim()
        index = index[(..., *[None] * extra)].expand(*index.shape, *by_tile.shape[index.dim() :])
        return by_tile.gather(-1 - extra, index)

    def stored_scales(self, scales: torch.Tensor) -> Parts:
        """Scales [..., B, S, T, R] as parts: a row's multiplier serves all its tiles."""
        rows = scales.movedim(-1, -3)  # [..., B, R, S, T]
        parts = E4m3().compress(rows.flatten(-2))
        codes = parts["scales"].unflatten(-1, rows.shape[-2:]).movedim(-3, -1)
        return {"scales": codes.contiguous(), "multipliers": parts["multipliers"]}

    def read_scales(self, parts: Parts) -> torch.Tensor:
        """Scales [..., B, S, T, R] in float32, in stored order."""
        return parts["scales"].float() * parts["multipliers"].float()[..., None, None, :]

    def assemble(self, tiles: torch.Tensor, scales: torch.Tensor, order: torch.Tensor) -> Parts:
        """Parts of values [..., B, S, T, R, C] with scales [..., B, S, T, R] (in stored order), nearest levels."""
        meta = self.stored_scales(scales)
        steps = self.read_scales(meta)
        scaled = self.sorted(tiles, order) * inverse(steps)[..., None]
        return self.pack(nearest(scaled, self.counts), order, meta)

    def pack(self, codes: torch.Tensor, order: torch.Tensor, meta: Parts) -> Parts:
        """Codes uint8 [..., B, S, T, R, C] in stored order -> parts."""
        import torch

        parts = {"order": order.to(torch.int16), **meta}
        at = 0
        for bits, count in self.counts:
            parts[f"values{bits}"] = pack(codes[..., at : at + count, :, :], bits).flatten(-2).contiguous()
            at += count
        return parts

    def decompress(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        levels = []
        for bits, _ in self.counts:
            packed = parts[f"values{bits}"].unflatten(-1, (self.cols // QUANTUM, 4 * bits))
            levels.append(normal(bits, self.cols).level(unpack(packed, bits)))
        values = torch.cat(levels, -3) * self.read_scales(parts)[..., None]
        place = parts["order"].long().argsort(-1)
        return self.flat(self.sorted(values, place), shape).to(dtype)


def nearest(scaled: torch.Tensor, counts: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Codes uint8 of [..., T, R, C], whose first tiles are in the first width, and so on."""
    import torch

    codes, at = [], 0
    for bits, count in counts:
        codes.append(normal(bits, QUANTUM).rank(scaled[..., at : at + count, :, :]))
        at += count
    return torch.cat(codes, -3)


def parse(name: str) -> Tiles | None:
    """The scheme of a name such as "tiles16x32-2x3-4x6"; None where it is none."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    pairs = [tuple(map(int, pair.split("x"))) for pair in found[3][1:].split("-")]
    rows, cols = int(found[1]), int(found[2])
    counts = tuple((b, n) for b, n in pairs)
    ascending = all(a < b for (a, _), (b, _) in pairwise(counts))
    if not rows or not cols or cols % QUANTUM or not ascending or not all(n for _, n in counts):
        return None
    return Tiles(rows, cols, counts)
