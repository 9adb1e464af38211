"""Moments against their definitions, and what they are for: the predicted divergence against the measured one."""

import pytest
import torch

from tiny import CONFIGS, load, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.compress import calibrate
from undistilled.compress.calibrate import FEW, Moments, look_up, looked_up
from undistilled.compress.store import Store
from undistilled.compress.sweep import Sweep, sweep
from undistilled.model.batch import Packed
from undistilled.model.layers import Linear, LocalBank
from undistilled.ops.registry import force_reference


def windows(count, size=48):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(2, 320, (size,), generator=draw).tolist() for _ in range(count)]


def moments(folder, texts, where):
    model = find(str(folder))
    where.mkdir()
    sweep(model.spec, model.source(), texts, where)
    return Store(where)


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
    _, plan = load(folder, scheme="fp32")
    found = moments(folder, windows(2), tmp_path / "c")
    wanted = {row.name: row for row in plan.rows if len(row.shape) == 2 and row.role != "router"}
    assert set(found) == set(wanted)
    assert {f.name.split("-")[0] for f in (tmp_path / "c").iterdir()} == {"moments"}
    for weight, one in found.items():
        out, into = wanted[weight].shape
        assert one.tokens == 96 and one.inputs.shape[-2:] == (into, into)
        assert one.outputs.shape[-1] == out and (one.outputs.sum() > 0 or "experts" in weight)
    at = "model.layers.0.self_attn."
    if name == "deepseek_v3":
        shared = [found[f"{at}{part}.weight"].inputs for part in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")]
        assert shared[0] is shared[1] and shared[0] is not shared[2]
    if name in ("llama", "qwen3"):
        assert found[f"{at}q_proj.weight"].inputs is found[f"{at}v_proj.weight"].inputs
        assert found[f"{at}o_proj.weight"].inputs is not found[f"{at}q_proj.weight"].inputs
    else:
        experts = found["model.layers.1.mlp.experts.*.gate_proj.weight"]
        assert experts.met is not None and experts.met.sum() == 96 * 4


def whole_model(decoder, texts):
    """The definition: the whole model at once, by autograd, with hooks on every linear layer and expert."""
    inputs, outputs, names = {}, {}, {id(s): n for n, s in decoder_weights(decoder)}

    def keep(name, x, y):
        inputs[name] = inputs.get(name, 0) + x.detach().T @ x.detach()
        if y.requires_grad:
            y.register_hook(lambda g: outputs.__setitem__(name, outputs.get(name, 0) + g.square().sum(0)))
        return y

    for module in decoder.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda m, x, y: keep(names[id(m.stored)], x[0], y))
        if isinstance(module, LocalBank):
            module.submit = dense_bank(module, names, keep)
    draw = torch.Generator().manual_seed(0)
    with force_reference(), torch.enable_grad():
        for text in texts:
            ids = torch.tensor(text)
            batch = Packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
            log_TV = decoder.logits(decoder(batch, [()] * len(decoder.layers))).log_softmax(-1)
            drawn = torch.multinomial(log_TV.detach().exp(), 1, generator=draw)
            (-log_TV.gather(-1, drawn).sum()).backward()
    return inputs, outputs


def gradients_of(embedding):
    """Where the gradients at what it looks up will be, a tensor for each window."""
    found = []

    def after(_module, _ids, h_TD):
        h_TD.requires_grad_(True).register_hook(found.append)

    embedding.register_forward_hook(after)
    return found


def decoder_weights(decoder):
    for path, module in decoder.named_modules():
        if isinstance(module, Linear):
            yield ("" if path == "lm_head" else "model.") + path + ".weight", module.stored
        if isinstance(module, LocalBank):
            at = path.removesuffix(".banks.0")
            for part in ("gate", "up", "down"):
                yield f"model.{at}.experts.*.{part}_proj.weight", getattr(module, part).stored


