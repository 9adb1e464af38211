"""What every kind of checkpoint answers, so that the loader asks one question of all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import scheme as schemes

if TYPE_CHECKING:
    import torch

    from ..scheme.base import Parts


Columns = tuple[int, int] | None


def narrowed(parts: Parts, scheme: str | None, shape: tuple[int, ...], columns: Columns) -> Parts:
    """Columns of the parts of whole rows [out, in], for checkpoints that are not read by columns."""
    if columns is None:
        return parts
    return schemes.Stored(schemes.get(str(scheme)), shape, parts).narrow("in", *columns).parts


class Source(Protocol):
    """Weights by their Hugging Face names, read by ranges of rows, never all at once.

    Rows are indices of the first dimension. Every error is a BadArtefact naming file and tensor.
    """

    config: dict[str, Any]
    files: list[Path]

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def scheme(self, name: str) -> str | None:
        """The scheme that holds this tensor's stored values exactly, or None where only `dense` reads it."""
        ...

    def parts(self, name: str, start: int, stop: int, columns: Columns = None) -> Parts:
        """Rows [start, stop) as parts of `scheme(name)`, or of these rows the columns [first, past the last).

        Both ranges respect the scheme's quanta.
        """
        ...

    def dense(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in float32."""
        ...
