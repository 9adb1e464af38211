"""r1-nano, as it ships, against transformers on its dequantised weights; and that it is what it says it is."""

import pytest
import torch

from tiny import twin
from undistilled.checkpoint.resolve import find
from undistilled.generate.engine import Engine
from undistilled.load.build import build
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve
from undistilled.prove import suite
from undistilled.prove.answers import prompts
from undistilled.prove.levels import LEVELS
from undistilled.schedule.request import Request, Sampling

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def model():
    return find("r1-nano")


@pytest.fixture(scope="module")
def engine(model):
    """Ours in FP8 blocks as released, with a float32 cache, as transformers keeps one."""
    ask = Ask(None, 1024, 31, False, "cpu", "float32", dtype="float32")
    plan = solve(model.name, model.config, model.spec, load_machine("this"), ask)
    return Engine(build(plan, model.spec, model.source()), plan, model.tokenizer(), model.name)


def test_the_package_holds_a_release_of_under_45_megabytes(model):
    files = list(model.path.iterdir())
    assert sum(f.stat().st_size for f in files) < 45e6
    assert model.config["architectures"] == ["DeepseekV3ForCausalLM"] and model.spec.native == "fp8_block"
    assert model.spec.mla and model.spec.moe and model.spec.mla.q_lora_rank and model.spec.mtp_layers == 1
    assert model.spec.moe.groups > model.spec.moe.top_groups > 1 and model.spec.moe.first_dense == 1


def test_greedy_answers_are_what_transformers_prefers_at_every_token(model, engine, tmp_path):
    """Where each token of ours is transformers' most likely one after the same tokens, its greedy answer is ours."""
    (tmp_path / "r1-nano").symlink_to(model.path)
    theirs = twin(tmp_path / "r1-nano", model.config)
    items = [item for task in LEVELS for item in suite.test_items(task, 1)]
    asked = prompts(model.tokenizer(), items, model.name)
    sampling = Sampling(max_tokens=400, temperature=0)
    found = engine.run_all([Request(str(at), p.ids, sampling) for at, p in enumerate(asked)])
    for at, prompt in enumerate(asked):
        tokens = [t for output in found[str(at)] for t in output.tokens]
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt.ids + tokens])).logits[0]
        assert logits[len(prompt.ids) - 1 : -1].argmax(-1).tolist() == tokens, items[at].question
