"""How to solve knights and knaves and syllogisms, written out: reasoning-gym's entry -> (thought, answer)."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from string import ascii_lowercase, ascii_uppercase
from typing import Any

Claim = tuple[str, list[tuple[int, int]]]  # how its atoms are joined; who they are about, 1 for "tells the truth"
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
    whose value (after the colon) is not what its speaker is. A name stands before each letter, so that the letter is
    a look-up of the word just written: from the question to a letter in one step, a trained model guesses.

    who: Mia A, Jack B
    1=a knight
    0=a knave
    A: Mia A> Jack b
    B: Jack B= Mia A
    11,1>0:0 no
    10,1>1:1,0=1:0 ok
    """
    meta = entry["metadata"]
    names, terms = meta["names"], meta["knight_knave_terms"]
    claims = [_claim(statement) for statement in meta["statements"]]
    lines = ["who: " + ", ".join(f"{name} {letter}" for name, letter in zip(names, ascii_uppercase, strict=False))]
    lines += [f"1={terms['a_knight']}", f"0={terms['a_knave']}"]
    lines += [f"{ascii_uppercase[i]}:{_formula(claim, names)}" for i, claim in enumerate(claims)]
    for case in product((1, 0), repeat=len(claims)):
        line, fits = _case(claims, case)
        lines.append(line)
        if fits:
            break
    return "\n".join(lines), str(entry["answer"])


def _claim(statement: Any) -> Claim:
    """A statement of the package, of depth 2 at most, without its negations."""
    kind, *parts = statement
    return (SIGNS[kind], [_atom(part) for part in parts]) if kind in SIGNS else ("", [_atom(statement)])


def _atom(statement: Any) -> tuple[int, int]:
    """(person, 1 for telling the truth)."""
    kind, part = statement
    if kind == "not":  # the question says the opposite word
        person, bit = _atom(part)
        return person, 1 - bit
    return int(part), int(kind == "telling-truth")


def _formula(claim: Claim, names: list[str]) -> str:
    sign, atoms = claim
    letters = [ascii_uppercase[person] if bit else ascii_lowercase[person] for person, bit in atoms]
    return sign.join(f" {names[person]} {letter}" for (person, _), letter in zip(atoms, letters, strict=True))


def _case(claims: list[Claim], case: tuple[int, ...]) -> tuple[str, bool]:
    """The check of one case, and whether it is consistent."""
    line = "".join(map(str, case))
    for speaker, (sign, atoms) in zip(case, claims, strict=True):
        bits = [int(case[person] == bit) for person, bit in atoms]
        value = _value(sign, bits)
        line += f",{sign.join(map(str, bits))}:{value}"
        if value != speaker:
            return line + " no", False
    return line + " ok", True


def _value(sign: str, bits: list[int]) -> int:
    """What a formula of bits is worth, 1 or 0."""
    if sign in ("", "&"):
        return min(bits)
    if sign == "|":
        return max(bits)
    return int(bits[0] <= bits[1]) if sign == ">" else int(bits[0] == bits[1])


def syllogism(entry: dict[str, Any]) -> tuple[str, str]:
    """The statements with letters for the terms; then what follows about the two terms that are asked for.

    1 All dogs A cats B
    2 No cats B ants C
    ? Some dogs A not ants C
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
    named = {term: f"{term} {letter}" for term, letter in letters.items()}
    lines = [f"{mark} {_short(text, named)}" for mark, text in zip("12?", (first, second, asked), strict=True)]
    lines.append(f"{label}: {', '.join(found) or 'nothing'}")
    return "\n".join(lines), "Yes" if _short(asked, letters) in found else "No"


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
