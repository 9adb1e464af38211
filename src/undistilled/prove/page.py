"""A receipt as a page for people. It repeats the receipt's figures, with units, and says what they do not show."""

from __future__ import annotations

import math
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2

from .receipt import verify_receipt

Row = dict[str, Any]
SIDES = ("original", "plan")


def render(receipt: dict[str, Any]) -> str:
    """The page: one HTML document with no script and nothing to fetch."""
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {f.__name__: f for f in (size, rate, nats, percent, points, signed)}
    return environment.from_string(source).render(r=receipt, **view(receipt))


def view(r: dict[str, Any]) -> dict[str, Any]:
    """What the template shows beside the receipt itself."""
    return {
        "verified": verify_receipt(r),
        "sentence": sentence(r),
        "perplexity": perplexity(r["perplexity"]),
        "kl_note": kl_note(r["kl_nats"]),
        "tasks": [task(name, t) for name, t in r["tasks"].items()],
        "suite": suite(r.get("suite")),
        "bars": bars(r),
        "histogram": histogram(r["kl_nats"]["histogram"]),
        "bindings": bindings(r),
        "same_context": not r["conditions"] or r["conditions"]["same_context"],
        "busy": busy(r["conditions"]),
    }


def sentence(r: dict[str, Any]) -> str:
    kl, plan, original = r["kl_nats"], r["plan"], r["original"]
    if kl["max"] == 0:
        return (
            f"In {plan['scheme']}, {r['model']['name']} gave exactly the probabilities of its original "
            f"({original['scheme']}) at all {kl['n']:,} positions."
        )
    return (
        f"In {plan['scheme']}, {r['model']['name']} takes {size(plan['bytes'])} of weights instead of "
        f"{size(original['bytes'])}, and its next-token distributions diverge from the original's by "
        f"{nats(kl['mean'])} on average; at {percent(r['top1_agreement'])} of {kl['n']:,} positions both put the same "
        "token first."
    )


def kl_note(kl: dict[str, Any]) -> str:
    if kl["max"] == 0:
        return "No position differed at all."
    if kl["se"] is None:
        return "One position: nothing can be said about others."
    if kl["se_by"] == "windows":
        return f"The interval is by {kl['windows']} windows of text, which are taken as independent."
    return (
        f"The text gave only {kl['windows']} windows, so the interval takes each position as independent. "
        "Neighbouring positions are alike: it is likely too narrow. More --tokens widen the basis."
    )


def perplexity(p: dict[str, Any]) -> Row:
    """Relative change of the perplexity, from the paired log-ratio."""
    ratio = p["log_ratio"]
    change = math.expm1(ratio["mean"])
    if ratio["interval"] is None:
        return {"change": change, "low": None, "high": None, "verdict": "One position: nothing is established."}
    low, high = (math.expm1(x) for x in ratio["interval"])
    verdict = (
        "The plan's perplexity is higher: it predicts this text less well."
        if low > 0
        else (
            "The plan's perplexity is lower on this text."
            if high < 0
            else "Not established that the perplexities differ: the interval includes zero."
        )
    )
    return {"change": change, "low": low, "high": high, "verdict": verdict}


def difference(t: dict[str, Any]) -> tuple[bool, str]:
    """Whether the accuracies differ beyond doubt, and a sentence about it."""
    low, high = t["difference_interval"]
    p = t["mcnemar_p"]
    if not low <= 0 <= high and p < 0.05:  # with few discordant questions the exact test is the stricter
        return True, f"The plan answers {'worse' if high < 0 else 'better'} (exact paired test: p = {p:.2g})."
    why = "the interval includes zero" if low <= 0 <= high else "the exact paired test does not exclude chance"
    return False, f"Not established that accuracy differs: {why} (p = {p:.2g})."


def task(name: str, t: dict[str, Any]) -> Row:
    established, verdict = difference(t)
    guess = t["original_interval"][0] <= t["chance"]
    if guess:
        guessing = percent(t["chance"])
        verdict += f" Nor that the original does better than guessing ({guessing}), so this task tells little."
    kept = None if t["kept"] is None or guess else t["kept"]
    return {"name": name, **t, "verdict": verdict, "established": established, "kept_shown": kept}


def suite(s: dict[str, Any] | None) -> Row | None:
    """The reasoning suite: a row for each task, and all of them together. None where it was not asked."""
    if not s:
        return None
    established, verdict = difference(s["mean"])
    rows = []
    for name, t in s["tasks"].items():
        levels = [v for v in t["levels"] if v["n"]]
        shares = ", ".join(f"{v['original']:.0%} / {v['plan']:.0%}" for v in levels) if len(levels) > 1 else ""
        rows.append(
            {
                **t,
                "name": name,
                "by_level": shares,
                "established": difference(t)[0],
                "accuracy": [accuracy(who, t[who], t[f"{who}_interval"]) for who in SIDES],
            }
        )
    ways = "after reasoning" if s["thinking"] else "at once, without reasoning"
    return {
        **s,
        "rows": rows,
        "verdict": verdict,
        "established": established,
        "ways": ways,
        "mean_accuracy": [accuracy(who, s["mean"][who]) for who in SIDES],
    }


def accuracy(who: str, share: float, interval: list[float] | None = None) -> Row:
    """A bar in percent of a whole, with its interval's whisker where there is one."""
    low, high = interval or (None, None)
    return {
        "who": who,
        "share": share,
        "width": f"{100 * share:.2f}",
        "interval": interval,
        "low": None if low is None else f"{100 * low:.2f}",
        "range": None if low is None or high is None else f"{100 * (high - low):.2f}",
    }


