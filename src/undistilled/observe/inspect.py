"""What a model is, from its config alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .. import scheme as schemes
from ..checkpoint.resolve import find
from ..model.weights import counts, weights
from ..plan.recipes import scheme_of

TABLE = ("bf16", "fp8_block", "int8", "int4")


def _gguf(path: Path) -> dict[str, Any]:
    """The type that most of a GGUF's bytes have, and the bytes of its files."""
    from ..checkpoint.gguf_source import GGUFSource

    files = GGUFSource(path).files
    types: Counter[str] = Counter()
    for file in files:
        for tensor in file.tensors.values():
            types[tensor.type] += tensor.nbytes
    return {"type": types.most_common(1)[0][0], "bytes": sum(file.path.stat().st_size for file in files)}


def inspect(name: str) -> dict[str, Any]:
    """Parameters in all and active, bytes in the released form and in others, layers, cache bytes a token.

    `file` is what a GGUF holds before it is read as the released scheme; None for other models.
    """
    model = find(name)
    spec = model.spec
    total, active = counts(spec)
    known = list(weights(spec))
    by_role: dict[str, int] = {}
    for w in known:
        if not w.mtp:
            by_role[w.role] = by_role.get(w.role, 0) + w.params

    def size(scheme: str, mtp: bool) -> int:
        return sum(
            schemes.bytes_of(schemes.get(scheme_of(w, spec, scheme)), w.full_shape) for w in known if mtp or not w.mtp
        )

    return {
        "model": model.name,
        "architecture": spec.model_type,
        "parameters": {"total": total, "active": active, "mtp": sum(w.params for w in known if w.mtp)},
        "file": _gguf(model.path) if model.path.suffix == ".gguf" else None,
        "released_scheme": spec.native,
        "bytes": size(spec.native, mtp=False),
        "bytes_by_scheme": {s: size(s, mtp=False) for s in dict.fromkeys((spec.native, *TABLE))},
        "layers": spec.layers,
        "mtp_layers": spec.mtp_layers,
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "heads": spec.heads,
        "experts": {"total": spec.moe.experts, "per_token": spec.moe.per_token} if spec.moe else None,
        "max_context": spec.max_context,
        "kv_bytes_per_token": spec.kv_bytes_per_token(),
        "kv_values_per_token_per_layer": spec.kv_values,
        "tensors": sum(w.count * (2 if spec.native == "fp8_block" and w.is_linear else 1) for w in known),
        "parameters_by_role": by_role,
        "has_weights": model.has_weights,
    }
