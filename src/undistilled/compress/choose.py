"""What each weight becomes: its scheme, by request or by sharing out bytes, and the values, by a solver."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import scheme as schemes
from ..checkpoint.resolve import Model
from ..checkpoint.source import Source
from ..errors import DoesNotFit, UsageError
from ..model.weights import Weight, weights
from ..plan.recipes import MIXED, parse, scheme_of
from ..scheme.base import Parts, Scheme
from ..scheme.grouped import Grouped
from ..scheme.tiles import Tiles
from . import room
from .allocate import allocate
from .calibrate import Moments, look_up
from .files import keep
from .hessian import Factored, Hessian
from .material import moments_of
from .options import FORMAT, Option, at_once, options, sampled, smallest
from .pace import Pace
from .rescale import search_factors
from .rescaled import Factors, Rescaled
from .solvers import gptq, hqq, search
from .solvers import tiles as tile_solver

if TYPE_CHECKING:
    from .run import Request

__all__ = ["CALIBRATION", "Choice", "at_once", "budget", "check", "choose"]

SOLVERS = ("rtn", "hqq", "search", "gptq", "awq", "awq-gptq")
UNCALIBRATED = ("rtn", "hqq")
TRIED = "nl3-g64"  # under a budget: what awq tries its factors in, before schemes are known
FACTORS = "factors"  # the folder of what rows and columns are multiplied by, inside the one being made
CALIBRATION = "calibration"  # the folder of moments, inside the one being made where no other was named
DRAFT = 0.01  # nats of an answer that a draft's nat is worth: an MTP layer's errors cost tries, never answers
REST = "int8"  # under a budget: the recipe of what is no matrix of a block


@dataclass
class Choice:
    """`schemes` of single weights; others follow the recipe `base`."""

    base: str
    solver: str
    moments: Mapping[str, Moments] = field(default_factory=dict)
    schemes: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    factors: Factors = field(default_factory=Factors)
    factored: Factored = field(default_factory=Factored)

    def solve(self, weight: Weight, experts: slice | None, scheme: Scheme, w: torch.Tensor) -> Parts:
        """Parts of a matrix or vector `w`, float32, or of stacked experts [E, N, K]."""
        if not isinstance(scheme, (Grouped, Tiles)):
            return scheme.compress(w)
        if self.solver == "hqq":
            return tile_solver.plain(scheme, w) if isinstance(scheme, Tiles) else hqq.solve(scheme, w)
        found = self.known(weight, experts)
        if found is None:
            return scheme.compress(w)
        inputs, outputs = found[0], found[1].to(w.device)
        if self.solver in ("search", "awq"):
            diagonal = inputs.diagonal().to(w.device)
            if isinstance(scheme, Tiles):
                return tile_solver.searched(scheme, w, diagonal, outputs)
            return search.solve(scheme, w, diagonal[..., None, :])
        known = self.factored.of(inputs.whole, w.device)
        if isinstance(scheme, Tiles):
            return tile_solver.solve(scheme, w, inputs.to(w.device), outputs, known)
        return gptq.solve(scheme, w, inputs.to(w.device), known)

    def known(self, weight: Weight, experts: slice | None) -> tuple[Hessian, torch.Tensor] | None:
        """Mean moments of a weight as it is stored, or of these experts; None where it was not calibrated."""
        found = self.moments.get(weight.name)
        return None if found is None else self.factors.moments(weight.name, experts, *found.of(experts))

    def source(self, model: Model) -> Source:
        """The model's weights as they are to be stored."""
        found = model.source()
        changed = self.factors.rows or self.factors.columns
        return Rescaled(found, self.factors, weights(model.spec)) if changed else found

    @property
    def corrects(self) -> bool:
        """Whether values are chosen with the correlations of inputs."""
        return self.solver in ("gptq", "awq-gptq")

    def uses(self, weight: Weight) -> list[str]:
        """The names of a weight's moments: two where it is a head, and rows are looked up too."""
        both = [weight.name, look_up(weight.name)]
        return both if both[1] in self.moments else both[:1]

    def diagonals(self, weight: Weight, experts: slice, use: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squares of inputs [1 or E, K] and of the gradients of outputs [1 or E, N], of a use of this weight; ones
        where none are known."""
        some = experts if weight.experts else None
        moments = self.moments.get(use)
        if moments is None:
            rows, into = weight.shape
            return torch.ones(1, into, device=self.device), torch.ones(1, rows, device=self.device)
        found = self.factors.diagonal(weight.name, some, *moments.diagonal(some))
        by_input, by_output = (t.to(self.device) for t in found)
        return (by_input, by_output) if weight.experts else (by_input[None], by_output[None])


def check(request: Request) -> None:
    """UsageError where a name in it is not known."""
    if request.solver not in SOLVERS:
        raise UsageError(f"--solver {request.solver!r:.80} is not known.", f"Known: {', '.join(SOLVERS)}.")
    if request.scheme is not None and parse(request.scheme)[0] == MIXED:
        raise UsageError(f"{MIXED!r} is what a compressed checkpoint says of itself.", "Name a scheme.")
    if request.bits is not None and not 0 < request.bits <= 32:
        raise UsageError(f"--bits {request.bits} is no number of bits.", "More than 0, at most 32.")


def budget(model: Model, request: Request) -> int | None:
    """Bytes to share out over the matrices that a budget is for; None where a scheme was asked for.

    Before anything is read: DoesNotFit where not even the smallest schemes take so little, UsageError where the model
    is smaller as it is.
    """
    if request.scheme is not None:
        return None
    every, shared = list(weights(model.spec)), _shared(model, request)
    names = {w.name for w in shared}
    rest = sum(_bytes(w, scheme_of(w, model.spec, REST)) for w in every if w.name not in names)
    least = rest + sum(min(_bytes(w, name) for name in smallest(w)) for w in shared)
    params, asked = sum(w.params for w in every), size(model, request)
    own = sum(_bytes(w, scheme_of(w, model.spec, model.spec.native)) for w in every)
    if request.bytes is not None and asked > own:
        raise UsageError(
            f"{model.name} takes {own / 1e6:,.1f} MB as it is, less than the {asked / 1e6:,.1f} MB asked for.",
            f"Give --bytes below {math.floor(own / 1e6)}MB, or run the model as it is.",
        )
    if asked < least:
        raise DoesNotFit(
            f"The smallest form of {model.name} takes {least / 1e6:,.1f} MB, {8 * least / params:.2f} bits a weight; "
            f"asked for are {asked / 1e6:,.1f} MB.",
            f"Give --bits {math.ceil(80 * least / params) / 10} or more."
            if request.bytes is None
            else f"Give --bytes {math.ceil(least / 1e6)}MB or more.",
        )
    return asked - rest


def size(model: Model, request: Request) -> int:
    """Bytes of the checkpoint that is asked for."""
    every = list(weights(model.spec))
    if request.scheme is not None:
        return sum(_bytes(w, scheme_of(w, model.spec, request.scheme)) for w in every)
    return request.bytes or int((request.bits or 0) * sum(w.params for w in every) / 8)


def _shared(model: Model, request: Request) -> list[Weight]:
    """The matrices that a budget is shared out over: those of blocks; head and embedding where their worth is known."""
    known = ("head", "embed") if request.solver not in UNCALIBRATED else ()
    return [w for w in weights(model.spec) if w.is_linear or w.role in known]


def _bytes(weight: Weight, scheme: str) -> int:
    return schemes.bytes_of(schemes.get(scheme), weight.full_shape)


def choose(model: Model, request: Request, folder: Path, say: Callable[[str], None]) -> Choice:
    """The choice for `request`; what it costs to make is kept in `folder`, so that a second run makes the same."""
    moments: Mapping[str, Moments] = {}
    calibrated = request.solver not in UNCALIBRATED
    kept = Path(request.calibration) if request.calibration and calibrated else folder / CALIBRATION
    room.check(model, request.tokens, kept if calibrated else None, folder, size(model, request))
    if calibrated:
        moments = moments_of(model, request, kept, say)
    choice = Choice(request.scheme or REST, request.solver, moments, device=request.device)
    if request.solver.startswith("awq"):
        asked = request.scheme or TRIED
        choice.factors = search_factors(
            model.spec,
            model.source(),
            moments,
            lambda weight: scheme_of(weight, model.spec, asked),
            say,
            request.device,
            folder / FACTORS,
        )
    if request.scheme is None:
        file = folder / "choice.json"
        if not file.exists():
            keep(file, _shared_out(model, request, choice, kept, say))
        choice.schemes = json.loads(file.read_text())
    return choice


def _shared_out(
    model: Model, request: Request, choice: Choice, kept: Path, say: Callable[[str], None]
) -> dict[str, str]:
    """Weight -> scheme, so that the whole checkpoint has the bytes that were asked for."""
    shared = _shared(model, request)
    shared_out = budget(model, request)
    assert shared_out is not None
    basis = request.solver if not choice.moments else "scaled" if choice.factors.columns else "moments"
    found = _measured(model, shared, choice, kept / f"options-{FORMAT}-of-{basis}.jsonl", say)
    worth = [DRAFT if w.mtp else 1.0 for w in shared]
    groups = [[(by * o.loss, o.nbytes) for o in each] for by, each in zip(worth, found, strict=True)]
    taken = allocate(groups, shared_out)
    return {w.name: each[i].scheme for w, each, i in zip(shared, found, taken, strict=True)}


def _measured(
    model: Model, shared: list[Weight], choice: Choice, file: Path, say: Callable[[str], None]
) -> list[list[Option]]:
    """Every weight's options, a line each in `file`; those that are not there are measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    found: dict[str, list[Option]] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill cut it short
            name, rows = json.loads(line)
            found[name] = [Option(*row) for row in rows]
    source, lacking = choice.source(model), [w for w in shared if w.name not in found]
    pace = Pace(sum(map(sampled, lacking)))
    with file.open("a") as f:
        for weight in lacking:
            found[weight.name] = options(weight, source, choice)
            f.write(json.dumps([weight.name, [astuple(o) for o in found[weight.name]]]) + "\n")
            f.flush()
            pace.did(sampled(weight))
            say(f"measured {len(found)} of {len(shared)} matrices, {pace}")
    return [found[weight.name] for weight in shared]
