"""y = x W^T + b for a weight in any scheme. Shapes: x [T, K], W [N, K], y [T, N].

T tokens, K inputs, N outputs. `y` has the dtype of `x`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scheme import Stored, fp8_block, grouped, int8, plain
from . import triton as cuda
from .cpu import native
from .registry import Kernel, forced, op, say_fallback

LARGE = 32  # tokens from which a matrix product on a dense copy beats the kernels for few


@op
def linear(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """Decompress to the activations' dtype, multiply."""
    return F.linear(x_TK, weight.dense(x_TK.dtype))


def apply(x_TK: torch.Tensor, weight: Stored, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b by the kernel that suits the weight; any number of leading dimensions."""
    kernel = weight.kernels.get(x_TK.dtype)
    if kernel is None:
        kernel = weight.kernels[x_TK.dtype] = _choose(x_TK, weight)
    y = kernel.run(x_TK, weight)  # type: ignore[attr-defined]
    return y if bias_N is None else y + bias_N.to(y.dtype)


def _choose(x_TK: torch.Tensor, weight: Stored) -> Kernel:
    kernel = linear.resolve(weight, x_TK.dtype)
    if kernel is linear.reference and not isinstance(weight.scheme, plain.Plain):
        say_fallback("linear", weight.scheme.name, weight.device.type)
    return kernel


@linear.register(
    "dense",
    lambda w, dtype: isinstance(w.scheme, plain.Plain) and w.parts["values"].dtype == dtype,
    "PyTorch's own product: weights and activations have one dtype",
)
def _dense(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    return F.linear(x_TK, weight.parts["values"])


def _int8pack(w: Stored, dtype: torch.dtype) -> bool:
    return (
        isinstance(w.scheme, int8.Int8)
        and w.scheme.group == 0
        and w.device.type == "cpu"
        and dtype == torch.float32
        and w.shape[-1] % 16 == 0
        and w.shape[-2] % 4 == 0
    )


@linear.register("int8pack", _int8pack, "PyTorch's aten::_weight_int8pack_mm for few tokens, BF16 activations inside")
def _int8_torch(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    if x_TK.shape[0] >= LARGE:
        return F.linear(x_TK, weight.dense(x_TK.dtype))
    scales = weight.parts["scales"][:, 0]
    ones = torch.ones_like(scales, dtype=torch.bfloat16)
    y = torch.ops.aten._weight_int8pack_mm(x_TK.bfloat16(), weight.parts["values"], ones)
    return y.float() * scales


def native_kind(scheme: object) -> int | None:
    """The C kernels' number for a scheme, or None."""
    if isinstance(scheme, plain.Plain):
        return native.KIND[scheme.name]
    for kind, cls in (("fp8_block", fp8_block.Fp8Block), ("int8", int8.Int8)):
        if isinstance(scheme, cls):
            return native.KIND[kind]
    if isinstance(scheme, grouped.Grouped) and scheme.name.startswith("int4"):
        return native.KIND["int4"]
    return None


def native_arguments(weight: Stored) -> tuple:
    """(kind, values, scales, minimums, experts where there are some, N, K, group) as the C kernels take them."""
    parts = weight.parts
    group = getattr(weight.scheme, "group", 0) or weight.shape[-1]
    kind = native_kind(weight.scheme)
    return kind, parts["values"], parts.get("scales"), parts.get("minimums"), *weight.shape, group


def native_ready(w: Stored, dtype: torch.dtype) -> bool:
    """Whether the C kernels serve this weight with these activations."""
    here = w.device.type == "cpu" and dtype == torch.float32
    return here and native.library() is not None and native_kind(w.scheme) is not None


@linear.register("native", native_ready, "our C kernel: FP32 activations, one result whatever the batch")
def _native(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    if x_TK.shape[0] < LARGE:
        checked = weight.kernels.get("native")
        if checked is None:
            checked = weight.kernels["native"] = native.Weight(*native_arguments(weight))
        return native.linear_stored(x_TK.contiguous(), checked)  # type: ignore[arg-type]
    return F.linear(x_TK, dense(weight, x_TK.dtype))


@linear.register(
    "triton", cuda.ready, "our Triton kernel: up to 64 tokens decoded and multiplied in one, else cuBLAS on a dense one"
)
def _triton(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    from .triton import linear as kernels

    return kernels.linear(x_TK, weight)


def dense(weight: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a plain tensor [N, K], by our kernels where they serve; not a copy where it is one already."""
    if weight.parts["values"].dtype == dtype:
        return weight.parts["values"]
    if len(weight.shape) == 2 and not forced() and native_ready(weight, dtype):
        return native.dequantise(*native_arguments(weight))
    if len(weight.shape) == 2 and not forced() and cuda.ready(weight, dtype):
        from .triton import linear as kernels

        return kernels.dense(weight)
    return weight.dense(dtype)
