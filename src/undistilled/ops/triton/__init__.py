"""CUDA kernels in Triton. Nothing here imports triton at the top but the kernel files, which load on first use.

`why_missing()` says why there are none: machines without CUDA, or without triton, run the references.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from ...scheme import Plain, Stored
from ...scheme.tiles import Tiles
from .form import form_of

OLDEST = (8, 0)  # compute capability: bfloat16 arithmetic on pairs
FEW = 64  # rows that kernels decode a weight for; above, a product on a dense copy is faster


@cache
def why_missing() -> str:
    """Why no kernel serves on this machine; empty where they do."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.get_device_capability() < OLDEST:
        return f"the GPU's compute capability is below {OLDEST[0]}.{OLDEST[1]}"
    return ""


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels take activations like x."""
    return x.device.type == "cuda" and x.dtype is torch.bfloat16 and not why_missing()


def ready(weight: Stored, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply by this weight: quantised, on a CUDA device, activations in bfloat16."""
    return form_of(weight.scheme) is not None and _here(weight, dtype)  # type: ignore[arg-type]  # frozen


def tiles_ready(weight: Stored, dtype: torch.dtype) -> bool:
    """As `ready`, for dynamic blocks: of 16 rows, whose quanta of a row are a power of two."""
    scheme = weight.scheme
    if not isinstance(scheme, Tiles) or scheme.rows != 16 or scheme.cols & (scheme.cols - 1):
        return False
    return _here(weight, dtype)


def pairs(first: Stored, second: Stored, dtype: torch.dtype) -> bool:
    """Whether one launch of the kernels multiplies by both: of one form, with as many inputs."""
    alike = first.scheme == second.scheme and first.shape[-1] == second.shape[-1]
    return alike and ready(first, dtype) and ready(second, dtype)


def multiplies(weight: Stored, dtype: torch.dtype) -> bool:
    """Whether either of both serves."""
    return ready(weight, dtype) or tiles_ready(weight, dtype)


def rates(gate: Stored, dtype: torch.dtype) -> bool:
    """Whether the router's kernel takes this gate: BF16 as activations are. It has no backward."""
    plain = isinstance(gate.scheme, Plain) and gate.parts["values"].dtype is torch.bfloat16
    return plain and torch.is_inference_mode_enabled() and _here(gate, dtype)


def lifts(weight: Stored, rows: int, dtype: torch.dtype) -> bool:
    """Whether the kernels of MLA's lift take so many rows to this weight; they have no backward."""
    return rows <= FEW and torch.is_inference_mode_enabled() and ready(weight, dtype)


def _here(weight: Stored, dtype: torch.dtype) -> bool:
    if weight.device.type != "cuda" or dtype is not torch.bfloat16 or why_missing():
        return False
    if weight.shape[-2] * weight.shape[-1] >= 1 << 31:  # offsets are 32 bits
        return False
    return all(part.is_contiguous() for part in weight.parts.values())


def inference(x: torch.Tensor) -> bool:
    """As `serves`, for ops that training differentiates: their kernels have no backward."""
    return serves(x) and torch.is_inference_mode_enabled()


def scores(x: torch.Tensor) -> bool:
    """As `inference`, for a router's logits, which are float32 whatever the activations are."""
    wide = x.device.type == "cuda" and x.dtype is torch.float32
    return wide and torch.is_inference_mode_enabled() and not why_missing()
