"""Finds the native kernels and calls them through ctypes.

The extension is optional: `library()` is None where it was not built or cannot run, and `why_missing()` says why.
UNDISTILLED_KERNELS names another folder to take it from.
"""

import ctypes
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import kernels_folder

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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
    folder = kernels_folder()
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


class _Kernels:
    """The library's functions by their names without `native_`; each is looked up once."""

    def __getattr__(self, name: str) -> Any:
        lib = library()
        if lib is None:
            raise RuntimeError(why_missing())
        function = getattr(lib, f"native_{name}")
        setattr(self, name, function)
        return function


kernels = _Kernels()
_threads = 0


def sized() -> None:
    """Has our team as many threads as PyTorch's from the next call on."""
    global _threads
    now = torch.get_num_threads()
    if now != _threads:
        kernels.threads(now)
        _threads = now


def pointer(tensor: Tensor | None, dtype: torch.dtype, what: str) -> int:
    """Where a tensor lies; ValueError where it is no contiguous one of this dtype on the CPU."""
    if tensor is None or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{what}: want a contiguous {dtype} tensor on the CPU")
    return tensor.data_ptr()
