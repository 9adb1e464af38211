"""A receipt: what a plan costs in quality against the original weights, and what it took beside what was predicted.

Every figure is measured by the call that makes it. `receipt_id` is the SHA-256 of everything else in the receipt,
so that an edit shows; it is no signature, and whoever edits can also compute a new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.resolve import Model, find
from ..errors import UsageError
from ..generate.engine import Engine
from ..model.decoder import Decoder
from ..plan.plan import Plan
from . import divergence, graded, measure
from . import tasks as questions
from .answers import Answer
from .inputs import Asked, Inputs, read_inputs
from .plans import home_of, original_of, original_plan, proven_plan
from .score import Scorer

VERSION = 1
Progress = Callable[[str], None]


def prove(
    model_name: str,
    *,
    plan_file: Path | None = None,
    scheme: str | None = None,
    original: str | None = None,
    text: Path | None = None,
    tasks: Sequence[Path] = (),
    tokens: int = 2048,
    limit: int | None = None,
    context: int | None = None,
    dtype: str | None = None,
    window: int = 512,
    suite: graded.Wanted | None = None,
    speed: bool = True,
    progress: Progress | None = None,
    command: measure.Command = measure.run_command,
) -> dict[str, Any]:
    """The receipt of a plan, from a file or made here for `scheme`, `context` and `dtype` on this machine.

    original: the model that it is compared with; None: the same, or what a compressed one was made from.
    tokens: of the text, in windows of `window`; limit: questions of each task (None: all of a file, 100 of each task
    of the reasoning suite, which is asked where `suite` says what).
    Three runs, one after another: speed and memory in a fresh process (unless not `speed`), the original here, the
    plan here.
    Raises what planning, loading and reading the inputs raise, before anything long begins.
    """
    say = progress or (lambda _text: None)
    model = find(model_name)
    plan = proven_plan(model, plan_file, scheme, context, dtype)
    base = original_of(model, original)
    first = original_plan(base, plan)
    inputs = read_inputs(model, plan, first, Asked(text, tasks, tokens, limit, window, suite))
    bench = None
    if speed:
        say("measuring memory and speed in a fresh process")
        bench = measure.bench(model_name, plan, command)
    with tempfile.TemporaryDirectory(prefix="undistilled-") as folder:
        quality = _quality((base, first), (model, plan), inputs, Path(folder) / "logprobs", say)
    return seal(_bindings((base, first), (model, plan), inputs) | quality | _figures(plan, bench))


@dataclass(frozen=True)
class Side:
    """What one model gave: something about the text, chosen indices by task file, answers by reasoning task."""

    text: Any
    chosen: list[list[int]]
    answers: dict[str, list[Answer]]


Planned = tuple[Model, Plan]


def _quality(first: Planned, second: Planned, inputs: Inputs, file: Path, say: Progress) -> dict[str, Any]:
    """One model after the other; the first one's log-probabilities wait in `file`."""
    suite, (base, original), (model, plan) = inputs.suite, first, second
    one = _side(
        base,
        original,
        suite.original if suite else None,
        inputs,
        f"original ({original.scheme})",
        say,
        lambda scorer: divergence.record(scorer, inputs.windows, file),
    )
    other = _side(
        model,
        plan,
        suite.plan if suite else None,
        inputs,
        f"plan ({plan.scheme})",
        say,
        lambda scorer: divergence.compare(scorer, inputs.windows, one.text),
    )
    compared = zip(inputs.tasks, one.chosen, other.chosen, strict=True)
    return other.text | {
        "tasks": {t.name: questions.compare(t, a, b) for t, a, b in compared},
        "suite": graded.figures(suite, one.answers, other.answers) if suite else None,
    }


def _side(
    model: Model, plan: Plan, roomy: Plan | None, inputs: Inputs, who: str, say: Progress, read: Callable[[Scorer], Any]
) -> Side:
    """Load one model and ask it everything, the suite with the `roomy` plan's cache in place of the scorer's."""

    def work(decoder: Decoder) -> Side:
        text, chosen = _scored(Scorer(decoder, plan), inputs, who, say, read)
        if not (inputs.suite and roomy):
            return Side(text, chosen, {})
        measure.free()
        say(f"{who}: reasoning questions, {roomy.limits.batch} at once")
        tokenizer = model.tokenizer()
        return Side(text, chosen, asked(Engine(decoder, roomy, tokenizer, roomy.model)))

    def asked(engine: Engine) -> dict[str, list[Answer]]:
        assert inputs.suite is not None
        return graded.ask(inputs.suite, engine, lambda news: say(f"{who}: {news}"))

    say(f"loading the {who}")
    if plan.mesh is None:
        return measure.with_model(model, plan, work)
    text, chosen = measure.with_ranks(
        model, plan, lambda engine: _scored(Scorer(engine.decoder, plan, engine.runner), inputs, who, say, read)
    )
    return Side(text, chosen, measure.with_ranks(model, roomy, asked) if inputs.suite and roomy else {})


