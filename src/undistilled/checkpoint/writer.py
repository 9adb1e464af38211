"""Safetensors files written tensor by tensor: what a file will hold is known, so its header goes first.

A file has a name ending in `.part` until all of it is on the disk and was read back. Format: see safetensors.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import BadArtefact, UndistilledError
from ..scheme.base import PartSpec
from .safetensors import DTYPES

KIND = {str(dtype).removeprefix("torch."): kind for kind, dtype in DTYPES.items()}
CHUNK = 8 << 20  # bytes read back at once

Tensor = tuple[str, PartSpec]  # a tensor to come: its name, dtype and shape


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
    for name, spec in tensors:
        header[name] = {
            "dtype": KIND[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (name, spec), value in zip(tensors, values, strict=True):
        if tuple(value.shape) != spec.shape or str(value.dtype) != f"torch.{spec.dtype}":
            raise ValueError(f"{name}: {spec}: got {list(value.shape)} {value.dtype}")
        yield value.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data


T = TypeVar("T")


def shards(sized: Iterable[tuple[T, int]], room: int) -> list[list[T]]:
    """What goes into each file, of (item, bytes) in order: as many as `room` bytes take, and at least one."""
    files: list[list[T]] = [[]]
    left = room
    for item, size in sized:
        if size > left and files[-1]:
            files.append([])
            left = room
        files[-1].append(item)
        left -= size
    return files


def shard_name(at: int, count: int) -> str:
    """The file name of shard `at` of `count`, from 1 on."""
    return f"model-{at:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, where: dict[str, str], total: int, config: dict[str, Any]) -> None:
    """The index of the shards, tensor name -> file, with the bytes of all; and config.json."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    for name, value in (("model.safetensors.index.json", index), ("config.json", config)):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")


def sha256(file: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
