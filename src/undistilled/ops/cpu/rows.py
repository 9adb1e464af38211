"""The native kernels for rows of activations and for what lies around the products; see native.py for the suffixes."""

import numpy
import torch
from torch import Tensor

from .loader import FLOATS, kernels, pointer, sized
from .matrix import Matrix, check


def norm_rows(
    x_RD: Tensor, w_D: Tensor, eps: float, residual_RD: Tensor | None = None, out_RD: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; x += residual first, in place, if given.

    Rows of x and out may lie apart, and out may be x.
    """
    d = w_D.shape[0]
    check(x_RD.shape[-1] == d, "x: wrong width")
    r = None
    if residual_RD is not None:
        check(residual_RD.shape == x_RD.shape, "residual: wrong shape")
        r = pointer(residual_RD, torch.float32, "residual")
    y_RD = x_RD.new_empty(x_RD.shape) if out_RD is None else out_RD
    (x, rows, apart), (y, _, to) = _rows(x_RD, "x"), _rows(y_RD, "out")
    sized()
    kernels.norm_rows(x, r, pointer(w_D, torch.float32, "w"), y, rows, d, apart, to, eps)
    return y_RD


def _rows(x: Tensor, what: str) -> tuple[int, int, int]:
    """(pointer, rows, floats from row to row) of a tensor [..., D], contiguous or [R, D] with rows apart."""
    d = x.shape[-1]
    if x.is_contiguous():
        return pointer(x, torch.float32, what), x.numel() // d if d else 0, d
    apart = x.dim() == 2 and x.stride(1) == 1 and x.dtype is torch.float32 and x.is_cpu
    check(apart, f"{what}: want float32 rows on the CPU")
    return x.data_ptr(), x.shape[0], x.stride(0)


def pointwise(a: Tensor, b: Tensor, times: bool = False, out: Tensor | None = None) -> Tensor:
    """a + b or a * b; b like a, or [D] for every row of a [..., D]. `out` may be a."""
    one = b.dim() == 1 and a.dim() > 1
    check(b.shape == (a.shape[-1:] if one else a.shape), "a and b: shapes differ")
    y = torch.empty_like(a) if out is None else out
    d = a.shape[-1]
    x, z = pointer(a, torch.float32, "a"), pointer(b, torch.float32, "b")
    sized()
    kernels.pointwise(x, z, pointer(y, torch.float32, "out"), a.numel() // d if d else 0, d, one, times)
    return y


def write_rows(table: Tensor, slots_R: Tensor, values: Tensor) -> None:
    """table[slots_R[r]] = values[r], rounded to nearest; table [S, ...], values [R, ...] float32."""
    d = table[0].numel()
    check(values.shape == (len(slots_R), *table.shape[1:]), "values: wrong shape")
    place, rows = pointer(table, table.dtype, "table"), pointer(values, torch.float32, "values")
    sized()
    at = pointer(slots_R, torch.int64, "slots")
    kernels.write_rows(FLOATS[table.dtype], rows, at, place, len(slots_R), d, len(table))


def pick_rows(weight: Matrix, ids_R: Tensor) -> Tensor:
    """Rows ids_R of a stored weight [N, K] as float32 [R, K]; zeros for an id that is none."""
    check(weight.experts is None, "weight: want one matrix, not experts")
    ids = pointer(ids_R, torch.int64, "ids")
    out = torch.empty((len(ids_R), weight.k))
    sized()
    kernels.pick_rows(weight.pointer, ids, out.data_ptr(), len(ids_R))
    return out


def absorb(q_RHX: Tensor, lift: Matrix, nope: int) -> Tensor:
    """Queries [R, H, N + P] in latent space, [R, H, Z + P]; lift [H * (N + V), Z] as it is stored."""
    r, h, x = q_RHX.shape
    check(lift.n % h == 0 and nope <= min(x, lift.n // h), "lift: wrong shape")
    q = pointer(q_RHX, torch.float32, "q")
    out = q_RHX.new_empty((r, h, lift.k + x - nope))
    sized()
    kernels.absorb(lift.pointer, q, out.data_ptr(), r, h, nope, x - nope)
    return out


def release(x_RHZ: Tensor, lift: Matrix, nope: int) -> Tensor:
    """Attended latents [R, H, Z] as values [R, H, V]; lift as in `absorb`."""
    r, h, z = x_RHZ.shape
    check(lift.n % h == 0 and z == lift.k and nope <= lift.n // h, "lift: wrong shape")
    x = pointer(x_RHZ, torch.float32, "x")
    out = x_RHZ.new_empty((r, h, lift.n // h - nope))
    sized()
    kernels.release(lift.pointer, x, out.data_ptr(), r, h, nope)
    return out


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top: int,
    groups: tuple[int, int],
    sigmoid: bool,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(ids [T, top] int32, weights [T, top]), see ops/router.py; groups: how many, and how many are kept."""
    t, e = logits_TE.shape
    check(top <= e and e % groups[0] == 0 and groups[1] <= groups[0], "choices: more than there are")
    check(bias_E is None or bias_E.shape == (e,), "bias: wrong shape")
    logits = pointer(logits_TE, torch.float32, "logits")
    bias = None if bias_E is None else pointer(bias_E, torch.float32, "bias")
    ids, weights = logits_TE.new_empty((t, top), dtype=torch.int32), logits_TE.new_empty((t, top))
    sized()
    kernels.route(logits, bias, ids.data_ptr(), weights.data_ptr(), t, e, top, *groups, sigmoid, normalise, scale)
    return ids, weights


def silu_mul(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u, element by element."""
    sized()
    check(g.shape == u.shape, "g and u: shapes differ")
    y = torch.empty_like(g)
    kernels.silu_mul(pointer(g, torch.float32, "g"), pointer(u, torch.float32, "u"), y.data_ptr(), g.numel())
    return y


def rope_rows(x_RHD: Tensor, cos_RC: Tensor, sin_RC: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding, in place; C = D / 2. Pair i is (2i, 2i + 1) if interleaved, else (i, i + C).

    x may be a slice of the last axis of a contiguous [R, H, more] tensor.
    """
    r, h, d = x_RHD.shape
    stride = x_RHD.stride(1) if h > 1 else x_RHD.stride(0)
    ok = x_RHD.dtype is torch.float32 and x_RHD.stride(2) == 1 and (r == 1 or x_RHD.stride(0) == h * stride)
    check(ok and x_RHD.is_cpu, "x: want float32 heads at one distance on the CPU")
    check(cos_RC.shape == sin_RC.shape == (r, d // 2) and d % 2 == 0, "cos and sin: want [R, D / 2]")
    sized()
    cos, sin = pointer(cos_RC, torch.float32, "cos"), pointer(sin_RC, torch.float32, "sin")
    kernels.rope_rows(x_RHD.data_ptr(), cos, sin, r, h, d, stride, interleaved)
    return x_RHD


PIECE = 1 << 14  # bytes that `read` counts as one


def read(memory: Tensor) -> int:
    """Reads all of a contiguous tensor of whole PIECEs with every thread; the exclusive or of its 32-bit words."""
    at = pointer(memory, memory.dtype, "memory")
    count, rest = divmod(memory.numel() * memory.element_size(), PIECE)
    check(rest == 0, f"memory: want whole pieces of {PIECE} bytes")
    out = torch.empty(count, dtype=torch.int32)
    sized()
    kernels.read(at, out.data_ptr(), count, PIECE)
    return int(numpy.bitwise_xor.reduce(out.numpy()))
