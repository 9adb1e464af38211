"""The native CPU kernels, called through ctypes.

The extension is optional: `library()` is None where it was not built or cannot run, and
`why_missing()` says why. Every function keeps a row's bits independent of the other rows in
the call and of the thread count, which OpenMP shares with PyTorch.

Shape suffixes: M rows of activations, N outputs, K inputs, R rows (one per sequence), H heads,
D head width, W cache width, B blocks of a table. Activations are float32 and contiguous.
"""

import ctypes
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

KIND = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8_block": 3, "int8": 4, "int4": 5}
"""How a weight matrix [N, K] is stored.

- fp32, fp16, bf16: values [N, K].
- fp8_block: float8_e4m3fn values [N, K] (or their bits as uint8), scales f32
  [ceil(N/128), ceil(K/128)]. The two NaN codes read as +-480.
- int8: values int8 [N, K], scales f32 [N, ceil(K/group)].
- int4: values uint8 [N, ceil(K/32), 16], byte i of a block holding element i (low nibble) and
  i + 16 (high); scales f16 [N, ceil(K/group)], group a multiple of 32 or K; mins like the
  scales (w = q * scale + min) or None (w = (q - 8) * scale).
"""

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_VALUES = (
    (torch.float32,),
    (torch.float16,),
    (torch.bfloat16,),
    (torch.float8_e4m3fn, torch.uint8),
    (torch.int8,),
    (torch.uint8,),
)
_SCALES = {3: torch.float32, 4: torch.float32, 5: torch.float16}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "native_linear": [_I, *[_P] * 5, *[_L] * 4],
    "native_linear_rounded": [_I, *[_P] * 5, *[_L] * 4],
    "native_dequantise": [_I, *[_P] * 4, *[_L] * 5],
    "native_attend_rows": [_I, *[_P] * 6, *[_L] * 6, _F],
    "native_mla_rows": [_I, *[_P] * 5, *[_L] * 6, _F],
    "native_norm_rows": [*[_P] * 4, _L, _L, _F],
    "native_silu_mul": [*[_P] * 3, _L],
    "native_rope_rows": [*[_P] * 3, *[_L] * 4, _I],
    "native_experts_rows": [*[_P] * 7, *[_L] * 3],
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    folder = Path(__file__).parent
    path = next((p for s in EXTENSION_SUFFIXES if (p := folder / f"_kernels{s}").exists()), None)
    if path is None:
        return None, f"no native kernels in {folder}: the package was built without a compiler"
    try:
        lib = ctypes.CDLL(str(path))
        lib.native_isa.restype = ctypes.c_char_p
        needs = lib.native_isa().decode().split()
        for name, arguments in _ARGUMENTS.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, None
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
    """Whether the kernels have products of activations rounded to BF16: `rounded` below."""
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
_native_experts_rows = _lazy("native_experts_rows")


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


def _pointer(tensor: Tensor | None, dtype: torch.dtype, what: str) -> int:
    if tensor is None or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{what}: want a contiguous {dtype} tensor on the CPU")
    return tensor.data_ptr()


def _group(kind: int, group: int, k: int) -> int:
    """Inputs that share a scale; floats have none."""
    return 128 if kind == 3 else group if kind > 3 else k


