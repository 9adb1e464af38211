"""A GGUF model as a `Source`: weights by ranges of rows, and as parts of our schemes where those are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import scheme as schemes
from .gguf_source import GGUFSource
from .source import Columns, narrowed

EXACT = {
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "Q8_0": "int8-g32",
    "Q4_0": "int4-g32-sym",
    "Q4_1": "int4-g32",
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PART = {"mins": "minimums"}


class GGUFStream:
    """`files`, `names`, `shape`, `scheme`, `parts` and `dense`, as source.py has them."""

    def __init__(self, source: GGUFSource) -> None:
        self.inner, self.config = source, source.config
        self.files = [file.path for file in source.files]
        self._last: tuple[str, Any] = ("", None)

    def names(self) -> set[str]:
        return set(self.inner.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def scheme(self, name: str) -> str | None:
        kind = self.inner.dtype(name)
        if kind in PLAIN:
            return EXACT[kind]
        return EXACT.get(kind) if self.inner.splits(name) else None

    def parts(self, name: str, start: int, stop: int, columns: Columns = None) -> dict[str, torch.Tensor]:
        shape = (stop - start, *self.shape(name)[1:])
        return narrowed(self._parts(name, start, stop), self.scheme(name), shape, columns)

    def _parts(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        kind = self.inner.dtype(name)
        if kind in PLAIN:
            return {"values": self._rows(name, start, stop, PLAIN[kind])}
        found = self._once(name, lambda: self.inner.quantised(name))
        if found is None:  # a scale beyond float16
            return schemes.get(EXACT[kind]).compress(self.dense(name, start, stop))
        wanted = schemes.get(EXACT[kind]).layout()
        parts = {PART.get(part, part): tensor for part, tensor in found[1].items()}
        return {part: parts[part][start:stop] for part in wanted}  # Q4_0's minimums follow from its scales

    def dense(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._rows(name, start, stop, torch.float32)

    def _rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        rows = self.inner.plain_rows(name, start, stop, dtype)
        if rows is None:
            rows = self._once(name + str(dtype), lambda: self.inner.read(name, dtype))[start:stop]
        self._forget()
        return rows

    def _once(self, key: str, read: Callable[[], Any]) -> Any:
        """What `read` gives, kept while ranges of the same tensor are asked for."""
        if self._last[0] != key:
            self._last = (key, read())
            self._forget()
        return self._last[1]

    def _forget(self) -> None:
        for file in self.inner.files:
            file.forget()
