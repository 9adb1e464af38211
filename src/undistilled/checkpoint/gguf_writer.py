"""GGUF files written tensor by tensor, version 3, little-endian. Format: ggml's docs/gguf.md; gguf.py reads it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .gguf_types import BlockType
from .writer import DiskFull

ALIGNMENT = 32  # bytes; what a file without `general.alignment` has
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class ToWrite:
    """A tensor to come. `shape` is row-major, (out, in) for a matrix; `number` is ggml's of `kind`."""

    name: str
    number: int
    kind: BlockType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.elements * self.kind.nbytes


def write_gguf(file: Path, metadata: dict[str, Any], tensors: list[ToWrite], values: Iterable[np.ndarray]) -> int:
    """Write `values`, uint8, in the order of `tensors`; the bytes of all. DiskFull where there is no room.

    Metadata are whole numbers (uint32; int32 in lists), floats (float32), booleans, text, and lists of one kind.
    """
    try:
        with file.open("wb") as f:
            f.write(_header(metadata, tensors))
            for tensor, value in zip(tensors, values, strict=True):
                if value.nbytes != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {value.nbytes} bytes, expected {tensor.nbytes}")
                f.write(np.ascontiguousarray(value).reshape(-1).data)
                f.write(bytes(-tensor.nbytes % ALIGNMENT))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise DiskFull(f"Cannot write {file}: {error.strerror}.", "Make room and try again.") from None
    return sum(tensor.nbytes for tensor in tensors)


def _header(metadata: dict[str, Any], tensors: list[ToWrite]) -> bytes:
    found = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        found += [_text(key), _value(value)]
    at = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        found += [_text(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        found.append(struct.pack("<IQ", tensor.number, at))
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    header = b"".join(found)
    return header + bytes(-len(header) % ALIGNMENT)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """The type's number, then the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    kind, pack = _ELEMENTS[type(value[0]) if value else str]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + pack(value)


_ELEMENTS: dict[type, Any] = {
    str: (_STRING, lambda values: b"".join(map(_text, values))),
    int: (_I32, lambda values: np.array(values, "<i4").tobytes()),
    float: (_F32, lambda values: np.array(values, "<f4").tobytes()),
}
