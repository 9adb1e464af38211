"""The verbs that make models and compare them; see cli.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from . import show, show_quality
from .errors import Interrupted, UsageError
from .options import DEVICE, JSON, MODEL, SCHEME

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def size(text: str) -> int:
    """Bytes of "200GB", "1.5 GiB" or "4096"; UsageError where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]i?)?B)?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is no size.", "Such as 200GB or 1.5GiB.")
    return int(float(found[1]) * UNITS[(found[2] or "").upper()])


def _home(device: str | None) -> str:
    """Where to compute: a GPU if there is one, unless "cpu" is asked for."""
    from .plan.ask import check_device
    from .plan.hardware import load_machine

    check_device(device)
    gpus = [] if device else [d.name for d in load_machine("this").devices if d.kind == "cuda"]
    return gpus[0] if gpus else "cpu"


def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    scheme: Annotated[
        str | None, typer.Option(help="A scheme or recipe for all, and what departs: int8,expert=int4,head=bf16.")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Bits a weight on average, shared out by worth.")] = None,
    size_: Annotated[str | None, typer.Option("--bytes", help="The same, for the whole checkpoint: 200GB.")] = None,
    solver: Annotated[str, typer.Option(help="rtn or hqq (no calibration); search, gptq, awq or awq-gptq.")] = "gptq",
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to calibrate on.")] = 8192,
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on; default: an excerpt of Emma.")] = None,
    traces: Annotated[
        int | None, typer.Option(min=0, help="Of the tokens, the model's own answers; default: half.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="What it answers, a question a line; default: ours.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder that keeps the calibration for further runs.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu keeps GPUs out.")] = None,
    as_json: JSON = False,
) -> None:
    """Make a smaller checkpoint. The same command goes on where a kill or a full disk ended it."""
    from .checkpoint.resolve import find
    from .compress.run import Request
    from .compress.run import quantize as run

    text_, questions_, kept = (str(file) if file else None for file in (text, questions, calibration))
    own = tokens // 2 if traces is None else min(traces, tokens)
    bytes_ = size(size_) if size_ else None
    request = Request(scheme, bits, bytes_, solver, tokens, own, text_, questions_, kept, _home(device))
    try:
        with show.steps() as say:
            done = run(find(model), out, request, say)
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted; {out}.partial has what is done.", "The same command goes on there.") from None
    if as_json:
        print(json.dumps(done, indent=1))
    else:
        show_quality.quantized(done)


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint: a folder, a .gguf file, a hub id or a built-in name.")],
    out: Annotated[Path, typer.Argument(help="The folder to make, or with gguf the file.")],
    form: Annotated[str, typer.Option("--format", help="compressed-tensors (transformers, vLLM) or gguf (llama.cpp).")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Weights that the format cannot say go over as BF16; else they are refused.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Write a checkpoint, codes and scales as they are, in a format that other programs read."""
    from .checkpoint.export import export as run
    from .checkpoint.resolve import find

    with show.steps() as say:
        done = run(find(model), out, form, dense=dense, say=say)
    print(json.dumps(done, indent=1)) if as_json else show_quality.exported(done)


def rebalance(
    model: Annotated[str, typer.Argument(help="The model that the plan is of.")],
    plan_file: Annotated[Path, typer.Option("--plan", help="A plan with several stages (`plan --pp`).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the new plan goes.")],
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens that each request decodes while it is measured.")] = 32,
    as_json: JSON = False,
) -> None:
    """Share layers out anew by the time that each stage really takes."""
    from .observe.rebalance import rebalance as run

    with show.loading() as progress:
        before, after, result = run(model, plan_file, output, new_tokens, progress)
    if as_json:
        print(json.dumps({"stages": after.stages, "measured": result}, indent=1))
    else:
        show.rebalanced(before, after, output, result)


def routing(
    model: MODEL,
    text: Annotated[Path | None, typer.Option(help="A text file; default: an excerpt of Persuasion.")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of it to read.")] = 4096,
    groups: Annotated[int, typer.Option("--ep", min=2, help="Groups of ranks to say the imbalance for.")] = 2,
    copies: Annotated[int, typer.Option("--expert-copies", min=1, help="Copies a layer to say it for.")] = 4,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the counts go, for a plan.")] = None,
    scheme: SCHEME = None,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Count how often each expert is chosen on a text: what --expert-counts wants to know."""
    from .generate.engine import open_engine
    from .observe.routing import balance, choices, counted
    from .plan.plan import write_text
    from .prove.inputs import CHARACTERS, read_text

    name, content = read_text(text)
    with show.loading() as progress:
        engine = open_engine({"model": model, "scheme": scheme, "device": device}, progress)
    found = choices(engine, engine.tokenizer.encode(content[: tokens * CHARACTERS], control=False)[:tokens])
    if output:
        write_text(output, counted(engine, found, name).model_dump_json() + "\n")
    report = balance(engine, found, groups, copies)
    print(json.dumps(report, indent=1)) if as_json else show.routing(report, output)


def compare(
    receipts: Annotated[list[Path], typer.Argument(help="Receipts that `prove -o` wrote, of forms of one model.")],
    picture: Annotated[Path | None, typer.Option("-o", "--output", help="Draw it (.svg, .png).")] = None,
    as_json: JSON = False,
) -> None:
    """Quality over bytes of several receipts of one model, as a table and a picture."""
    from .prove.compare import check_picture, draw, rows

    if picture:
        check_picture(picture)
    found = rows(receipts)
    if picture:
        draw(found, picture)
    print(json.dumps(found, indent=1)) if as_json else show_quality.compared(found, picture)


def train(
    folder: Annotated[Path, typer.Argument(help="Where the run lives: a second run there goes on.")],
    prose: Annotated[Path, typer.Option(help="English text to learn beside the questions (.txt, .txt.gz).")],
    budget: Annotated[float, typer.Option(help="Minutes of the whole training; the rate ends at 0.")] = 17.0,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens of a batch.")] = 65536,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    stop_after: Annotated[float, typer.Option(help="Minutes until this run saves and stops; the next resumes.")] = 1e6,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make questions.")] = 0,
    activations: Annotated[str, typer.Option(help="keep, recompute, or offload to the CPU's memory.")] = "keep",
    zero: Annotated[bool, typer.Option("--zero", help="Optimizer states in shards over torchrun's ranks.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks (torch.compile).")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train r1-nano, a small reasoning model of R1's architecture, from scratch."""
    from .tune.loop import Recipe
    from .tune.train import Options
    from .tune.train import train as run

    recipe = Recipe(60 * budget, tokens, rate, seed=seed)
    run(folder, Options(recipe, prose, stop_after, workers, activations, zero, compiled), show.note)
