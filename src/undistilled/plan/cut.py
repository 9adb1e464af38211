"""What a rank holds of each weight: one table of roles, and whole quanta of every scheme.

Attention is cut by head, SwiGLUs by width, the vocabulary by row, routed experts by expert and width, or, where no
quantum lets their width be cut, by expert alone. Norms, routers and MLA's compressions are held whole by all ranks of
their stage. A SwiGLU of fewer quanta than there are ranks leaves some ranks without a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .. import scheme as schemes
from ..errors import BadArtefact, UsageError
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..scheme import int8
from ..scheme.base import quantum
from .copies import MOST
from .mesh import Mesh, even, ranges
from .recipes import products_of

# role -> (the axis that is cut, what the axis counts)
CUT = {
    "attention.q": ("out", "heads"),
    "attention.q_b": ("out", "heads"),
    "attention.k": ("out", "kv_heads"),
    "attention.v": ("out", "kv_heads"),
    "attention.kv_b": ("out", "heads"),
    "attention.o": ("in", "heads"),
    **{f"{kind}.{name}": ("out", kind) for kind in ("dense", "shared", "expert") for name in ("gate", "up")},
    **{f"{kind}.down": ("in", kind) for kind in ("dense", "shared", "expert")},
    "embed": ("out", "vocab"),
    "head": ("out", "vocab"),
}
BIASES = {"q_proj": "heads", "k_proj": "kv_heads", "v_proj": "kv_heads"}


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of `axis`, of the experts with these numbers; axis None: all of it."""

    axis: str | None = None
    start: int = 0
    stop: int = 0
    experts: tuple[int, ...] | None = None

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """The logical shape of what the rank holds, with the expert axis in front where there is one."""
        shape = list(weight.shape)
        if self.axis:
            shape[0 if self.axis == "out" else 1] = self.stop - self.start
        return (*([len(self.experts)] if self.experts is not None else []), *shape)


