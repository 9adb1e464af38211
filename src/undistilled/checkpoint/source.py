"""What every kind of checkpoint answers, so that the loader asks one question of all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..scheme.base import Parts


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

    def parts(self, name: str, start: int, stop: int) -> Parts:
        """Rows [start, stop) as parts of `scheme(name)`; the range respects the scheme's row quantum."""
        ...

    def dense(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in float32."""
        ...
