"""Fields of GGML's blocks, taken out of bytes for many blocks at once."""

import numpy as np


def f16(part: np.ndarray) -> np.ndarray:
    """uint8 [n, 2k] -> float32 [n, k]."""
    return np.ascontiguousarray(part).view("<f2").astype(np.float32)


def words(part: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 [n, k] -> little-endian integers [n, k / their size]."""
    return np.ascontiguousarray(part).view(dtype)


def nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, k] -> uint8 [n, k/width, 2, width]: of each `width` bytes first the low, then the high nibbles."""
    groups = packed.reshape(len(packed), -1, 1, width)
    return np.concatenate([groups & 15, groups >> 4], axis=2)


def bits(packed: np.ndarray, width: int, step: int) -> np.ndarray:
    """uint8 [n, k] -> uint8 [n, k/width, 8/step, width]: `step`-bit fields, low bits first."""
    shifts = np.arange(0, 8, step, dtype=np.uint8).reshape(1, 1, -1, 1)
    return (packed.reshape(len(packed), -1, 1, width) >> shifts) & np.uint8((1 << step) - 1)


def fields(numbers: np.ndarray, shifts: list[int], mask: int) -> np.ndarray:
    """Unsigned [n, k] -> the same type [n, k * len(shifts)]: what lies at each shift, of one number after another."""
    found = (numbers[:, :, None] >> np.array(shifts, numbers.dtype)) & numbers.dtype.type(mask)
    return found.reshape(len(numbers), -1)
