"""What `make run` shows: plan a model for this machine, measure what compression costs, ask it something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import show, show_plan
from .checkpoint.resolve import find
from .errors import UsageError
from .generate.engine import open_engine
from .plan.hardware import load_machine
from .plan.solve import Ask, solve
from .prove import measure
from .prove.graded import Wanted, held_out_items
from .prove.receipt import prove, write_receipt
from .schedule.request import Sampling
from .serve.terminal import Conversation

SCHEMES = ("int8", "int4")
CONTEXT, TOKENS = 512, 1024
SUITE_LIMIT = 3  # held-out questions of each reasoning task
QUESTIONS = {"r1-nano": "Solve for x: 7*x + 12 = 89"}  # held out: r1-nano never saw it
QUESTION = "What is gravity? Answer in two sentences."


def run(name: str, folder: Path = Path("out")) -> None:
    """The demo, on a model that is already here; receipts go to `folder`."""
    folder.mkdir(exist_ok=True)
    model = find(name)
    show.heading("1. Plan, before a weight is read")
    original = solve(model.name, model.config, model.spec, load_machine("this"), Ask(context=CONTEXT))
    show_plan.plan(original)
    show.heading("2. Prove: what INT8 and INT4 cost, measured on this machine")
    suite = _suite(name)
    receipts = {scheme: _receipt(name, scheme, suite, folder) for scheme in SCHEMES}
    show.comparison([_original(name, original, receipts), *map(_compressed, receipts.values())])
    if suite:
        tasks = receipts[SCHEMES[0]]["suite"]["tasks"]
        show.note(f"reasoning: {len(tasks)} tasks, {SUITE_LIMIT} held-out questions of each")
    show.note(f"receipts, with a page each: {', '.join(str(folder / f'{name}-{s}.html') for s in SCHEMES)}")
    show.heading("3. Run, in INT8")
    _ask(name)
    _next(name)


def _suite(name: str) -> Wanted | None:
    """The reasoning suite for a model that was trained to reason, where reasoning-gym could be installed."""
    if name not in QUESTIONS:
        return None
    try:
        held_out_items((), 1)
    except UsageError as error:
        show.note(f"reasoning is left out: {error}")
        return None
    return Wanted()


def _original(name: str, plan: Any, receipts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    with show.steps() as say:
        say(f"measuring the original ({plan.scheme})")
        found = measure.bench(name, plan)
    weights = sum(row.nbytes for row in plan.rows)
    right = _right(next(iter(receipts.values())), "original")
    return _row(plan.scheme, weights, found["peak_bytes"], found["speed"], right) | {"kl_nats": None}


def _receipt(name: str, scheme: str, suite: Wanted | None, folder: Path) -> dict[str, Any]:
    with show.steps() as say:
        receipt = prove(
            name,
            scheme=scheme,
            context=CONTEXT,
            tokens=TOKENS,
            suite=suite,
            limit=SUITE_LIMIT,
            progress=lambda text: say(f"{scheme}: {text}"),
        )
    write_receipt(receipt, folder / f"{name}-{scheme}.json")
    return receipt


def _compressed(receipt: dict[str, Any]) -> dict[str, Any]:
    plan, speed = receipt["plan"], receipt["speed"]["measured"]
    row = _row(plan["scheme"], plan["bytes"], receipt["memory"]["measured"], speed, _right(receipt, "plan"))
    return row | {"kl_nats": receipt["kl_nats"], "top1_agreement": receipt["top1_agreement"]}


def _right(receipt: dict[str, Any], side: str) -> float | None:
    return receipt["suite"]["mean"][side] if receipt["suite"] else None


def _row(scheme: str, weights: int, peak: int, speed: dict, right: float | None) -> dict[str, Any]:
    return {
        "scheme": scheme,
        "weights": weights,
        "peak_bytes": peak,
        "right": right,
        "prefill": speed["prefill_tokens_per_s"]["median"],
        "decode": speed["decode_tokens_per_s"]["median"],
    }


def _ask(name: str) -> None:
    with show.loading() as progress:
        engine = open_engine({"model": name, "scheme": "int8", "context": CONTEXT}, progress)
    question = QUESTIONS.get(name, QUESTION)
    show.note(f"> {question}")
    conversation = Conversation(engine)
    sampling = Sampling(max_tokens=120, temperature=0)
    show.usage(conversation.say(question, sampling, show.stream, show.thought))


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
