"""`quantize`: a model in, a smaller checkpoint out, a file at a time.

Everything is written to OUT.partial and gets its name when it is whole. A file is a unit of work: after a SIGKILL or
on a full disk the same command goes on with the first file that is not there, and ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch

from .. import scheme as schemes
from ..checkpoint.compressed import tensor_of
from ..checkpoint.resolve import Model
from ..checkpoint.source import Source
from ..checkpoint.writer import Tensor, sha256, shard_name, shards, write, write_index
from ..errors import BadArtefact, DoesNotFit, UsageError
from ..model.spec import OURS
from ..model.weights import Weight, weights
from ..plan.recipes import scheme_of
from ..scheme.base import Parts, Scheme, parts_of
from . import material
from .choose import CALIBRATION, FACTORS, UNCALIBRATED, Choice, at_once, budget, check, choose
from .files import LOCK, alone, keep, kept
from .pace import Pace

SIZES = ("scheme", "bits", "bytes")  # the options that say how small
SHARD = 1 << 30  # bytes of a file: what a SIGKILL loses at most
NOTHING = {"request.json", LOCK}  # what a run leaves that ended before it had made anything
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What was asked for. `scheme`: a scheme or recipe; else `bytes` or `bits` (of a weight, on average) is shared out.

    `solver`: a row of choose.SOLVERS. It calibrates on `tokens`, of which up to `traces` are the model's own answers to
    `questions` (a file) and the rest `text` (a file); what it finds is kept in the folder `calibration`, if one is
    given. `device`: where it computes.
    """

    scheme: str | None = None
    bits: float | None = None
    bytes: int | None = None
    solver: str = "gptq"
    tokens: int = 8192
    traces: int = 0
    text: str | None = None
    questions: str | None = None
    calibration: str | None = None
    device: str = "cpu"
    shard: int = SHARD


def quantize(model: Model, out: Path, request: Request, say: Say = lambda _: None) -> dict:
    """Write `model` to `out` as asked; what was done, for people and scripts."""
    given = [f"--{key}" for key in SIZES if getattr(request, key) is not None]
    if not given:
        raise UsageError("Say how small: one of --scheme, --bits and --bytes.")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each say how small.", "Give one of them, not both.")
    check(request)
    budget(model, request)
    if out.exists():
        raise UsageError(f"{out} exists.", "Give another folder, or remove it.")
    folder = out.with_name(out.name + ".partial")
    _refuse(model, request, out, folder)
    with alone(folder):
        try:
            return _made(model, out, folder, request, say)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                f"The GPU has too little memory: {str(error).splitlines()[0]}",
                "Free it and give the same command again, which goes on, or start with --device cpu.",
            ) from None


def _refuse(model: Model, request: Request, out: Path, folder: Path) -> None:
    """UsageError or BadArtefact for what would fail after hours."""
    given = Path(request.calibration).resolve() if request.calibration else None
    if given and any(given.is_relative_to(p.resolve()) for p in (out, folder)):
        raise UsageError(f"{given} is where the checkpoint goes.", "Give another --calibration.")
    if not model.has_weights:
        raise BadArtefact(f"{model.name} has no weights here.", "Give a folder or file that has them.")
    if request.solver not in UNCALIBRATED:
        material.read(request.text, "emma")
        material.read(request.questions, "questions")
    there = model.source().names()
    lacking = next((w for w in weights(model.spec) for n in w.tensor_names if n not in there), None)
    if lacking:
        raise BadArtefact(
            f"{model.name}: {lacking.name!r} of config.json is not in the files.",
            "Set num_nextn_predict_layers to 0 in config.json." if lacking.mtp else "Is the download complete?",
        )


def _made(model: Model, out: Path, folder: Path, request: Request, say: Say) -> dict:
    _open(folder, model, request)
    began = perf_counter()
    choice = choose(model, request, folder, say)
    table = {w.name: choice.schemes.get(w.name) or scheme_of(w, model.spec, choice.base) for w in weights(model.spec)}
    files = _files(model, table, request.shard)
    wrote = _write(folder, model, table, files, choice, say)
    _finish(folder, out, model, table, files, request)
    return {
        "out": str(out),
        "bytes": wrote,
        "files": len(files),
        "seconds": perf_counter() - began,
        "bits_per_weight": 8 * wrote / sum(w.params for w in weights(model.spec)),
        "schemes": _counted(table),
    }


def _counted(table: dict[str, str]) -> dict[str, int]:
    """How many weights of each scheme; dynamic blocks count as one."""
    found: dict[str, int] = {}
    for name in table.values():
        kind = "tiles" if name.startswith("tiles") else name
        found[kind] = found.get(kind, 0) + 1
    return found


def _open(folder: Path, model: Model, request: Request) -> None:
    """Begin, or go on: the folder must be of the same request for the same model."""
    said = {"model": model.fingerprint(), **asdict(request)}
    file = folder / "request.json"
    if not file.exists():
        keep(file, said)
        return
    before = kept(file)
    other = next((key for key in said if before.get(key) != said[key]), None)
    if other and {f.name for f in folder.iterdir()} <= NOTHING:
        keep(file, said)
    elif other:
        what = "of another model" if other == "model" else f"of another request, made with {_options(before, other)}"
        raise UsageError(f"{folder} is {what}.", "Remove it, or give another OUT.")