def bars(r: dict[str, Any]) -> list[Row]:
    """Predicted beside measured, widths in percent of the longest; none where nothing was measured."""
    memory, speed = r["memory"], r["speed"]
    if speed["measured"] is None:
        return []
    rows = [bar("Peak memory", memory["predicted"], memory["measured"], size, lower_is_better=True)]
    for title, key in (("Prefill speed", "prefill_tokens_per_s"), ("Decode speed", "decode_tokens_per_s")):
        m = speed["measured"][key]
        rows.append(bar(title, speed["predicted"][key], m["median"], rate, m["min"], m["max"]))
    return rows


def busy(at: dict[str, Any] | None) -> bool:
    """Whether other work took so much of the machine that its speed here is not its own."""
    return at is not None and at["load_before"] is not None and at["load_before"] > 0.5 * at["cores"]


def bar(title: str, predicted: float, measured: float, show, low=None, high=None, lower_is_better=False) -> Row:
    top = max(predicted, measured, high or 0) or 1
    off = measured / predicted - 1 if predicted else 0.0
    words = "as predicted" if abs(off) < 0.0005 else f"{abs(off):.1%} {'above' if off > 0 else 'below'} the prediction"
    spread = f"{show(low)} to {show(high)} over the runs" if low is not None else ""
    return {
        "title": title,
        "predicted": show(predicted),
        "measured": show(measured),
        "words": words,
        "spread": spread,
        "worse": off > 0.0005 if lower_is_better else off < -0.0005,
        "predicted_width": f"{100 * predicted / top:.2f}",
        "measured_width": f"{100 * measured / top:.2f}",
        "low": f"{100 * low / top:.2f}" if low is not None else None,
        "range": f"{100 * (high - low) / top:.2f}" if low is not None else None,
    }


def histogram(h: dict[str, Any]) -> dict[str, Any]:
    """Columns of a 640 x 180 drawing; the first holds everything below its first edge, the last all above."""
    counts, edges = h["counts"], h["edges"]
    top, width = max(counts) or 1, 640 / len(counts)
    names = [f"below {edges[0]:.2g}", *(f"{a:.2g} to {b:.2g}" for a, b in pairwise(edges)), f"{edges[-1]:.2g} or more"]
    columns = [
        {
            "x": f"{i * width + 1:.1f}",
            "y": f"{150 - 140 * c / top:.1f}",
            "height": f"{140 * c / top:.1f}",
            "width": f"{width - 2:.1f}",
            "middle": f"{(i + 0.5) * width:.1f}",
            "count": c,
            "name": f"{names[i]} nats",
        }
        for i, c in enumerate(counts)
    ]
    ticks = [{"x": f"{(i + 1) * width:.1f}", "text": power(e)} for i, e in enumerate(edges) if i % 2 == 0]
    return {"columns": columns, "ticks": ticks}


def _speed_run(at: dict[str, Any] | None) -> str:
    if at is None:
        return "none"
    return (
        f"{at['prompt_tokens']:,} prompt tokens, {at['new_tokens']} new ones, batch {at['batch']}; "
        f"predicted for a context of {at['context']:,} tokens from {at['basis']}"
    )


def bindings(r: dict[str, Any]) -> list[tuple[str, str]]:
    """What the figures hold for, as (name, text)."""
    p, o, t, at, machine = r["plan"], r["original"], r["text"], r["conditions"], r["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    return [
        ("Model", f"{r['model']['name']}, {r['model']['parameters']:,} parameters"),
        ("Model's fingerprint", f"{r['model']['fingerprint']} (config; each weight file's name, size and both ends)"),
        ("Plan", f"{weights(p)}; context {p['context']:,} tokens, batch {p['batch']}"),
        ("Plan's digest", p["digest"]),
        ("Original", weights(o)),
        ("Text", f"{t['name']}: {t['tokens']:,} tokens in windows of {t['window']}; SHA-256 {t['sha256']}"),
        *((f"Task {name}", f"{task['n']:,} questions; SHA-256 {task['sha256']}") for name, task in r["tasks"].items()),
        *suite_bindings(r.get("suite")),
        ("Speed run", _speed_run(at)),
        ("Machine", f"{machine['name']}: {machine['system']}, {machine['threads']} threads"),
        ("Versions", versions),
        ("Command", r["command"]),
        ("When", r["when"]),
    ]


def suite_bindings(s: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not s:
        return []
    asked = f"{s['mean']['n']:,} held-out questions of reasoning-gym {s['reasoning_gym']}"
    how = f"greedy, at most {s['max_tokens']} tokens an answer, context {s['context']:,} tokens"
    at_once = f"{s['batch']['original']} at once for the original, {s['batch']['plan']} for the plan"
    return [("Reasoning suite", f"{asked}; {how}; {at_once}; SHA-256 {s['questions_sha256']}")]


def weights(p: dict[str, Any]) -> str:
    return (
        f"{p['scheme']} on {p['device']}: {size(p['bytes'])} of weights, {p['bits_per_weight']:.2f} bits for each; "
        f"computed in {p['compute_dtype']}, KV cache in {p['kv_dtype']}"
    )


def size(count: float) -> str:
    """Bytes in decimal units: 70272 -> "70.3 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def rate(value: float) -> str:
    return f"{value:,.1f} tokens/s" if value < 100 else f"{value:,.0f} tokens/s"


def nats(value: float) -> str:
    return f"{value:.3g} nats"


def percent(value: float) -> str:
    return f"{value:.1%}"


def signed(value: float) -> str:
    return f"{value:+.2%}".replace("-", "−")


def power(edge: float) -> str:
    """0.01 -> "0.01", 1e-6 -> "10⁻⁶"."""
    return f"{edge:g}" if edge > 0.0009 else "10⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[-round(math.log10(edge))]


def points(value: float) -> str:
    """A difference of proportions in percentage points."""
    return f"{100 * value:+.1f} points".replace("-", "−")
