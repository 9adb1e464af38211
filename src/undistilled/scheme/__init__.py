"""Schemes: how weights are stored. `get("int8")` finds one; a new format is a new file and a row here."""

from ..errors import UsageError
from . import fp8_block, fp8_channel, grouped, int8, plain, tiles
from .base import Dim, PartSpec, Scheme, Stored, bytes_of, parts_of, row_quantum
from .plain import Plain

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for module in (plain, fp8_block, fp8_channel, int8, grouped) for scheme in module.SCHEMES
}


def get(name: str) -> Scheme:
    """The scheme of that name; UsageError names the known ones."""
    found = SCHEMES.get(name) or tiles.parse(name)
    if found is None:
        families = dict.fromkeys(known.split("-")[0] for known in SCHEMES)
        known = ", ".join(family if family in SCHEMES else f"{family}-g64" for family in families)
        raise UsageError(
            f"Unknown scheme {name!r:.80}.",
            f"Known: {known}; some also by groups (int4-g32, -g64), without minimums (int4-sym), and dynamic blocks "
            "(tiles16x32-2x3-3x4-4x2).",
        )
    return found


__all__ = ["SCHEMES", "Dim", "PartSpec", "Plain", "Scheme", "Stored", "bytes_of", "get", "parts_of", "row_quantum"]
