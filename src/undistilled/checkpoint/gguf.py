"""A reader of GGUF files that trusts nothing: every count, length and offset is checked before it is used.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Time and memory are bounded by the limits below
and by the file's own size, whatever the file claims.
"""

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from undistilled.checkpoint.gguf_types import CHUNK_BYTES, TYPES, BlockType, dequantise
from undistilled.errors import BadArtefact

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_ELEMENTS = 1 << 22
"""Array elements in all metadata together; a 256k vocabulary with merges, scores and types has 1.1 million."""
MAX_STRING = 1 << 26
MAX_KEY = (1 << 16) - 1
MAX_DEPTH = 3

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """`shape` is row-major, (out, in) for a matrix; `offset` counts bytes from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    kind: BlockType


class _Reader:
    """A bounds-checked cursor. `field` names what is being read, for messages."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.at, self.field, self.budget = 0, "header", MAX_ELEMENTS

    def fail(self, what: str) -> NoReturn:
        raise BadArtefact(f"{self.path}: {self.field}: {what}.", "The file is damaged or was made to mislead.")

    def need(self, count: int) -> int:
        start = self.at
        if count > self.size - start:
            self.fail(f"needs {count} bytes at offset {start}, but the file ends at {self.size}")
        self.at = start + count
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.data, self.need(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.data, self.need(8))[0])

    def string(self, limit: int = MAX_STRING) -> str:
        length = self.u64()
        if length > limit:
            self.fail(f"a string of {length} bytes is over the limit of {limit}")
        start = self.need(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            self.fail(f"text at offset {start} is not UTF-8 ({error.reason})")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS or kind == _BOOL:
            return self.numbers(kind, 1)[0]
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth + 1)
        self.fail(f"unknown value type {kind}")

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS.get(kind, "<u1"))
        start = self.need(count * dtype.itemsize)
        values = np.frombuffer(self.data, dtype, count, start)
        if kind == _BOOL:
            if count and values.max() > 1:
                self.fail("a boolean is neither 0 nor 1")
            values = values.astype(bool)
        return values.tolist()

    def array(self, depth: int) -> list[Any]:
        kind, count = self.u32(), self.u64()
        if depth > MAX_DEPTH:
            self.fail(f"arrays are nested more than {MAX_DEPTH} deep")
        # A nested array takes as long to read as many numbers.
        self.budget -= count * (16 if kind == _ARRAY else 1)
        if self.budget < 0:
            self.fail(f"an array of {count} elements takes the metadata over {MAX_ELEMENTS} elements")
        if kind in _SCALARS or kind == _BOOL:
            return self.numbers(kind, count)
        if kind not in (_STRING, _ARRAY):
            self.fail(f"unknown element type {kind}")
        if count * (8 if kind == _STRING else 12) > self.size - self.at:
            self.fail(f"an array of {count} elements does not fit in the file")
        return self.strings(count) if kind == _STRING else [self.array(depth + 1) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """A tight loop, because vocabularies have hundreds of thousands of strings."""
        data, at, size, length_of = self.data, self.at, self.size, _U64.unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                if size - at < 8:
                    self.fail(f"string {len(found)} of {count} is cut off")
                length = length_of(data, at)[0]
                at += 8
                if length > size - at or length > MAX_STRING:
                    self.fail(f"string {len(found)} of {count} claims {length} bytes")
                found.append(data[at : at + length].decode())
                at += length
        except UnicodeDecodeError as error:
            self.fail(f"string {len(found)} of {count} is not UTF-8 ({error.reason})")
        self.at = at
        return found


class GGUFFile:
    """One GGUF file, mapped into memory. Raises BadArtefact, and nothing else, on whatever is wrong with it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = self._open()
        reader = _Reader(self.path, self._map)
        tensors, keys = self._header(reader)
        self.metadata: dict[str, Any] = self._metadata(reader, keys)
        infos = self._infos(reader, tensors)
        self.tensors: dict[str, GGUFTensor] = self._place(reader, infos)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def _open(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BadArtefact(f"{self.path}: cannot be read ({error}).", "Give the path of a .gguf file.") from error

    def _header(self, reader: _Reader) -> tuple[int, int]:
        if self._map[:4] == b"GGUF" and reader.size < 24:
            raise BadArtefact(
                f"{self.path}: is truncated: its {reader.size} bytes are less than a GGUF header.", "Download it again."
            )
        if self._map[:4] != b"GGUF":
            raise BadArtefact(f"{self.path}: is not a GGUF file (no GGUF header).", "Give the path of a .gguf file.")
        reader.at = 4
        version = reader.u32()
        if version & 0xFFFF == 0 and version:
            raise BadArtefact(f"{self.path}: is a big-endian GGUF file.", "Convert it to little-endian first.")
        if version not in (2, 3):
            raise BadArtefact(f"{self.path}: has GGUF version {version}.", "Versions 2 and 3 are supported.")
        tensors, keys = reader.u64(), reader.u64()
        # The least a tensor entry and a key can take: name length, dimension, type, offset; length, type, value.
        for what, count, limit, least in (("tensors", tensors, MAX_TENSORS, 32), ("keys", keys, MAX_KEYS, 13)):
            if count > limit or count * least > reader.size:
                reader.fail(f"claims {count} {what}, more than the file can hold")
        return tensors, keys

    def _metadata(self, reader: _Reader, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(count):
            reader.field = f"metadata key {index}"
            key = reader.string(MAX_KEY)
            reader.field = f"metadata {key!r}"
            if key in found:
                reader.fail("appears twice")
            found[key] = reader.value(reader.u32())
        return found

    def _infos(self, reader: _Reader, count: int) -> dict[str, tuple[BlockType, tuple[int, ...], int]]:
        found: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for index in range(count):
            reader.field = f"tensor {index}"
            name = reader.string(MAX_KEY)
            reader.field = f"tensor {name!r}"
            if name in found:
                reader.fail("appears twice")
            found[name] = self._info(reader)
        return found

    def _info(self, reader: _Reader) -> tuple[BlockType, tuple[int, ...], int]:
        """(format, shape, offset in the data section) of the next tensor entry."""
        count = reader.u32()
        if not 1 <= count <= 4:
            reader.fail(f"has {count} dimensions, not 1 to 4")
        dims = [reader.u64() for _ in range(count)]
        number, offset = reader.u32(), reader.u64()
        kind = TYPES.get(number)
        if kind is None:
            reader.fail(f"has unknown type number {number}")
        if 0 in dims:
            reader.fail(f"has a zero dimension in {tuple(reversed(dims))}")
        if prod(dims) >= 1 << 63:
            reader.fail(f"has more elements than 64 bits count in {tuple(reversed(dims))}")
        if dims[0] % kind.elements:
            reader.fail(f"has rows of {dims[0]} elements, not a multiple of {kind.name}'s block of {kind.elements}")
        return kind, tuple(reversed(dims)), offset

    def _alignment(self, reader: _Reader) -> int:
        reader.field = "metadata 'general.alignment'"
        value = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(value) is not int or value < 8 or value & (value - 1):
            reader.fail(f"is {str(value)[:40]}, not a power of two of at least 8")
        return value

    def _place(
        self, reader: _Reader, infos: dict[str, tuple[BlockType, tuple[int, ...], int]]
    ) -> dict[str, GGUFTensor]:
        alignment = self._alignment(reader)
        start = -(-reader.at // alignment) * alignment
        found: dict[str, GGUFTensor] = {}
        for name, (kind, shape, offset) in infos.items():
            reader.field = f"tensor {name!r}"
            nbytes = prod(shape) // kind.elements * kind.nbytes
            if offset % alignment:
                reader.fail(f"its offset {offset} is not a multiple of the alignment {alignment}")
            if start + offset + nbytes > reader.size:
                reader.fail(f"its data would end at {start + offset + nbytes}, past the file's end at {reader.size}")
            found[name] = GGUFTensor(name, kind.name, shape, start + offset, nbytes, kind)
        self._check_overlap(reader, found)
        return found

    def _check_overlap(self, reader: _Reader, tensors: dict[str, GGUFTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                reader.field = f"tensor {after.name!r}"
                reader.fail(f"its data overlap those of {before.name!r}")

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise BadArtefact(f"{self.path}: has no tensor {name!r}.", "The model file is incomplete.")
        return self.tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes, a read-only uint8 view of the mapped file."""
        tensor = self._tensor(name)
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def forget(self) -> None:
        """Let go of the file's pages: they count as this process's memory while they are mapped in."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def read(self, name: str, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> torch.Tensor:
        """Dequantised values. `rows` takes a range of the first dimension and touches no other bytes."""
        tensor = self._tensor(name)
        start, stop, step = (rows or slice(None)).indices(tensor.shape[0])
        if step != 1:
            raise ValueError("rows must be a contiguous range")
        stop = max(start, stop)
        per_row = prod(tensor.shape[1:])
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=dtype)
        self._fill(out.view(-1), tensor, start * per_row)
        return out

    def _fill(self, out: torch.Tensor, tensor: GGUFTensor, first: int) -> None:
        """Write elements `first`, `first` + 1, ... of `tensor` to flat `out`, a bounded chunk at a time."""
        kind = tensor.kind
        if kind.decode is None:
            raise BadArtefact(
                f"{self.path}: tensor {tensor.name!r} has type {kind.name}, which cannot be read yet.",
                "Use a file in F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K or IQ1_S to IQ4_XS.",
            )
        block, raw, step = kind.elements, self.raw(tensor.name), CHUNK_BYTES // (4 * kind.elements)
        last = first + out.numel()
        for at in range(first // block, -(-last // block) if out.numel() else 0, step):
            end = min(at + step, -(-last // block))
            values = dequantise(kind, raw[at * kind.nbytes : end * kind.nbytes])
            low, high = max(first, at * block), min(last, end * block)
            # A copy: torch refuses to wrap the read-only mapping that plain types give back.
            part = torch.from_numpy(values[low - at * block : high - at * block].copy())
            out[low - first : high - first].copy_(part)
