"""The options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
TP = Annotated[
    int | None,
    typer.Option("--tensor-parallel-size", "--tp", min=1, help="Ranks that share every layer, by head and width."),
]
PP = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "--pp", min=1, help="Stages that layers are shared out to.")
]
EP = Annotated[int | None, typer.Option("--expert-parallel-size", "--ep", min=1, help="Ranks that share out experts.")]
MICROBATCHES = Annotated[
    int | None, typer.Option("--microbatches", min=1, max=64, help="Parts of a batch that are in the pipeline at once.")
]
MTP = Annotated[bool, typer.Option("--mtp", help="Load the multi-token-prediction layer too.")]
DTYPE = Annotated[
    str | None, typer.Option("--dtype", help="Of products: float32, bfloat16 or auto, which the device decides.")
]
