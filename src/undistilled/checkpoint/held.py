"""A checkpoint's weights on their way into another format, and what such a format answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import BadArtefact
from ..model.weights import Weight, weights
from ..scheme.base import Parts, Scheme
from .resolve import Model
from .source import Source

Say = Callable[[str], None]


@dataclass
class Held:
    """A model's weights and the scheme in which each is exported; `dense`: those that are turned into it for that."""

    model: Model
    source: Source
    schemes: dict[str, Scheme] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)

    def weights(self) -> Iterator[Weight]:
        """Those that the files hold: layers that predict further tokens may be missing."""
        return (w for w in weights(self.model.spec) if w.name in self.schemes)

    def parts(self, weight: Weight, name: str) -> Parts:
        """The whole weight `name` in its scheme."""
        rows, scheme = weight.shape[0], self.schemes[weight.name]
        if weight.name in self.dense:
            return scheme.compress(self.source.dense(name, 0, rows))
        if tuple(self.source.shape(name)) != weight.shape or self.source.scheme(name) != scheme.name:
            said = f"{list(self.source.shape(name))} {self.source.scheme(name)}"
            raise BadArtefact(f"{name!r} is {said}, expected {list(weight.shape)} {scheme.name}.")
        return self.source.parts(name, 0, rows)


class Format(Protocol):
    """What export.py asks of a format. `way_out`: how a person gets what the format can say."""

    way_out: str

    def refuses(self, weight: Weight, scheme: Scheme) -> str | None:
        """Why it cannot say this weight in this scheme, as the end of a sentence; None where it can."""
        ...

    def write(self, held: Held, out: Path, say: Say) -> int:
        """Write `out`, which is not there yet; the bytes of all tensors."""
        ...
