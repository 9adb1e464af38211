"""On a CUDA device: the same models, schemes and engine, against transformers and against our own CPU run."""

import gc
import os
from statistics import geometric_mean

import pytest
import torch

from logits import our_logits
from runs import greedy
from tiny import CONFIGS, load, twin, write_checkpoint
from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.load.build import build
from undistilled.ops.registry import force_reference
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve

pytestmark = pytest.mark.gpu
NAMES = ["deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme, tolerance", [("fp32", 1e-4), ("bf16", 3e-2)])
def test_logits_against_transformers(name, scheme, tolerance, tmp_path):
    config = CONFIGS[name]
    folder = write_checkpoint(tmp_path / "m", config)
    decoder, plan = load(folder, scheme=scheme, device=None)
    assert decoder.embed_tokens.stored.device.type == "cuda"
    tokens = torch.randint(2, config["vocab_size"], (150,)).tolist()
    exact = twin(folder, config).cuda()
    theirs = twin(folder, config, torch.float32 if scheme == "fp32" else torch.bfloat16).cuda()
    with torch.inference_mode():
        ids = torch.tensor([tokens], device="cuda")
        truth, expected = exact(ids).logits[0].float(), theirs(ids).logits[0].float()
    ours = our_logits(decoder, plan, tokens)
    error = (ours - truth).norm() / truth.norm()
    their_error = (expected - truth).norm() / truth.norm()
    # a router decides discretely: in BF16 some tokens go elsewhere, for transformers just as for us
    assert error < max(tolerance, 1.5 * float(their_error)), (float(error), float(their_error))


@pytest.mark.parametrize("name", NAMES)
def test_batched_and_chunked_equal_alone(name, tmp_path):
    decoder, plan = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme="fp32", device=None)
    prompts = [[5, 9, 11], list(range(2, 90)), [300] * 33, list(range(40, 60))]
    alone = [greedy(decoder, plan, [p], 24)[0] for p in prompts]
    assert greedy(decoder, plan, prompts, 24) == alone
    assert greedy(decoder, plan, prompts, 24, chunk=7) == alone


@pytest.fixture(scope="module")
def smollm2():
    try:
        return find(os.environ.get("SMOLLM2_GGUF", "smollm2"))
    except Exception:
        pytest.skip("the demo model is not on this machine")


@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_smollm2_in_every_scheme(scheme, smollm2):
    machine = load_machine("this")
    tokens = torch.randint(0, 49152, (96,), generator=torch.Generator().manual_seed(1)).tolist()

    def built(device, dtype):
        cache = "float32" if dtype == "float32" else None  # else a step of BF16 in it would grow too
        ask = Ask(scheme, 256, device=device, kv_dtype=cache, dtype=dtype)
        plan = solve(smollm2.name, smollm2.config, smollm2.spec, machine, ask)
        assert device == "cpu" or "cuda:0" in plan.predicted.devices
        return build(plan, smollm2.spec, smollm2.source()), plan

    def exactly(device):
        decoder, plan = built(device, "float32")
        found = greedy(decoder, plan, [tokens], 16)[0] if scheme == "fp32" else []
        return our_logits(decoder, plan, tokens).float().cpu(), found

    (exact, expected), (wide, found) = exactly("cpu"), exactly(None)
    assert (wide - exact).norm() < 1e-3 * exact.norm()
    assert found == expected
    if scheme == "fp32":
        return
    decoder, plan = built(None, "auto")
    fast = errors(decoder, plan, tokens, exact)
    if max(fast) < 3e-2:
        return
    decoder = None
    gc.collect()
    with force_reference():
        decoder, plan = built(None, "auto")
        plain = errors(decoder, plan, tokens, exact)
    # in a model that few bits have hurt a step of BF16 grows: one sample says little (int3: 0.07 to 0.37), so the
    # kernels' errors are compared with the references' over equally good roundings, which leave the means 12% of doubt
    assert geometric_mean(fast) < 1.5 * geometric_mean(plain), (fast, plain)


def errors(decoder, plan, tokens, exact, samples=24):
    """Relative errors in norm of the logits, under roundings that are as good as the one that was made."""
    found = []
    for seed in range(samples):
        hooks = move(decoder, seed)
        found.append(float((our_logits(decoder, plan, tokens).float().cpu() - exact).norm() / exact.norm()))
        for hook in hooks:
            hook.remove()
    return found


def move(decoder, seed):
    """Every block's result by up to half a step of BF16 at random."""
    draw = torch.Generator(decoder.embed_tokens.stored.device).manual_seed(seed)

    def moved(_block, _inputs, h):
        part = torch.rand(h.shape, generator=draw, device=h.device) - 0.5
        return (h.float() * (1 + part * 2**-7)).to(h.dtype)

    return [block.register_forward_hook(moved) for block in decoder.layers]
