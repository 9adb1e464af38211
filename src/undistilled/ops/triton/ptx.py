"""PTX that turns four bytes of a weight into four bfloat16 codes, exactly.

An integer below 128 in the mantissa of a bfloat16 with the exponent of 128 is that integer plus 128, which one
subtraction of pairs takes away; the conversion units would be four times slower. Registers: t the four bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .form import Form


def _pair(value: float) -> str:
    """A bfloat16 twice, as a PTX constant."""
    high = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    return f"0x{high:04X}{high:04X}"


_SIGNED = f"""
and.b32 a, t, 0x7f7f7f7f; and.b32 b, t, 0x80808080; mov.b32 m, 0x43434343; mov.b32 c, {_pair(-1)};
prmt.b32 u, a, m, 0x4140; prmt.b32 v, b, m, 0x4140; fma.rn.bf16x2 $0, v, c, u;
prmt.b32 u, a, m, 0x4342; prmt.b32 v, b, m, 0x4342; fma.rn.bf16x2 $1, v, c, u;
"""  # low seven bits + 128, less 128 or, where the sign is set, 256
_E4M3 = f"""
mov.b32 m, {_pair(2.0**120)}; mov.b32 c, 0x80008000; mov.b32 b, 0;
prmt.b32 u, t, b, 0x1404; shr.u32 v, u, 4; and.b32 v, v, 0x07f007f0; and.b32 u, u, c; or.b32 u, u, v;
fma.rn.bf16x2 $0, u, m, c;
prmt.b32 u, t, b, 0x3424; shr.u32 v, u, 4; and.b32 v, v, 0x07f007f0; and.b32 u, u, c; or.b32 u, u, v;
fma.rn.bf16x2 $1, u, m, c;
"""  # the exponent and mantissa in their places, times 2^120 for the other bias; right for subnormals too


_BIASED = """
mov.b32 m, 0x43434343; prmt.b32 $0, t, m, 0x4140; prmt.b32 $1, t, m, 0x4342;
"""  # 128 stays; the minimum makes up for it


def _codes(offset: int) -> str:
    return f"""
mov.b32 m, 0x43434343; mov.b32 c, {_pair(offset - 128)}; mov.b32 a, {_pair(1)};
prmt.b32 u, t, m, 0x4140; fma.rn.bf16x2 $0, u, a, c;
prmt.b32 u, t, m, 0x4342; fma.rn.bf16x2 $1, u, a, c;
"""


def _table(table: tuple[int, ...]) -> str:
    """Four look-ups by byte permutation: selectors are nibbles, tables 8 bytes."""
    entries = [entry & 255 for entry in table] + [0] * (-len(table) % 8)
    words = [int.from_bytes(bytes(entries[i : i + 4]), "little") for i in range(0, len(entries), 4)]
    text = "shr.u32 u, t, 4; or.b32 u, u, t; mov.b32 b, 0; prmt.b32 u, u, b, 0x4420;\n"
    if len(words) == 2:
        return text + f"mov.b32 a, {words[0]}; mov.b32 b, {words[1]}; prmt.b32 t, a, b, u;" + _SIGNED
    return (
        text
        + f"""and.b32 u, u, 0x7777; shr.u32 t, t, 3; and.b32 t, t, 0x01010101; mul.lo.u32 t, t, 255;
mov.b32 a, {words[0]}; mov.b32 b, {words[1]}; prmt.b32 v, a, b, u;
mov.b32 a, {words[2]}; mov.b32 b, {words[3]}; prmt.b32 u, a, b, u;
lop3.b32 t, t, u, v, 0xCA;"""
        + _SIGNED
    )


def program(form: Form, piece: int) -> str:
    """Four bytes ($2; of the second plane $3) of a piece to four bfloat16 (pairs $0, $1)."""
    shift, mask, right, left, mask2 = form.taken(piece)
    text = "{ .reg .b32 t, u, v, a, b, c, m;\n"
    if mask == 255:
        text += "mov.b32 t, $2;"
    else:
        text += f"shr.u32 t, $2, {shift}; and.b32 t, t, {mask * 0x01010101};"
    if mask2:
        move = f"shr.u32 u, $3, {right};" if right else f"shl.b32 u, $3, {left};"
        text += move + f" and.b32 u, u, {mask2 * 0x01010101}; or.b32 t, t, u;"
    if form.affine:
        return text + _BIASED + "}"
    if form.kind == "codes":
        return text + _codes(form.offset) + "}"
    body = {"int8": _SIGNED, "fp8": _E4M3}.get(form.kind)
    return text + (body or _table(form.table)) + "}"
