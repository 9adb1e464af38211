"""The verbs that make a smaller model; see cli.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from . import show
from .errors import UsageError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def size(text: str) -> int:
    """Bytes of "200GB", "1.5 GiB" or "4096"; UsageError where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is no size.", "Such as 200GB or 1.5GiB.")
    return int(float(found[1]) * UNITS[(found[2] or "").upper().removesuffix("B") + "B" if found[2] else ""])


def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    scheme: Annotated[
        str | None, typer.Option(help="A scheme or recipe for all, and what departs: int8,expert=int4,head=bf16.")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Bits a weight on average, shared out by worth.")] = None,
    size_: Annotated[str | None, typer.Option("--bytes", help="The same, for the whole checkpoint: 200GB.")] = None,
    solver: Annotated[str, typer.Option(help="rtn (no calibration), search or gptq.")] = "gptq",
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to calibrate on.")] = 8192,
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on; default: an excerpt of Emma.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Make a smaller checkpoint. The same command goes on where a kill or a full disk ended it."""
    from .checkpoint.resolve import find
    from .compress.run import Request
    from .compress.run import quantize as run

    request = Request(scheme, bits, size(size_) if size_ else None, solver, tokens, str(text) if text else None)
    with show.steps() as say:
        done = run(find(model), out, request, say)
    if as_json:
        print(json.dumps(done, indent=1))
    else:
        show.quantized(done)
