"""The multi-token-prediction layer, on request, against transformers' own block with the same weights."""

import pytest
import torch

from tiny import CONFIGS, load, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.errors import UsageError
from undistilled.generate.cache import allocate
from undistilled.generate.runner import Runner
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Sequence, Work

CONFIG = CONFIGS["deepseek_v3-mtp"]


def theirs(folder, h_TD, tokens):
    """enorm, hnorm and eh_proj by hand, then transformers' block, norm and head."""
    import transformers
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    source = find(str(folder)).source()
    at = f"model.layers.{CONFIG['num_hidden_layers']}."
    state = {n[len(at) :]: source.dense(n, 0, source.shape(n)[0]) for n in source.names() if n.startswith(at)}
    config = transformers.AutoConfig.for_model(**CONFIG)
    config._attn_implementation = "eager"
    twin = hf.DeepseekV3ForCausalLM(config).float().eval()
    block, experts = twin.model.layers[-1], CONFIG["n_routed_experts"]
    own = {k: v for k, v in state.items() if k in block.state_dict()}
    names = [[f"mlp.experts.{e}.{p}_proj.weight" for e in range(experts)] for p in ("gate", "up", "down")]
    gate, up, down = (torch.stack([state[n] for n in group]) for group in names)
    own |= {"mlp.experts.gate_up_proj": torch.cat((gate, up), 1), "mlp.experts.down_proj": down}
    block.load_state_dict(own)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * state[name]

    embedded = state["embed_tokens.weight"][tokens]
    joined = torch.cat((norm(embedded, "enorm.weight"), norm(h_TD, "hnorm.weight")), -1)
    x = (joined @ state["eh_proj.weight"].T)[None]
    positions = torch.arange(len(tokens))[None]
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
    out = block(x, position_embeddings=twin.model.rotary_emb(x, positions), attention_mask=mask)
    out = out[0] if isinstance(out, tuple) else out
    return (norm(out.view(len(tokens), -1), "shared_head.norm.weight")) @ state["shared_head.head.weight"].T


def test_the_mtp_layer_agrees(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG)
    decoder, plan = load(folder, mtp=True, dtype="float32")
    runner = Runner(decoder, plan)
    tokens = torch.randint(2, 300, (40,)).tolist()
    sequence = Sequence(Request("r", tokens, Sampling()), tokens, list(range(plan.kv.blocks)))
    batch = runner.batch([Work(sequence, 0, len(tokens))], True)
    with torch.inference_mode():
        h_TD = torch.randn(len(tokens), CONFIG["hidden_size"])
        decoder.prepare(batch)
        ours = decoder.mtp[0](h_TD, batch, allocate(decoder.spec, plan.kv, torch.device("cpu"), layers=1)[0])
        expected = theirs(folder, h_TD, tokens)
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_mtp_weights_stay_on_disk_unless_asked_for(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG)
    decoder, plan = load(folder)
    assert not decoder.mtp and any(row.store == "unloaded" for row in plan.rows)
    with pytest.raises(UsageError, match="multi-token"):
        load(write_checkpoint(tmp_path / "n", CONFIGS["deepseek_v3"]), mtp=True)
