"""How to find an expression with a given value, written out: reasoning-gym's entry -> (thought, answer).

Plus and minus first: what is subtracted makes up half of what the sum of all is too large by. Where no choice does
that, three numbers are tried with times and divided by: one number last, after what the other two make.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

UNDO = {"-": "+", "+": "-", "/": "*", "*": "/"}


def countdown(entry: dict[str, Any]) -> tuple[str, str]:
    """The steps, and the first expression that they find.

    14+9=23,23+2=25
    25<63
    9,2:+11-7*18/x;14:-49+77/x*x no
    14,2:+16-12*28/7;9:-54+72/7*x yes 7
    14/2=7,7*9=63
    """
    meta = entry["metadata"]
    numbers, target = [int(number) for number in meta["numbers"]], int(meta["target"])
    lines, answer = _plus_minus(numbers, target)
    if not answer and len(numbers) == 3:
        more, answer = _one_last(numbers, target)
        lines += more
    return "\n".join(lines), answer or str(entry["answer"])


def _plus_minus(numbers: list[int], target: int) -> tuple[list[str], str]:
    """The search with plus and minus alone; the expression is empty where there is none."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    over = total - target
    if over <= 0:
        return [",".join(steps), f"{total}{'<' if over else '='}{target}"], "" if over else _signed(numbers, [])
    if over % 2:
        return [",".join(steps), f"{total}-{target}={over} odd"], ""
    line, minus = _half(numbers, over // 2, total)
    lines = [",".join(steps), f"{total}-{target}={over},{over}/2={over // 2}", line]
    return lines, _signed(numbers, minus) if minus else ""


def _half(numbers: list[int], half: int, total: int) -> tuple[str, list[int]]:
    """Which numbers make up `half`: one of them, all but one, or more by their sums. The line, and their places."""
    if half in numbers:
        return f"take {half}", [numbers.index(half)]
    line, rest = f"no {half},{total}-{half}={total - half}", total - half
    if rest in numbers:
        place = numbers.index(rest)
        return f"{line} keep {rest}", [i for i in range(len(numbers)) if i != place]
    line += f" no {rest}"
    for size in range(2, len(numbers) - 1):
        for places in combinations(range(len(numbers)), size):
            chosen = [numbers[i] for i in places]
            line += f",{'+'.join(map(str, chosen))}={sum(chosen)}"
            if sum(chosen) == half:
                return f"{line} take", list(places)
    return line, []


def _signed(numbers: list[int], minus: list[int]) -> str:
    plus = [str(number) for i, number in enumerate(numbers) if i not in minus]
    return "+".join(plus) + "".join(f"-{numbers[i]}" for i in minus)


def _one_last(numbers: list[int], target: int) -> tuple[list[str], str]:
    """Each number as the last one: what the other two make, what is needed of them, and whether that is the same."""
    lines: list[str] = []
    for place, last in enumerate(numbers):
        a, b = (number for i, number in enumerate(numbers) if i != place)
        makes = _makes(a, b)
        needs = _needs(target, last, max(value for _, value in makes.values()))
        line = f"{a},{b}:" + "".join(f"{op}{makes[op][1] if op in makes else 'x'}" for op in "+-*/")
        line += f";{last}:" + "".join(f"{op}{needs.get(op, 'x')}" for op in "-+/*")
        for undo, need in needs.items():
            for inner, value in makes.values():
                if value == need:
                    steps = f"{inner}={value},{value}{UNDO[undo]}{last}={target}"
                    return [*lines, f"{line} yes {need}", steps], f"({inner}){UNDO[undo]}{last}"
        lines.append(line + " no")
    return lines, ""


def _makes(a: int, b: int) -> dict[str, tuple[str, int]]:
    """What two numbers make, by operation: the expression and its value."""
    large, small = max(a, b), min(a, b)
    found = {"+": (f"{a}+{b}", a + b), "-": (f"{large}-{small}", large - small), "*": (f"{a}*{b}", a * b)}
    if large % small == 0:
        found["/"] = (f"{large}/{small}", large // small)
    return found


def _needs(target: int, last: int, largest: int) -> dict[str, int]:
    """What the other two must make, by how it is found from the target: not below 0, whole, no product too large."""
    found = {"-": target - last, "+": target + last}
    if target < last:
        del found["-"]
    if target % last == 0:
        found["/"] = target // last
    if target * last <= largest:
        found["*"] = target * last
    return found


TRACES: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {"countdown": countdown}