def _weight(kind: int, values: Tensor, scales: Tensor | None, mins: Tensor | None, n: int, k: int, group: int):
    """Pointers to a stored weight's parts, after checks of their types and sizes."""
    if values.dtype not in _VALUES[kind] or not values.is_contiguous() or not values.is_cpu:
        raise ValueError(f"values: want a contiguous {_VALUES[kind][0]} tensor on the CPU")
    _check(values.numel() == (n * ((k + 31) // 32) * 16 if kind == 5 else n * k), "values: wrong size")
    if kind < 3:
        return values.data_ptr(), None, None
    groups = (k + group - 1) // group
    _check(kind != 5 or group % 32 == 0 or group >= k, "group: int4 wants a multiple of 32")
    rows = (n + 127) // 128 if kind == 3 else n
    s = _pointer(scales, _SCALES[kind], "scales")
    _check(scales is not None and scales.numel() == rows * groups, "scales: wrong size")
    if mins is None:
        return values.data_ptr(), s, None
    _check(kind == 5 and mins.numel() == n * groups, "mins: wrong kind or size")
    return values.data_ptr(), s, _pointer(mins, torch.float16, "mins")


def linear(
    kind: int, x_MK: Tensor, values: Tensor, scales: Tensor | None, mins: Tensor | None, n: int, k: int, group: int,
    rounded: bool = False,
) -> Tensor:
    """y [..., N] = x [..., K] @ W^T for a weight [N, K] stored as `kind` (see KIND); x `rounded` to BF16 first."""
    return linear_stored(x_MK, Weight(kind, values, scales, mins, n, k, group, rounded))


class Weight:
    """A stored weight [N, K], checked once: `linear_stored` then checks only x."""

    __slots__ = ("arguments", "k", "kind", "n", "parts", "rounded")

    def __init__(
        self, kind: int, values: Tensor, scales: Tensor | None, mins: Tensor | None, n: int, k: int, group: int,
        rounded: bool = False,
    ):
        _check_rounded(kind, rounded)
        group = _group(kind, group, k)
        self.parts = values, scales, mins  # keeps the storage alive
        self.kind, self.n, self.k, self.rounded = kind, n, k, rounded
        self.arguments = *_weight(kind, values, scales, mins, n, k, group), group


def _check_rounded(kind: int, rounded: bool) -> None:
    _check(not rounded or (rounds() and kind > 1), "rounded: not in this build, or not for fp32 and fp16")


def linear_stored(x_MK: Tensor, weight: Weight) -> Tensor:
    """`linear` with a weight that was checked beforehand: the same bits."""
    n, k = weight.n, weight.k
    if x_MK.dtype is not torch.float32 or not x_MK.is_contiguous() or not x_MK.is_cpu or x_MK.shape[-1] != k:
        raise ValueError(f"x: want a contiguous float32 tensor [..., {k}] on the CPU")
    v, s, z, group = weight.arguments
    m = x_MK.numel() // k
    y_MN = x_MK.new_empty(m, n)
    run = _native_linear_rounded if weight.rounded else _native_linear
    run(weight.kind, x_MK.data_ptr(), v, s, z, y_MN.data_ptr(), m, n, k, group)
    return y_MN if x_MK.dim() == 2 else y_MN.view(*x_MK.shape[:-1], n)


def dequantise(
    kind: int, values: Tensor, scales: Tensor | None, mins: Tensor | None, n: int, k: int, group: int,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """A stored weight [N, K], or its rows [n0, n1), as float32; into `out` where given."""
    group = _group(kind, group, k)
    v, s, z = _weight(kind, values, scales, mins, n, k, group)
    n0, n1 = rows or (0, n)
    _check(0 <= n0 <= n1 <= n, "rows: outside the weight")
    if out is None:
        out = torch.empty((n1 - n0, k))
    _check(out.numel() == (n1 - n0) * k, "out: wrong size")
    _native_dequantise(kind, v, s, z, _pointer(out, torch.float32, "out"), n, k, group, n0, n1)
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
    _check(k_cache.shape == v_cache.shape and k_cache.shape[-1] == d and h % kv_heads == 0, "cache: wrong shape")
    _check(block_table_RB.shape[0] == r and context_R.shape == (r,), "block table or context: wrong shape")
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
    _check(cache.shape[-1] == w and latent <= w, "cache: wrong shape")
    _check(block_table_RB.shape[0] == r and context_R.shape == (r,), "block table or context: wrong shape")
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


def norm_rows(x_RD: Tensor, w_D: Tensor, eps: float, residual_RD: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; x += residual first, in place, if given."""
    d = w_D.shape[0]
    _check(x_RD.shape[-1] == d, "x: wrong width")
    x = _pointer(x_RD, torch.float32, "x")
    r = None
    if residual_RD is not None:
        _check(residual_RD.shape == x_RD.shape, "residual: wrong shape")
        r = _pointer(residual_RD, torch.float32, "residual")
    y_RD = torch.empty_like(x_RD)
    _native_norm_rows(x, r, _pointer(w_D, torch.float32, "w"), y_RD.data_ptr(), x_RD.numel() // d, d, eps)
    return y_RD


def silu_mul(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u, element by element."""
    _check(g.shape == u.shape, "g and u: shapes differ")
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
    _check(ok and x_RHD.is_cpu, "x: want float32 heads at one distance on the CPU")
    _check(cos_RC.shape == sin_RC.shape == (r, d // 2) and d % 2 == 0, "cos and sin: want [R, D / 2]")
    cos, sin = _pointer(cos_RC, torch.float32, "cos"), _pointer(sin_RC, torch.float32, "sin")
    _native_rope_rows(x_RHD.data_ptr(), cos, sin, r, h, d, stride, interleaved)
    return x_RHD


class _Matrix(ctypes.Structure):
    _fields_ = [
        *(("kind", _I), ("values", _P), ("scales", _P), ("mins", _P)),
        *(("n", _L), ("k", _L), ("group", _L), ("rounds", _I)),
    ]


class Experts:
    """One projection of all experts: a weight [E, N, K], each expert stored as KIND describes; x `rounded` or not."""

    def __init__(
        self, kind: int, values: Tensor, scales: Tensor | None, mins: Tensor | None, e: int, n: int, k: int, group: int,
        rounded: bool = False,
    ):
        _check_rounded(kind, rounded)
        group = _group(kind, group, k)
        for part in (values, scales, mins):
            _check(part is None or part.shape[0] == e, f"want {e} experts along the first axis")
        _weight(
            kind, values[0], scales if scales is None else scales[0], mins if mins is None else mins[0], n, k, group
        )
        _check(all(p is None or p.is_contiguous() for p in (values, scales, mins)), "want contiguous tensors")
        self.parts = values, scales, mins  # keeps the storage alive
        self.experts, self.n, self.k = e, n, k
        self.matrix = _Matrix(kind, *(None if p is None else p.data_ptr() for p in self.parts), n, k, group, rounded)
        self.pointer = ctypes.addressof(self.matrix)


def experts_rows(
    x_RD: Tensor, gate: Experts, up: Experts, down: Experts, chosen_RT: Tensor, weights_RT: Tensor
) -> Tensor:
    """Sum over t of weights_RT * down(silu(gate x) * (up x)), each with expert chosen_RT (int32).

    A choice outside 0..E-1 adds nothing. An expert's weights are read once for all rows that
    chose it. Returns [R, D].
    """
    r, t = chosen_RT.shape
    d = down.n
    _check(x_RD.shape == (r, gate.k) and weights_RT.shape == (r, t), "x or weights: wrong shape")
    same = gate.n == up.n == down.k and gate.k == up.k and gate.experts == up.experts == down.experts
    _check(same, "gate, up and down do not fit")
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
