"""`export`: a checkpoint in a format that other programs read. Codes and scales go over as they are.

What a format cannot say is refused, naming the weight, or goes over in BF16 where a person asked for that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import scheme as schemes
from ..errors import UsageError
from ..model.weights import weights
from .export_gguf import GGUF
from .export_tensors import CompressedTensors
from .held import Format, Held, Say
from .resolve import Model

FORMATS: dict[str, Callable[[Model], Format]] = {"compressed-tensors": CompressedTensors, "gguf": GGUF}
DENSE = "bf16"  # what becomes of the weights that a format cannot say


def export(model: Model, out: Path, form: str, *, dense: bool = False, say: Say = lambda _: None) -> dict[str, Any]:
    """Write `model` to `out`; what was done, for people and scripts. UsageError names what the format cannot say."""
    if form not in FORMATS:
        raise UsageError(f"Unknown format {form!r:.80}.", f"Known: {', '.join(FORMATS)}.")
    if out.exists():
        raise UsageError(f"{out} exists.", "Give another name, or remove it.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.absolute().parent} is no folder.", "Make it, or give another name.")
    if not model.has_weights:
        raise UsageError(f"{model.path} has no weights to export.")
    kind = FORMATS[form](model)
    held = _held(model, kind, dense)
    partial = out.with_name(out.name + ".partial")
    _remove(partial)
    try:
        wrote = kind.write(held, partial, say)
        os.replace(partial, out)
    finally:
        _remove(partial)
    counts: dict[str, int] = {}
    for scheme in held.schemes.values():
        counts[scheme.name] = counts.get(scheme.name, 0) + 1
    return {"out": str(out), "format": form, "bytes": wrote, "schemes": counts, "dense": held.dense}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _held(model: Model, kind: Format, dense: bool) -> Held:
    """Which scheme each weight is exported in, before anything is written."""
    held = Held(model, model.source())
    present = held.source.names()
    for weight in weights(model.spec):
        if weight.mtp and weight.tensor_names[0] not in present:
            continue
        name = held.source.scheme(weight.tensor_names[0])
        reason = kind.refuses(weight, schemes.get(name)) if name else "lies in a form that no scheme holds"
        if reason and not dense:
            said = f", {name}," if name else ""
            raise UsageError(f"{weight.name}{said} {reason}.", f"{kind.way_out} Or --dense: such weights as BF16.")
        if reason:
            held.dense.append(weight.name)
        held.schemes[weight.name] = schemes.get(DENSE if reason or name is None else name)
    return held