def dense_bank(bank, names, keep):
    def submit(x_TD, ids_Tk, weights_Tk):
        out = torch.zeros_like(x_TD)
        for e in range(bank.gate.stored.shape[0]):
            rows, picks = (ids_Tk == e).nonzero(as_tuple=True)
            gate, up, down = (getattr(bank, p).stored.expert(e).dense(torch.float32) for p in ("gate", "up", "down"))
            at = [f"{names[id(getattr(bank, p).stored)]}/{e}" for p in ("gate", "up", "down")]
            x = x_TD[rows]
            h = torch.nn.functional.silu(keep(at[0], x, x @ gate.T)) * keep(at[1], x, x @ up.T)
            out = out.index_add(0, rows, keep(at[2], h, h @ down.T) * weights_Tk[rows, picks, None])
        return out

    return submit


@pytest.mark.parametrize("name", ["qwen2", "llama-tied", "deepseek_v3", "deepseek_v2"])
def test_block_by_block_is_the_whole_model_at_once(name, tmp_path):
    folder, texts = write_checkpoint(tmp_path / "m", CONFIGS[name]), windows(3)
    found = moments(folder, texts, tmp_path / "c")
    decoder, _ = load(folder, scheme="fp32")
    rows = gradients_of(decoder.embed_tokens)
    inputs, outputs = whole_model(decoder, texts)
    embedding = "model.embed_tokens.weight"
    if name == "llama-tied":
        inputs[embedding], outputs[embedding] = inputs.pop("lm_head.weight"), outputs.pop("lm_head.weight")
        embedding = look_up(embedding)
    inputs[embedding] = sum(g.T @ g for g in rows)
    outputs[embedding] = looked_up(torch.tensor(texts).flatten(), rows[0], found[embedding].outputs.numel()).outputs
    assert {n.split("/")[0] for n in outputs} == set(found)
    for weight, total in outputs.items():
        at, _, expert = weight.partition("/")
        one = found[at]
        into, out = (one.inputs[int(expert)], one.outputs[int(expert)]) if expert else (one.inputs, one.outputs)
        assert (into - inputs[weight]).norm() < 1e-4 * inputs[weight].norm() + 1e-12, weight
        assert (out - total).norm() < 1e-3 * total.norm() + 1e-12, weight


def test_an_mtp_layer_is_calibrated_by_the_loss_of_its_own_tokens(tmp_path):
    folder, texts = write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3-mtp"]), windows(3)
    found = moments(folder, texts, tmp_path / "c")
    decoder, _ = load(folder, scheme="fp32", mtp=True)
    layer = f"model.layers.{len(decoder.layers)}"
    mtp, draw, outputs, inputs = decoder.mtp[0], torch.Generator().manual_seed(0), [], []
    down = mtp.block.mlp.shared_experts.down_proj

    def keep(_module, x, y):
        if y.requires_grad:
            inputs.append(x[0].detach())
            y.register_hook(outputs.append)

    down.register_forward_hook(keep)
    rows = gradients_of(mtp.embed_tokens)
    with force_reference():
        for text in texts:
            ids, bounds = torch.tensor(text), torch.tensor([0, len(text) - 1], dtype=torch.int32)
            whole = Packed(ids, torch.arange(len(ids)), bounds + torch.tensor([0, 1], dtype=torch.int32), len(ids))
            with torch.no_grad():
                h_TD = decoder(whole, [()] * len(decoder.layers))[:-1]
            batch = Packed(ids[1:], torch.arange(len(ids) - 1), bounds, len(ids) - 1)
            decoder.prepare(batch)
            log_TV = mtp(h_TD, batch, ()).log_softmax(-1)
            drawn = torch.multinomial(log_TV.detach().exp(), 1, generator=draw)
            (-log_TV.gather(-1, drawn).sum()).backward()
    one, rows_of = found[f"{layer}.mlp.shared_experts.down_proj.weight"], found[f"{layer}.embed_tokens.weight"]
    for got, parts in ((one.inputs, inputs), (rows_of.inputs, rows)):
        want = sum(x.T @ x for x in parts)
        assert (got - want).norm() < 1e-4 * want.norm()
    want = sum(g.square().sum(0) for g in outputs)
    assert (one.outputs - want).norm() < 1e-3 * want.norm()


