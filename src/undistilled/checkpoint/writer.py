"""Safetensors files written tensor by tensor: what a file will hold is known, so its header goes first.

A file has a name ending in `.part` until all of it is on the disk and was read back. Format: see safetensors.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BadArtefact, UndistilledError
from ..scheme.base import BYTES

KIND = {
    "float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8", "int8": "I8",
    "int16": "I16",
}
CHUNK = 8 << 20  # bytes read back at once


@dataclass(frozen=True)
class Tensor:
    """A tensor to come: its name, dtype as torch calls it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


class DiskFull(UndistilledError):
    """Nothing more can be written; what was is kept."""


def write(file: Path, tensors: list[Tensor], values: Iterable[torch.Tensor]) -> str:
    """Write `values` in the order of `tensors`; the SHA-256 of the file.

    DiskFull where it has no room; BadArtefact where the disk gives back something else than was written.
    """
    part = file.with_name(file.name + ".part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as f:
            for block in _blocks(tensors, values):
                digest.update(block)
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DiskFull(
            f"Cannot write {file}: {error.strerror}.", "Make room and give the same command again: it goes on."
        ) from None
    wrote = digest.hexdigest()
    if sha256(part) != wrote:
        raise BadArtefact(f"{part}: the disk gives back something else than was written.", "Is the disk sound?")
    os.replace(part, file)
    return wrote


def _blocks(tensors: list[Tensor], values: Iterable[torch.Tensor]):
    header, at = {}, 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": KIND[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor, value in zip(tensors, values, strict=True):
        if tuple(value.shape) != tensor.shape or str(value.dtype) != f"torch.{tensor.dtype}":
            raise ValueError(f"{tensor}: got {list(value.shape)} {value.dtype}")
        yield value.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data


def sha256(file: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
