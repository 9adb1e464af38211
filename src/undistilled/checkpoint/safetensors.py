"""Hugging Face folders of safetensors, read by plain file reads: a mapped file would count as our memory.

Format: 8 bytes little-endian header length, a JSON header, then the data. Every claim of the header is
checked before it is believed. R1's FP8 weights come with a `weight_scale_inv` beside each.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import scheme as schemes
from ..errors import BadArtefact
from ..ops.linear import dense
from ..scheme.fp8_block import BLOCK
from .source import Columns

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
SCHEME = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MAX_HEADER = 100_000_000  # bytes; R1's largest is under 1 MB
SCALE = "_scale_inv"
ALL = slice(None)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, stop) of `file`."""

    file: Path
    kind: str  # the header's name of the dtype; one outside DTYPES is refused when it is read, and only then
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of one safetensors file; BadArtefact names the file, the tensor and what is wrong."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise BadArtefact(
                    f"{file}: the header claims {length} bytes, the file has {size}.",
                    "It is truncated or not safetensors; download it again.",
                )
            header = json.loads(f.read(length), object_pairs_hook=_reject_duplicates)
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", "Is the download complete?") from None
    except (ValueError, RecursionError) as error:
        raise BadArtefact(f"{file}: the header is not valid JSON ({error}).", "Download it again.") from None
    if not isinstance(header, dict):
        raise BadArtefact(f"{file}: the header is not a JSON object.")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, fields, 8 + length, size) for name, fields in header.items()}
    _check_overlap(file, entries)
    return entries


