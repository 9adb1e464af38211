"""What a weight may become, and what each would lose: schemes for all of it, and dynamic blocks.

Of the ways to give a weight's tiles their widths, those are options that some price of a byte makes best (Everett
1963): for a price, each tile takes the width with the least loss + price x bytes. Tiles are taken by their rank in
their block of rows, so that every block has the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import scheme as schemes
from ..checkpoint.source import Source
from ..model.weights import Weight
from ..scheme.tiles import WIDTHS, Tiles
from .solvers import tiles as tile_solver

if TYPE_CHECKING:
    from .choose import Choice

WHOLE = ("int8", "int8-g128")  # schemes of whole weights beside dynamic blocks, which end at 6 bits
ROWS, COLS = 16, (32, 64, 128)  # of a tile
PRICES = 24  # of a byte, from one that buys no bit to one that buys all
RANKS = 24  # groups of tiles that take one width together
AT_ONCE = 4 << 20  # values of stacked experts that are worked on together


@dataclass(frozen=True)
class Option:
    scheme: str
    loss: float  # nats a token, before a solver makes up for some of it
    nbytes: int


def smallest(weight: Weight) -> list[str]:
    """The schemes of which one takes the fewest bytes."""
    into = weight.shape[1]
    return [Tiles(ROWS, cols, ((WIDTHS[0], -(-into // cols)),)).name for cols in COLS if cols < 2 * into] + list(WHOLE)


def options(weight: Weight, source: Source, choice: Choice) -> list[Option]:
    """Every option of a weight, or of all its experts together."""
    by_cols = {cols: _Ranked(weight, cols) for cols in COLS if cols < 2 * weight.shape[1]}
    lost = dict.fromkeys(WHOLE, 0.0)
    many = max(1, AT_ONCE // (weight.shape[0] * weight.shape[1]))
    for first in range(0, weight.count, many):
        names = weight.tensor_names[first : first + many]
        w = torch.stack([source.dense(name, 0, weight.shape[0]) for name in names])
        inputs, outputs = choice.diagonals(weight, slice(first, first + many))
        inputs, outputs = inputs.expand(len(names), -1), outputs.expand(len(names), -1)
        for ranked in by_cols.values():
            ranked.add(w, inputs, outputs)
        for name in WHOLE:
            scheme = schemes.get(name)
            lost[name] += float(tile_solver.lost(scheme, scheme.compress(w), w, inputs, outputs).sum())
    whole = [Option(n, loss, schemes.bytes_of(schemes.get(n), weight.full_shape)) for n, loss in lost.items()]
    return whole + [option for ranked in by_cols.values() for option in ranked.options()]


class _Ranked:
    """Losses of a weight's tiles in every width, summed by their rank in their block."""

    def __init__(self, weight: Weight, cols: int) -> None:
        self.weight, self.cols, self.tiles = weight, cols, -(-weight.shape[1] // cols)
        self.lost = torch.zeros(len(WIDTHS), self.tiles)

    def add(self, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        shape = Tiles(ROWS, self.cols, ((WIDTHS[0], self.tiles),))
        lost = tile_solver.losses(shape, w, inputs, outputs)
        order = lost[3].argsort(-1)
        for at, bits in enumerate(WIDTHS):
            self.lost[at] += lost[bits].gather(-1, order).flatten(0, -2).sum(0)

    def options(self) -> list[Option]:
        blocks = -(-self.weight.shape[0] // ROWS) * self.weight.count
        groups = [g for g in torch.arange(self.tiles).tensor_split(min(self.tiles, RANKS)) if len(g)]
        lost = torch.stack([self.lost[:, g].sum(1) for g in groups], 1)  # [widths, groups]
        size = torch.tensor([[len(g) * blocks * ROWS * self.cols * b / 8 for g in groups] for b in WIDTHS])
        steps = (lost[:-1] - lost[1:]) / (size[1:] - size[:-1])
        prices = steps.clamp(min=1e-30).flatten().log().quantile(torch.linspace(0, 1, PRICES)).exp()
        found = {}
        for price in (0.0, *prices.tolist(), float("inf")):
            taken = (size if price == float("inf") else lost + price * size).argmin(0).tolist()
            counts = [sum(len(g) for g, t in zip(groups, taken, strict=True) if t == i) for i in range(len(WIDTHS))]
            scheme = Tiles(ROWS, self.cols, tuple((b, n) for b, n in zip(WIDTHS, counts, strict=True) if n))
            loss = sum(float(lost[t, g]) for g, t in enumerate(taken))
            found[scheme.name] = Option(scheme.name, loss, schemes.bytes_of(scheme, self.weight.full_shape))
        return list(found.values())
