"""GGML's IQ formats: 4-bit codes of unevenly spaced levels, and 1 to 3 bits by codebooks of 8 or 4 values.

Layouts follow ggml-common.h (`block_iq*`, little-endian), the order of float operations gguf-py's `quants.py`.
Each function maps uint8 [n, bytes of a block] to float32 [n, elements of a block].
"""

import numpy as np

from undistilled.checkpoint.gguf_bits import f16, fields, nibbles, words
from undistilled.checkpoint.gguf_codebooks import codebook

_UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_EVEN_SIGNS = np.array([code | (code.bit_count() & 1) << 7 for code in range(128)], np.uint8)
"""Seven signs as they are stored -> eight: the last is what makes the number of minus signs even."""


def iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return f16(blocks[:, :2]) * _UNEVEN[nibbles(blocks[:, 2:], 16)].reshape(len(blocks), 32)


def iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = fields(blocks[:, 4:8], [0, 4], 15)
    high = fields(words(blocks[:, 2:4], "<u2"), list(range(0, 16, 2)), 3)
    scale = f16(blocks[:, :2]) * ((low | (high << 4)).astype(np.float32) - 32)
    return _scaled(scale, _UNEVEN[nibbles(blocks[:, 8:], 16)])


def _scaled(scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Scales [n, groups] times values, 256 in each of n blocks -> [n, 256]."""
    n, groups = scale.shape
    return (scale[:, :, None] * values.reshape(n, groups, -1)).reshape(n, 256)


def _signed(scale: np.ndarray, values: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """As `_scaled`; bit i of `signs` uint8 [n, 32] is set where the i-th of eight values is negative."""
    minus = np.unpackbits(np.ascontiguousarray(signs)[:, :, None], axis=2, bitorder="little")
    return _scaled(scale, values.reshape(minus.shape) * (1 - 2 * minus.astype(np.float32)))


def _high(low: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Indices with `more` bits above the eight of `low`, uint16."""
    return low | (more.astype(np.uint16) << 8)


def iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    pairs = words(blocks[:, 2:], "<u4").reshape(len(blocks), 8, 2)
    signs, scale = _packed_signs(blocks, pairs[:, :, 1])
    return _signed(scale * np.float32(0.25), codebook("IQ2_XXS")[words(pairs[:, :, 0], "u1")], signs)


def _packed_signs(blocks: np.ndarray, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """32-bit numbers [n, 8] of four times seven signs and a scale -> signs [n, 32], d * (scale + 1/2) [n, 8]."""
    scale = f16(blocks[:, :2]) * (np.float32(0.5) + (packed >> 28).astype(np.float32))
    return _EVEN_SIGNS[fields(packed, [0, 7, 14, 21], 127)], scale


def iq2_xs(blocks: np.ndarray) -> np.ndarray:
    codes = words(blocks[:, 2:66], "<u2")
    return _signed(_quarters(blocks, 66), codebook("IQ2_XS")[codes & 511], _EVEN_SIGNS[codes >> 9])


def _quarters(blocks: np.ndarray, at: int) -> np.ndarray:
    """Scales [n, 16] from nibbles at byte `at`."""
    scale = fields(blocks[:, at : at + 8], [0, 4], 15).astype(np.float32)
    return f16(blocks[:, :2]) * (np.float32(0.5) + scale) * np.float32(0.25)


def iq2_s(blocks: np.ndarray) -> np.ndarray:
    codes = _high(blocks[:, 2:34], fields(blocks[:, 66:74], [0, 2, 4, 6], 3))
    return _signed(_quarters(blocks, 74), codebook("IQ2_S")[codes], blocks[:, 34:66])


def iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    signs, scale = _packed_signs(blocks, words(blocks[:, 66:], "<u4"))
    return _signed(scale * np.float32(0.5), codebook("IQ3_XXS")[blocks[:, 2:66]], signs)


def iq3_s(blocks: np.ndarray) -> np.ndarray:
    codes = _high(blocks[:, 2:66], fields(blocks[:, 66:74], list(range(8)), 1))
    scale = f16(blocks[:, :2]) * (1 + 2 * fields(blocks[:, 106:], [0, 4], 15)).astype(np.float32)
    return _signed(scale, codebook("IQ3_S")[codes], blocks[:, 74:106])


def iq1_s(blocks: np.ndarray) -> np.ndarray:
    head = words(blocks[:, 34:], "<u2")
    codes = _high(blocks[:, 2:34], fields(head, [0, 3, 6, 9], 7))
    scale = f16(blocks[:, :2]) * (2 * ((head >> 12) & 7) + 1).astype(np.float32)
    return _shifted(scale, codes, head >> 15)


def _shifted(scale: np.ndarray, codes: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Values of -1, 0, 1, an eighth lower where `down` [n, k] says so of n blocks' k-th parts, else higher."""
    shift = np.float32(0.125) - np.float32(0.25) * down.astype(np.float32)
    n, parts = shift.shape
    return _scaled(scale, codebook("IQ1_S")[codes].reshape(n, parts, -1) + shift[:, :, None])


def iq1_m(blocks: np.ndarray) -> np.ndarray:
    head, scales = fields(blocks[:, 32:48], [0, 4], 15), words(blocks[:, 48:], "<u2")
    # The float16 is spread over the four numbers' highest nibbles, its lowest nibble first.
    d = np.bitwise_or.reduce((scales >> 12) << np.array([0, 4, 8, 12], np.uint16), axis=1, keepdims=True)
    scale = d.view("<f2").astype(np.float32) * (2 * fields(scales, [0, 3, 6, 9], 7) + 1).astype(np.float32)
    return _shifted(scale, _high(blocks[:, :32], head & 7), head >> 3)
