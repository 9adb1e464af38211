"""How to sort and filter lists, written out: reasoning-gym's entry -> (thought, answer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KEY = 4  # letters of a word that are spelled out for sorting
RULES = {"keep_larger": ">", "keep_smaller": "<", "remove_larger": "<=", "remove_smaller": ">="}


def number_sorting(entry: dict[str, Any]) -> tuple[str, str]:
    """Every number with its sign and two digits before the point; then bucket by bucket of the tens digit.

    +51.6-91.9-02.8
    -9:91.9;8;7;6;5;4;3;2;1;0:02.8
    +0;1;2;3;4;5:51.6;6;7;8;9
    """
    meta = entry["metadata"]
    ascending = meta["direction"] == "ascending"
    numbers = [str(text) for text in meta["original_numbers"]]
    lines, ordered = ["".join(map(_padded, numbers))], []
    for sign in "-+" if ascending else "+-":
        group = [text for text in numbers if _padded(text)[0] == sign]
        if group:
            line, found = _buckets(group, sign, rising=(sign == "+") == ascending)
            lines.append(line)
            ordered += found
    return "\n".join(lines), str(ordered)


def _buckets(group: list[str], sign: str, *, rising: bool) -> tuple[str, list[str]]:
    """The line of one sign's buckets, and its numbers in order: by magnitude, `rising` or falling."""
    group = sorted(group, key=_size, reverse=not rising)
    parts = []
    for tens in range(10) if rising else range(9, -1, -1):
        here = [_padded(text)[1:] for text in group if min(9, int(_size(text)) // 10) == tens]
        parts.append(f"{tens}:{','.join(here)}" if here else str(tens))
    return sign + ";".join(parts), group


def _size(text: str) -> float:
    return abs(float(text))


def _padded(text: str) -> str:
    """-2.8 -> -02.8, 51 -> +51."""
    whole, point, rest = text.lstrip("-").partition(".")
    return f"{'-' if text[0] == '-' else '+'}{whole:0>2}{point}{rest}"


def number_filtering(entry: dict[str, Any]) -> tuple[str, str]:
    """What stays; then how each number compares with the limit, and whether it stays.

    keep <=+22.8
    +51.6>no
    -91.90<yes
    """
    meta = entry["metadata"]
    rule, limit = RULES[meta["operation"]], str(meta["filter_value"])
    texts = [str(text) for text in meta["original_numbers"]]
    values = [float(text) for text in texts]
    lines, kept = [f"keep {rule}{_padded(limit)}"], []
    for value in values:
        text = texts[values.index(value)]  # the package writes equal numbers as it wrote the first of them
        relation = "=" if value == float(limit) else "<" if value < float(limit) else ">"
        lines.append(f"{_padded(text)}{relation}{'yes' if relation in rule else 'no'}")
        if relation in rule:
            kept.append(text)
    return "\n".join(lines), str(kept)


def word_sorting(entry: dict[str, Any]) -> tuple[str, str]:
    """Each word and its first letters spelled; the first letters sorted; the spelled words sorted.

    words: find f i n d, Hart H a r t, film f i l m
    H f f
    H a r t Hart, f i l m film, f i n d find
    """
    meta = entry["metadata"]
    words = [str(word) for word in meta["transformed_words"]]
    ordered = sorted(words, reverse=meta["direction"] == "descending")
    lines = [
        "words: " + ", ".join(f"{word} {' '.join(word[:KEY])}" for word in words),
        " ".join(word[0] for word in ordered),
        ", ".join(f"{' '.join(word[:KEY])} {word}" for word in ordered),
    ]
    return "\n".join(lines), ", ".join(ordered)


TRACES: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "number_sorting": number_sorting,
    "number_filtering": number_filtering,
    "word_sorting": word_sorting,
}
