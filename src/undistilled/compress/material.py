"""What a model is calibrated on: a text, and what it writes itself when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint.resolve import Model
from ..errors import DoesNotFit
from ..load.build import build
from ..plan.hardware import load_machine
from ..plan.solve import Ask, solve
from .calibrate import Moments, calibrate

if TYPE_CHECKING:
    from .run import Request

WINDOW = 512  # tokens, or the model's longest context


def moments_of(model: Model, request: Request, file: Path, say: Callable[[str], None]) -> dict[str, Moments]:
    """Moments of every matrix; from `file` where a run before this one left them."""
    if not file.exists():
        found = _measure(model, request, say)
        part = file.with_suffix(".part")
        save_file(_flat(found), part, {n: str(m.tokens) for n, m in found.items()})
        part.replace(file)
    return _read(file)


def _measure(model: Model, request: Request, say: Callable[[str], None]) -> dict[str, Moments]:
    ask = Ask("fp32", window(model), 1, False, "cpu")
    plan = solve(model.name, model.config, model.spec, load_machine("this"), ask)
    if not plan.fits:
        raise DoesNotFit(f"Calibration runs {model.name} in float32, which does not fit here.", "Use --solver rtn.")
    windows = cut(model, request)
    return calibrate(build(plan, model.spec, model.source()), windows, say=say)


def window(model: Model) -> int:
    return min(WINDOW, model.spec.max_context)


def cut(model: Model, request: Request) -> list[list[int]]:
    """Windows of token ids, `request.tokens` in all."""
    tokenizer = model.tokenizer()
    ids = tokenizer.encode(read(request.text)[: request.tokens * 8], control=False)[: request.tokens]
    head = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    size = window(model) - len(head)
    return [head + ids[at : at + size] for at in range(0, len(ids), size)]


def read(text: str | None) -> str:
    """A text file, or the calibration text that comes with the program (not the one `prove` compares on)."""
    if text is None:
        return resources.files(__package__).joinpath("data/emma.txt").read_text(encoding="utf-8")
    return Path(text).read_text(encoding="utf-8")


def _flat(found: dict[str, Moments]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for name, moments in found.items():
        shared = seen.setdefault(moments.inputs.data_ptr(), name)
        if shared == name:
            tensors[f"{name}:inputs"] = moments.inputs
        else:
            tensors[f"{name}:inputs={shared}"] = torch.zeros(1)
        tensors[f"{name}:outputs"] = moments.outputs
        if moments.met is not None:
            tensors[f"{name}:met"] = moments.met.clone()
    return tensors


def _read(file: Path) -> dict[str, Moments]:
    from safetensors import safe_open

    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        tokens = f.metadata()
    shared = {key.split(":inputs=")[0]: key.split(":inputs=")[1] for key in tensors if ":inputs=" in key}
    return {
        name: Moments(
            tensors[f"{shared.get(name, name)}:inputs"], tensors[f"{name}:outputs"], tensors.get(f"{name}:met"), int(n)
        )
        for name, n in tokens.items()
    }
