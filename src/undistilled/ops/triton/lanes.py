"""One element a thread: tensors as long as a program has threads, whose element i is a register of thread i.

Triton's blocks cannot say which thread holds which byte; these can, so that a tile goes from memory to the tensor
cores' operands without a way through shared memory. A register is 32 bits: a word of codes, or two float16.
`mma.sync` m16n8k16 (PTX ISA, "Matrix Fragments"): thread 4 g + t of a warp holds rows g and g + 8 of the left operand
and column g of the right one, at four of 16 inputs, and columns 2 t and 2 t + 1 of the result.

Memory is read and written in assembly even where Triton's own operations would do: its pass that coalesces them looks
at the whole kernel for each, and took four fifths of the time of compiling.
"""

from __future__ import annotations

import triton
import triton.language as tl

SOME = tl.constexpr(
    "{ .reg .pred e, o, p, q; .reg .b32 w; and.b32 w, $7, 1; setp.eq.b32 e, w, 0; setp.ne.b32 o, w, 0;"
    " setp.gt.and.s32 p, $7, 2, e; setp.gt.and.s32 q, $7, 4, e;"
    " mov.b32 $2, 0; mov.b32 $3, 0; mov.b32 $4, 0; mov.b32 $5, 0;"
    " @e ld.global.L1::evict_first.v2.b32 {$0, $1}, [$6];"
    " @p ld.global.L1::evict_first.v2.b32 {$2, $3}, [$6 + 8];"
    " @q ld.global.L1::evict_first.v2.b32 {$4, $5}, [$6 + 16];"
    " setp.gt.and.s32 p, $7, 4, o;"
    " @o ld.global.L1::evict_first.b32 $0, [$6]; @o ld.global.L1::evict_first.b32 $1, [$6 + 4];"
    " @o ld.global.L1::evict_first.b32 $2, [$6 + 8];"
    " @p ld.global.L1::evict_first.b32 $3, [$6 + 12]; @p ld.global.L1::evict_first.b32 $4, [$6 + 16]; }"
)
MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@triton.jit
def permute(a, b, selector):
    """Bytes of (a, b), 0 to 7, picked by four nibbles; a nibble's upper bit asks for the byte's sign instead."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.int32, True, 1)


@triton.jit
def fma2(a, b, c):
    """a b + c of two float16 each, rounded once."""
    return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """c + a b in float32: a [16, 16] and b [16, 8] in float16, each thread its own part."""
    return tl.inline_asm_elementwise(
        MMA, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3], (tl.float32,) * 4, True, 1
    )


@triton.jit
def kept4(p):
    """Four words at p, which is a multiple of 16 bytes; of a tensor that is read again and again."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [p.to(tl.int64)], (tl.int32,) * 4, True, 1
    )


@triton.jit
def kept_byte(p, there):
    """The byte at p, zero where `there` is."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.u8 $0, [$1]; }",
        "=&r,l,r", [p.to(tl.int64), there], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def kept_short(p):
    """The int16 at p."""
    return tl.inline_asm_elementwise("ld.global.nc.s16 $0, [$1];", "=r,l", [p.to(tl.int64)], tl.int32, True, 1)


@triton.jit
def kept_word(p):
    """The int32 at p."""
    return tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], tl.int32, True, 1)


@triton.jit
def kept_float(p):
    """The float32 at p."""
    return kept_word(p).to(tl.float32, bitcast=True)


@triton.jit
def others(p):
    """The float32 at p that another program may have written: not from this processor's cache."""
    word = tl.inline_asm_elementwise("ld.global.cg.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], tl.int32, False, 1)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def put(p, value, there):
    """Writes float32 or 16 bits to p, but where `there` is zero."""
    if value.dtype.primitive_bitwidth == 32:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [p.to(tl.int64), value.to(tl.int32, bitcast=True), there], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [p.to(tl.int64), value.to(tl.int16, bitcast=True).to(tl.int32), there], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def settled(lane):
    """Loads above are issued here, not where they are needed: ptxas moves them down to save registers."""
    tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [lane], tl.int32, False, 1)


@triton.jit
def passing1(p):
    """A word at p that is read once."""
    return tl.inline_asm_elementwise(
        "ld.global.L1::evict_first.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], tl.int32, False, 1
    )


@triton.jit
def passing2(p):
    """As `passing1`, two words at a multiple of 8 bytes."""
    return tl.inline_asm_elementwise(
        "ld.global.L1::evict_first.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [p.to(tl.int64)], (tl.int32,) * 2, False, 1
    )


@triton.jit
def passing4(p):
    """As `passing1`, four words at a multiple of 16 bytes."""
    return tl.inline_asm_elementwise(
        "ld.global.L1::evict_first.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l", [p.to(tl.int64)], (tl.int32,) * 4, False, 1,
    )  # fmt: skip


@triton.jit
def passing(p, COUNT: tl.constexpr):
    """2 to 6 words at p, a multiple of COUNT words, as a tuple."""
    if COUNT == 2:
        return passing2(p)
    elif COUNT == 4:
        return passing4(p)
    elif COUNT == 6:
        return passing2(p) + passing2(p + 2) + passing2(p + 4)
    else:
        found: tl.tuple = ()
        for i in tl.static_range(COUNT):
            found += (passing1(p + i),)
        return found


@triton.jit
def passing_some(p, count):
    """Six words: `count` at p, a multiple of so many words, and zeros; two where `count` is 0."""
    return tl.inline_asm_elementwise(
        SOME, "=&r,=&r,=&r,=&r,=&r,=&r,l,r", [p.to(tl.int64), count], (tl.int32,) * 6, False, 1
    )
