"""What a weight may become, and what each would lose: schemes for all of it, dynamic blocks, and what it is now.

Of the ways to give a weight's tiles their widths, those are options that some price of a byte makes best (Everett
1963): for a price, each tile takes the width with the least loss + price x bytes. Tiles are taken by their rank in
their block of rows, so that every block has the same counts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .. import scheme as schemes
from ..checkpoint.source import Source
from ..model.weights import Weight
from ..scheme.base import Parts
from ..scheme.grouped import Grouped
from ..scheme.tiles import WIDTHS, Tiles
from .solvers import tiles as tile_solver

if TYPE_CHECKING:
    from .choose import Choice

# schemes of whole weights beside dynamic blocks, which end at 6 bits without minimums
WHOLE = ("int8", "int8-g128", "int6-g64")
# of a head or an embedding, of which single rows are looked up
BY_ROW = (*WHOLE, "int5-g32", "nl4-g32", "nl4-g64", "nl3-g32", "nl3-g64", "nl2-g32", "nl2-g64")
ROWS, COLS = 16, (32, 64, 128)  # of a tile
PRICES = 24  # of a byte, from one that buys no bit to one that buys all
RANKS = 24  # groups of tiles that take one width together
AT_ONCE = {"cpu": 4 << 20, "cuda": 256 << 20}  # values of stacked experts that are worked on together, at most
WORKED = 80  # bytes a value that solving takes beside the weight; 44 to 76 were seen
FORMAT = 4  # of measured options on disk: raised whenever what they say changes
SAMPLE = 4 << 20  # values of a weight that are measured, about: ranges of rows, drawn at random, one of each stretch
FEWEST = 8  # ranges of a weight that are measured at least
RANGE = 128  # rows: whole blocks of tiles, and of R1's FP8
TRIED, GROUP = 4, 64  # ranges of a weight that GPTQ is tried on, by groups of so many inputs


def at_once(device: str) -> int:
    """Values of stacked experts to work on together. GPTQ goes block of inputs by block, on a GPU a few launches each,
    whatever lies in the stack: there it is as many as half of the free memory holds."""
    kind = device.split(":")[0]
    if kind == "cpu":
        return AT_ONCE[kind]
    return max(1, min(AT_ONCE[kind], _free(device) // 2 // WORKED))


def _free(device: str) -> int:
    """Bytes of a GPU that are free, or that PyTorch keeps for the next tensor."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class Option:
    scheme: str
    loss: float  # nats a token
    nbytes: int


