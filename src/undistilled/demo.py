"""What `make run` shows: plan a real model for this machine, measure what compression costs, ask it something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import show
from .checkpoint.resolve import find
from .generate.engine import open_engine
from .plan.hardware import load_machine
from .plan.solve import Ask, solve
from .prove import measure
from .prove.receipt import prove, write_receipt
from .schedule.request import Sampling
from .serve.terminal import Conversation

SCHEMES = ("int8", "int4")
CONTEXT, TOKENS = 512, 1024
QUESTION = "What is gravity? Answer in two sentences."


def run(name: str, folder: Path = Path("out")) -> None:
    """The demo, on a model that is already here; receipts go to `folder`."""
    folder.mkdir(exist_ok=True)
    model = find(name)
    show.heading("1. Plan, before a weight is read")
    original = solve(model.name, model.config, model.spec, load_machine("this"), Ask(context=CONTEXT))
    show.plan(original)
    show.heading("2. Prove: what INT8 and INT4 cost, measured on this machine")
    show.comparison([_original(name, original), *(_compressed(name, scheme, folder) for scheme in SCHEMES)])
    show.note(f"receipts, with a page each: {', '.join(str(folder / f'{name}-{s}.html') for s in SCHEMES)}")
    show.heading("3. Run, in INT8")
    _ask(name)
    _next(name)


def _original(name: str, plan: Any) -> dict[str, Any]:
    with show.steps() as say:
        say(f"measuring the original ({plan.scheme})")
        found = measure.bench(name, plan)
    weights = sum(row.nbytes for row in plan.rows)
    return _row(plan.scheme, weights, found["peak_bytes"], found["speed"], None, 1.0)


def _compressed(name: str, scheme: str, folder: Path) -> dict[str, Any]:
    with show.steps() as say:
        receipt = prove(
            name, scheme=scheme, context=CONTEXT, tokens=TOKENS, progress=lambda text: say(f"{scheme}: {text}")
        )
    write_receipt(receipt, folder / f"{name}-{scheme}.json")
    measured = receipt["speed"]["measured"]
    weights = receipt["plan"]["bytes"]
    return _row(scheme, weights, receipt["memory"]["measured"], measured, receipt["kl_nats"], receipt["top1_agreement"])


def _row(scheme: str, weights: int, peak: int, speed: dict, kl: dict | None, top1: float) -> dict[str, Any]:
    return {
        "scheme": scheme,
        "weights": weights,
        "peak_bytes": peak,
        "kl_nats": kl,
        "top1_agreement": top1,
        "prefill": speed["prefill_tokens_per_s"]["median"],
        "decode": speed["decode_tokens_per_s"]["median"],
    }


def _ask(name: str) -> None:
    with show.loading() as progress:
        engine = open_engine({"model": name, "scheme": "int8", "context": CONTEXT}, progress)
    show.note(f"> {QUESTION}")
    conversation = Conversation(engine)
    sampling = Sampling(max_tokens=80, temperature=0)
    show.usage(conversation.say(QUESTION, sampling, show.stream, show.thought))


def _next(name: str) -> None:
    show.heading("4. Next")
    for what, command in (
        ("talk to it", f"undistilled chat {name} --scheme int8"),
        ("serve it behind OpenAI's API", f"undistilled serve {name} --scheme int8 --port 8000"),
        ("plan the whole DeepSeek-R1 for this machine", "undistilled plan deepseek-r1"),
        ("or for another one", "undistilled plan deepseek-r1 --scheme int4 --machine rtx4090-384gb"),
        ("measure this machine, so that predictions are good", "undistilled doctor --measure"),
    ):
        show.out.print(f"  {what}:\n    [bold].venv/bin/{command}[/]")