def _entry(file: Path, name: str, fields: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise BadArtefact(f"{file}: tensor {name!r} has a malformed entry.", "Download it again.")
    if dtype not in DTYPES:
        return Entry(file, dtype, shape, base + start, base + stop)
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != need or base + stop > size:
        raise BadArtefact(
            f"{file}: tensor {name!r} needs {need} bytes at {start}..{stop}, the file has {size - base} bytes of data.",
            "It is truncated or its header is wrong; download it again.",
        )
    return Entry(file, dtype, shape, base + start, base + stop)


def _check_overlap(file: Path, entries: dict[str, Entry]) -> None:
    last, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start < last:
            raise BadArtefact(f"{file}: tensors {before!r} and {name!r} overlap.", "Download it again.")
        last, before = entry.stop, name


class SafetensorsSource:
    """A folder with config.json and one or more safetensors files."""

    LONGEST = 3  # dimensions of a tensor

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._open: tuple[Path, int] | None = None
        self.bytes_read = 0
        self.folder, self.config = folder, config
        self.files = shard_files(folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise BadArtefact(f"{file}: tensor {name!r} is also in {self.entries[name].file}.")
                self.entries[name] = entry

    def names(self) -> set[str]:
        return {n for n in self.entries if not n.endswith(SCALE)}

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise BadArtefact(
                f"{self.folder}: tensor {name!r} is missing.", "A shard is missing, or config.json is another model's."
            )
        entry = self.entries[name]
        if entry.kind not in DTYPES:
            raise BadArtefact(
                f"{entry.file}: tensor {name!r} has dtype {entry.kind!r}.", f"Known: {', '.join(DTYPES)}."
            )
        if not 1 <= len(entry.shape) <= self.LONGEST or 0 in entry.shape:
            raise BadArtefact(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}.",
                f"Expected 1 to {self.LONGEST} positive sizes.",
            )
        return entry

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def scheme(self, name: str) -> str:
        entry = self._entry(name)
        if entry.dtype not in SCHEME and entry.dtype is not torch.float8_e4m3fn:
            raise BadArtefact(
                f"{entry.file}: tensor {name!r} holds {entry.kind}, which is no weight by itself.",
                f"Known: {', '.join(k for k, d in DTYPES.items() if d.is_floating_point)}.",
            )
        if entry.dtype is not torch.float8_e4m3fn:
            return SCHEME[entry.dtype]
        if len(entry.shape) != 2:
            raise BadArtefact(f"{entry.file}: tensor {name!r} is FP8 and no matrix; blocks have two dimensions.")
        return "fp8_block"

    def read(self, name: str, start: int, stop: int, within: slice = ALL) -> torch.Tensor:
        """Rows [start, stop) as stored, or of each row [within.start, within.stop) of the second dimension."""
        entry = self._entry(name)
        shape = (stop - start, *entry.shape[1:])
        width = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        if within == ALL:
            rows = torch.empty(shape, dtype=entry.dtype)
            self._into(rows, name, entry.start + start * width)
            return rows
        first, past, _ = within.indices(entry.shape[1])
        rows = torch.empty((shape[0], past - first, *shape[2:]), dtype=entry.dtype)
        each = width // entry.shape[1]
        self._columns(rows, name, entry.start + start * width, width, slice(first * each, past * each))
        return rows

    def _columns(self, into: torch.Tensor, name: str, offset: int, width: int, part: slice) -> None:
        """Bytes `part` of each row of `width` bytes. Mapped for the time of the copy: a read for each row is slow."""
        file, count = self._entry(name).file, len(into)
        handle, before = self._descriptor(file), offset % mmap.ALLOCATIONGRANULARITY
        if os.fstat(handle).st_size < offset + count * width:
            raise BadArtefact(f"{file}: ends inside tensor {name!r}.", "The file changed while it was read.")
        view = into.view(torch.uint8).numpy().reshape(count, -1)
        with mmap.mmap(handle, before + count * width, access=mmap.ACCESS_READ, offset=offset - before) as mapped:
            rows = numpy.frombuffer(mapped, numpy.uint8, count * width, before).reshape(count, width)
            view[:] = rows[:, part]
            del rows  # it holds the map
        self.bytes_read += view.size

    def _into(self, into: torch.Tensor, name: str, offset: int) -> None:
        view = into.view(torch.uint8).numpy().reshape(-1).data
        file, done = self._entry(name).file, 0
        self.bytes_read += len(view)
        while done < len(view):
            got = os.preadv(self._descriptor(file), [view[done:]], offset + done)
            if got == 0:
                raise BadArtefact(f"{file}: ends inside tensor {name!r}.", "The file changed while it was read.")
            done += got

    def _descriptor(self, file: Path) -> int:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = (file, os.open(file, os.O_RDONLY))
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        self.close()

    def parts(self, name: str, start: int, stop: int, columns: Columns = None) -> dict[str, torch.Tensor]:
        rows = self.read(name, start, stop, slice(*columns) if columns else ALL)
        if rows.dtype is not torch.float8_e4m3fn:
            return {"values": rows}
        return {"values": rows, "scales": self._scales(name, start, stop, columns)}

    def _scales(self, name: str, start: int, stop: int, columns: Columns) -> torch.Tensor:
        entry = self._entry(name)
        scales = self._entry(name + SCALE)
        expected = tuple(-(-n // BLOCK) for n in entry.shape)
        if scales.shape != expected or scales.dtype is not torch.float32:
            raise BadArtefact(
                f"{scales.file}: {name + SCALE!r} is {list(scales.shape)} {scales.dtype}, "
                f"expected {list(expected)} float32 for 128 x 128 blocks."
            )
        within = slice(columns[0] // BLOCK, -(-columns[1] // BLOCK)) if columns else ALL
        return self.read(name + SCALE, start // BLOCK, -(-stop // BLOCK), within)

    def dense(self, name: str, start: int, stop: int) -> torch.Tensor:
        parts = self.parts(name, start, stop)
        stored = schemes.Stored(schemes.get(self.scheme(name)), tuple(parts["values"].shape), parts)
        return dense(stored, torch.float32)


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's index names, or the only ones there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise BadArtefact(
            f"{pickled[0]}: weights in pickle files can run code and are never opened.",
            "Convert them to safetensors first.",
        )
    raise BadArtefact(f"{folder}: no .safetensors files.", "Is the download complete?")


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        mapping = json.loads(index.read_text())["weight_map"]
        names = sorted(set(mapping.values()))
    except OSError as error:
        raise BadArtefact(f"{index}: {error.strerror}.", "Is the download complete?") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadArtefact(f"{index}: not an index with a weight_map.", "Download it again.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise BadArtefact(
                f"{index}: shard {name!r} is not a plain file name.", "Paths out of the folder are refused."
            )
        if not name.endswith(".safetensors"):
            raise BadArtefact(f"{index}: shard {name!r} is not safetensors.", "Pickle files are never opened.")
        if not (folder / name).exists():
            raise BadArtefact(f"{folder / name}: the shard is missing.", "Is the download complete?")
    return [folder / name for name in names]
