"""AWQ (Lin et al. 2023): inputs that count are stored larger, so that rounding them loses less; the model is the same.

A fold is a place where channels may be scaled: what gives them (a norm, or rows of a matrix) is divided by s, the
columns of what takes them are multiplied. s = (root mean square of the input)^alpha, and alpha is the best of ALPHAS
by the output error of the rounded weights, the trace of G d M d^T with the moments of compress/calibrate.py; so no
activations are kept (the paper takes the mean of |x|, of which second moments do not tell).

An MoE layer's norm also feeds its router, whose values must not change: there s is rounded to powers of two, which
scale 16-bit weights exactly. Experts have an s each between up and down, and share the one of their norm.
K inputs, N outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from .. import scheme as schemes
from ..checkpoint.source import Source
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..scheme.base import Scheme
from ..scheme.grouped import Grouped, normal
from ..scheme.tiles import Tiles
from .calibrate import Moments
from .hessian import Hessian
from .rescaled import Factors
from .solvers import search

ALPHAS = tuple(i / 10 for i in range(11))
ROWS = 256  # of a weight that alpha is tried on, evenly spaced
EXPERTS = 16  # of a layer that the alpha of their norm is tried on
CANDIDATES = 5  # for a scale, while alphas are tried
DIMMEST = 0.01  # of the mean square of all channels: what a channel counts as at least
AT_ONCE = 1 << 22  # values of experts that are tried together

SchemeOf = Callable[[Weight], str]

# what gives the channels -> what takes them, by their names in a layer
FOLDS = (
    (
        "input_layernorm.weight",
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.q_a_proj",
            "self_attn.kv_a_proj_with_mqa",
        ),
    ),
    (
        "post_attention_layernorm.weight",
        (
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.gate",
            "mlp.experts.*.gate_proj",
            "mlp.experts.*.up_proj",
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
        ),
    ),
    ("self_attn.q_a_layernorm.weight", ("self_attn.q_b_proj",)),
    ("self_attn.kv_a_layernorm.weight", ("self_attn.kv_b_proj",)),
    ("self_attn.v_proj.weight", ("self_attn.o_proj",)),
    ("self_attn.kv_b_proj.weight", ("self_attn.o_proj",)),
    ("mlp.up_proj.weight", ("mlp.down_proj",)),
    ("mlp.shared_experts.up_proj.weight", ("mlp.shared_experts.down_proj",)),
    ("mlp.experts.*.up_proj.weight", ("mlp.experts.*.down_proj",)),
)


@dataclass(frozen=True)
class Fold:
    """`rows` [channels]: the giver's row of each; `columns` [K of a taker]: the channel of each. None: in order."""

    giver: Weight
    takers: tuple[Weight, ...]
    biases: tuple[Weight, ...] = ()  # of the giver: they are divided too
    exact: bool = False  # s is rounded to powers of two
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def apart(self) -> bool:
        """Whether each expert has an s of its own."""
        return bool(self.giver.experts)

    def spread(self, s: torch.Tensor) -> torch.Tensor:
        """s of channels -> of the takers' columns."""
        return s if self.columns is None else s[..., self.columns]


def folds(spec: ModelSpec) -> Iterator[Fold]:
    """Every fold of a model's layers."""
    known = {w.name: w for w in weights(spec)}
    for layer in range(spec.layers + spec.mtp_layers):
        at = f"model.layers.{layer}"
        for giver, takers in FOLDS:
            there = tuple(known[n] for t in takers if (n := f"{at}.{t}.weight") in known)
            if f"{at}.{giver}" in known and there:
                bias = known.get(f"{at}.{giver}".removesuffix("weight") + "bias")
                rows, columns = _places(giver, spec)
                router = any(taker.role == "router" for taker in there)
                yield Fold(known[f"{at}.{giver}"], there, (bias,) if bias else (), router, rows, columns)


