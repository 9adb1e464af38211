"""The same greedy tokens however a request is run: cached or not, chunked or whole, alone or in company."""

import pytest
import torch

from runs import greedy
from tiny import CONFIGS, load, write_checkpoint

MODELS = ["deepseek_v3", "deepseek_v2", "llama", "qwen3"]
SCHEMES = ["fp32", "bf16", "int8", "int4", "fp8_block", "fp8_channel"]
PROMPTS = [[5, 9, 11], list(range(2, 90)), [300] * 33, list(range(40, 60))]
NEW = 24


def model(name, tmp_path, scheme, **options):
    return load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme=scheme, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batched_equals_alone(name, scheme, tmp_path):
    decoder, plan = model(name, tmp_path, scheme)
    together = greedy(decoder, plan, PROMPTS, NEW, batch=4)
    alone = [greedy(decoder, plan, [p], NEW)[0] for p in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached(name, tmp_path):
    decoder, plan = model(name, tmp_path, "fp32")
    prompt = PROMPTS[1]
    cached = greedy(decoder, plan, [prompt], NEW)[0]
    tokens = list(prompt)
    for _ in range(NEW):
        tokens += greedy(decoder, plan, [tokens], 1)[0]
    assert tokens[len(prompt) :] == cached


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunked_equals_whole(name, chunk, tmp_path):
    decoder, plan = model(name, tmp_path, "fp32")
    assert greedy(decoder, plan, PROMPTS, NEW, chunk=chunk) == greedy(decoder, plan, PROMPTS, NEW)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_absorbed_equals_naive(name, tmp_path):
    decoder, plan = model(name, tmp_path, "fp32")
    absorbed = greedy(decoder, plan, PROMPTS, NEW)
    for block in decoder.layers:
        block.self_attn.absorbed = False
    assert greedy(decoder, plan, PROMPTS, NEW) == absorbed


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_preempted_equals_undisturbed(name, scheme, tmp_path):
    decoder, plan = model(name, tmp_path, scheme)
    undisturbed = greedy(decoder, plan, PROMPTS, NEW)
    tight = greedy(decoder, plan, PROMPTS, NEW, blocks=9)  # fewer than the four need together
    assert tight == undisturbed


def test_mla_caches_latents_only(tmp_path):
    decoder, plan = model("deepseek_v3", tmp_path, "bf16")
    mla = decoder.spec.mla
    assert plan.kv.bytes_per_token == (mla.kv_lora_rank + mla.qk_rope_head_dim) * 2 * decoder.spec.layers
    from undistilled.generate.cache import allocate

    caches = allocate(decoder.spec, plan.kv, torch.device("cpu"))
    held = sum(t.numel() * t.element_size() for cache in caches for t in cache)
    assert held == plan.kv.blocks * plan.kv.block_size * plan.kv.bytes_per_token
