"""What a model is calibrated on: a text, and what it writes itself when it is asked; and where that is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.resolve import Model
from ..errors import UsageError
from .calibrate import FEW
from .files import alone, keep, kept
from .store import Store
from .sweep import sweep
from .traces import fits, traces

if TYPE_CHECKING:
    from .run import Request

FORMAT = 3  # of a calibration on disk: raised whenever what it holds changes
WITHOUT = "without-answers"  # a file that says so of a calibration
FEWEST = 64  # tokens
WINDOW = 512  # tokens, or the model's longest context


def moments_of(model: Model, request: Request, folder: Path, say: Callable[[str], None]) -> Store:
    """Moments of every matrix, from `folder`; what of them is not there is measured. UsageError where it is of
    another model or request."""
    with alone(folder, wait=True):
        _claim(folder / "calibration.json", model, request)
        file, without = folder / "windows.json", folder / WITHOUT
        if without.exists():
            say(f"{folder} has no answers of {model.name}'s own, which did not fit: remove it to try again with them")
        if not file.exists():
            if request.traces and not fits(model, request.device):
                say(f"{model.name} does not fit here as released: calibration without answers of its own")
                without.touch()
                request = replace(request, traces=0)
            keep(file, windows(model, request, say))
        sweep(model.spec, model.source(), kept(file), folder, device=request.device, say=say)
    found = Store(folder)
    _say_rare(found, say)
    return found


def _say_rare(moments: Store, say: Callable[[str], None]) -> None:
    """How many experts calibration hardly met, and what is done about it."""
    met = list(moments.met())
    rare, every = sum(int((m < FEW).sum()) for m in met), sum(map(len, met))
    if rare:
        say(f"{rare} of {every} experts met fewer than {FEW} tokens and take their layer's moments; --tokens helps")


def _claim(file: Path, model: Model, request: Request) -> None:
    """Say whose calibration this folder is, or check it."""
    texts = {kind: _digest(name, kind) for kind, name in (("emma", request.text), ("questions", request.questions))}
    said = {
        "format": FORMAT,
        "model": model.fingerprint(),
        "tokens": request.tokens,
        "traces": request.traces,
        "device": request.device,
        "text": texts["emma"],
        "questions": texts["questions"] if request.traces else None,
    }
    if not file.exists():
        keep(file, said)
    elif (before := kept(file)) != said:
        other = next(key for key in said if before.get(key) != said[key])
        raise UsageError(
            f"{file.parent} holds a calibration with another {other}.", "Remove it, or give another --calibration."
        )


def _digest(name: str | None, built_in: str) -> str:
    return hashlib.sha256(read(name, built_in).encode()).hexdigest()


def windows(model: Model, request: Request, say: Callable[[str], None]) -> list[list[int]]:
    """Windows of token ids, `request.tokens` in all: of a text, and up to `request.traces` of the model's answers."""
    size = min(WINDOW, model.spec.max_context)
    own: list[list[int]] = []
    if request.traces:
        own = traces(model, questions(read(request.questions, "questions")), request.traces, request.device, say)
    own = [answer[at : at + size] for answer in own for at in range(0, len(answer), size)]
    found = own + cut(model, read(request.text, "emma"), request.tokens - sum(map(len, own)), size)
    have = sum(map(len, found))
    if have < FEWEST:
        raise UsageError(f"There are {have} tokens to calibrate on.", f"Give a --text of {FEWEST} or more.")
    if have < request.tokens:
        say(f"only {have} of {request.tokens} tokens to calibrate on; a longer --text has more")
    return found


def questions(text: str) -> list[str]:
    """A question a line, as a JSON string where it has line breaks of its own."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            one = json.loads(line)
        except ValueError:
            one = line
        found.append(one if isinstance(one, str) else line)
    return found


def cut(model: Model, text: str, tokens: int, size: int) -> list[list[int]]:
    """Windows of `size`, `tokens` of the text in all."""
    tokenizer = model.tokenizer()
    ids = tokenizer.encode(text[: tokens * 8], control=False)[:tokens]
    head = tokenizer.encode_prompt("")
    size -= len(head)
    return [head + ids[at : at + size] for at in range(0, len(ids), size)]


def read(name: str | None, built_in: str) -> str:
    """A text file, or the one of that name that comes with the program (none that `prove` compares on)."""
    if name is None:
        return resources.files(__package__).joinpath(f"data/{built_in}.txt").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {name}: {error}.", "Give a text file in UTF-8.") from None
