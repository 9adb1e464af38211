"""Worked solutions of divisors, fractions, primes and equations: reasoning-gym's entry -> (thought, answer)."""

from __future__ import annotations

import re
from itertools import chain, count

from .arithmetic import Entry, Trace, divide, leading_part, multiply

EQUATION = re.compile(r"(?:(\d+) - )?(-?)(?:(\d+)\*)?([a-z])(?: ([+-]) (\d+))? = (-?\d+)")


def euclid(left: int, right: int) -> tuple[list[str], int]:
    """Lines of Euclid's algorithm, from the larger number, and the greatest common divisor.

    A line takes a multiple of the smaller number off the larger one; a rest of 0 or 1 ends it.
    """
    large, small = max(left, right), min(left, right)
    lines = []
    while small > 1:
        lines += divide(large, small)
        large, small = small, large % small
    divisor = small or large
    return [*lines, f"gcd={divisor}"], divisor


def exact(dividend: int, divisor: int) -> list[str]:
    """Lines of a division that leaves nothing; the last is `3901/47=83`."""
    quotient = dividend // divisor
    lines = divide(dividend, divisor) if quotient > 1 else []
    return [*lines, f"{dividend}/{divisor}={quotient}"]


def gcd(entry: Entry) -> tuple[str, str]:
    """`780,461` (the larger first), then Euclid; with more numbers the divisor so far meets the next one."""
    divisor, *rest = entry["metadata"]["numbers"]
    lines = []
    for number in rest:
        lines.append(f"{max(divisor, number)},{min(divisor, number)}")
        steps, divisor = euclid(divisor, number)
        lines += steps
    return "\n".join(lines), entry["answer"]


def lcm(entry: Entry) -> tuple[str, str]:
    """Euclid, then the smaller number over the divisor, times the larger one."""
    multiple, *rest = entry["metadata"]["numbers"]
    lines = []
    for number in rest:
        large, small = max(multiple, number), min(multiple, number)
        steps, divisor = euclid(large, small)
        lines += [f"{large},{small}", *steps]
        if divisor > 1:
            lines += exact(small, divisor)
        lines += multiply(large, small // divisor)
        multiple = large * small // divisor
        lines.append(f"lcm={multiple}")
    return "\n".join(lines), entry["answer"]


def fraction_simplification(entry: Entry) -> tuple[str, str]:
    """The fraction, Euclid, both parts over the divisor, the simple fraction (in the question's style: the answer)."""
    top, bottom = entry["metadata"]["numerator"], entry["metadata"]["denominator"]
    steps, divisor = euclid(top, bottom)
    lines = [f"{top}/{bottom}", *steps]
    if divisor > 1:
        lines += exact(top, divisor) + exact(bottom, divisor)
    lines.append(f"{top // divisor}/{bottom // divisor}")
    return "\n".join(lines), entry["answer"]


def trial(number: int, prime: int) -> list[str]:
    """The line that tells whether a prime divides: none for 2 and 5 (the last digit), the sum of digits for 3.

    From 7 on `13:97-91=6`: multiples of the prime by one digit are taken off until less than the prime is left.
    """
    if prime in (2, 5):
        return []
    if prime == 3:
        digits = str(number)
        return ["3:" + "+".join(digits) + (f"={sum(map(int, digits))}" if len(digits) > 1 else "")]
    line = f"{prime}:{number}"
    rest = number
    while rest >= prime:
        part = leading_part(rest, prime) * prime
        rest -= part
        line += f"-{part}={rest}"
    return [line]


def prime_factorization(entry: Entry) -> tuple[str, str]:
    """Trial division by 2, 3, 5, 7, 11, ... until the square exceeds what is left, shown as `11*11=121>97`."""
    rest: int = entry["metadata"]["number"]
    lines, factors = [str(rest)], []
    primes = chain((2, 3), (n for n in count(5, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2))))
    prime = next(primes)
    while prime * prime <= rest:
        lines += trial(rest, prime)
        if rest % prime:
            prime = next(primes)
            continue
        factors.append(prime)
        lines.append(f"{rest}/{prime}={rest // prime}")
        rest //= prime
    factors.append(rest)
    lines += [f"{prime}*{prime}={prime * prime}>{rest}", "*".join(map(str, factors))]
    return "\n".join(lines), entry["answer"]


def simple_equations(entry: Entry) -> tuple[str, str]:
    """The equation, the constants on one side, the coefficient off by an exact division, `x=8`."""
    equation: str = entry["metadata"]["equation"]
    lines = [equation.replace(" ", "")]
    found = EQUATION.fullmatch(equation)
    if found is None:  # no variable: reasoning-gym's terms have cancelled, as in 0 = 0
        return lines[0], entry["answer"]
    before, minus, factor, name, sign, after, right = found.groups()
    coefficient, value = int(factor or 1), int(right)
    scaled = f"{coefficient}*{name}" if factor else name
    if before:  # 20 - 3*x = 5
        lines.append(f"{before}{-value:+d}={int(before) - value}")
        value = int(before) - value
    elif sign:
        constant = int(sign + after)
        lines.append(f"{value}{-constant:+d}={value - constant}")
        value -= constant
    if minus:
        lines.append(f"-{scaled}={value}")
        value = -value
    if before or sign or minus:
        lines.append(f"{scaled}={value}")
    if coefficient > 1:
        lines += [*divide(value, coefficient), f"{name}={value // coefficient}"]
    return "\n".join(lines), entry["answer"]


TRACES: dict[str, Trace] = {
    "gcd": gcd,
    "lcm": lcm,
    "fraction_simplification": fraction_simplification,
    "prime_factorization": prime_factorization,
    "simple_equations": simple_equations,
}
