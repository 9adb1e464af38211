"""What a person sees of a plan: devices, ranks, contexts, and the layouts it was chosen from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from . import show
from .events import Event
from .show import count, number, rate, size, table_of

LAYOUTS = 12  # that are shown of those compared


def plan(made: Any, output: Path | None = None) -> None:
    """A plan as tables, of devices, ranks and contexts, and a sentence."""
    p = made.predicted
    show.out.print(
        f"[bold]{made.model}[/] ({made.architecture}, {count(made.parameters)} parameters, "
        f"{count(made.active_parameters)} active) as [bold]{made.scheme}[/] "
        f"on [bold]{made.machine}[/], products in {made.compute_dtype}"
    )
    table = table_of("device", "weights", "KV", "working", "runtime", "total", "free", "")
    for name, d in p.devices.items():
        b = d.bytes
        table.add_row(
            name,
            *(size(x) for x in (b.weights, b.kv, b.activations, b.runtime, b.total, d.available)),
            _fits(d.fits),
        )
    show.out.print(table)
    _ranks(made)
    _contexts(made)
    show.out.print(
        f"Predicted{'' if made.fits else ', if it fitted,'} for batch {made.limits.batch}, "
        f"context {made.limits.context}: prefill {rate(p.prefill_tokens_per_s)}, "
        f"decode {rate(p.decode_tokens_per_s)} ({size(p.decode_bytes_per_token)} read a token; {p.basis})."
    )
    for text in made.notes:
        show.out.print(f"[yellow]note:[/] {text}")
    show.out.print(f"{len(made.rows)} rows, {made.tensors:,} tensors" + (f"; written to {output}" if output else ""))


def layouts(happened: Event) -> None:
    """Ways to share a model out, the best first; what no run can have, last."""
    if happened.name != "plan.layouts":
        return
    tried = happened.fields["tried"]
    table = table_of("layout", "fullest device", "prefill,\ntokens/s", "decode,\ntokens/s", "")
    for i, t in enumerate(tried[:LAYOUTS]):
        speeds = (number(t.prefill), number(t.decode)) if not t.refused else ("", "")
        said = escape(t.refused.message) if t.refused else _fits(t.fits) + ", not run yet" * t.only_predicted
        said = "[green]taken[/]" if i == 0 and t.fits and not t.only_predicted else said
        table.add_row(str(t.degrees), "" if t.refused else f"{t.full:.0%}", *speeds, said)
    table.columns[-1].justify, table.columns[-1].overflow = "left", "fold"
    show.out.print(table)
    if len(tried) > LAYOUTS:
        show.out.print(f"and {len(tried) - LAYOUTS} more")


def _ranks(made: Any) -> None:
    """What every rank holds, where there are several."""
    mesh = made.mesh
    if mesh is None:
        return
    table = table_of("rank", "layers", "device", "weights", "KV", "working", "total", "talk a step")
    for rank, found in enumerate(made.predicted.ranks):
        first, past = mesh.stages[mesh.stage(rank)]
        b = found.bytes
        sizes = (size(x) for x in (b.weights, b.kv, b.activations, b.total))
        table.add_row(str(rank), f"{first} to {past - 1}", found.device, *sizes, f"{found.collective_s * 1e3:.2f} ms")
    show.out.print(table)


def _fits(yes: bool) -> str:
    return "[green]fits[/]" if yes else "[red]too large[/]"


def _contexts(made: Any) -> None:
    """A column for the GPUs, of the fullest, and one for the CPU."""
    names = list(dict.fromkeys(n for c in made.predicted.contexts for n in c.total_bytes))
    gpus = [n for n in names if n != "cpu"]
    folded = {f"fullest of {len(gpus)} GPUs" if len(gpus) > 1 else n: gpus for n in gpus}
    folded |= {n: [n] for n in names if n == "cpu"}
    table = table_of("context", *folded, "")
    for c in made.predicted.contexts:
        most = [size(max(c.total_bytes.get(n, 0) for n in group)) for group in folded.values()]
        table.add_row(f"{c.context:,}", *most, _fits(c.fits))
    show.out.print(table)
