"""Loads the build of the native kernels that suits this processor (builds.py) and calls it through ctypes.

The kernels are optional: `library()` is None where none were built or can run, and `why_missing()` says why.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .builds import Build, asked, choose, cpuinfo, sources

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "native_sources": [],
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
    "native_lay_across": [*[_P] * 2, *[_L] * 2, _I],
    "native_tiles": [],
    "native_imitate_tiles": [_I],
    "native_imitated": [],
    "native_absorb": [*[_P] * 3, *[_L] * 4],
    "native_release": [*[_P] * 3, *[_L] * 3],
    "native_route": [*[_P] * 4, *[_L] * 5, _I, _I, _F],
    "native_experts_rows": [*[_P] * 7, *[_L] * 4],
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
    "native_sources": ctypes.c_char_p,
    "native_tiles": _I,
    "native_imitated": _L,
    "native_program": _P,
    "native_program_steps": _L,
    "native_program_name": ctypes.c_char_p,
    "native_program_weights": _L,
    "native_program_apart": _I,
}


@cache
def _chosen() -> Build | str:
    return choose(cpuinfo())


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    build = _chosen()
    if isinstance(build, str):
        return None, build
    path = asked()[0] / build.file
    try:
        lib = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
    except (OSError, AttributeError) as error:
        return None, f"cannot load {path}: {error}"
    if sources() not in ("", lib.native_sources().decode()):
        return None, f"{path} was built from other sources than these: build it again, by `pip install -e .`"
    return lib, ""


def serves(x: Tensor) -> bool:
    """Whether the kernels take activations like x."""
    return x.device.type == "cpu" and x.dtype is torch.float32 and library() is not None


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None."""
    return _load()[0]


def build() -> Build | None:
    """The build that is loaded, or None."""
    chosen = _chosen()
    return None if isinstance(chosen, str) or library() is None else chosen


@cache
def rounds() -> bool:
    """Whether the kernels have products of activations rounded to BF16."""
    found = build()
    return found is not None and found.rounds


@cache
def crosses() -> bool:
    """Whether the kernels have weights across (Build.crosses)."""
    found = build()
    return found is not None and found.crosses


def tiles() -> bool:
    """Whether products of INT16 of many rows go by the processor's tiles (tiles.cpp)."""
    return library() is not None and bool(kernels.tiles())


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