def smallest(weight: Weight) -> list[str]:
    """The schemes of which one takes the fewest bytes."""
    if not weight.is_linear:
        return list(BY_ROW)
    into = weight.shape[1]
    return [Tiles(ROWS, cols, ((WIDTHS[0], -(-into // cols)),)).name for cols in _cols(weight)] + list(WHOLE)


def _cols(weight: Weight) -> list[int]:
    """Columns that its tiles may have; none where rows of it are looked up."""
    return [cols for cols in COLS if weight.is_linear and cols < 2 * weight.shape[1]]


def options(weight: Weight, source: Source, choice: Choice) -> list[Option]:
    """Every option of a weight, or of all its experts together."""
    rounding = _plain if choice.solver == "rtn" else tile_solver.searching
    by_cols = {cols: _Ranked(weight, cols, rounding) for cols in _cols(weight)}
    lost: dict[str, list[torch.Tensor]] = {name: [] for name in (WHOLE if weight.is_linear else BY_ROW)}
    ranges = sample(weight)
    for w, uses in _stacks(weight, ranges, source, choice):
        for ranked in by_cols.values():
            ranked.add(w, *uses[0])
        for name in lost:
            scheme = schemes.get(name)
            rounded = rounding(scheme, w, uses[0][0]) if isinstance(scheme, Grouped) else scheme.compress(w)
            lost[name].append(torch.stack([tile_solver.lost(scheme, rounded, w, *use).sum() for use in uses]))
    left = _left(weight, ranges, source, choice)
    found = [option for ranked in by_cols.values() for option in ranked.options(left)]
    for name, sums in lost.items():
        scheme, loss = schemes.get(name), sum(sum(uses) for uses in torch.stack(sums).tolist())
        share = left[scheme.bits] if isinstance(scheme, Grouped) else 1.0
        found.append(Option(name, share * loss, schemes.bytes_of(scheme, weight.full_shape)))
    return found + _as_it_is(weight, source)


def _as_it_is(weight: Weight, source: Source) -> list[Option]:
    """The scheme that holds it now, which loses nothing."""
    held = {source.scheme(name) for name in weight.tensor_names}
    name = held.pop()
    if held or name is None or (not weight.is_linear and schemes.row_quantum(schemes.get(name)) > 1):
        return []
    return [Option(name, 0.0, schemes.bytes_of(schemes.get(name), weight.full_shape))]


def _left(weight: Weight, ranges: list[Range], source: Source, choice: Choice) -> dict[int, float]:
    """Bits -> what GPTQ leaves of the loss that searched scales alone have by the moments' diagonal: more where inputs
    are hardly correlated. 1 where another solver is asked for, or nothing is known."""
    found = [choice.known(weight, slice(e, e + 1) if weight.experts else None) for e, _, _ in ranges[:1]]
    if not choice.corrects or found[0] is None:
        return dict.fromkeys(WIDTHS, 1.0)
    before, after = dict.fromkeys(WIDTHS, 0.0), dict.fromkeys(WIDTHS, 0.0)
    for e, start, stop in ranges[:: -(-len(ranges) // TRIED)]:
        known = choice.known(weight, slice(e, e + 1) if weight.experts else None)
        assert known is not None
        hessian, outputs = known[0].to(choice.device), known[1].to(choice.device).reshape(-1)[start:stop]
        w = source.dense(weight.tensor_names[e], start, stop).to(choice.device)
        factor = choice.factored.of(known[0].whole, choice.device)
        for bits, (one, other) in tile_solver.corrected(w, hessian, outputs, GROUP, factor).items():
            before[bits] += one
            after[bits] += other
    return {bits: after[bits] / before[bits] if before[bits] > 0 else 1.0 for bits in WIDTHS}


def _plain(scheme: Grouped, w: torch.Tensor, _inputs: torch.Tensor) -> Parts:
    """Rounded to nearest: what the solver of that name will do, in a quarter of the time that a search takes."""
    return scheme.compress(w)


Range = tuple[int, int, int]  # (expert, first row, past the last)


def sample(weight: Weight) -> list[Range]:
    """The ranges that are measured: all of a small weight, else one at random of each stretch, since heads and experts
    repeat with periods of their own. The weight's name is the seed."""
    rows, into = weight.shape
    starts = [(e, start) for e in range(weight.count) for start in range(0, rows, RANGE)]
    count = min(len(starts), max(FEWEST, round(SAMPLE / (RANGE * into))))
    draw = random.Random(weight.name)
    edges = [len(starts) * i // count for i in range(count + 1)]
    chosen = [starts[draw.randrange(first, last)] for first, last in pairwise(edges)]
    return [(e, start, min(rows, start + RANGE)) for e, start in chosen]


def sampled(weight: Weight) -> int:
    """Values of the ranges that are measured."""
    return weight.shape[1] * sum(stop - start for _, start, stop in sample(weight))


def _stand_for(weight: Weight, ranges: list[Range], choice: Choice, use: str) -> float:
    """What the losses of these ranges are multiplied by: moments of all rows are known, so that the share of the
    ranges in trace(M) times the sum of G counts, not how many they are."""
    everything, share = [], []
    for expert in range(weight.count):
        inputs, outputs = choice.diagonals(weight, slice(expert, expert + 1), use)
        mass = inputs.double().sum() * outputs[0].double()
        everything.append(mass.sum())
        share += [mass[start:stop].sum() for e, start, stop in ranges if e == expert]
    total, measured = (sum(torch.stack(sums).tolist()) for sums in (everything, share))  # a GPU is waited for once
    rows = sum(stop - start for _, start, stop in ranges)
    return total / measured if measured > 0 else weight.count * weight.shape[0] / rows


def _stacks(weight: Weight, ranges: list[Range], source: Source, choice: Choice):
    """(values [B, N, K], for each use input moments [B, K] and output moments [B, N]) of ranges of one height, several
    at once. Output moments are multiplied by what the ranges stand for."""
    many = max(1, at_once(choice.device) // (RANGE * weight.shape[1]))
    uses = [(use, _stand_for(weight, ranges, choice, use)) for use in choice.uses(weight)]
    for height in sorted({stop - start for _, start, stop in ranges}):
        equal = [r for r in ranges if r[2] - r[1] == height]
        for first in range(0, len(equal), many):
            some = equal[first : first + many]
            w = torch.stack([source.dense(weight.tensor_names[e], start, stop) for e, start, stop in some])
            yield w.to(choice.device), [_moments(weight, some, choice, *use) for use in uses]


def _moments(weight: Weight, some: list[Range], choice: Choice, use: str, every: float):
    pairs = [choice.diagonals(weight, slice(e, e + 1), use) for e, _, _ in some]
    outputs = torch.cat([two[:, start:stop] for (_, two), (_, start, stop) in zip(pairs, some, strict=True)])
    return torch.cat([one for one, _ in pairs]), every * outputs


class _Ranked:
    """Losses of a weight's tiles in every width, summed by their rank in their block."""

    def __init__(self, weight: Weight, cols: int, rounding: tile_solver.Rounding) -> None:
        self.weight, self.cols, self.tiles, self.rounding = weight, cols, -(-weight.shape[1] // cols), rounding
        self.lost: torch.Tensor | None = None  # [widths, tiles], on the device of what was added

    def add(self, w: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        shape = Tiles(ROWS, self.cols, ((WIDTHS[0], self.tiles),))
        lost = tile_solver.losses(shape, w, inputs, outputs, rounding=self.rounding)
        order = lost[3].argsort(-1)
        found = torch.stack([lost[bits].gather(-1, order).flatten(0, -2).sum(0) for bits in WIDTHS])
        self.lost = found if self.lost is None else self.lost + found

    def options(self, left: dict[int, float]) -> list[Option]:
        """`left`: bits -> the share of the measured losses that a solver leaves."""
        assert self.lost is not None
        blocks = -(-self.weight.shape[0] // ROWS) * self.weight.count
        groups = [g for g in torch.arange(self.tiles).tensor_split(min(self.tiles, RANKS)) if len(g)]
        share = torch.tensor([left[bits] for bits in WIDTHS])
        by_tile = self.lost.cpu()
        lost = share[:, None] * torch.stack([by_tile[:, g].sum(1) for g in groups], 1)  # [widths, groups]
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
