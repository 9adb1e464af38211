"""On a CUDA device: the same models, schemes and engine, against transformers and against our own CPU run."""

import gc
import os

import pytest
import torch

from logits import our_logits
from runs import greedy
from tiny import CONFIGS, load, twin, write_checkpoint
from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.load.build import build
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


@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_smollm2_in_every_scheme(scheme):
    path = os.environ.get("SMOLLM2_GGUF", "smollm2")
    try:
        model = find(path)
    except Exception:
        pytest.skip("the demo model is not on this machine")
    machine = load_machine("this")
    tokens = torch.randint(0, 49152, (96,), generator=torch.Generator().manual_seed(1)).tolist()

    def run(device):
        plan = solve(model.name, model.config, model.spec, machine, Ask(scheme, 256, 1, False, device))
        decoder = build(plan, model.spec, model.source())
        logits = our_logits(decoder, plan, tokens).float().cpu()
        found = greedy(decoder, plan, [tokens], 16)[0] if scheme == "fp32" else []
        del decoder
        gc.collect()
        return logits, found, plan

    cpu, cpu_tokens, _ = run("cpu")
    gpu, gpu_tokens, plan = run(None)
    assert "cuda:0" in plan.predicted.devices
    error = (gpu - cpu).norm() / cpu.norm()
    assert error < (1e-3 if scheme == "fp32" else 3e-2), float(error)
    if scheme == "fp32":
        assert gpu_tokens == cpu_tokens
