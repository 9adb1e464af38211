"""What a person sees of receipts and of compressed models; see show.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from . import show
from .show import rate, size, table_of


def receipt(r: dict[str, Any], output: Path | None = None) -> None:
    kl, ppl = r["kl_nats"], r["perplexity"]
    schemes = f"{r['plan']['scheme']} against its original ({r['original']['scheme']})"
    show.out.print(f"[bold]{r['model']['name']}[/]: {schemes}")
    table = table_of("measure", "original", "plan")
    table.add_row("perplexity", f"{ppl['original']:.3f}", f"{ppl['plan']:.3f}")
    table.add_row("KL divergence", "", f"{kl['mean']:.5f} ± {kl['se']:.5f} nats")
    table.add_row("same first choice", "", f"{r['top1_agreement']:.1%}")
    for name, task in r["tasks"].items():
        table.add_row(f"{name} ({task['n']} questions)", f"{task['original']:.1%}", f"{task['plan']:.1%}")
    show.out.print(table)
    if r["suite"]:
        _suite(r["suite"])
    if r["speed"]["measured"]:
        _speeds(r)
    if output:
        show.out.print(f"receipt: {output}, page: {output.with_suffix('.html')}")


def _speeds(r: dict[str, Any]) -> None:
    speeds = table_of("measure", "predicted", "measured")
    speeds.add_row("memory", size(r["memory"]["predicted"]), size(r["memory"]["measured"]))
    for name in ("prefill", "decode"):
        key = f"{name}_tokens_per_s"
        speeds.add_row(name, rate(r["speed"]["predicted"][key]), rate(r["speed"]["measured"][key]["median"]))
    show.out.print(speeds)


def _suite(s: dict[str, Any]) -> None:
    """Accuracy by task of both models' answers, and how long these were."""
    table = table_of("reasoning task (questions)", "original", "plan", "difference, points", "tokens an\nanswer")
    for name, t in [*s["tasks"].items(), ("all", s["mean"])]:
        low, high = (100 * x for x in t["difference_interval"])
        length = t["tokens_per_answer"]
        table.add_row(
            f"{name} ({t['n']})",
            f"{t['original']:.1%}",
            f"{t['plan']:.1%}",
            f"{100 * t['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{length['original']:.0f} to {length['plan']:.0f}",
        )
    show.out.print(table)
    cut = s["unfinished"]
    show.out.print(
        f"answered {'after' if s['thinking'] else 'without'} reasoning; "
        f"cut at {s['max_tokens']} tokens: {cut['original']:.1%} to {cut['plan']:.1%} of the answers"
    )


def quantized(done: dict[str, Any]) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in done["schemes"].items())
    show.out.print(
        f"{escape(done['out'])}: {size(done['bytes'])} in {done['files']} file{'s' * (done['files'] != 1)}, "
        f"{done['bits_per_weight']:.2f} bits a weight, {done['seconds']:.0f} s\n[dim]{kinds}[/]"
    )


def exported(done: dict[str, Any]) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in done["schemes"].items())
    show.out.print(f"{escape(done['out'])}: {size(done['bytes'])} as {done['format']}\n[dim]{kinds}[/]")
    if done["dense"]:
        show.out.print(f"{len(done['dense'])} of them as BF16 for want of a word: {escape(done['dense'][0])}, …")


def compared(found: list[dict[str, Any]], picture: Path | None) -> None:
    table = table_of("form", "weights", "bits", "KL, nats", "same choice", "questions")
    for row in found:
        right = "" if row["suite"] is None else f"{row['suite']:.1%}"
        table.add_row(
            row["name"],
            size(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_nats']:.5f}",
            f"{row['top1_agreement']:.1%}",
            right,
        )
    show.out.print(table)
    if picture:
        show.out.print(f"picture: {escape(str(picture))}")
