"""Words of 2 to 6 bits a code to float16 values, eight codes at a time (scheme/packing.py has the planes).

For J of 0 to 3 a nibble word holds codes 4 J + i (low nibble of byte i) and 4 J + i + 16 (high nibble): two bits of
2 and three of 3, four of the wider ones, whose other bits lie in words `up`, each in its nibble's upper bit. Nibbles
pick bytes of a table: levels + 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...scheme.grouped import NORMAL
from .lanes import fma2, permute


@triton.constexpr_function
def table(bits, at):
    """Levels 4 at to 4 at + 3, + 128, as a word; of 2 bits there are only four."""
    levels = [int(level) + 128 for level in NORMAL[bits]]
    return signed(int.from_bytes(bytes(levels[4 * at : 4 * at + 4] or levels[:4]), "little"))


@triton.constexpr_function
def signed(word):
    """The int32 of these 32 bits."""
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def nibbles(words, BITS: tl.constexpr, J: tl.constexpr):
    """(nibble word, words of the bits above: none, one or two) of 32 codes' words."""
    low: tl.constexpr = J // 2 * 2
    if BITS == 2:
        return (words[J % 2] >> low) & 0x33333333, ()
    elif BITS == 3:
        left: tl.constexpr = 2 - low - J % 2
        third = words[2] << left if left >= 0 else words[2] >> -left
        return ((words[J % 2] >> low) & 0x33333333) | (third & 0x44444444), ()
    elif BITS == 4:
        return words[J], ()
    elif BITS == 5:
        return words[J], (words[4] << (3 - J),)
    else:
        return words[J], (words[4 + J % 2] << (3 - low), words[4 + J % 2] << (2 - low))


@triton.jit
def signs(n, HALF: tl.constexpr):
    """Of four nibbles the upper bit, eight times: a byte each."""
    return permute(n, n << 4, 0xBFAE if HALF else 0x9D8C)


@triton.jit
def picked(index, masks, BITS: tl.constexpr, AT: tl.constexpr, DEPTH: tl.constexpr):
    """Bytes of the table's part of 8 << DEPTH levels from AT on: by the index, and masks of the bits above."""
    if DEPTH == 0:
        return permute(table(BITS, AT), table(BITS, AT + 1), index)
    else:
        half: tl.constexpr = 1 << DEPTH
        low = picked(index, masks, BITS, AT, DEPTH - 1)
        high = picked(index, masks, BITS, AT + half, DEPTH - 1)
        return low ^ ((low ^ high) & masks[DEPTH - 1])


@triton.jit
def eight(words, scale2, bias2, BITS: tl.constexpr, J: tl.constexpr):
    """Four registers: codes (4 J + i, 4 J + i + 16) for i of 0 to 3, times the scale, exactly.

    A byte u in the lower half of float16 1024 is 1024 + u: times the scale, plus `bias2` = -1152 scales.
    """
    n, above = nibbles(words, BITS, J)
    found: tl.tuple = ()
    for half in tl.static_range(2):
        index = n
        masks: tl.tuple = ()
        if BITS > 3:
            index = n & 0x77777777
            masks = (signs(n, half),)
            for i in tl.static_range(BITS - 4):
                masks += (signs(above[i], half),)
        levels = picked(index >> (16 * half), masks, BITS, 0, max(BITS - 3, 0))
        for pair in tl.static_range(2):
            found += (fma2(permute(levels, 0x64646464, 0x4342 if pair else 0x4140), scale2, bias2),)
    return found


@triton.jit
def scale_pair(code):
    """(the FP8 number / 256 twice, -1152 times that), in float16: both exact."""
    half = ((code & 127) << 7) | ((code & 128) << 8)
    twice = half * 0x10001
    MINUS: tl.constexpr = signed(0xE480E480)
    return twice, fma2(twice, MINUS, 0)
