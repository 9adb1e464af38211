"""Worked solutions of arithmetic questions: reasoning-gym's entry -> (thought, answer).

A thought is lines without spaces around digits, each a small step from what stands above it. Two forms recur:
a product by parts, `347*200=69400` then `347*80=27760,69400+27760=97160`, and a quotient by parts,
`47*80=3760,3901-3760=141` then `47*3=141` (a part of 1 is written `780-461=319`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Entry = dict[str, Any]
Trace = Callable[[Entry], tuple[str, str]]


def multiply(left: int, right: int) -> list[str]:
    """Lines that multiply two numbers >= 0 by the digits of the shorter one (of `right` if equally long)."""
    if len(str(left)) < len(str(right)):
        left, right = right, left
    digits = str(right)
    parts = [int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"] or [0]
    total = left * parts[0]
    lines = [f"{left}*{parts[0]}={total}"]
    for part in parts[1:]:
        product = left * part
        lines.append(f"{left}*{part}={product},{total}+{product}={total + product}")
        total += product
    return lines


def leading_part(dividend: int, divisor: int) -> int:
    """The quotient's first digit with its zeros: 83 -> 80. 0 < divisor <= dividend."""
    quotient = dividend // divisor
    place = 10 ** (len(str(quotient)) - 1)
    return quotient // place * place


def divide(dividend: int, divisor: int) -> list[str]:
    """Lines that take the divisor (> 0) off the dividend, one digit of the quotient a line, while it still fits.

    The last number of the last line is the remainder, except where a product comes out exactly: no more is written.
    """
    lines = []
    rest = dividend
    while rest >= divisor:
        part = leading_part(rest, divisor)
        product = divisor * part
        if part == 1:
            lines.append(f"{rest}-{divisor}={rest - divisor}")
        elif product == rest:
            lines.append(f"{divisor}*{part}={product}")
        else:
            lines.append(f"{divisor}*{part}={product},{rest}-{product}={rest - product}")
        rest -= product
    return lines


def chain_sum(entry: Entry) -> tuple[str, str]:
    """The sum, then a running total: `48+27-91`, `48+27=75`, `75-91=-16`."""
    first, *rest = entry["metadata"]["expression"].split()
    total = int(first)
    lines = [first + "".join(rest)]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        value = apply(total, sign, int(term))
        lines.append(f"{total}{sign}{term}={value}")
        total = value
    return "\n".join(lines), entry["answer"]


def products(entry: Entry) -> tuple[str, str]:
    """The product, then it by parts, factor after factor."""
    factors = [int(term) for term in entry["metadata"]["expression"].split("*")]
    lines = ["*".join(map(str, factors))]
    total = factors[0]
    for factor in factors[1:]:
        lines += multiply(total, factor)
        total *= factor
    return "\n".join(lines), entry["answer"]


def apply(left: int, sign: str, right: int) -> int:
    """One operation; `/` rounds down, as reasoning-gym's does in the rare expression with an inexact quotient."""
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left // right


def operate(left: int, sign: str, right: int) -> list[str]:
    """Lines of one operation on signed numbers; the last is always the operation itself, `-12*34=-408`."""
    a, b = abs(left), abs(right)
    lines = []
    if sign == "*" and a > 9 and b > 9:
        lines = multiply(a, b)
    elif sign == "/" and b > 1 and (a > 99 or b > 9):
        lines = divide(a, b)
    result = f"{left}{sign}{right}={apply(left, sign, right)}"
    return lines if lines and lines[-1] == result else [*lines, result]


def group(tokens: list[str]) -> tuple[int, int]:
    """Where the first innermost parenthesis starts and ends in the tokens; the whole range if there is none."""
    if ")" not in tokens:
        return -1, len(tokens)
    end = tokens.index(")")
    start = max(i for i in range(end) if tokens[i].endswith("("))
    return start, end


def reduce_once(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Work the first operation, `*` and `/` before `+` and `-`: (its lines, the tokens that are left).

    Tokens are signed numbers, operators, "(", "-(" and ")". A parenthesis that holds one number is dissolved.
    """
    start, end = group(tokens)
    signs = range(start + 2, end, 2)
    lines: list[str] = []
    inner = tokens[start + 1 : end]
    if signs:
        at = next((i for i in signs if tokens[i] in "*/"), signs[0]) - start - 1
        left, sign, right = int(inner[at - 1]), inner[at], int(inner[at + 1])
        lines = operate(left, sign, right)
        inner = [*inner[: at - 1], str(apply(left, sign, right)), *inner[at + 2 :]]
    if start < 0:
        return lines, inner
    if len(inner) > 1:
        return lines, [*tokens[: start + 1], *inner, *tokens[end:]]
    value = -int(inner[0]) if tokens[start] == "-(" else int(inner[0])
    return lines, [*tokens[:start], str(value), *tokens[end + 1 :]]


def basic_arithmetic(entry: Entry) -> tuple[str, str]:
    """The expression, then operation after operation, each followed by the expression that is left."""
    tokens = entry["metadata"]["expression"].split()
    lines = ["".join(tokens)]
    while len(tokens) > 1:
        steps, tokens = reduce_once(tokens)
        lines += [*steps, "".join(tokens)]
    return "\n".join(lines), entry["answer"]


LEGS = {
    0: ("snake", "sea slug", "jellyfish", "flatworm", "leech"),
    2: ("chicken", "bird", "human", "duck"),
    4: ("dog", "cat", "cow", "horse", "lion", "elephant", "giraffe", "tiger", "deer", "sheep"),
    5: ("starfish",),
    6: (
        "insect",
        "ant",
        "butterfly",
        "beetle",
        "bee",
        "wasp",
        "grasshopper",
        "cricket",
        "cockroach",
        "firefly",
        "praying mantis",
    ),
    8: ("spider", "scorpion"),
    10: ("crab", "lobster", "shrimp"),
    14: ("woodlouse",),
}
LEGS_OF = {animal: legs for legs, animals in LEGS.items() for animal in animals}


def leg_counting(entry: Entry) -> tuple[str, str]:
    """A line for each animal, with the running total: `tiger 4*8=32`, `ant 6*2=12,32+12=44`."""
    lines: list[str] = []
    total = 0
    for animal, count in entry["metadata"]["animals"].items():
        legs = LEGS_OF[animal] * count
        line = f"{animal} {LEGS_OF[animal]}*{count}={legs}"
        lines.append(f"{line},{total}+{legs}={total + legs}" if lines else line)
        total += legs
    return "\n".join(lines), entry["answer"]


TRACES: dict[str, Trace] = {
    "chain_sum": chain_sum,
    "products": products,
    "basic_arithmetic": basic_arithmetic,
    "leg_counting": leg_counting,
}
