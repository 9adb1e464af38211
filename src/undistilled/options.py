"""The options that several verbs share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL = Annotated[
    str,
    typer.Argument(
        help="A folder, a .gguf file, a hub id (owner/name) or a built-in name (r1-nano, smollm2, deepseek-r1 to plan)"
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PLAN = Annotated[Path | None, typer.Option("--plan", help="A plan file; it decides schemes, homes and limits.")]
SCHEME = Annotated[
    str | None, typer.Option("--scheme", help="bf16, fp16, fp32, fp8_block, int8, int4, … Default: as released.")
]
CONTEXT = Annotated[int | None, typer.Option("--context", min=1, help="Tokens of context to make room for.")]
BATCH = Annotated[int, typer.Option("--batch", min=1, help="Requests to make room for at once.")]
DEVICE = Annotated[str | None, typer.Option("--device", help="`cpu` leaves GPUs out.")]
RANKS: dict[str, Any] = {
    "ranks": Annotated[
        str | None,
        typer.Option("--ranks", help="Ranks in all, or `auto`, at most one a GPU; the plan chooses --tp, --pp, --ep."),
    ],
    "tp": Annotated[
        int | None,
        typer.Option("--tp", "--tensor-parallel-size", min=1, help="Ranks that share every layer, by head and width."),
    ],
    "pp": Annotated[
        int | None,
        typer.Option("--pp", "--pipeline-parallel-size", min=1, help="Stages that layers are shared out to."),
    ],
    "ep": Annotated[
        int | None, typer.Option("--ep", "--expert-parallel-size", min=1, help="Ranks that share out experts.")
    ],
    "microbatches": Annotated[
        int | None,
        typer.Option("--microbatches", min=1, max=64, help="Parts of a batch in a pipeline at once; else one a stage."),
    ],
    "expert_copies": Annotated[
        int | None,
        typer.Option("--expert-copies", min=1, help="Copies of often chosen experts, at most so many a layer."),
    ],
    "expert_counts": Annotated[
        str | None, typer.Option("--expert-counts", help="How often which are: a file of `undistilled routing`.")
    ],
    "cluster": Annotated[
        str | None, typer.Option("--cluster", help="`ray` places ranks on the nodes of a Ray cluster.")
    ],
}
MTP = Annotated[bool, typer.Option("--mtp", help="Load the multi-token-prediction layer too.")]
DTYPE = Annotated[
    str | None,
    typer.Option("--dtype", help="Of products: float32, bfloat16, int16, int8 or auto: what is fast there."),
]


RUN: dict[str, Any] = {"plan": PLAN, "scheme": SCHEME, "context": CONTEXT, "device": DEVICE, "dtype": DTYPE} | RANKS
PROVE: dict[str, Any] = {
    "plan_file": PLAN,
    "scheme": SCHEME,
    "original": Annotated[
        str | None, typer.Option(help="The model to compare with; default: what it was made from, or itself.")
    ],
    "text": Annotated[
        Path | None, typer.Option(help="A text file; default: an excerpt that comes with the program.")
    ],
    "tasks": Annotated[
        list[Path] | None, typer.Option(help="Multiple-choice files (.jsonl, .jsonl.gz); may repeat.")
    ],
    "tokens": (Annotated[int, typer.Option(help="Tokens of the text to compare on.")], 2048),
    "context": CONTEXT,
    "dtype": DTYPE,
    "limit": Annotated[
        int | None, typer.Option(help="Questions of each task; default: all of a file, 100 of each of the suite.")
    ],
    "speed": (
        Annotated[
            bool,
            typer.Option("--speed/--no-speed", help="Whether memory and speed are measured, in a fresh process."),
        ],
        True,
    ),
}


def taking(options: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb with these options, which it gets together as `options`. By name: how typer reads it, and, where that is
    not None, its default."""

    def with_them(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def run(**given: Any) -> None:
            verb(options={name: given.pop(name) for name in options}, **given)

        kept = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "options"]
        more = [_parameter(name, said) for name, said in options.items()]
        run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in kept] + more)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*kept, *more]}
        return run

    return with_them


def _parameter(name: str, said: Any) -> inspect.Parameter:
    annotation, default = said if isinstance(said, tuple) else (said, None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