def test_rows_that_were_not_met_share_what_was_met_once():
    found = looked_up(torch.tensor([0, 0, 0, 1, 1, 2]), torch.randn(6, 4), 5)
    assert torch.allclose(found.outputs, torch.tensor([2.5, 5 / 3, 5 / 6, 0.5, 0.5]))
    assert looked_up(torch.tensor([0, 1]), torch.randn(2, 4), 2).outputs.tolist() == [1, 1]


def test_it_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    folder, texts = write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"]), windows(2)
    moments(folder, texts, tmp_path / "whole")
    model, where = find(str(folder)), tmp_path / "cut"
    where.mkdir()
    for left in range(1, 40):
        saved, calls = Sweep._save, iter(range(left))

        def save(self, *arguments, saved=saved, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            saved(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Sweep, "_save", save)
            try:
                sweep(model.spec, model.source(), texts, where)
                break
            except KeyboardInterrupt:
                pass
    assert left > 2
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (where / file.name).read_bytes()
    assert len(list(where.iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_many_experts_share_moments_and_keep_their_diagonals(tmp_path, monkeypatch):
    folder, texts = write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"]), windows(8)
    own = moments(folder, texts, tmp_path / "own")
    monkeypatch.setattr(calibrate, "LARGEST", 0)
    common = moments(folder, texts, tmp_path / "common")
    for name in (n for n in own if "experts.*" in n):
        one, two, every = own[name], common[name], slice(0, own[name].met.numel())
        assert two.inputs.dim() == 2 and (one.inputs.sum(0) - two.inputs).norm() < 1e-4 * two.inputs.norm()
        for left, right in zip(one.diagonal(every), two.diagonal(every), strict=True):
            assert torch.allclose(left, right, rtol=1e-3)
        shared = two.of(every)[0].dense()
        assert torch.allclose(shared.diagonal(dim1=-2, dim2=-1), two.diagonal(every)[0], rtol=1e-3)
        assert torch.linalg.eigvalsh(shared).min() > -1e-4 * shared.abs().max()


def test_an_expert_that_few_tokens_met_takes_its_layers_moments():
    inputs = torch.stack([torch.eye(4) * 100, torch.eye(4) * 7])
    few = Moments(inputs, torch.tensor([[300.0], [1000.0]]), torch.tensor([FEW * 3.0, 1.0]), 120)
    hessian, out = few.of(slice(0, 2))
    into = hessian.dense()
    assert torch.allclose(into[0], torch.eye(4) * 100 / 120)
    assert torch.allclose(into[1], torch.eye(4) * 107 * 2 / (FEW * 3 + 1) / 120)
    assert out[1].item() == pytest.approx(1300 / (FEW * 3 + 1))


def test_the_predicted_divergence_is_the_measured_one(tmp_path):
    """A small random change of one matrix: 1/2 G d M d^T is its divergence, within what 1,500 tokens can tell."""
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"])
    texts = windows(32)
    decoder, _ = load(folder, scheme="fp32")
    before = log_probabilities(decoder, texts)
    found = moments(folder, texts, tmp_path / "c")
    for name, module in (
        ("model.layers.0.self_attn.v_proj.weight", decoder.layers[0].self_attn.v_proj),
        ("model.layers.1.mlp.down_proj.weight", decoder.layers[1].mlp.down_proj),
        ("lm_head.weight", decoder.lm_head),
    ):
        values = module.stored.parts["values"]
        original = values.detach().clone()
        change = torch.randn(values.shape) * original.std() * 0.02
        inputs, outputs = found[name].of(None)
        predicted = float(0.5 * (inputs.lost(change) * outputs).sum())
        with torch.no_grad():
            values += change
        after = log_probabilities(decoder, texts)
        with torch.no_grad():
            values.copy_(original)
        measured = float((before.exp() * (before - after)).sum(-1).mean())
        assert 0.5 < predicted / measured < 2, (name, predicted, measured)
