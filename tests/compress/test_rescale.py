"""AWQ: scaled weights are the same model, and lose less where some inputs are much larger than others."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from byte_tokens import byte_tokenizer
from logits import our_logits
from tiny import CONFIGS, load, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.compress.calibrate import Moments
from undistilled.compress.hessian import Hessian
from undistilled.compress.rescale import folds, put, search_factors
from undistilled.compress.rescaled import Factors, Rescaled
from undistilled.compress.run import Request, quantize
from undistilled.load.build import build
from undistilled.model.weights import weights

TOKENS = torch.randint(2, 250, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def random_factors(spec):
    found, draw = Factors(), torch.Generator().manual_seed(1)
    for fold in folds(spec):
        channels = fold.giver.shape[0] if fold.rows is None else len(fold.rows)
        lead = (fold.giver.experts,) if fold.apart else ()
        s = torch.randn(*lead, channels, generator=draw).exp2()
        put(found, fold, s.log2().round().exp2() if fold.exact else s)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "deepseek_v3", "deepseek_v2", "deepseek_v3-mtp"])
def test_a_rescaled_model_is_the_same_model(name, tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIGS[name])
    decoder, plan = load(folder, scheme="fp32")
    model = find(str(folder))
    factors = random_factors(model.spec)
    changed = build(plan, model.spec, Rescaled(model.source(), factors, weights(model.spec)))
    want, got = our_logits(decoder, plan, TOKENS), our_logits(changed, plan, TOKENS)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    original = dict(decoder.named_parameters())
    same = {n.removesuffix(".values") for n, p in changed.named_parameters() if torch.equal(p, original[n])}
    biases = (f"layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qk")
    routers = (f"layers.{i}.mlp.bias" for i in range(3))
    kept = {*biases, *routers, "embed_tokens", "lm_head", "norm"}
    assert same == kept & {n.removesuffix(".values") for n in original}
    assert all(w.name in factors.columns for w in weights(model.spec) if w.is_linear)


def test_factors_come_back_from_their_file(tmp_path):
    model = find(str(write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"])))
    factors = random_factors(model.spec)
    factors.save(tmp_path / "factors.safetensors")
    again = Factors.load(tmp_path / "factors.safetensors")
    for kind in ("rows", "columns"):
        one, other = getattr(factors, kind), getattr(again, kind)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_moments_are_those_of_the_scaled_weight():
    """A change that is scaled with its weight loses what it lost before, by whole moments and by diagonals."""
    x, rows, columns = torch.randn(50, 6), torch.rand(3, 4) + 0.5, torch.rand(6) + 0.5
    d, inputs, outputs = torch.randn(3, 4, 6), (x.T @ x).expand(3, 6, 6), torch.rand(3, 4)
    factors, at = Factors({"w": rows}, {"w": columns}), slice(0, 3)
    scaled = d * rows[..., None] * columns
    m, g = factors.moments("w", at, Hessian(inputs), outputs)
    want = (((d @ inputs) * d).sum(-1) * outputs).sum()
    assert torch.allclose((m.lost(scaled) * g).sum(), want, rtol=1e-4)
    diagonal = inputs.diagonal(dim1=-2, dim2=-1)
    m, g = factors.diagonal("w", at, diagonal, outputs)
    want = ((d.square() * diagonal[:, None]).sum(-1) * outputs).sum()
    assert torch.allclose(((scaled.square() * m[:, None]).sum(-1) * g).sum(), want, rtol=1e-4)


def with_outliers(folder, name):
    """A tiny model some of whose channels are 30 times the others, in norms and in what feeds down and o."""
    made = write_checkpoint(folder, CONFIGS[name])
    byte_tokenizer().save(made)
    file = made / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(7)
    for tensor, values in tensors.items():
        loud = torch.rand(len(values), generator=draw) < 0.03
        if "layernorm" in tensor or "up_proj" in tensor or "v_proj" in tensor or "kv_b_proj" in tensor:
            values[loud] *= 30
    save_file(tensors, file, metadata={"format": "pt"})
    return made


def divergence(truth, plan, folder):
    made, made_plan = load(folder, scheme=None)
    one, other = (our_logits(*m, TOKENS).log_softmax(-1) for m in ((truth, plan), (made, made_plan)))
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("name, scheme", [("llama", "int3-g32"), ("deepseek_v3", "int4")])
def test_outlying_channels_cost_less_when_they_are_scaled(name, scheme, tmp_path):
    source = with_outliers(tmp_path / "m", name)
    truth, plan = load(source, scheme="fp32")
    lost = {}
    for solver in ("search", "awq"):
        quantize(find(str(source)), tmp_path / solver, Request(scheme=scheme, solver=solver, tokens=512))
        lost[solver] = divergence(truth, plan, tmp_path / solver)
    assert lost["awq"] < 0.95 * lost["search"], lost


def test_routers_and_16_bit_weights_are_scaled_by_powers_of_two(tmp_path):
    source = with_outliers(tmp_path / "m", "deepseek_v3")
    model = find(str(source))
    draw = torch.Generator().manual_seed(2)
    moments = {}
    for w in (w for w in weights(model.spec) if w.is_linear):
        lead = (w.experts,) if w.experts else ()
        inputs = torch.diag_embed(torch.rand(*lead, w.shape[1], generator=draw).pow(4))
        moments[w.name] = Moments(inputs, torch.ones(*lead, w.shape[0]), torch.full(lead, 99.0) if lead else None, 1)
    asked = {"expert.up": "bf16", "attention.kv_b": "fp8_block", "norm": "fp32", "router": "bf16"}
    found = search_factors(model.spec, model.source(), moments, lambda w: asked.get(w.role, "int3-g32"), lambda _: None)

    def exact(t):
        return bool((t.log2() == t.log2().round()).all())

    at = "model.layers.1"
    assert exact(found.columns[f"{at}.mlp.gate.weight"]) and exact(found.rows[f"{at}.mlp.experts.*.up_proj.weight"])
    assert not exact(found.columns[f"{at}.self_attn.q_b_proj.weight"])
    assert f"{at}.self_attn.kv_b_proj.weight" not in found.rows
    assert torch.equal(found.columns[f"{at}.mlp.gate.weight"], found.columns[f"{at}.mlp.experts.*.up_proj.weight"])
