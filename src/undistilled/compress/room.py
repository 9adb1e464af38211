"""What a run leaves on disk, by reckoning, so that a disk that is too small is said before hours pass."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.resolve import Model
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from .calibrate import LARGEST
from .files import check_room

FLOAT = 4  # bytes
ONE_INPUT = ("q", "k", "v", "q_a", "kv_a")  # of an attention


def check(model: Model, tokens: int, calibration: Path | None, out: Path, size: int) -> None:
    """DiskFull where `size` bytes of a checkpoint in `out`, and a calibration of so many tokens, find no room."""
    need = max(0, size - held(out))
    if calibration is not None:
        more = max(0, reckoned(model.spec, tokens) - held(calibration))
        check_room(calibration, more, "Its calibration")
        need += more if _disk(calibration) == _disk(out) else 0
    check_room(out, need, f"{model.name} in this form, with its calibration," if calibration else "This form")


def reckoned(spec: ModelSpec, tokens: int) -> int:
    """Bytes of a calibration at its largest: hidden states of all layers, gradients, and moments."""
    states = FLOAT * tokens * spec.hidden * (spec.layers + 2)
    by_input = {_input(w): w for w in weights(spec) if w.is_linear or w.role in ("head", "embed")}
    outputs = sum(FLOAT * w.shape[0] * w.count for w in weights(spec) if w.is_linear or w.role in ("head", "embed"))
    return states + outputs + sum(map(_moments, by_input.values()))


def _input(weight: Weight) -> tuple:
    """Weights that have one input have its moments once."""
    family, _, part = weight.role.partition(".")
    if family == "attention" and part in ONE_INPUT:
        part = "q"
    return weight.layer, family, "gate" if part == "up" else part


def _moments(weight: Weight) -> int:
    width = weight.shape[1]
    own = FLOAT * weight.count * width * width
    return own if own <= LARGEST or not weight.experts else FLOAT * width * (width + weight.count)


def held(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _disk(path: Path) -> int:
    return next(p for p in (path, *path.absolute().parents) if p.exists()).stat().st_dev
