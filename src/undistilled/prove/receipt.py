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
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.resolve import Model, find
from ..errors import BadArtefact, DoesNotFit, UsageError
from ..generate.engine import plan_for
from ..plan.check import check, check_devices
from ..plan.hardware import load_machine
from ..plan.plan import Plan
from ..plan.solve import Ask, solve
from . import divergence, measure
from . import tasks as questions
from .score import Scorer

VERSION = 1
DEFAULT_CONTEXT = 1024  # tokens that a plan made here has room for: the speed run fills it
ORIGINAL_CONTEXT = 4096  # tokens; the original only ever scores windows and questions
CHARACTERS = 64  # of a text for each token wanted: more than a token holds, less than a whole library
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What both models are given: windows of token ids, and questions with their ids."""

    text: dict[str, Any]
    windows: list[list[int]]
    tasks: list[questions.Task]
    encoded: list[list[questions.Encoded]]


def prove(
    model_name: str,
    *,
    plan_file: Path | None = None,
    scheme: str | None = None,
    text: Path | None = None,
    tasks: Sequence[Path] = (),
    tokens: int = 2048,
    limit: int | None = None,
    context: int | None = None,
    window: int = 512,
    progress: Progress | None = None,
    command: measure.Command = measure.run_command,
) -> dict[str, Any]:
    """The receipt of a plan, from a file or made here for `scheme` and `context` on this machine.

    tokens: of the text, in windows of `window`; limit: questions of each task file (None: all).
    Three runs, one after another: speed and memory in a fresh process, the original here, the plan here.
    Raises what planning, loading and reading the inputs raise, before anything long begins.
    """
    say = progress or (lambda _text: None)
    model = find(model_name)
    plan = _plan(model, plan_file, scheme, context)
    original = original_plan(model, plan)
    inputs = _inputs(model, plan, original, text, list(tasks), tokens, limit, window)
    say("measuring memory and speed in a fresh process")
    bench = measure.bench(model_name, plan, command)
    with tempfile.TemporaryDirectory(prefix="undistilled-") as folder:
        quality = _quality(model, plan, original, inputs, Path(folder) / "logprobs", say)
    return seal(_bindings(model, plan, original, inputs) | quality | _figures(plan, bench))


def _plan(model: Model, plan_file: Path | None, scheme: str | None, context: int | None) -> Plan:
    if plan_file and (scheme or context):
        raise UsageError("A plan file decides scheme and context.", "Give --plan alone, or --scheme and --context.")
    if not model.has_weights:
        raise BadArtefact(f"{model.path} has no weights to prove anything about.")
    if plan_file:
        plan = plan_for(model, {"plan": plan_file})
    else:
        context = context or min(DEFAULT_CONTEXT, model.spec.max_context)
        plan = plan_for(model, {"scheme": scheme, "context": context})
    _device(plan)
    return plan


def _device(plan: Plan) -> str:
    """The one device that the plan uses."""
    used = {row.store for row in plan.rows} - {"unloaded"}
    if len(used) != 1:
        raise UsageError(f"The plan spreads over {', '.join(sorted(used))}; only a plan on one device can be proven.")
    return used.pop()


def original_plan(model: Model, plan: Plan) -> Plan:
    """The weights as released on this machine: where the plan runs, else on the CPU. DoesNotFit where on neither."""
    machine = load_machine("this")
    free = {d.name: d.free_bytes for d in machine.devices}
    context = min(plan.limits.context, ORIGINAL_CONTEXT)
    for device in ("cpu",) if _device(plan) == "cpu" else (None, "cpu"):
        made = solve(model.name, model.config, model.spec, machine, Ask(None, context, 1, False, device))
        if made.fits and len({row.store for row in made.rows} - {"unloaded"}) == 1:
            check(made, model.spec, model.config)
            check_devices(made, free)
            return made
    raise DoesNotFit(
        f"The original of {model.name} ({made.scheme}) does not fit this machine, and a receipt measures against it.",
        "Prove on a machine that holds it.",
    )


def _inputs(
    model: Model, plan: Plan, original: Plan, text: Path | None, files: list[Path], tokens: int, limit: int | None,
    window: int,
) -> Inputs:
    if tokens < 2 or window < 2:
        raise UsageError("--tokens and the window start at 2.")
    tokenizer = model.tokenizer()
    room = min(plan.limits.context, original.limits.context)
    name, content = read_text(text)
    bos = tokenizer.bos if tokenizer.add_bos else None
    ids = tokenizer.encode(content[: tokens * CHARACTERS], control=False)
    _check_vocab(model, ids)
    cut = divergence.windows(ids, min(window, room), tokens, bos)
    read = questions.read_tasks(files, limit)
    described = {
        "name": name, "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "tokens": sum(len(w) - (bos is not None) for w in cut), "window": min(window, room),
    }
    return Inputs(described, cut, read, [questions.encode_task(t, tokenizer, room) for t in read])


def _check_vocab(model: Model, ids: list[int]) -> None:
    if ids and max(ids) >= model.spec.vocab:
        raise BadArtefact(
            f"The tokenizer gives id {max(ids)}; the model has {model.spec.vocab} rows.", "Is it another model's?"
        )


def read_text(file: Path | None) -> tuple[str, str]:
    """(name, content) of a UTF-8 text; without a file, of the excerpt that comes with the program."""
    if file is None:
        data = resources.files(__package__).joinpath("data/austen.txt")
        return "Jane Austen, Persuasion (excerpt, built in)", data.read_text(encoding="utf-8")
    try:
        return Path(file).name, Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise BadArtefact(f"{file}: not UTF-8 text ({error}).") from None


def _quality(model: Model, plan: Plan, original: Plan, inputs: Inputs, file: Path, say: Progress) -> dict[str, Any]:
    """One model after the other; the first one's log-probabilities wait in `file`."""

    def choose(scorer: Scorer, who: str) -> list[list[int]]:
        chosen = []
        for task, encoded in zip(inputs.tasks, inputs.encoded, strict=True):
            say(f"{who}: {task.name}, {len(encoded)} questions")
            chosen.append(list(questions.answers(scorer, encoded)))
        return chosen

    def first(scorer: Scorer):
        say(f"original ({original.scheme}): {inputs.text['tokens']} tokens of text")
        return divergence.record(scorer, inputs.windows, file), choose(scorer, f"original ({original.scheme})")

    def second(scorer: Scorer):
        say(f"plan ({plan.scheme}): {inputs.text['tokens']} tokens of text")
        return divergence.compare(scorer, inputs.windows, recording), choose(scorer, f"plan ({plan.scheme})")

    say(f"loading the original ({original.scheme})")
    recording, before = measure.with_model(model, original, first)
    say(f"loading the plan ({plan.scheme})")
    figures, after = measure.with_model(model, plan, second)
    compared = zip(inputs.tasks, before, after, strict=True)
    return figures | {"tasks": {t.name: questions.compare(t, a, b) for t, a, b in compared}}


