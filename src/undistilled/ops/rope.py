"""Rotary position embedding: frequencies for each scaling, and the rotation.

Sources: Su et al. 2021; YaRN: Peng et al. 2023, section 3; llama3: the Llama 3.1 release.
Scores do not depend on the order of the rotated values as long as queries and keys share it: the
reference leaves halves side by side, the C kernel leaves every value in its place.
"""

from __future__ import annotations

import math

import torch

from ..model.spec import Rope, yarn_mscale
from . import triton as cuda
from .cpu import native
from .registry import op

Turn = tuple[torch.Tensor | None, torch.Tensor | None, bool]  # cos, sin [T, F], and whether pairs are neighbours


def frequencies(rope: Rope) -> tuple[torch.Tensor, float]:
    """(angle for each position [dim / 2], factor on cos and sin)."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    return plain, 1.0


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    turns = rope.original_max * plain / (2 * math.pi)  # full turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(plain / rope.factor, plain, blend.clamp(0, 1))


def _yarn(plain: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, float]:
    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_max / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = max(high - low, 0.001)
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    factor = rope.attention_factor
    if factor is None:
        both = rope.mscale and rope.mscale_all_dim
        factor = (
            yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
            if both
            else (yarn_mscale(rope.factor))
        )
    return torch.lerp(plain, plain / rope.factor, stretched), factor


def angles(positions_T: torch.Tensor, frequencies_F: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, dim / 2] in float32."""
    turned = positions_T[:, None].float() * frequencies_F
    return turned.cos() * factor, turned.sin() * factor


@op
def rotate(x_THR: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of x [T, heads, dim] in float32; the dtype of x is kept."""
    x = x_THR.float()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_THR.dtype)


@rotate.register("native", native.serves, "our C kernel: in place")
def _native(x_THR: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return native.rope_rows(x_THR, cos_TF, sin_TF, interleaved)


@rotate.register("triton", cuda.inference, "our Triton kernel: one pass")
def _triton(x_THR: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool) -> torch.Tensor:
    from .triton import small

    return small.rotate(x_THR, cos_TF, sin_TF, interleaved)


@op
def rotate_tail(
    x_THX: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool, width: int
) -> torch.Tensor:
    """The last `width` of every head rotated, the others as they are; x may be overwritten."""
    tail = rotate(x_THX[..., -width:], cos_TF, sin_TF, interleaved)
    return torch.cat((x_THX[..., :-width], tail), -1)


@rotate_tail.register("native", native.serves, "our C kernel: in place")
def _native_tail(
    x_THX: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool, width: int
) -> torch.Tensor:
    native.rope_rows(x_THX[..., -width:], cos_TF, sin_TF, interleaved)
    return x_THX