def _places(giver: str, spec: ModelSpec) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Values' channels: rows of kv_b behind each head's keys; with grouped queries, several columns of o have one."""
    if giver == "self_attn.kv_b_proj.weight":
        assert spec.mla is not None
        nope, width = spec.mla.qk_nope_head_dim, spec.mla.v_head_dim
        return torch.arange(spec.heads * (nope + width)).view(spec.heads, -1)[:, nope:].flatten(), None
    if giver == "self_attn.v_proj.weight" and spec.kv_heads != spec.heads:
        channels = torch.arange(spec.kv_heads * spec.head_dim).view(spec.kv_heads, 1, spec.head_dim)
        return None, channels.expand(-1, spec.heads // spec.kv_heads, -1).flatten()
    return None, None


def search_factors(
    spec: ModelSpec,
    source: Source,
    moments: Mapping[str, Moments],
    scheme_of: SchemeOf,
    say: Callable[[str], None],
    device: str = "cpu",
    folder: Path | None = None,
) -> Factors:
    """The factors of every fold that gains by them; those without moments of all that takes them are left out.

    Each layer's are kept in `folder`, and taken from there where a run before this one left them.
    """
    found, layers = Factors(), spec.layers + spec.mtp_layers
    cases = _Cases(source, moments, scheme_of, device)
    for layer, some in groupby(folds(spec), lambda fold: fold.giver.layer or 0):
        file = folder / f"{layer}.safetensors" if folder else None
        own = Factors.load(file) if file and file.exists() else _layers(some, cases)
        if file and not file.exists():
            file.parent.mkdir(exist_ok=True)
            own.save(file)
        found |= own
        say(f"scaled the inputs of layer {layer + 1} of {layers}")
    return found


def _layers(every: Iterator[Fold], cases: _Cases) -> Factors:
    """The factors of a layer's folds."""
    found = Factors()
    for fold in filter(None, (_worth(each, cases.scheme_of) for each in every)):
        tried = [t for t in fold.takers if t.role != "router"]
        if all(t.name in cases.moments for t in tried):
            s = (_apart if fold.apart else _together)(fold, tried, cases)
            if (s != 1).any():
                put(found, fold, s.cpu())
    return found


def _worth(fold: Fold, scheme_of: SchemeOf) -> Fold | None:
    """The fold where it has takers of few bits. Dividing must lose nothing: a giver in 16 bits is divided by powers of
    two, and one whose rows share a scale (FP8 blocks), not at all."""
    given, takers = schemes.get(scheme_of(fold.giver)), [tried_in(scheme_of(t)) for t in fold.takers]
    shared = schemes.row_quantum(given) > 1 and not isinstance(given, Tiles)  # which have a multiplier for each row
    if shared or not any(isinstance(t, Grouped) for t in takers):
        return None
    plain = fold.giver.role != "norm" and isinstance(given, schemes.Plain)
    return replace(fold, exact=fold.exact or plain)


def put(factors: Factors, fold: Fold, s: torch.Tensor) -> None:
    """Divides the giver's rows by s [channels] or [E, channels], and multiplies the takers' columns."""
    for giver in (fold.giver, *fold.biases):
        given = torch.ones(*s.shape[:-1], giver.shape[0])
        given[..., slice(None) if fold.rows is None else fold.rows] = 1 / s
        factors.rows[giver.name] = factors.rows.get(giver.name, 1) * given
    for taker in fold.takers:
        factors.columns[taker.name] = factors.columns.get(taker.name, 1) * fold.spread(s)