def _figures(plan: Plan, bench: dict[str, Any]) -> dict[str, Any]:
    """Memory in bytes and speed in tokens a second; both speeds are of all requests of the batch together."""
    p = plan.predicted
    predicted = {"prefill_tokens_per_s": p.prefill_tokens_per_s, "decode_tokens_per_s": p.decode_tokens_per_s}
    at = bench["conditions"]
    return {
        "memory": {"predicted": p.devices[_device(plan)].bytes.total, "measured": bench["peak_bytes"]},
        "speed": {"predicted": predicted, "measured": bench["speed"]},
        "conditions": at | {"same_context": at["prompt_tokens"] + at["new_tokens"] >= at["context"], "basis": p.basis},
    }


def _bindings(model: Model, plan: Plan, original: Plan, inputs: Inputs) -> dict[str, Any]:
    """What the figures are about, so that they can be found wanting elsewhere."""
    return {
        "receipt_version": VERSION,
        "model": {"name": model.name, "fingerprint": model.fingerprint(), "parameters": plan.parameters},
        "plan": _weights(plan) | {"digest": plan.digest(), "context": plan.limits.context, "batch": plan.limits.batch},
        "original": _weights(original) | {"digest": original.digest()},
        "versions": {"undistilled": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "name": plan.machine, "system": platform.platform(), "processor": platform.machine(),
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
        "scheme": plan.scheme, "device": _device(plan), "bytes": held, "bits_per_weight": 8 * held / count,
        "compute_dtype": plan.compute_dtype, "kv_dtype": plan.kv.dtype,
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
