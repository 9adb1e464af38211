"""What a person sees in a terminal. No logic: numbers come in, text with units goes out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from .errors import UndistilledError
from .events import Event, sentence

BUSY = 0.2  # cores that others take from which a measurement is said to suffer

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def size(count: float) -> str:
    """Bytes for people: 70272 -> "70.3 KB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def count(n: float) -> str:
    """Parameters for people: 671026419200 -> "671.03 B"."""
    for unit in ("", "K", "M", "B"):
        if abs(n) < 1000 or unit == "B":
            return f"{n:.2f} {unit}".strip() if unit else f"{n:.0f}"
        n /= 1000
    raise AssertionError


def number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def rate(value: float) -> str:
    return f"{number(value)} tokens/s"


def error(e: UndistilledError) -> None:
    err.print(f"[bold red]error:[/] {escape(e.message)}")
    if e.hint:
        err.print(f"       {escape(e.hint)}")


def note(text: str) -> None:
    err.print(f"[dim]{escape(text)}[/]")


def stream(text: str) -> None:
    print(text, end="", flush=True)


def thought(text: str) -> None:
    out.print(f"[dim]{escape(text)}[/]", end="")


def ask() -> str:
    return out.input("[bold]> [/]")


@contextmanager
def loading() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr for loading; nothing where stderr is no terminal."""
    columns = (
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, _name: bar.update(task, completed=done, total=total)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """On stderr, the step in hand: a spinner in a terminal, a line for each elsewhere."""
    if not sys.stderr.isatty():
        yield note
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=escape(text))


def event(happened: Event) -> None:
    """Says what a person should know of what happened."""
    if said := sentence(happened):
        note(said)


def table_of(*columns: str) -> Table:
    """A caller keeps it within 80 columns: bytes take 8 of them ("203.1 GB"), a space between columns 2."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def inspection(report: dict[str, Any]) -> None:
    rows = [
        ("architecture", report["architecture"]),
        (
            "parameters",
            f"{count(report['parameters']['total'])}, {count(report['parameters']['active'])} active for a token",
        ),
        ("layers", f"{report['layers']}" + (f" + {report['mtp_layers']} MTP" if report["mtp_layers"] else "")),
        ("released as", _released(report)),
        ("other schemes", ", ".join(f"{s} {size(b)}" for s, b in report["bytes_by_scheme"].items())),
        ("KV cache", f"{size(report['kv_bytes_per_token'])} a token at 16 bits"),
        ("context", f"at most {report['max_context']:,} tokens"),
    ]
    if report["experts"]:
        rows.insert(2, ("experts", f"{report['experts']['total']}, {report['experts']['per_token']} for a token"))
    table = table_of(report["model"], "")
    for name, value in rows:
        table.add_row(name, value)
    table.columns[1].justify = "left"
    out.print(table)


def _released(report: dict[str, Any]) -> str:
    as_read = f"{report['released_scheme']}, {size(report['bytes'])}, {report['tensors']:,} tensors"
    file = report["file"]
    return f"{file['type']}, {size(file['bytes'])} (GGUF); read as {as_read}" if file else as_read


def doctor(report: dict[str, Any], brief: bool = False) -> None:
    """brief: nothing of kernels and presets."""
    table = table_of("this machine", "")
    table.columns[1].justify = "left"
    for name, value in report["rows"]:
        table.add_row(escape(name), escape(value))
    out.print(table)
    if brief:
        out.print("Plans over ranks go by these links from now on: `plan MODEL --tp 2`.")
        return
    if report["native_kernels"]:
        tiles = ", INT16 products of many rows by AMX" if report["native_tiles"] else ""
        out.print(f"CPU kernels: built for {report['native_kernels']}{tiles}")
    else:
        out.print(f"[yellow]native kernels missing:[/] {escape(report['native_why_missing'])}")
    _kernels(report["kernels"])
    out.print(f"Machines to plan for with --machine: {', '.join(report['presets'])}")


