"""GGML block formats: sizes, exact dequantisation and lossless splits into our int4/int8 parts.

Layouts follow ggml-common.h (blocks, little-endian); the order of float operations follows
gguf-py's `quants.py`, so that results are equal to it bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from undistilled.checkpoint import gguf_iq as iq
from undistilled.checkpoint.gguf_bits import bits, f16, nibbles

Decode = Callable[[np.ndarray], np.ndarray]

CHUNK_BYTES = 16 << 20
"""Largest float32 output, in bytes, that one dequantisation step produces."""


def _plain(dtype: str) -> Decode:
    """Values stored as they are; integers and float64 keep their type so that nothing is lost here."""
    return lambda blocks: np.ascontiguousarray(blocks).view(dtype)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * f16(blocks[:, :2])


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    values = nibbles(blocks[:, 2:], 16).reshape(len(blocks), 32).astype(np.float32)
    values -= 8
    return f16(blocks[:, :2]) * values


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale_min = f16(blocks[:, :4])
    values = nibbles(blocks[:, 4:], 16).reshape(len(blocks), 32).astype(np.float32)
    return scale_min[:, :1] * values + scale_min[:, 1:]


def _five(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Fifth bits uint8 [n, 4] (bit i is element i) and nibbles [n, 16] -> float32 [n, 32], 0..31."""
    top = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return (nibbles(low, 16).reshape(len(low), 32) | (top << 4)).astype(np.float32)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    values = _five(blocks[:, 2:6], blocks[:, 6:])
    values -= 16
    return f16(blocks[:, :2]) * values


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    scale_min = f16(blocks[:, :4])
    return scale_min[:, :1] * _five(blocks[:, 4:8], blocks[:, 8:]) + scale_min[:, 1:]


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    d = f16(blocks[:, 80:84])
    scales = d[:, :1] * (blocks[:, :16] & 15).astype(np.float32)
    mins = d[:, 1:] * (blocks[:, :16] >> 4).astype(np.float32)
    values = bits(blocks[:, 16:80], 32, 2).reshape(n, 16, 16).astype(np.float32)
    return (scales[:, :, None] * values - mins[:, :, None]).reshape(n, 256)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    low = nibbles(blocks[:, 96:104], 8).reshape(n, 16)
    high = bits(blocks[:, 104:108], 4, 2).reshape(n, 16)
    scales = (low | (high << 4)).astype(np.float32)
    scales -= 32
    scales = f16(blocks[:, 108:110]) * scales
    values = bits(blocks[:, 32:96], 32, 2).reshape(n, 256).astype(np.float32)
    # A clear mask bit takes 4 off: the mask holds the value's third bit, and values run from -4.
    values -= 4 * (1 - bits(blocks[:, :32], 32, 1).reshape(n, 256))
    return (scales[:, :, None] * values.reshape(n, 16, 16)).reshape(n, 256)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K and Q5_K headers (d, dmin, twelve bytes of 6-bit fields) -> scales and mins, float32 [n, 8, 1]."""
    d = f16(blocks[:, :4])
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (mixed & 15) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (mixed >> 4) | ((second >> 2) & 48)], axis=1)
    return (d[:, :1] * scales.astype(np.float32))[:, :, None], (d[:, 1:] * mins.astype(np.float32))[:, :, None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, mins = _k_scales(blocks)
    values = nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).astype(np.float32)
    return (scales * values - mins).reshape(-1, 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, mins = _k_scales(blocks)
    high = bits(blocks[:, 16:48], 32, 1).reshape(-1, 8, 32)
    values = (nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | (high << 4)).astype(np.float32)
    return (scales * values - mins).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    low = nibbles(blocks[:, :128], 64).reshape(n, 256)
    high = bits(blocks[:, 128:192], 32, 2).reshape(n, 256)
    values = (low | (high << 4)).astype(np.float32)
    values -= 32
    scales = f16(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[:, :, None] * values.reshape(n, 16, 16)).reshape(n, 256)


@dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` values are stored in `nbytes` bytes. `decode` maps uint8 [n, nbytes] to [n, elements], or is
    None where the format is known but not read here."""

    name: str
    elements: int
    nbytes: int
    decode: Decode | None = None


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _plain("<f4")),
    1: BlockType("F16", 1, 2, f16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66, iq.iq2_xxs),
    17: BlockType("IQ2_XS", 256, 74, iq.iq2_xs),
    18: BlockType("IQ3_XXS", 256, 98, iq.iq3_xxs),
    19: BlockType("IQ1_S", 256, 50, iq.iq1_s),
    20: BlockType("IQ4_NL", 32, 18, iq.iq4_nl),
    21: BlockType("IQ3_S", 256, 110, iq.iq3_s),
    22: BlockType("IQ2_S", 256, 82, iq.iq2_s),
    23: BlockType("IQ4_XS", 256, 136, iq.iq4_xs),
    24: BlockType("I8", 1, 1, _plain("i1")),
    25: BlockType("I16", 1, 2, _plain("<i2")),
    26: BlockType("I32", 1, 4, _plain("<i4")),
    27: BlockType("I64", 1, 8, _plain("<i8")),
    28: BlockType("F64", 1, 8, _plain("<f8")),
    29: BlockType("IQ1_M", 256, 56, iq.iq1_m),
    30: BlockType("BF16", 1, 2, _bf16),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
