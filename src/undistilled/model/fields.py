"""Typed values out of a config.json; each error names the field."""

from __future__ import annotations

from typing import Any

from ..errors import BadArtefact

MAX_SIZE = (1 << 31) - 1  # of any dimension
MAX_LAYERS, MAX_EXPERTS = 1024, 4096  # these are counted out one by one; R1 has 61 + 1 and 256


def bad(config: dict[str, Any], key: str, expected: str) -> BadArtefact:
    found = f"is {config[key]!r:.80}, expected {expected}" if key in config else "is missing"
    return BadArtefact(f"config.json: {key!r} {found}.", "Is this the model's own config.json?")


def need(
    config: dict[str, Any],
    key: str,
    default: int | None = None,
    null: int | None = None,
    least: int = 1,
    most: int = MAX_SIZE,
) -> int:
    """A whole number; `default` stands for a missing key, `null` for null and for a key missing without default."""
    value = config.get(key, default)
    value = null if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise bad(config, key, f"a whole number from {least} to {most}")
    return value


def number(config: dict[str, Any], key: str, default: float, over: float = 0.0) -> float:
    """A finite number; `default` stands for null and for a missing key."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not over < value < 1e30:
        raise bad(config, key, f"a number over {over:g}")
    return float(value)


def table(config: dict[str, Any], key: str) -> dict[str, Any] | None:
    if not isinstance(config.get(key), dict | None):
        raise bad(config, key, "an object")
    return config.get(key)


def ids(config: dict[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and 0 <= id <= MAX_SIZE for id in found):
        raise bad(config, key, "a token id")
    return tuple(found)
