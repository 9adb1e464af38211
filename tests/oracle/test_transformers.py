"""Every architecture against transformers on the same weights, in float32 on the CPU."""

import pytest
import torch

from logits import our_logits
from runs import greedy
from tiny import CONFIGS, load, twin, write_checkpoint

CASES = [(name, False) for name in CONFIGS if name != "deepseek_v3-mtp"] + [("deepseek_v3", True)]


@pytest.mark.parametrize("name, fp8", CASES)
def test_logits_and_greedy_tokens(name, fp8, tmp_path):
    config = CONFIGS[name]
    folder = write_checkpoint(tmp_path / "model", config, fp8=fp8, dtype=torch.bfloat16 if fp8 else torch.float32)
    decoder, plan = load(folder, kv="float32", dtype="float32")
    assert decoder.layers[0].self_attn.o_proj.stored.scheme.name == ("fp8_block" if fp8 else "fp32")
    theirs = twin(folder, config)
    tokens = torch.randint(2, config["vocab_size"], (150,)).tolist()  # past YaRN's original 64
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    ours = our_logits(decoder, plan, tokens)
    assert (ours - expected).norm() / expected.norm() < 1e-4

    prompt = tokens[:20]
    with torch.inference_mode():
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
            use_cache=True,
        )[0, len(prompt) :].tolist()
    assert greedy(decoder, plan, [prompt], 64)[0] == out