"""GGML type number -> format (numbers from ggml.h's `ggml_type`)."""

BY_NAME: dict[str, BlockType] = {kind.name: kind for kind in TYPES.values()}


def dequantise(kind: BlockType, raw: np.ndarray) -> np.ndarray:
    """uint8 of whole blocks, any shape -> flat values, float32 (plain integers and F64: their own type).

    Invalid bit patterns (NaN or infinite scales) pass through without a warning: the values say it themselves.
    """
    if kind.decode is None:
        raise ValueError(f"{kind.name} cannot be dequantised")
    with np.errstate(invalid="ignore", over="ignore"):
        return kind.decode(raw.reshape(-1, kind.nbytes)).reshape(-1)


def _blocks(raw: np.ndarray, rows: int, nbytes: int) -> np.ndarray:
    return raw.reshape(rows, -1, nbytes)


def to_int4_parts(raw: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q4_1 bytes of `rows` rows -> values uint8 [N, K/32, 16], scales f16 [N, K/32], mins f16 [N, K/32].

    Byte i of a group has element i in its low nibble and element i + 16 in its high one; w = q * scale + min.
    """
    blocks = _blocks(raw, rows, 20)
    header = np.ascontiguousarray(blocks[:, :, :4]).view("<f2")
    return np.ascontiguousarray(blocks[:, :, 4:]), header[:, :, 0].copy(), header[:, :, 1].copy()


def q4_0_parts(raw: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Q4_0 bytes -> values uint8 [N, K/32, 16] (packed as in `to_int4_parts`), scales f16 [N, K/32];
    w = (q - 8) * scale."""
    blocks = _blocks(raw, rows, 18)
    return np.ascontiguousarray(blocks[:, :, 2:]), np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]


def q8_0_parts(raw: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Q8_0 bytes -> values int8 [N, K], scales float32 [N, K/32]; w = q * scale."""
    blocks = _blocks(raw, rows, 34)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
    return np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(rows, -1), scales


def quantised_parts(kind: BlockType, raw: np.ndarray, rows: int) -> tuple[str, dict[str, np.ndarray]] | None:
    """The stored numbers as our "int4" (values, scales, mins) or "int8" (values, scales), or None if no exact
    form exists. Q4_0 gets mins = -8 * scale, which f16 holds exactly unless the product overflows."""
    if kind.name == "Q4_1":
        return "int4", dict(zip(("values", "scales", "mins"), to_int4_parts(raw, rows), strict=True))
    if kind.name == "Q4_0":
        values, scales = q4_0_parts(raw, rows)
        with np.errstate(over="ignore"):
            mins = scales * np.float16(-8)
        exact = bool(np.isfinite(mins).all())
        return ("int4", {"values": values, "scales": scales, "mins": mins}) if exact else None
    if kind.name == "Q8_0":
        return "int8", dict(zip(("values", "scales"), q8_0_parts(raw, rows), strict=True))
    return None