class Cuts:
    """Slices of every weight for every rank. `stored`: weight name -> scheme.

    UsageError names the weight that the mesh would cut within a quantum.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, stored: Mapping[str, str], compute: str = "float32") -> None:
        self.spec, self.mesh, self.stored, self.compute = spec, mesh, stored, compute
        self.weights = {w.name: w for w in weights(spec)}
        self._sizes: dict[tuple[Any, ...], int] = {}
        if mesh.stages[-1][1] != spec.layers:
            raise UsageError(f"The stages end at layer {mesh.stages[-1][1]} of {spec.layers}.")
        if mesh.ep > 1 and spec.moe is None:
            raise UsageError("--ep shares out routed experts; this model has none.", "Use --tp or --pp.")
        self._check_copies()

    @cached_property
    def _parts(self) -> dict[str, list[tuple[int, int]]]:
        """What is counted -> its range for each place in a stage; of experts' width, for each tensor rank."""
        spec, inner, shares = self.spec, self.mesh.inner, self.mesh.weights
        groups = spec.heads if spec.mla else spec.kv_heads
        if inner > groups and not spec.mla:
            heads, kv = self._repeated(groups)
        else:
            times = spec.heads // groups
            kv = self._split("heads", groups, shares)
            heads = [(a * times, b * times) for a, b in kv]
        found = {"heads": heads, "kv_heads": kv, "vocab": self._split("vocab", spec.vocab, shares)}
        widths = {"dense": spec.intermediate}
        if spec.moe:
            widths["shared"] = spec.moe.width * spec.moe.shared
            tensor = [sum(shares[t :: self.mesh.tp]) for t in range(self.mesh.tp)]
            found["expert"] = self._split("expert", spec.moe.width, tensor)
            if any(a == b for a, b in found["expert"]):
                found["expert"] = [(0, spec.moe.width)]
        for kind, width in widths.items():
            if any(w.role.startswith(kind) for w in self.weights.values()):
                found[kind] = self._split(kind, width, shares)
        return found

    def _repeated(self, groups: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Heads and key-value heads where there are more ranks than the latter: each is held by several ranks."""
        inner, heads = self.mesh.inner, self.spec.heads
        if inner % groups or heads % inner:
            raise UsageError(
                f"{heads} heads with {groups} key-value heads cannot be shared by {inner} ranks.",
                f"Up to {groups}, or a multiple of {groups} that divides {heads}.",
            )
        return even(heads, inner), [(i // (inner // groups), i // (inner // groups) + 1) for i in range(inner)]

    def _split(self, kind: str, units: int, shares: list[float]) -> list[tuple[int, int]]:
        """Ranges of `units`, each a whole number of every scheme's quanta. Widest first in the error: who asks most."""
        together, culprit = 1, ""
        for weight in self.weights.values():
            axis, counted = CUT.get(weight.role, ("", ""))
            if counted in ((kind, "kv_heads") if kind == "heads" else (kind,)) and weight.name in self.stored:
                size = weight.shape[0 if axis == "out" else 1]
                need = self._quantum(weight, axis)
                grown = math.lcm(together, need // math.gcd(need, size // units))
                if grown > together:
                    together, culprit = grown, weight.name
        found = ranges(shares, -(-units // together))
        if kind in ("heads", "vocab") and any(a == b for a, b in found):
            helps = culprit and len(shares) <= units  # another scheme does
            raise UsageError(
                f"{len(shares)} ranks cannot share the {units} {_UNITS[kind]}"
                + (f" {together} at a time, which {culprit} in {self.stored[culprit]} needs." if helps else "."),
                _OTHERS if helps else f"At most {units} ranks in a stage, which has --tp times --ep of them.",
            )
        return [(min(a * together, units), min(b * together, units)) for a, b in found]

    def experts(self, rank: int, layer: int) -> tuple[int, ...]:
        """The routed experts that a rank holds of a layer: its own, then copies."""
        group = self.group(rank)
        copies = sorted(e for at, e, to in self.mesh.copies if (at, to) == (layer, group))
        return (*self.owned(rank), *copies)

    def owned(self, rank: int) -> range:
        """The routed experts of a rank but for copies."""
        return range(*self._owned[self.group(rank)])

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """The experts [first, past the last) of each group of ranks."""
        return tuple(self._owned)

    def holders(self, layer: int) -> list[tuple[int, ...]]:
        """The groups that hold each expert of a layer, the owner first."""
        copies: dict[int, list[int]] = {}
        for at, expert, group in self.mesh.copies:
            if at == layer:
                copies.setdefault(expert, []).append(group)
        owners = (group for group, (first, past) in enumerate(self._owned) for _ in range(first, past))
        return [(owner, *sorted(copies.get(expert, ()))) for expert, owner in enumerate(owners)]

    def group(self, rank: int) -> int:
        """The ranks of a stage that hold the same experts are a group."""
        return self.mesh.within(rank) // self._widths

    @property
    def groups(self) -> int:
        return len(self._owned)

    @cached_property
    def _owned(self) -> list[tuple[int, int]]:
        """The experts [first, past the last) of each group."""
        assert self.spec.moe is not None
        wide, shares = self._widths, self.mesh.weights
        groups = [sum(shares[at : at + wide]) for at in range(0, self.mesh.inner, wide)]
        return ranges(groups, self.spec.moe.experts)

    @property
    def _widths(self) -> int:
        """How many ranks share an expert."""
        return len(self._parts["expert"])

    def _check_copies(self) -> None:
        moe, seen = self.spec.moe, set[tuple[int, int, int]]()
        for copy in self.mesh.copies:
            layer, expert, group = copy
            known = moe is not None and moe.first_dense <= layer < self.spec.layers and 0 <= expert < moe.experts
            if not known or not 0 <= group < self.groups or copy in seen:
                raise BadArtefact(f"The mesh has a copy {copy} of no expert, or for no group, or twice.")
            if group in self.holders(layer)[expert][:1]:
                raise BadArtefact(f"The mesh copies expert {expert} of layer {layer} to group {group}, whose it is.")
            seen.add(copy)
        if any(len(held) > MOST for layer in {layer for layer, *_ in seen} for held in self.holders(layer)):
            raise BadArtefact(f"An expert has more than {MOST} holders.")

    def slice(self, name: str, rank: int) -> Slice | None:
        """What the rank holds of a weight; None: nothing."""
        weight = self.weights[name]
        if not self.held(weight, rank):
            return None
        axis, counted = CUT.get(weight.role, (None, ""))
        if weight.role == "bias":
            counted = BIASES.get(name.split(".")[-2], "")
            axis = "out" if counted else None
        experts = self.experts(rank, weight.layer or 0) if weight.experts else None
        if axis is None:
            return Slice(experts=experts)
        place = self.mesh.within(rank) % self._widths if weight.experts else self.mesh.within(rank)
        units = {"heads": self.spec.heads, "kv_heads": self.spec.kv_heads}.get(counted)
        each = weight.shape[0 if axis == "out" else 1] // units if units else 1
        start, stop = (edge * each for edge in self._parts[counted][place])
        self._check_quanta(weight, axis, start, stop)
        return Slice(axis, start, stop, experts)

    def nbytes(self, weight: Weight, rank: int) -> int:
        """Bytes that the rank holds of a weight. Layers are alike, but for copies of experts."""
        if not self.held(weight, rank):
            return 0
        kind = weight.name.split(".")[-2] if weight.role == "bias" else weight.role
        experts = len(self.experts(rank, weight.layer or 0)) if weight.experts else 0
        key = kind, weight.shape, self.stored[weight.name], self.mesh.within(rank), experts
        if key not in self._sizes:
            found = self.slice(weight.name, rank)
            assert found is not None
            self._sizes[key] = schemes.bytes_of(schemes.get(self.stored[weight.name]), found.shape(weight))
        return self._sizes[key]

    def _quantum(self, weight: Weight, axis: str) -> int:
        """What is never cut: a scheme's quanta, and inputs whose activations share a scale in products of INT8
        (INT16's move a product by 2e-5 of its size)."""
        scheme = self.stored[weight.name]
        found = quantum(schemes.get(scheme), axis)
        coarse = axis == "in" and products_of(weight.role, scheme, "cpu", self.compute) == "int8"
        return math.lcm(found, int8.ACTIVATIONS["int8"]) if coarse else found

    def _check_quanta(self, weight: Weight, axis: str, start: int, stop: int) -> None:
        scheme, size = self.stored[weight.name], weight.shape[0 if axis == "out" else 1]
        together = self._quantum(weight, axis)
        if start < stop and (start % together or (stop % together and stop != size)):
            raise UsageError(
                f"{self.mesh.inner} ranks would cut {weight.name} at {start} to {stop}, within the {together} that "
                f"{scheme} keeps together.",
                _OTHERS,
            )

    def held(self, weight: Weight, rank: int) -> bool:
        """Whether the rank's stage has the weight. A tied embedding is in the first and the last."""
        stage = self.mesh.stage(rank)
        if weight.layer is None and weight.role == "embed":
            return stage == 0 or (self.spec.tied and stage == self.mesh.pp - 1)
        return stage == self.mesh.stage_of(weight.layer, last=True)

    def spec_of(self, rank: int) -> ModelSpec:
        """The spec that a rank's attention sees: its own heads."""
        place = self.mesh.within(rank)
        (a, b), (c, d) = self._parts["heads"][place], self._parts["kv_heads"][place]
        return replace(self.spec, heads=b - a, kv_heads=b - a if self.spec.mla else d - c)

    def cache_values(self, rank: int) -> int:
        """Values that a rank caches for a token over its layers."""
        return self.spec_of(rank).kv_values * len(self.mesh.layers(rank))


_OTHERS = "Fewer ranks in a stage, or a scheme that keeps fewer together, such as --scheme int8."
_UNITS = {"heads": "heads or groups of heads", "vocab": "rows of the vocabulary"}