def _options(before: dict, other: str) -> str:
    """What a request said, as options: how small, by which solver, and `other`."""
    said = {key: before.get(key) for key in dict.fromkeys((*SIZES, "solver", other))}
    given = " ".join(f"--{key} {value}" for key, value in said.items() if value is not None)
    return given + (f" and no --{other}" if said[other] is None and other not in SIZES else "")


def _files(model: Model, table: dict[str, str], room: int) -> list[list[tuple[Weight, int]]]:
    """The tensors of each file, (weight, which expert): in order, as many as `room` bytes take."""
    sized = ((w, schemes.bytes_of(schemes.get(table[w.name]), w.shape)) for w in weights(model.spec))
    return shards((((w, at), size) for w, size in sized for at in range(w.count)), room)


def _tensors(table: dict[str, str], content: list[tuple[Weight, int]]) -> list[Tensor]:
    found = []
    for weight, at in content:
        scheme = schemes.get(table[weight.name])
        for part, spec in parts_of(scheme, weight.shape).items():
            found.append((tensor_of(weight.tensor_names[at], scheme, part), spec))
    return found


def _write(folder: Path, model: Model, table: dict[str, str], files: list, choice: Choice, say: Say) -> int:
    """Every file that is not there yet; the bytes of all."""
    journal = folder / "journal.jsonl"
    done = {}
    for line in journal.read_text().splitlines() if journal.exists() else []:
        entry = _entry(line)
        done[entry.get("file")] = entry.get("sha256")
    source, total = choice.source(model), 0
    every = sum(spec.nbytes for content in files for _, spec in _tensors(table, content))
    pace = Pace(every)
    for at, content in enumerate(files, 1):
        file, tensors = folder / shard_name(at, len(files)), _tensors(table, content)
        size = sum(spec.nbytes for _, spec in tensors)
        if file.exists() and done.get(file.name) == sha256(file):
            pace.found(size)
        else:
            digest = write(file, tensors, _values(source, table, content, choice))
            with journal.open("a") as f:
                f.write(json.dumps({"file": file.name, "sha256": digest}) + "\n")
            pace.did(size)
        total += size
        say(f"{file.name}: {total / 1e9:.2f} of {every / 1e9:.2f} GB, {pace}")
    return total


def _entry(line: str) -> dict:
    """A line of the journal; one that a kill cut short says nothing."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _values(source: Source, table: dict[str, str], content: list, choice: Choice) -> Iterator[torch.Tensor]:
    for weight, experts in _together(content, at_once(choice.device)):
        scheme = schemes.get(table[weight.name])
        names = [weight.tensor_names[at] for at in experts]
        if source.scheme(names[0]) == scheme.name:
            found = iter([source.parts(name, 0, weight.shape[0]) for name in names])
        else:
            found = _solved(weight, experts, scheme, source, choice)
        for parts in found:
            for part, spec in parts_of(scheme, weight.shape).items():
                yield parts[part].reshape(spec.shape)


def _together(content: list[tuple[Weight, int]], values: int) -> Iterator[tuple[Weight, range]]:
    """Runs of experts of one weight that are solved at once, about `values`: small matrices gain much by company."""
    at = 0
    while at < len(content):
        weight, first = content[at]
        most = max(1, values // math.prod(weight.shape))
        count = 1
        while count < most and at + count < len(content) and content[at + count][0] is weight:
            count += 1
        yield weight, range(first, first + count)
        at += count


def _solved(weight: Weight, experts: range, scheme: Scheme, source: Source, choice: Choice) -> Iterator[Parts]:
    dense = [source.dense(weight.tensor_names[at], 0, weight.shape[0]).to(choice.device) for at in experts]
    if not weight.experts:
        yield choice.solve(weight, None, scheme, dense[0])
        return
    stacked = choice.solve(weight, slice(experts.start, experts.stop), scheme, torch.stack(dense))
    yield from ({part: tensor[at] for part, tensor in stacked.items()} for at in range(len(experts)))


def _finish(folder: Path, out: Path, model: Model, table: dict[str, str], files: list, request: Request) -> None:
    """Index, config and tokenizer; then the folder gets its name."""
    where, total = {}, 0
    for at, content in enumerate(files, 1):
        for name, spec in _tensors(table, content):
            where[name] = shard_name(at, len(files))
            total += spec.nbytes
    config = model.plain_config()
    config[OURS] = {
        "format": 1,
        "model": model.said,
        "fingerprint": model.fingerprint(),
        "request": asdict(request),
        "schemes": table,
    }
    model.tokenizer().save(folder)
    write_index(folder, where, total, config)
    os.replace(folder, out)  # before anything of the work is removed: a kill in between loses none of it
    for name in ("request.json", "journal.jsonl", "choice.json", LOCK):
        (out / name).unlink(missing_ok=True)
    for name in (CALIBRATION, FACTORS):
        shutil.rmtree(out / name, ignore_errors=True)
