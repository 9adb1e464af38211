"""The native CPU kernels, called through ctypes.

The extension is optional: `library()` is None where it was not built or cannot run, and
`why_missing()` says why. UNDISTILLED_KERNELS names another folder to take it from. Every function
keeps a row's bits independent of the other rows in the call and of the number of threads: as many
as PyTorch's, our own (pool.h).

Shape suffixes: M rows of activations, N outputs, K inputs, R rows (one per sequence), H heads,
D head width, W cache width, B blocks of a table. Activations are float32 and contiguous.
"""

import ctypes
import os
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy
import torch
from torch import Tensor

from .matrix import Matrix, check

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "native_linear": [*[_P] * 3, _L],
    "native_linear_rounded": [*[_P] * 3, _L],
    "native_dequantise": [*[_P] * 2, *[_L] * 2],
    "native_attend_rows": [_I, *[_P] * 6, *[_L] * 6, _F],
    "native_mla_rows": [_I, *[_P] * 5, *[_L] * 6, _F],
    "native_norm_rows": [*[_P] * 4, *[_L] * 4, _F],
    "native_silu_mul": [*[_P] * 3, _L],
    "native_pointwise": [*[_P] * 3, _L, _L, _I, _I],
    "native_rope_rows": [*[_P] * 3, *[_L] * 4, _I],
    "native_write_rows": [_I, *[_P] * 3, *[_L] * 3],
    "native_pick_rows": [*[_P] * 3, _L],
    "native_absorb": [*[_P] * 3, *[_L] * 4],
    "native_release": [*[_P] * 3, *[_L] * 3],
    "native_route": [*[_P] * 4, *[_L] * 5, _I, _I, _F],
    "native_experts_rows": [*[_P] * 7, *[_L] * 3],
    "native_read": [_P, _P, _L, _L],
    "native_threads": [_I],
    "native_program_record": [_P],
    "native_program_run": [_P, _P],
    "native_program_free": [_P],
    "native_program": [],
    "native_program_steps": [_P],
    "native_program_name": [_P, _L],
    "native_program_weights": [_P, _L],
    "native_program_apart": [_P, _L],
}
_RESULTS = {
    "native_program": _P,
    "native_program_steps": _L,
    "native_program_name": ctypes.c_char_p,
    "native_program_weights": _L,
    "native_program_apart": _I,
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    folder = Path(os.environ.get("UNDISTILLED_KERNELS") or Path(__file__).parent)
    path = next((p for s in EXTENSION_SUFFIXES if (p := folder / f"_kernels{s}").exists()), None)
    if path is None:
        return None, f"no native kernels in {folder}: the package was built without a compiler"
    try:
        lib = ctypes.CDLL(str(path))
        lib.native_isa.restype = ctypes.c_char_p
        needs = lib.native_isa().decode().split()
        for name, arguments in _ARGUMENTS.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
    except (OSError, AttributeError) as error:
        return None, f"cannot load {path}: {error}"
    lacking = [flag for flag in needs if flag not in _cpu_flags(needs)]
    if lacking:
        return None, f"{path} was built for a processor with {' '.join(lacking)}: build it again here"
    return lib, ""


def _cpu_flags(otherwise: list[str]) -> list[str]:
    if platform.system() != "Linux":
        return otherwise
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line.split()
    return otherwise


def serves(x: Tensor) -> bool:
    """Whether the kernels take activations like x."""
    return x.device.type == "cpu" and x.dtype is torch.float32 and library() is not None


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None."""
    return _load()[0]


@cache
def rounds() -> bool:
    """Whether the kernels have products of activations rounded to BF16: `Matrix.rounded`."""
    lib = library()
    return lib is not None and bool(lib.native_rounds())


def why_missing() -> str:
    """Why `library()` is None; empty where it is not."""
    return _load()[1]


def _bound(name: str):
    lib = library()
    if lib is None:
        raise RuntimeError(why_missing())
    function = getattr(lib, name)
    globals()[f"_{name}"] = function
    return function


def _lazy(name: str):
    """A stand-in that loads the library on its first call and puts the function in its place."""
    return lambda *arguments: _bound(name)(*arguments)


_native_linear = _lazy("native_linear")
_native_linear_rounded = _lazy("native_linear_rounded")
_native_dequantise = _lazy("native_dequantise")
_native_attend_rows = _lazy("native_attend_rows")
_native_mla_rows = _lazy("native_mla_rows")
_native_norm_rows = _lazy("native_norm_rows")
_native_silu_mul = _lazy("native_silu_mul")
_native_rope_rows = _lazy("native_rope_rows")
_native_pointwise = _lazy("native_pointwise")
_native_write_rows = _lazy("native_write_rows")
_native_pick_rows = _lazy("native_pick_rows")
_native_absorb = _lazy("native_absorb")
_native_release = _lazy("native_release")
_native_route = _lazy("native_route")
_native_experts_rows = _lazy("native_experts_rows")
_native_read = _lazy("native_read")
_native_threads = _lazy("native_threads")

_threads = 0


def sized() -> None:
    """Has our team as many threads as PyTorch's from the next call on."""
    global _threads
    now = torch.get_num_threads()
    if now != _threads:
        _native_threads(now)
        _threads = now


def _pointer(tensor: Tensor | None, dtype: torch.dtype, what: str) -> int:
    if tensor is None or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{what}: want a contiguous {dtype} tensor on the CPU")
    return tensor.data_ptr()


def linear(x_MK: Tensor, weight: Matrix) -> Tensor:
    """y [..., N] = x [..., K] @ W^T; x rounded to BF16 first where the weight's products do."""
    n, k = weight.n, weight.k
    if x_MK.dtype is not torch.float32 or not x_MK.is_contiguous() or not x_MK.is_cpu or x_MK.shape[-1] != k:
        raise ValueError(f"x: want a contiguous float32 tensor [..., {k}] on the CPU")
    check(weight.experts is None, "weight: want one matrix, not experts")
    m = x_MK.numel() // k
    y_MN = x_MK.new_empty(m, n)
    sized()
    run = _native_linear_rounded if _rounded(weight) else _native_linear
    run(weight.pointer, x_MK.data_ptr(), y_MN.data_ptr(), m)
    return y_MN if x_MK.dim() == 2 else y_MN.view(*x_MK.shape[:-1], n)


def _rounded(weight: Matrix) -> bool:
    check(not weight.rounded or rounds(), "rounded: not in this build")
    return weight.rounded


def dequantise(weight: Matrix, rows: tuple[int, int] | None = None) -> Tensor:
    """A stored weight [N, K], or its rows [n0, n1), as float32."""
    n0, n1 = rows or (0, weight.n)
    check(0 <= n0 <= n1 <= weight.n and weight.experts is None, "rows: outside the weight")
    sized()
    out = torch.empty((n1 - n0, weight.k))
    _native_dequantise(weight.pointer, out.data_ptr(), n0, n1)
    return out


def attend_rows(
    q_RHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    context_R: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Grouped-query attention of one query per row over its first context_R[r] tokens.

    The caches are [slots, Hkv, D] in float32, float16 or bfloat16; token t of row r lies in slot
    block_table_RB[r, t // block_size] * block_size + t % block_size. Table and context are int32.
    A row without context gets zeros. Returns [R, H, D].
    """
    r, h, d = q_RHD.shape
    kv_heads = k_cache.shape[-2]
    check(k_cache.shape == v_cache.shape and k_cache.shape[-1] == d and h % kv_heads == 0, "cache: wrong shape")
    check(block_table_RB.shape[0] == r and context_R.shape == (r,), "block table or context: wrong shape")
    sized()
    dtype = k_cache.dtype
    out_RHD = torch.empty_like(q_RHD)
    _native_attend_rows(
        _FLOATS[dtype],
        _pointer(q_RHD, torch.float32, "q"),
        _pointer(k_cache, dtype, "k_cache"),
        _pointer(v_cache, dtype, "v_cache"),
        _pointer(block_table_RB, torch.int32, "block table"),
        _pointer(context_R, torch.int32, "context"),
        out_RHD.data_ptr(),
        r,
        h,
        kv_heads,
        d,
        block_table_RB.shape[1],
        block_size,
        scale,
    )
    return out_RHD


def mla_rows(
    q_RHW: Tensor,
    cache: Tensor,
    block_table_RB: Tensor,
    context_R: Tensor,
    block_size: int,
    latent: int,
    scale: float,
) -> Tensor:
    """Absorbed latent attention: scores over all W of a cache row, values its first `latent`.

    The cache is [slots, W]; paging and types as in `attend_rows`. Returns [R, H, latent].
    """
    r, h, w = q_RHW.shape
    check(cache.shape[-1] == w and latent <= w, "cache: wrong shape")
    check(block_table_RB.shape[0] == r and context_R.shape == (r,), "block table or context: wrong shape")
    sized()
    dtype = cache.dtype
    out_RHL = q_RHW.new_empty((r, h, latent))
    _native_mla_rows(
        _FLOATS[dtype],
        _pointer(q_RHW, torch.float32, "q"),
        _pointer(cache, dtype, "cache"),
        _pointer(block_table_RB, torch.int32, "block table"),
        _pointer(context_R, torch.int32, "context"),
        out_RHL.data_ptr(),
        r,
        h,
        w,
        latent,
        block_table_RB.shape[1],
        block_size,
        scale,
    )
    return out_RHL


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
        r = _pointer(residual_RD, torch.float32, "residual")
    y_RD = x_RD.new_empty(x_RD.shape) if out_RD is None else out_RD
    (x, rows, apart), (y, _, to) = _rows(x_RD, "x"), _rows(y_RD, "out")
    sized()
    _native_norm_rows(x, r, _pointer(w_D, torch.float32, "w"), y, rows, d, apart, to, eps)
    return y_RD


def _rows(x: Tensor, what: str) -> tuple[int, int, int]:
    """(pointer, rows, floats from row to row) of a tensor [..., D], contiguous or [R, D] with rows apart."""
    d = x.shape[-1]
    if x.is_contiguous():
        return _pointer(x, torch.float32, what), x.numel() // d if d else 0, d
    apart = x.dim() == 2 and x.stride(1) == 1 and x.dtype is torch.float32 and x.is_cpu
    check(apart, f"{what}: want float32 rows on the CPU")
    return x.data_ptr(), x.shape[0], x.stride(0)


def pointwise(a: Tensor, b: Tensor, times: bool = False, out: Tensor | None = None) -> Tensor:
    """a + b or a * b; b like a, or [D] for every row of a [..., D]. `out` may be a."""
    one = b.dim() == 1 and a.dim() > 1
    check(b.shape == (a.shape[-1:] if one else a.shape), "a and b: shapes differ")
    y = torch.empty_like(a) if out is None else out
    d = a.shape[-1]
    x, z = _pointer(a, torch.float32, "a"), _pointer(b, torch.float32, "b")
    sized()
    _native_pointwise(x, z, _pointer(y, torch.float32, "out"), a.numel() // d if d else 0, d, one, times)
    return y


def write_rows(table: Tensor, slots_R: Tensor, values: Tensor) -> None:
    """table[slots_R[r]] = values[r], rounded to nearest; table [S, ...], values [R, ...] float32."""
    d = table[0].numel()
    check(values.shape == (len(slots_R), *table.shape[1:]), "values: wrong shape")
    place, rows = _pointer(table, table.dtype, "table"), _pointer(values, torch.float32, "values")
    sized()
    at = _pointer(slots_R, torch.int64, "slots")
    _native_write_rows(_FLOATS[table.dtype], rows, at, place, len(slots_R), d, len(table))


def pick_rows(weight: Matrix, ids_R: Tensor) -> Tensor:
    """Rows ids_R of a stored weight [N, K] as float32 [R, K]; zeros for an id that is none."""
    check(weight.experts is None, "weight: want one matrix, not experts")
    ids = _pointer(ids_R, torch.int64, "ids")
    out = torch.empty((len(ids_R), weight.k))
    sized()
    _native_pick_rows(weight.pointer, ids, out.data_ptr(), len(ids_R))
    return out


def absorb(q_RHX: Tensor, lift: Matrix, nope: int) -> Tensor:
    """Queries [R, H, N + P] in latent space, [R, H, Z + P]; lift [H * (N + V), Z] as it is stored."""
    r, h, x = q_RHX.shape
    check(lift.n % h == 0 and nope <= min(x, lift.n // h), "lift: wrong shape")
    q = _pointer(q_RHX, torch.float32, "q")
    out = q_RHX.new_empty((r, h, lift.k + x - nope))
    sized()
    _native_absorb(lift.pointer, q, out.data_ptr(), r, h, nope, x - nope)
    return out


def release(x_RHZ: Tensor, lift: Matrix, nope: int) -> Tensor:
    """Attended latents [R, H, Z] as values [R, H, V]; lift as in `absorb`."""
    r, h, z = x_RHZ.shape
    check(lift.n % h == 0 and z == lift.k and nope <= lift.n // h, "lift: wrong shape")
    x = _pointer(x_RHZ, torch.float32, "x")
    out = x_RHZ.new_empty((r, h, lift.n // h - nope))
    sized()
    _native_release(lift.pointer, x, out.data_ptr(), r, h, nope)
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
    logits = _pointer(logits_TE, torch.float32, "logits")
    bias = None if bias_E is None else _pointer(bias_E, torch.float32, "bias")
    ids, weights = logits_TE.new_empty((t, top), dtype=torch.int32), logits_TE.new_empty((t, top))
    sized()
    _native_route(logits, bias, ids.data_ptr(), weights.data_ptr(), t, e, top, *groups, sigmoid, normalise, scale)
    return ids, weights


def silu_mul(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u, element by element."""
    sized()
    check(g.shape == u.shape, "g and u: shapes differ")
    y = torch.empty_like(g)
    _native_silu_mul(_pointer(g, torch.float32, "g"), _pointer(u, torch.float32, "u"), y.data_ptr(), g.numel())
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
    cos, sin = _pointer(cos_RC, torch.float32, "cos"), _pointer(sin_RC, torch.float32, "sin")
    _native_rope_rows(x_RHD.data_ptr(), cos, sin, r, h, d, stride, interleaved)
    return x_RHD


def experts_rows(x_RD: Tensor, gate: Matrix, up: Matrix, down: Matrix, chosen_RT: Tensor, weights_RT: Tensor) -> Tensor:
    """Sum over t of weights_RT * down(silu(gate x) * (up x)), each with expert chosen_RT (int32).

    A choice outside 0..E-1 adds nothing. An expert's weights are read once for all rows that
    chose it. Returns [R, D].
    """
    r, t = chosen_RT.shape
    d = down.n
    check(x_RD.shape == (r, gate.k) and weights_RT.shape == (r, t), "x or weights: wrong shape")
    same = gate.n == up.n == down.k and gate.k == up.k and gate.experts == up.experts == down.experts
    check(same and gate.experts is not None, "gate, up and down do not fit")
    for weight in (gate, up, down):
        _rounded(weight)
    sized()
    out_RD = x_RD.new_empty((r, d))
    _native_experts_rows(
        _pointer(x_RD, torch.float32, "x"),
        gate.pointer,
        up.pointer,
        down.pointer,
        _pointer(chosen_RT, torch.int32, "chosen"),
        _pointer(weights_RT, torch.float32, "weights"),
        out_RD.data_ptr(),
        gate.experts,
        r,
        t,
    )
    return out_RD


PIECE = 1 << 14  # bytes that `read` counts as one


def read(memory: Tensor) -> int:
    """Reads all of a contiguous tensor of whole PIECEs with every thread; the exclusive or of its 32-bit words."""
    at = _pointer(memory, memory.dtype, "memory")
    count, rest = divmod(memory.numel() * memory.element_size(), PIECE)
    check(rest == 0, f"memory: want whole pieces of {PIECE} bytes")
    out = torch.empty(count, dtype=torch.int32)
    sized()
    _native_read(at, out.data_ptr(), count, PIECE)
    return int(numpy.bitwise_xor.reduce(out.numpy()))
