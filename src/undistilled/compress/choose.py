"""What each weight becomes: its scheme, by request or by sharing out bytes, and the values, by a solver."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import scheme as schemes
from ..checkpoint.resolve import Model
from ..errors import DoesNotFit, UsageError
from ..model.weights import Weight, weights
from ..plan.recipes import parse, scheme_of
from ..scheme.base import Parts, Scheme
from ..scheme.grouped import Grouped
from ..scheme.tiles import WIDTHS, Tiles
from .allocate import allocate
from .calibrate import Moments
from .material import moments_of
from .solvers import gptq, search
from .solvers import tiles as tile_solver

if TYPE_CHECKING:
    from .run import Request

SOLVERS = ("rtn", "search", "gptq")
ROWS, COLS = 16, 32  # of a tile
BUCKETS = 12  # of a weight's tiles, by rank: what one choice of bits is for
HEAD = "int8"  # of the head under a budget: it is read once a token, and its loss is a word
PLAIN_BITS = "int8"  # of the recipe whose other roles a budget keeps


@dataclass
class Choice:
    """`schemes` of single weights; others follow the recipe `base`."""

    base: str
    solver: str
    moments: dict[str, Moments] = field(default_factory=dict)
    schemes: dict[str, str] = field(default_factory=dict)

    def solve(self, weight: Weight, expert: int, scheme: Scheme, w: torch.Tensor) -> Parts:
        """Parts of one matrix (or vector) `w`, float32."""
        found = self.moments.get(weight.name)
        if found is None or self.solver == "rtn" or not isinstance(scheme, (Grouped, Tiles)):
            return scheme.compress(w)
        inputs, outputs = found.of(expert if weight.experts else None)
        if isinstance(scheme, Tiles):
            return tile_solver.solve(scheme, w, inputs, outputs)
        if self.solver == "search":
            return search.solve(scheme, w, inputs.diagonal()[None])
        return gptq.solve(scheme, w, inputs)


def choose(model: Model, request: Request, folder: Path, say: Callable[[str], None]) -> Choice:
    """The choice for `request`; what it costs to make is kept in `folder`, so that a second run makes the same."""
    if request.solver not in SOLVERS:
        raise UsageError(f"--solver {request.solver!r} is not known.", f"Known: {', '.join(SOLVERS)}.")
    if request.scheme is not None:
        parse(request.scheme)
    calibrated = request.solver != "rtn"
    moments = moments_of(model, request, folder / "moments.safetensors", say) if calibrated else {}
    choice = Choice(request.scheme or PLAIN_BITS, request.solver, moments)
    if request.scheme is None:
        file = folder / "choice.json"
        if not file.exists():
            part = file.with_suffix(".part")
            part.write_text(json.dumps(_shared_out(model, request, choice, say)))
            part.replace(file)
        choice.schemes = json.loads(file.read_text())
    return choice


def _shared_out(model: Model, request: Request, choice: Choice, say: Callable[[str], None]) -> dict[str, str]:
    """Weight -> dynamic blocks, so that the whole checkpoint has the bytes that were asked for."""
    every = list(weights(model.spec))
    linear = [w for w in every if w.is_linear]
    rest = sum(
        schemes.bytes_of(schemes.get(scheme_of(w, model.spec, choice.base)), w.full_shape)
        for w in every
        if not w.is_linear
    )
    budget = request.bytes or int(request.bits * sum(w.params for w in every) / 8)  # type: ignore[operator]
    room = budget - rest - sum(_fixed(w) for w in linear)
    if room <= 0:
        raise DoesNotFit(f"{rest / 1e9:.3f} GB are no matrices; the budget is {budget / 1e9:.3f} GB.", "Give more.")
    keys, options = [], []
    source = model.source()
    for at, weight in enumerate(linear, 1):
        ranks, found = _options(weight, source, choice)
        keys += [(weight.name, count) for count in ranks]
        options += found
        say(f"measured {at} of {len(linear)} matrices")
    counts: dict[str, dict[int, int]] = {}
    for (name, count), taken in zip(keys, allocate(options, room), strict=True):
        of = counts.setdefault(name, {})
        of[WIDTHS[taken]] = of.get(WIDTHS[taken], 0) + count
    return {name: Tiles(ROWS, COLS, tuple(sorted(of.items()))).name for name, of in counts.items()}


def _fixed(weight: Weight) -> int:
    """Bytes of dynamic blocks beside their tiles."""
    return -(-weight.shape[0] // ROWS) * ROWS * 2 * weight.count


def _options(weight: Weight, source, choice: Choice) -> tuple[list[int], list[list[tuple[float, int]]]]:
    """Tiles in each bucket of ranks, and for each bucket its (loss, bytes) in each of WIDTHS."""
    tiles = -(-weight.shape[1] // COLS)
    shape = Tiles(ROWS, COLS, ((WIDTHS[0], tiles),))
    total = {bits: torch.zeros(tiles) for bits in WIDTHS}
    for at, name in enumerate(weight.tensor_names):
        w = source.dense(name, 0, weight.shape[0])
        found = choice.moments.get(weight.name)
        if found is None:
            inputs, outputs = torch.ones(weight.shape[1]), torch.ones(weight.shape[0])
        else:
            moments, outputs = found.of(at if weight.experts else None)
            inputs = moments.diagonal()
        lost = tile_solver.losses(shape, w, inputs, outputs)
        order = lost[3].argsort(-1)
        for bits, by_tile in lost.items():
            total[bits] += by_tile.gather(-1, order).sum((0, 1))
    blocks = -(-weight.shape[0] // ROWS) * weight.count
    buckets = np.array_split(np.arange(tiles), min(tiles, BUCKETS))
    size = {bits: blocks * (ROWS * COLS * bits // 8 + ROWS + 2) for bits in WIDTHS}
    options = [[(float(total[b][ranks].sum()), len(ranks) * size[b]) for b in WIDTHS] for ranks in buckets]
    return [len(ranks) for ranks in buckets], options
