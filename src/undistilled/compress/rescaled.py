"""A checkpoint with rows and columns of some weights multiplied, as it is read. See rescale.py for by what.

K inputs, N outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint.source import Columns, Source
from ..model.weights import Weight
from ..scheme.base import Parts
from .files import whole
from .hessian import Hessian


@dataclass
class Factors:
    """By weight name: of rows [N] or [E, N], of columns [K] or [E, K] (or [K] for all experts)."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def __or__(self, other: Factors) -> Factors:
        return Factors(self.rows | other.rows, self.columns | other.columns)

    def of(self, weight: str, experts: slice | int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(of rows [..., N], of columns [..., K]) of a weight, or of these experts; None: all ones."""
        found = (self.rows.get(weight), self.columns.get(weight))
        rows, columns = (f if f is None or experts is None or f.dim() == 1 else f[experts] for f in found)
        return rows, columns

    def diagonal(
        self, weight: str, experts: slice | None, inputs: torch.Tensor, outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What mean squares [..., K] of inputs and [..., N] of outputs' gradients are for the multiplied weight."""
        rows, columns = self.of(weight, experts)
        inputs = inputs if columns is None else inputs / columns.square()
        return inputs, outputs if rows is None else outputs / rows.square()

    def moments(
        self, weight: str, experts: slice | None, inputs: Hessian, outputs: torch.Tensor
    ) -> tuple[Hessian, torch.Tensor]:
        """The same of whole moments."""
        rows, columns = self.of(weight, experts)
        inputs = inputs if columns is None else inputs.stretched(1 / columns)
        return inputs, outputs if rows is None else outputs / rows.square()

    def save(self, file: Path) -> None:
        tensors = {f"{kind}:{n}": t for kind in ("rows", "columns") for n, t in getattr(self, kind).items()}
        with whole(file) as part:
            save_file({name: t.clone().contiguous() for name, t in tensors.items()}, part)

    @classmethod
    def load(cls, file: Path) -> Factors:
        found = cls()
        for key, tensor in load_file(file).items():
            kind, _, name = key.partition(":")
            getattr(found, kind)[name] = tensor
        return found


class Rescaled:
    """`source` with these factors. A weight that has some is read as dense only."""

    def __init__(self, source: Source, factors: Factors, known: Iterable[Weight]) -> None:
        self.source, self.factors = source, factors
        self.config, self.files = source.config, source.files
        changed = factors.rows.keys() | factors.columns.keys()
        self.changed = {
            name: (weight.name, at if weight.experts else None)
            for weight in known if weight.name in changed
            for at, name in enumerate(weight.tensor_names)
        }  # fmt: skip

    def names(self) -> set[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def scheme(self, name: str) -> str | None:
        return None if name in self.changed else self.source.scheme(name)

    def parts(self, name: str, start: int, stop: int, columns: Columns = None) -> Parts:
        return self.source.parts(name, start, stop, columns)

    def dense(self, name: str, start: int, stop: int) -> torch.Tensor:
        w = self.source.dense(name, start, stop)
        if name not in self.changed:
            return w
        rows, columns = self.factors.of(*self.changed[name])
        if rows is not None:
            w = w * (rows[start:stop] if w.dim() == 1 else rows[start:stop, None])
        return w if columns is None else w * columns
