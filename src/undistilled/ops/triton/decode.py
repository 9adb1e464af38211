"""Bytes of a weight to bfloat16 codes, inside a kernel; and scales to float32.

Codes, levels and E4M3 numbers are all exact in bfloat16, so that scales can follow a product, in float32. A kernel
is compiled for a form: `S` is a `Form`, whose attributes `get` and its like read while compiling.
"""

from __future__ import annotations

import triton
import triton.language as tl

ASM = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no PTX
CODE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)  # nor products of bfloat16


@triton.constexpr_function
def get(form, name):
    """An attribute of the form."""
    return getattr(form, name)


@triton.constexpr_function
def level(form, code):
    return form.table[code]


@triton.constexpr_function
def taken(form, piece, i):
    return form.taken(piece)[i]


@triton.constexpr_function
def program(form, piece):
    return form.program(piece)


@triton.jit
def codes(w, v, S: tl.constexpr, piece: tl.constexpr):
    """bfloat16 codes of a piece from its bytes `w`, and those of the second plane, `v`. Affine ones: 128 more."""
    if ASM:
        if get(S, "second"):
            return tl.inline_asm_elementwise(program(S, piece), "=r,=r,r,r", [w, v], tl.bfloat16, True, 4)
        else:
            return tl.inline_asm_elementwise(program(S, piece), "=r,=r,r", [w], tl.bfloat16, True, 4)
    else:
        return _plain(w, v, S, piece)


@triton.jit
def ones_like(c):
    """Ones in the place and order of codes, so that two products share their other operand."""
    if ASM:
        text: tl.constexpr = "mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80;"
        return tl.inline_asm_elementwise(text, "=r,=r,r,r", [c], tl.bfloat16, True, 4)
    else:
        return (c.to(tl.float32) * 0 + 1).to(CODE)


@triton.jit
def settled(c):
    """The same bfloat16. Nothing before this is computed in the layout of a product that needs c turned over, whose
    threads would fetch each byte by itself: Triton moves conversions above what has no side effects."""
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [c], tl.bfloat16, False, 2)
    else:
        return c


@triton.jit
def _plain(w, v, S: tl.constexpr, piece: tl.constexpr):
    if get(S, "kind") == "int8":
        return w.to(tl.int8, bitcast=True).to(CODE)
    elif get(S, "kind") == "fp8":
        return e4m3(w).to(CODE)
    else:
        code = (w.to(tl.int32) >> taken(S, piece, 0)) & taken(S, piece, 1)
        if get(S, "second"):
            code |= ((v.to(tl.int32) >> taken(S, piece, 2)) << taken(S, piece, 3)) & taken(S, piece, 4)
        if get(S, "kind") == "codes":
            return (code + (128 if get(S, "affine") else get(S, "offset"))).to(CODE)
        else:
            value = tl.zeros_like(code)
            for i in tl.static_range(get(S, "levels")):
                value = tl.where(code == i, level(S, i), value)
            return value.to(CODE)


@triton.jit
def e4m3(b):
    bits = ((b.to(tl.int32) & 128) << 24) | ((b.to(tl.int32) & 127) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def scale(raw, S: tl.constexpr):
    """Stored scales to float32, times the form's factor."""
    if get(S, "scale") == 3:
        value = e4m3(raw)
    elif get(S, "scale") == 4:
        power = (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        value = tl.where(raw == 0, 5.877471754111438e-39, power)  # 2^-127
    else:
        value = raw.to(tl.float32)
    return value * get(S, "factor")


@triton.jit
def lifted(low, by_group):
    """The value of code -128: what an affine form adds to its codes times their scale."""
    return low.to(tl.float32) - 128.0 * by_group
