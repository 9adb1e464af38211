"""How to spell, count and shift letters, written out: reasoning-gym's entry -> (thought, answer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROBE = 5  # letters of a cipher text that are shifted until they read as English


def spell_backward(entry: dict[str, Any]) -> tuple[str, str]:
    """The letters numbered from 0, then the numbers counted down: 0s1u2n, 2n1u0s."""
    word = str(entry["metadata"]["word"])
    marked = [f"{index % 10}{letter}" for index, letter in enumerate(word)]
    return "".join(marked) + "\n" + "".join(reversed(marked)), word[::-1]


def letter_counting(entry: dict[str, Any]) -> tuple[str, str]:
    """Each word and its letters, with the count so far at each hit: Anna a=1 n n a=2, and a=3 n d."""
    meta = entry["metadata"]
    count, spelled = 0, []
    for word in meta["span"]:
        letters = []
        for letter in word.lower():
            count += letter == meta["target_letter"]
            letters.append(f"{letter}={count}" if letter == meta["target_letter"] else letter)
        spelled.append(f"{word} {' '.join(letters)}")
    return ", ".join(spelled), str(count)


def caesar_cipher(entry: dict[str, Any]) -> tuple[str, str]:
    """The first letters shifted back one by one until they read as English; then each word, letter by letter.

    V J G N C
    1 U I F M B
    2 T H E L A
    text: VJG v T j H g E = THE, NCY n L c A y W = LAW
    """
    meta = entry["metadata"]
    cipher, clear = str(meta["cipher_text"]), str(meta["clear_text"])
    probe = cipher.replace(" ", "")[:PROBE]
    lines = [" ".join(probe)]
    lines += [f"{shift} {' '.join(_back(probe, shift))}" for shift in range(1, meta["rotation"] + 1)]
    words = []
    for hidden, word in zip(cipher.split(" "), clear.split(" "), strict=True):
        pairs = " ".join(f"{a.lower()} {b}" for a, b in zip(hidden, word, strict=True))
        words.append(f"{hidden} {pairs} = {word}")
    return "\n".join(lines) + "\ntext: " + ", ".join(words), clear


def _back(letters: str, shift: int) -> str:
    return "".join(chr((ord(letter) - ord("A") - shift) % 26 + ord("A")) for letter in letters)


TRACES: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "spell_backward": spell_backward,
    "letter_counting": letter_counting,
    "caesar_cipher": caesar_cipher,
}
