"""Measures prefill and decode speed of a loaded engine, and the memory that it took."""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Any

import torch

from ..errors import UsageError
from ..generate.engine import Engine
from ..memory import peak_on
from ..schedule.request import Request, Sampling
from .others import Others
from .ranks import Clocks, report, watched

WARM_UP_TOKENS = 4


def once(engine: Engine, prompt_tokens: int, new_tokens: int, batch: int) -> tuple[float, float]:
    """(prefill, decode) in tokens a second of `batch` requests together.

    Prefill ends with the last request's first token; decode is every later token over the remaining time.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, min(engine.spec.vocab, 32000), (batch, prompt_tokens), generator=generator).tolist()
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"bench-{i}", prompt, sampling))
    began, first, produced, early = perf_counter(), 0.0, 0, 0
    while not engine.idle:
        produced += sum(len(o.tokens) for o in engine.step())
        if not first and not any(s.computed < s.prompt_length for s in _sequences(engine)):
            first, early = perf_counter(), produced
    ended = perf_counter()
    return batch * prompt_tokens / (first - began), (produced - early) / max(ended - first, 1e-9)


def _sequences(engine: Engine):
    return [r.sequence for r in engine.running.values()]


def bench(engine: Engine, prompt_tokens: int, new_tokens: int, batch: int, repeat: int) -> dict[str, Any]:
    """Median, minimum and maximum over `repeat` runs after one warm-up. others_cores: cores' worth that other programs
    took meanwhile.

    UsageError where the plan would make requests wait for each other, or end before `new_tokens`.
    """
    limits = engine.plan.limits
    if batch > limits.batch or prompt_tokens + new_tokens > limits.context:
        raise UsageError(
            f"The plan is for {limits.batch} at once and a context of {limits.context} tokens, not "
            f"{batch} of {prompt_tokens} + {new_tokens}.",
            f"Plan with --batch {batch} --context {prompt_tokens + new_tokens}, or ask for less.",
        )
    once(engine, min(prompt_tokens, 64), WARM_UP_TOKENS, batch)
    ranks = engine.runner.crew is not None
    before, began, others = (Clocks.read(engine) if ranks else None), perf_counter(), Others()
    with watched(engine) as moves:
        runs = [once(engine, prompt_tokens, new_tokens, batch) for _ in range(repeat)]
    elapsed, busy = perf_counter() - began, others.cores()
    predicted = engine.plan.predicted
    shared = report(engine, Clocks.read(engine) - before, elapsed, moves) if before else {}
    return shared | {
        "model": engine.name,
        "scheme": engine.plan.scheme,
        "compute_dtype": engine.plan.compute_dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "others_cores": busy,
        "prefill_tokens_per_s": _summary([r[0] for r in runs]),
        "decode_tokens_per_s": _summary([r[1] for r in runs]),
        "peak_bytes": peak_on(engine.runner.device),
        "predicted": {
            "prefill_tokens_per_s": predicted.prefill_tokens_per_s,
            "decode_tokens_per_s": predicted.decode_tokens_per_s,
            "bytes": {name: d.bytes.total for name, d in predicted.devices.items()},
        },
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
