"""y = x W^T + b for a weight in any scheme. Shapes: x [T, K], W [N, K], y [T, N].

T tokens, K inputs, N outputs. `y` has the dtype of `x`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scheme import Stored, fp8_block, fp8_channel, plain
from ..scheme.across import Across
from ..scheme.packing import QUANTUM
from . import integers
from . import triton as cuda
from .add import add
from .cpu import matrix, native
from .registry import Kernel, forced, op, say_fallback

LARGE = 32  # tokens from which a matrix product on a dense copy beats the kernels for few, of what lies by rows


@op
def linear(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """Round the activations where the weight's products ask for it, decompress to their dtype, multiply."""
    return F.linear(rounded(x_TK, weight), weight.dense(x_TK.dtype))


def rounded(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """The activations that the weight's products multiply."""
    if weight.products is None:
        return x_TK
    if weight.products in integers.LARGEST:
        return integers.rounded(x_TK, weight.products)
    return x_TK.to(getattr(torch, weight.products)).to(x_TK.dtype)


def apply(x_TK: torch.Tensor, weight: Stored, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b by the kernel that suits the weight; any number of leading dimensions."""
    kernel = weight.kernels.get(x_TK.dtype)
    if kernel is None:
        kernel = weight.kernels[x_TK.dtype] = _choose(x_TK, weight)
    y = kernel.run(x_TK, weight)  # type: ignore[attr-defined]
    return y if bias_N is None else add(y, bias_N.to(y.dtype))


def _choose(x_TK: torch.Tensor, weight: Stored) -> Kernel:
    kernel = linear.resolve(weight, x_TK.dtype)
    if kernel is linear.reference and (weight.products or not isinstance(weight.scheme, plain.Plain)):
        rounded = f" with {weight.products} products" if weight.products else ""
        say_fallback("linear", weight.scheme.name + rounded, weight.device.type)
    return kernel


def served(weight: Stored, dtype: torch.dtype) -> bool:
    """Whether no product of this weight falls back to decompressing it in PyTorch."""
    return isinstance(weight.scheme, plain.Plain) or linear.resolve(weight, dtype) is not linear.reference


@op
def both(x_TK: torch.Tensor, first: Stored, second: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T by each of two weights."""
    return apply(x_TK, first), apply(x_TK, second)


@linear.register(
    "dense",
    lambda w, dtype: not w.products and isinstance(w.scheme, plain.Plain) and w.parts["values"].dtype == dtype,
    "PyTorch's own product: weights and activations have one dtype",
)
def _dense(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    return F.linear(x_TK, weight.parts["values"])


def native_ready(w: Stored, dtype: torch.dtype) -> bool:
    """Whether the C kernels serve this weight with these activations, which stay float32."""
    return not w.products and native_reads(w, dtype)


def native_reads(w: Stored, dtype: torch.dtype) -> bool:
    """Whether the C kernels read this weight where it lies, for activations of this dtype."""
    here = w.device.type == "cpu" and dtype == torch.float32
    return here and native.library() is not None and matrix.takes(w)


def rounds_ready(w: Stored, dtype: torch.dtype) -> bool:
    """Whether the C kernels serve this weight's products with activations rounded to BF16."""
    exact = w.scheme.name not in ("fp32", "fp16")
    return w.products == "bfloat16" and exact and native.rounds() and native_reads(w, dtype)


def integers_ready(w: Stored, dtype: torch.dtype) -> bool:
    """Whether the C kernels serve this weight's products with activations rounded to integers."""
    return w.products in integers.LARGEST and integers.serves(w.scheme) and native_reads(w, dtype)


def fine_ready(w: Stored, dtype: torch.dtype) -> bool:
    return w.products == "int16" and integers_ready(w, dtype)


def coarse_ready(w: Stored, dtype: torch.dtype) -> bool:
    return w.products == "int8" and integers_ready(w, dtype)


@linear.register("native", native_ready, "our C kernel: FP32 activations, one result whatever the batch")
def _native(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    if x_TK.shape[0] < LARGE or isinstance(weight.scheme, Across):  # which is faster than a dense copy at any length
        return native.linear(x_TK.contiguous(), checked(weight))
    return F.linear(x_TK, dense(weight, x_TK.dtype))


def checked(weight: Stored) -> matrix.Matrix:
    """The weight as the C kernels take it, made once."""
    return weight.once("matrix", matrix.of)


@linear.register("native int8", coarse_ready, "our C kernel: INT8 products by groups, one result whatever the batch")
@linear.register("native bf16", rounds_ready, "our C kernel: BF16 products, FP32 sums, one result whatever the batch")
def _native_rounded(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    return native.linear(x_TK.contiguous(), checked(weight))


@linear.register("native int16", fine_ready, "our C kernels: INT16 products, for few tokens and for many")
def _native_fine(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    """Without a kernel for many rows these meet a dense copy: INT16 moves activations so little that they may stay."""
    return (_native_rounded if crosses(weight) else _native)(x_TK, weight)


def crosses(w: Stored) -> bool:
    """Whether the kernel for many rows of INT16 takes it: where a build has one, and scales serve whole blocks."""
    return native.crosses() and getattr(w.scheme, "group", 0) != QUANTUM // 2


def _fp8_rows(w: Stored, dtype: torch.dtype) -> bool:
    here = w.device.type == "cpu" and dtype == torch.float32 and native.library() is not None
    products = w.products is None or (w.products == "bfloat16" and native.rounds())
    return here and products and isinstance(w.scheme, fp8_channel.Fp8Channel)


@linear.register("native by row", _fp8_rows, "our C kernel for FP8 blocks with ones for scales, then each output's own")
def _native_by_row(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    if x_TK.shape[0] >= LARGE and not weight.products:
        return F.linear(x_TK, dense(weight, x_TK.dtype))
    y_TN = native.linear(x_TK.contiguous(), weight.once("codes", _as_blocks))
    return native.pointwise(y_TN, weight.parts["scales"].flatten(), times=True, out=y_TN)


def _as_blocks(weight: Stored) -> matrix.Matrix:
    (n, k), block = weight.shape, fp8_block.BLOCK
    ones = torch.ones(-(-n // block), -(-k // block))
    return matrix.matrix(matrix.KIND["fp8_block"], weight.parts["values"], ones, None, n, k, block, weight.products)


@linear.register(
    "triton", cuda.ready, "our Triton kernel: up to 64 tokens decoded and multiplied in one, else cuBLAS on a dense one"
)
def _triton(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    from .triton import linear as kernels

    return kernels.linear(x_TK, weight)


@linear.register(
    "triton tiles", cuda.tiles_ready, "our Triton kernel for dynamic blocks: up to 64 tokens in one, else cuBLAS"
)
def _triton_tiles(x_TK: torch.Tensor, weight: Stored) -> torch.Tensor:
    from .triton import tiles as kernels

    return kernels.linear(x_TK, weight)


@both.register("triton", cuda.pairs, "our Triton kernel: up to 64 tokens by both in one launch")
def _triton_both(x_TK: torch.Tensor, first: Stored, second: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton import linear as kernels

    if x_TK.dim() != 2 or len(x_TK) > kernels.FEW:
        return both.reference.run(x_TK, first, second)
    return kernels.few_of_both(x_TK.contiguous(), first, second)


def dense(weight: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a plain tensor [N, K], by our kernels where they serve; not a copy where it is one already."""
    if isinstance(weight.scheme, plain.Plain) and weight.parts["values"].dtype == dtype:
        return weight.parts["values"]
    if len(weight.shape) == 2 and not forced() and native_reads(weight, dtype):
        return native.dequantise(checked(weight))
    if len(weight.shape) == 2 and not forced() and cuda.ready(weight, dtype):
        from .triton import linear as kernels

        return kernels.dense(weight)
    if len(weight.shape) == 2 and not forced() and cuda.tiles_ready(weight, dtype):
        from .triton import tiles

        return tiles.dense(weight)
    return weight.dense(dtype)