def _scored(
    scorer: Scorer, inputs: Inputs, who: str, say: Progress, read: Callable[[Scorer], Any]
) -> tuple[Any, list[list[int]]]:
    """What `read` finds about the text, and the chosen indices by task file."""
    say(f"{who}: {inputs.text['tokens']} tokens of text")
    text, chosen = read(scorer), []
    for task, encoded in zip(inputs.tasks, inputs.encoded, strict=True):
        say(f"{who}: {task.name}, {len(encoded)} questions")
        chosen.append(list(questions.answers(scorer, encoded)))
    return text, chosen


def _figures(plan: Plan, bench: dict[str, Any] | None) -> dict[str, Any]:
    """Memory in bytes and speed in tokens a second; both speeds are of all requests of the batch together.

    Where nothing was measured, `measured` and `conditions` are None.
    """
    p = plan.predicted
    predicted = {"prefill_tokens_per_s": p.prefill_tokens_per_s, "decode_tokens_per_s": p.decode_tokens_per_s}
    memory = sum(device.bytes.total for device in p.devices.values())
    if bench is None:
        return {
            "memory": {"predicted": memory, "measured": None},
            "speed": {"predicted": predicted, "measured": None},
            "conditions": None,
        }
    at = bench["conditions"]
    return {
        "memory": {"predicted": memory, "measured": bench["peak_bytes"]},
        "speed": {"predicted": predicted, "measured": bench["speed"]},
        "conditions": at | {"same_context": at["prompt_tokens"] + at["new_tokens"] >= at["context"], "basis": p.basis},
    }


def _bindings(first: Planned, second: Planned, inputs: Inputs) -> dict[str, Any]:
    """What the figures are about, so that they can be found wanting elsewhere."""
    (base, original), (model, plan) = first, second
    return {
        "receipt_version": VERSION,
        "model": {"name": model.name, "fingerprint": model.fingerprint(), "parameters": plan.parameters},
        "plan": _weights(plan) | {"digest": plan.digest(), "context": plan.limits.context, "batch": plan.limits.batch},
        "original": _weights(original)
        | {"name": base.name, "fingerprint": base.fingerprint(), "digest": original.digest()},
        "versions": {"undistilled": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "name": plan.machine,
            "system": platform.platform(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "command": shlex.join(sys.argv),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "text": inputs.text,
    }


def _weights(plan: Plan) -> dict[str, Any]:
    """Scheme, home, and what the loaded weights take: bytes, and bits for each parameter with scales counted."""
    loaded = [row for row in plan.rows if row.store != "unloaded"]
    held = sum(row.nbytes for row in loaded)
    count = sum(math.prod(row.shape) * (row.experts[1] - row.experts[0] if row.experts else 1) for row in loaded)
    return {
        "scheme": plan.scheme,
        "device": home_of(plan),
        "bytes": held,
        "bits_per_weight": 8 * held / count,
        "compute_dtype": plan.compute_dtype,
        "kv_dtype": plan.kv.dtype,
    }


def receipt_id(receipt: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a receipt without its id. ValueError for NaN or infinity."""
    rest = {k: v for k, v in receipt.items() if k != "receipt_id"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(receipt: dict[str, Any]) -> dict[str, Any]:
    """The receipt as JSON types, with its id."""
    plain = json.loads(json.dumps(receipt, allow_nan=False))
    return plain | {"receipt_id": receipt_id(plain)}


def verify_receipt(receipt: dict[str, Any]) -> bool:
    """Whether nothing in it was changed since it was made, short of a new id for the change."""
    try:
        return isinstance(receipt, dict) and receipt.get("receipt_id") == receipt_id(receipt)
    except (ValueError, TypeError, RecursionError):
        return False


def write_receipt(receipt: dict[str, Any], path: Path) -> Path:
    """JSON at `path` and a page beside it (same stem, .html), each whole or not at all. Returns the page's path."""
    from .page import render

    path = Path(path)
    page = check_output(path)
    try:
        _write(path, json.dumps(receipt, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        _write(page, render(receipt))
    except OSError as error:
        raise UsageError(f"{error.filename or path}: {error.strerror}.") from None
    return page


def check_output(path: Path) -> Path:
    """The page's path; UsageError where a receipt cannot be written there, before an hour is spent on making it."""
    path = Path(path)
    page = path.with_suffix(".html")
    if page == path:
        raise UsageError(f"{path}: the receipt is JSON; its page takes the name ending in .html.", "Name it .json.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: no file can be written there.", "Its folder has to exist.")
    return page


def _write(path: Path, content: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)
