"""Passes before the first request: of every size that has kernels of its own, and without a trace."""

import pytest
import torch

from runs import greedy
from tiny import DEEPSEEK, load, write_checkpoint
from undistilled.events import subscribed
from undistilled.generate import warm
from undistilled.generate.graphs import bucket
from undistilled.generate.runner import Runner


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "m", DEEPSEEK)
    return load(folder, scheme="tiles16x32-2x3-3x4-4x2", context=128, batch=5)


def limited(plan, **limits):
    return plan.model_copy(update={"limits": plan.limits.model_copy(update=limits)})


@pytest.mark.parametrize("batch", [1, 5, 64, 100, 5000])
def test_sizes_cover_every_graph(loaded, batch):
    _, plan = loaded
    rows = [tokens for tokens, prefill in warm.sizes(limited(plan, batch=batch)) if not prefill]
    assert {bucket(r) for r in rows} >= {bucket(r) for r in range(1, min(batch, 64) + 1)}
    assert max(rows) == min(batch, 4096)


def test_prompts_end_with_the_longest_chunk(loaded):
    _, plan = loaded
    prompts = [tokens for tokens, prefill in warm.sizes(limited(plan, chunk=40)) if prefill]
    assert prompts == [8, 16, 32, 40]


def test_nothing_is_left_of_them(loaded, monkeypatch):
    decoder, plan = loaded
    prompts = [[5, 6, 7], list(range(40))]
    expected = greedy(decoder, plan, prompts, 6)
    monkeypatch.setattr("runs.Runner", warm_runner)
    assert greedy(decoder, plan, prompts, 6) == expected


def warm_runner(decoder, plan):
    runner = Runner(decoder, plan)
    with torch.inference_mode():
        runner.caches[0][0].fill_(torch.nan)  # what a request reads of them it wrote
    warm.warm(runner)
    assert runner.part.passes == 1 + sum(1 if prefill else 2 for _, prefill in warm.sizes(plan))
    return runner


def test_it_says_how_far_it_is(loaded, monkeypatch):
    monkeypatch.setattr(warm, "QUIET", -1.0)
    said = []
    with subscribed(said.append):
        warm.warm(Runner(*loaded))
    total = len(warm.sizes(loaded[1]))
    told = [e.fields for e in said if e.name == "engine.compiling"]
    assert told == [{"done": i, "total": total} for i in range(total)]


def test_only_where_kernels_are_compiled(loaded):
    assert not warm.compiles(Runner(*loaded))