def _together(fold: Fold, takers: list[Weight], cases: _Cases) -> torch.Tensor:
    """s [channels] of the alpha that loses least over all takers."""
    some = []
    for taker in takers:
        step = -(-taker.count // EXPERTS)
        for at in range(0, taker.count, step):
            case = cases.of(taker, slice(at, at + 1))
            stands_for = min(step, taker.count - at) * taker.shape[0] / case.w.shape[1]
            some.append((case, stands_for))
    power = torch.stack([case.power[0] * share for case, share in some]).sum(0)
    tried = scales(by_channel(power, fold.columns), fold.exact)
    lost = [sum(float(c.lost(fold.spread(s)).sum()) * share for c, share in some) for s in tried]
    return tried[lost.index(min(lost))]


def _apart(fold: Fold, takers: list[Weight], cases: _Cases) -> torch.Tensor:
    """s [E, channels]: each expert's own alpha."""
    (taker,), found = takers, []
    many = max(1, AT_ONCE // (min(ROWS, taker.shape[0]) * taker.shape[1]))
    for at in range(0, taker.count, many):
        case = cases.of(taker, slice(at, at + many))
        tried = scales(case.power, fold.exact)
        best = torch.stack([case.lost(s) for s in tried]).argmin(0)
        found.append(torch.stack(tried)[best, torch.arange(len(best))])
    return torch.cat(found)


def by_channel(power: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """Mean squares of a taker's columns -> sums by channel."""
    if columns is None:
        return power
    return power.new_zeros(int(columns.max()) + 1).index_add(0, columns, power)


def scales(power: torch.Tensor, exact: bool) -> list[torch.Tensor]:
    """s [..., channels] for each alpha, for mean squares of the channels: smallest times largest is 1."""
    power = power.clamp(min=1e-30)
    size = power.maximum(DIMMEST * power.mean(-1, keepdim=True)).sqrt()
    middle = (size.amin(-1, keepdim=True) * size.amax(-1, keepdim=True)).sqrt()
    found = [(size / middle) ** alpha for alpha in ALPHAS]
    return [s.log2().round().exp2() for s in found] if exact else found


@dataclass(frozen=True)
class _Cases:
    """Where the cases of a search come from, and where it computes."""

    source: Source
    moments: Mapping[str, Moments]
    scheme_of: SchemeOf
    device: str

    def of(self, taker: Weight, experts: slice) -> _Case:
        hessian, outputs = self.moments[taker.name].of(experts if taker.experts else None)
        outputs = outputs if taker.experts else outputs[None]
        some = torch.linspace(0, taker.shape[0] - 1, min(ROWS, taker.shape[0])).long()
        names = taker.tensor_names[experts]
        w = torch.stack([self.source.dense(name, 0, taker.shape[0])[some] for name in names])
        there = w.to(self.device), hessian.to(self.device), outputs[..., some].to(self.device)
        return _Case(*there, tried_in(self.scheme_of(taker)))


@dataclass
class _Case:
    """Experts (or one matrix) of a taker, `w` [E, N, K] some of their rows, with moments and a scheme."""

    w: torch.Tensor
    hessian: Hessian
    outputs: torch.Tensor  # [E, N]
    scheme: Scheme

    @property
    def power(self) -> torch.Tensor:
        """Mean squares of the inputs [E, K]."""
        return self.hessian.diagonal().expand(len(self.w), -1)

    def lost(self, s: torch.Tensor) -> torch.Tensor:
        """The error [E] of the outputs where columns are stored times s [K] or [E, K]."""
        s = s.expand(len(self.w), -1)[:, None]
        w = self.w * s
        if isinstance(self.scheme, Grouped):
            parts = search.solve(self.scheme, w, self.power[:, None] / s.square(), CANDIDATES)
        else:
            parts = self.scheme.compress(w)
        d = self.scheme.decompress(parts, tuple(w.shape), torch.float32) / s - self.w
        return (self.hessian.lost(d) * self.outputs).sum(-1)


def tried_in(name: str) -> Scheme:
    """The scheme that alphas are tried in: of dynamic blocks, their levels at the middle width."""
    scheme = schemes.get(name)
    if isinstance(scheme, Tiles):
        return normal(scheme.counts[len(scheme.counts) // 2][0], scheme.cols)
    return scheme
