"""How to solve knights and knaves and syllogisms, written out: reasoning-gym's entry -> (thought, answer)."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from string import ascii_uppercase
from typing import Any

SIGNS = {"and": "&", "or": "|", "->": ">", "<=>": "="}
PAIRS = {  # what follows from "q1 A B" and "q2 B C"; every term has members, as the package takes it
    ("All", "All"): ("All A C", "Some A C"),
    ("All", "No"): ("No A C", "Some A not C"),
    ("Some", "All"): ("Some A C",),
    ("Some", "No"): ("Some A not C",),
}
TURNED = {"All": "Some", "No": "No", "Some": "Some"}  # what "q X Y" says about "Y X"


def knights_knaves(entry: dict[str, Any]) -> tuple[str, str]:
    """The people as letters, their statements as formulas; then the cases in order until one is consistent.

    A capital says that a person tells the truth, a small letter that they lie. A case stops at the first statement
    whose value (after the colon) is not what its speaker is.

    A=Mia B=Jack
    1=a knight
    0=a knave
    A:A>b
    B:B=A
    11,1>0:0 no
    10,1>1:1,0=1:0 ok
    """
    meta = entry["metadata"]
    statements, terms = meta["statements"], meta["knight_knave_terms"]
    lines = [" ".join(f"{letter}={name}" for letter, name in zip(ascii_uppercase, meta["names"], strict=False))]
    lines += [f"1={terms['a_knight']}", f"0={terms['a_knave']}"]
    lines += [f"{letter}:{_formula(s)}" for letter, s in zip(ascii_uppercase, statements, strict=False)]
    for case in product((1, 0), repeat=len(statements)):
        line, fits = _case(statements, case)
        lines.append(line)
        if fits:
            break
    return "\n".join(lines), str(entry["answer"])


def _case(statements: Any, case: tuple[int, ...]) -> tuple[str, bool]:
    """The check of one case, and whether it is consistent."""
    line = "".join(map(str, case))
    for speaker, statement in zip(case, statements, strict=True):
        value = _value(statement, case)
        line += f",{_formula(statement, case)}:{value}"
        if value != speaker:
            return line + " no", False
    return line + " ok", True


def _formula(statement: Any, case: tuple[int, ...] | None = None) -> str:
    """A statement as a formula of letters, or of the case's values in their place."""
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        if case is not None:
            return str(_value(statement, case))
        letter = ascii_uppercase[int(parts[0])]
        return letter if kind == "telling-truth" else letter.lower()
    if kind == "not":
        if parts[0][0] in ("telling-truth", "lying"):  # the question says the opposite word
            return _formula(("lying" if parts[0][0] == "telling-truth" else "telling-truth", parts[0][1]), case)
        return f"!({_formula(parts[0], case)})"
    return SIGNS[kind].join(_inner(part, case) for part in parts)


def _inner(statement: Any, case: tuple[int, ...] | None) -> str:
    text = _formula(statement, case)
    return text if len(text) == 1 else f"({text})"


def _value(statement: Any, case: tuple[int, ...]) -> int:
    """Whether a statement holds in a case, 1 or 0."""
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return case[int(parts[0])] if kind == "telling-truth" else 1 - case[int(parts[0])]
    values = [_value(part, case) for part in parts]
    if kind == "not":
        return 1 - values[0]
    if kind in ("and", "or"):
        return min(values) if kind == "and" else max(values)
    return int(values[0] <= values[1]) if kind == "->" else int(values[0] == values[1])


def syllogism(entry: dict[str, Any]) -> tuple[str, str]:
    """The statements with letters for the terms; then what follows of the kind that is asked for.

    A=dogs B=cats C=ants
    1 All A B
    2 No B C
    ? Some A not C
    1+2: No A C, Some A not C
    """
    meta = entry["metadata"]
    first, second, asked = (_parsed(meta[key]) for key in ("premise1", "premise2", "conclusion"))
    letters = {first[1]: "A", first[2]: "B", second[2]: "C"}
    if "B" not in (letters[asked[1]], letters[asked[2]]):
        label, found = "1+2", PAIRS.get((_mood(first), _mood(second)), ())
    else:
        label, source = ("1", first) if asked[2] == first[1] else ("2", second)
        turned = TURNED.get(_mood(source))
        found = (f"{turned} {letters[source[2]]} {letters[source[1]]}",) if turned else ()
    short = [_short(statement, letters) for statement in (first, second, asked)]
    lines = [" ".join(f"{letter}={term}" for term, letter in letters.items())]
    lines += [f"{mark} {text}" for mark, text in zip("12?", short, strict=True)]
    lines.append(f"{label}: {', '.join(found) or 'nothing'}")
    return "\n".join(lines), "Yes" if short[2] in found else "No"


def _parsed(text: str) -> tuple[str, str, str, str]:
    """Some dogs are not cats -> (Some, dogs, cats, not)."""
    match = re.fullmatch(r"(All|No|Some) (\w+) are (not )?(\w+)", text)
    assert match, text
    return match[1], match[2], match[4], (match[3] or "").strip()


def _mood(statement: tuple[str, str, str, str]) -> str:
    return f"{statement[0]} {statement[3]}".strip()


def _short(statement: tuple[str, str, str, str], letters: dict[str, str]) -> str:
    quantifier, subject, predicate, negation = statement
    return " ".join(filter(None, (quantifier, letters[subject], negation, letters[predicate])))


TRACES: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "knights_knaves": knights_knaves,
    "syllogism": syllogism,
}