def _kernels(rows: list[dict[str, str]]) -> None:
    """A line for the schemes that one kernel serves for one reason."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        grouped.setdefault((row["device"], row["products"], row["kernel"], row["why"]), []).append(row["scheme"])
    table = table_of("device", "products", "kernel", "why", "schemes")
    for (device, products, kernel, why), served in grouped.items():
        table.add_row(device, products, kernel, escape(why), ", ".join(served))
    for column in table.columns:
        column.justify = "left"
    out.print(table)


def bench(result: dict[str, Any]) -> None:
    out.print(f"[bold]{escape(result['model'])}[/] as [bold]{result['scheme']}[/], {result['compute_dtype']} products")
    table = table_of("tokens/s", "median", "min", "max", "predicted")
    for name, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
        m = result[key]
        table.add_row(name, *(number(x) for x in (m["median"], m["min"], m["max"], result["predicted"][key])))
    out.print(table)
    planned = ", ".join(size(b) for b in result["predicted"]["bytes"].values())
    if "ranks" in result:
        rank_times(result)
    else:
        out.print(f"peak memory {size(result['peak_bytes'])} (planned {planned}); {result['threads']} threads")
    if result["others_cores"] > BUSY:
        taken = f"{result['others_cores']:.1f} cores"
        out.print(f"[yellow]Other programs took {taken} meanwhile: alone it may be faster.[/]")
    if "explain" in result:
        kernels(result["explain"])


def rank_times(result: dict[str, Any]) -> None:
    """What each rank took and did of the time."""
    table = table_of("rank", "peak", "planned", "computing", "waiting")
    for rank, found in enumerate(result["ranks"]):
        sizes = (size(found["peak_bytes"]), size(found["planned_bytes"]))
        table.add_row(str(rank), *sizes, *(f"{found[key] / result['elapsed_s']:.0%}" for key in ("busy_s", "waited_s")))
    out.print(table)
    threads = f"({result['threads']} thread{'s' * (result['threads'] > 1)} a rank)"
    if result["stages"] > 1:
        of_mean = f"the busiest computes {result['imbalance']:.2f} times the mean"
        out.print(f"stages idle {result['bubble']:.0%} of the time; {of_mean} {threads}")
    else:
        out.print(f"the rest of the time: messages, and what ranks do between passes {threads}")
    if result.get("overlap") is not None:
        out.print(
            f"messages between stages took {result['transfer_s'] / result['elapsed_s']:.1%} of the time, "
            f"{result['overlap']:.0%} of that hidden behind computing"
        )


def routing(report: dict[str, Any], output: Path | None) -> None:
    """How unevenly the layers' experts are chosen, over groups of ranks."""
    table = table_of(f"tokens of the busiest of {report['groups']} groups / mean", "mean of layers", "worst layer")
    copies = report["copies"]
    for name, key in (("experts cut by number", "plain"), (f"with up to {copies} copies a layer", "copied")):
        table.add_row(name, f"{sum(report[key]) / len(report[key]):.3f}", f"{max(report[key]):.3f}")
    out.print(table)
    if output:
        out.print(f"counts written to {output}")


def rebalanced(before: Any, after: Any, output: Path, result: dict[str, Any]) -> None:
    """How a mesh shared out layers, what each stage took, and how it shares them out now."""
    table = table_of("stage", "layers before", "computing", "layers now")
    busy = [row["busy_s"] / result["elapsed_s"] for row in result["ranks"]]
    for stage, ((a, b), (c, d)) in enumerate(zip(before.stages, after.stages, strict=True)):
        part = max(busy[stage * before.inner : (stage + 1) * before.inner])
        table.add_row(str(stage), f"{a} to {b - 1}", f"{part:.0%} of the time", f"{c} to {d - 1}")
    out.print(table)
    out.print(f"written to {output}")


def kernels(rows: list[dict[str, Any]]) -> None:
    """The kinds of kernels of a decode pass beside the time that their weights take to be read."""
    table = table_of("one pass", "steps", "ms", "weights", "GB/s", "floor, ms")
    for row in rows:
        ms, floor = (f"{row[key] * 1e3:.3f}" for key in ("seconds", "floor"))
        read = (size(row["bytes"]), f"{row['bytes'] / row['seconds'] / 1e9:.1f}", floor) if row["bytes"] else [""] * 3
        table.add_row(row["name"], str(row["count"]), ms, *read)
    out.print(table)
    out.print(f"read bandwidth {size(rows[0]['bandwidth'])}/s, measured now")


def comparison(rows: list[dict[str, Any]]) -> None:
    """Schemes of one model beside its original: bytes, divergence, questions answered right, speed."""
    right = ("answers\nright",) if any(row["right"] is not None for row in rows) else ()
    measures = ("KL to original,\nnats", "same\nchoice", *right, "tokens/s\nprefill", "\ndecode")
    table = table_of("scheme", "weights", "peak\nmemory", *measures)
    for row in rows:
        kl = row["kl_nats"]
        table.add_row(
            row["scheme"],
            size(row["weights"]),
            size(row["peak_bytes"]),
            f"{kl['mean']:.4f} ± {kl['se']:.4f}" if kl else "(the original)",
            f"{row['top1_agreement']:.1%}" if kl else "",
            *(["" if row["right"] is None else f"{row['right']:.0%}"] if right else []),
            number(row["prefill"]),
            number(row["decode"]),
        )
    out.print(table)


def heading(text: str) -> None:
    out.print(f"\n[bold]{escape(text)}[/]")


def usage(result: dict[str, Any]) -> None:
    u = result["usage"]
    out.print(
        f"\n[dim]{u['prompt_tokens']} + {u['completion_tokens']} tokens, finished by {result['finish_reason']}[/]"
    )
