"""Moments against their definitions, and what they are for: the predicted divergence against the measured one."""

import pytest
import torch

from tiny import CONFIGS, load, write_checkpoint
from undistilled.compress.calibrate import calibrate
from undistilled.model.batch import Packed
from undistilled.ops.registry import force_reference


def windows(count, size=48):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(2, 320, (size,), generator=draw).tolist() for _ in range(count)]


@torch.inference_mode()
def log_probabilities(decoder, texts):
    found = []
    with force_reference():
        for text in texts:
            ids = torch.tensor(text)
            batch = Packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
            found.append(decoder.logits(decoder(batch, [()] * len(decoder.layers))).log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3", "deepseek_v2"])
def test_every_matrix_has_moments_of_its_own_inputs(name, tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIGS[name])
    decoder, plan = load(folder, scheme="fp32")
    found = calibrate(decoder, windows(2))
    wanted = {row.name: row for row in plan.rows if len(row.shape) == 2 and row.role not in ("embed", "router")}
    assert set(found) == set(wanted)
    for weight, moments in found.items():
        out, into = wanted[weight].shape
        assert moments.tokens == 96 and moments.inputs.shape[-2:] == (into, into)
        assert moments.outputs.shape[-1] == out and (moments.outputs.sum() > 0 or "experts" in weight)
    at = "model.layers.0.self_attn."
    if name in ("llama", "qwen3"):
        assert found[f"{at}q_proj.weight"].inputs is found[f"{at}v_proj.weight"].inputs
        assert found[f"{at}o_proj.weight"].inputs is not found[f"{at}q_proj.weight"].inputs
    else:
        experts = found["model.layers.1.mlp.experts.*.gate_proj.weight"]
        assert experts.met is not None and experts.met.sum() == 96 * 4


def test_the_predicted_divergence_is_the_measured_one(tmp_path):
    """A small random change of one matrix: 1/2 G d M d^T is its divergence, within what 1,500 tokens can tell."""
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"])
    texts = windows(32)
    decoder, _ = load(folder, scheme="fp32")
    before = log_probabilities(decoder, texts)
    watched, _ = load(folder, scheme="fp32")
    found = calibrate(watched, texts)
    for name, module in (
        ("model.layers.0.self_attn.v_proj.weight", decoder.layers[0].self_attn.v_proj),
        ("model.layers.1.mlp.down_proj.weight", decoder.layers[1].mlp.down_proj),
        ("lm_head.weight", decoder.lm_head),
    ):
        values = module.stored.parts["values"]
        original = values.detach().clone()
        change = torch.randn(values.shape) * original.std() * 0.02
        inputs, outputs = found[name].of(None)
        predicted = float(0.5 * (((change @ inputs) * change).sum(-1) * outputs).sum())
        with torch.no_grad():
            values += change
        after = log_probabilities(decoder, texts)
        with torch.no_grad():
            values.copy_(original)
        measured = float((before.exp() * (before - after)).sum(-1).mean())
        assert 0.5 < predicted / measured < 2, (name, predicted, measured)
