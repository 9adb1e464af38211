"""What a GGUF file calls things, in Hugging Face's words: configuration, weight names, row order.

Sources: gguf-py's constants.py (keys, tensor names) and llama.cpp's converters (conversion/llama.py,
conversion/deepseek.py) and loader (llama_model_deepseek2), for what they write and how they read it back.
"""

import re
from collections.abc import Container, Mapping
from math import isfinite, pi
from typing import Any

import numpy as np
import torch

from undistilled.errors import BadArtefact
from undistilled.model.fields import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "deepseek2": ""}

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# attn_k_b and attn_v_b are two halves of one matrix: GGUFSource puts them together.
_ATTENTION = (
    "attn_q:q_proj attn_k:k_proj attn_v:v_proj attn_output:o_proj attn_q_norm:q_norm attn_k_norm:k_norm "
    "attn_q_a:q_a_proj attn_q_a_norm:q_a_layernorm attn_q_b:q_b_proj attn_kv_a_mqa:kv_a_proj_with_mqa "
    "attn_kv_a_norm:kv_a_layernorm attn_kv_b:kv_b_proj attn_k_b:kv_b_proj attn_v_b:kv_b_proj"
)
_LAYER = {
    "attn_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn_gate_inp": ("mlp.gate",),
    # Gate rows first, then up rows, within each expert.
    "ffn_gate_up_exps": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
} | {name: (f"self_attn.{hf}",) for name, hf in (pair.split(":") for pair in _ATTENTION.split())}
for _part in ("gate", "up", "down"):
    _LAYER[f"ffn_{_part}"] = (f"mlp.{_part}_proj",)
    _LAYER[f"ffn_{_part}_exps"] = (f"mlp.experts.*.{_part}_proj",)
    _LAYER[f"ffn_{_part}_shexp"] = (f"mlp.shared_experts.{_part}_proj",)

_HF = {hf: gguf for gguf, hf in _TOP.items()}
_HF_LAYER = {names[0]: part for part, names in _LAYER.items() if len(names) == 1 and not part.endswith("_b")}

_DERIVED = {"rope_freqs.weight"}
"""Tables computed from the configuration, not weights. `llama3_rope` reads them back."""

_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)(?:\.(weight|bias))?")


def block_of(name: str) -> int | None:
    """The layer a tensor belongs to, or None for those outside the layers."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def hf_names(name: str) -> tuple[str, ...] | None:
    """GGUF name -> Hugging Face names, "*" for the expert number; () for no weight, None for an unknown name."""
    if name in _TOP:
        return (_TOP[name],)
    match = _BLOCK.fullmatch(name)
    if name in _DERIVED or (match and match[2] in ("rope_freqs", "attn_rot_embd")):
        return ()
    if not match:
        return None
    layer, part, kind = f"model.layers.{match[1]}.", match[2], match[3]
    if part == "exp_probs_b":
        return (f"{layer}mlp.gate.e_score_correction_bias",)
    if part not in _LAYER or kind is None:
        return None
    return tuple(f"{layer}{hf}.{kind}" for hf in _LAYER[part])


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face weight outside the experts; KeyError where there is none."""
    if name in _HF:
        return _HF[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_HF_LAYER[part]}.{kind}"


def unpermute_rows(n_rows: int, n_heads: int) -> torch.Tensor:
    """int64 [n_rows]: row i of the released matrix is row `result[i]` of the GGUF one.

    The llama converter turns each head's two halves (the rotate-half layout) into neighbouring pairs.
    """
    if n_heads < 1 or n_rows % (2 * n_heads):
        raise ValueError(f"{n_rows} rows do not divide into {n_heads} heads of pairs")
    return torch.arange(n_rows).view(n_heads, -1, 2).transpose(1, 2).reshape(-1)


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows in the released order; `weight` is anything with a row per output (values, scales, biases)."""
    return weight[unpermute_rows(weight.shape[0], n_heads)]


def llama3_rope(factors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's `rope_scaling` from `rope_freqs.weight`, float32 [head_dim / 2] of frequency divisors.

    The file keeps only the result. Every Llama 3 release has low 1, high 4 and 8192 original positions and
    differs in the factor; a table that these do not reproduce raises ValueError.
    """
    values = factors.double().numpy()
    factor = float(values.max()) if values.size == head_dim // 2 else 0.0
    if not 1 <= factor < 1e6:
        raise ValueError("is not a table of Llama 3 rope factors")
    if not np.allclose(values, llama3_table(factor, theta, head_dim), rtol=1e-4):
        raise ValueError("is not Llama 3's rope scaling (low 1, high 4, original length 8192)")
    sizes = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **sizes}


def llama3_table(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """The table that `llama3_rope` reads, float32 [head_dim / 2]."""
    wavelength = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32: 9.999999747378752e-06 was 1e-05 before it was stored."""
    return float(str(np.float32(value)))


class _Keys:
    """Typed access to the metadata of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.arch: str = str(metadata.get("general.architecture"))
        if self.arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise BadArtefact(f"{where}: architecture {self.arch[:80]!r} is not supported.", f"Known: {known}.")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        name = key if key.startswith("tokenizer.") else f"{self.arch}.{key}"
        value = self.metadata.get(name, default)
        if kind is float and type(value) in (int, float) and isfinite(value) and abs(value) < 1e38:
            return _decimal(value)
        if value is not None and (type(value) is not kind or kind is float):
            raise BadArtefact(f"{self.where}: metadata {name!r} should be {kind.__name__}, not {str(value)[:60]!r}.")
        return value

    def size(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """A count from `least` to `most`; per-layer lists pass if all layers agree."""
        name = f"{self.arch}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or not least <= value <= most:
            raise BadArtefact(f"{self.where}: metadata {name!r} is {value!r:.60}, not a count from {least} to {most}.")
        return value

    def token(self, key: str, vocabulary: int) -> int | None:
        """A token id; None if absent or llama.cpp's 2**32 - 1 for "none"."""
        name = f"tokenizer.ggml.{key}_token_id"
        value = self.get(name, int)
        if value is None or value == (1 << 32) - 1:
            return None
        if not 0 <= value < vocabulary:
            raise BadArtefact(f"{self.where}: metadata {name!r} is {value}, outside the vocabulary of {vocabulary}.")
        return value


def hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], where: str = "GGUF file") -> dict[str, Any]:
    """A Hugging Face style configuration; `tensors` maps names to things with a row-major `shape`.

    `gguf_assumed` lists the fields that the file does not state. Raises BadArtefact naming the key at fault.
    """
    keys = _Keys(metadata, where)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadArtefact(f"{where}: has no matrix 'token_embd.weight'.", "Give the first file of a split model.")
    config = _common(keys, tensors, embedding.shape[0])
    if keys.arch == "deepseek2":
        config |= _deepseek(keys, tensors, config)
    else:
        config |= _dense(keys, tensors, config)
    config["rope_scaling"] = _rope_scaling(keys, config)
    return config


def _common(keys: _Keys, tensors: Container[str], vocabulary: int) -> dict[str, Any]:
    heads, blocks = keys.size("attention.head_count"), keys.size("block_count", most=MAX_LAYERS)
    predicting = keys.size("nextn_predict_layers", 0, least=0)
    theta = keys.get("rope.freq_base", float, 10000.0)
    eps = keys.get("attention.layer_norm_rms_epsilon", float)
    if eps is None or not 0 < eps < 1:
        raise BadArtefact(f"{keys.where}: metadata '{keys.arch}.attention.layer_norm_rms_epsilon' is {eps}.")
    if theta <= 0 or predicting >= blocks:
        raise BadArtefact(f"{keys.where}: 'rope.freq_base' is {theta}, or no layers are left beside {predicting}.")
    return {
        "architectures": [ARCHITECTURES[keys.arch]],
        "model_type": keys.arch,
        "hidden_act": "silu",
        "hidden_size": keys.size("embedding_length"),
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": blocks - predicting,
        "gguf_nextn_layers": predicting,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": keys.token("bos", vocabulary),
        "eos_token_id": keys.token("eos", vocabulary),
        "pad_token_id": keys.token("padding", vocabulary),
        "gguf_assumed": [],
    }


def _dense(keys: _Keys, tensors: Container[str], config: dict[str, Any]) -> dict[str, Any]:
    if keys.get("expert_count", int):
        raise BadArtefact(f"{keys.where}: {keys.arch} with experts is not supported.", "Use the released weights.")
    head_dim = keys.size("attention.key_length", max(1, config["hidden_size"] // config["num_attention_heads"]))
    rotary = keys.size("rope.dimension_count", head_dim)
    if rotary != head_dim or keys.size("attention.value_length", head_dim) != head_dim:
        raise BadArtefact(f"{keys.where}: '{keys.arch}.rope.dimension_count' and the head sizes differ.")
    return {"head_dim": head_dim}


_RELEASED_GROUPS = {(256, 61): (8, 4), (160, 60): (8, 3)}
"""(routed experts, layers) -> (groups, groups used): DeepSeek-V3 and R1; V2 and V2.5. Their config.json state
these, but GGUF files had no keys for them until late 2025."""


def _deepseek(keys: _Keys, tensors: Container[str], config: dict[str, Any]) -> dict[str, Any]:
    rope = keys.size("rope.dimension_count")
    # With the _mla keys, the plain ones hold the sizes of the absorbed (compressed) form.
    plain = [keys.metadata.get(f"{keys.arch}.attention.{part}_length") for part in ("key", "value")]
    key = keys.size("attention.key_length_mla", plain[0])
    value = keys.size("attention.value_length_mla", plain[1])
    query = keys.size("attention.q_lora_rank", 0, least=0)
    if key <= rope:
        raise BadArtefact(f"{keys.where}: key length {key} leaves nothing beside {rope} rotary dimensions.")
    found = {
        # The absorbed form is multi-query in GGUF; the released matrices have every head.
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": query or None,
        "kv_lora_rank": keys.size("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "rope_interleave": True,
        "first_k_dense_replace": keys.size("leading_dense_block_count", 0, least=0),
    }
    return found | _experts(keys, tensors, config)


def _experts(keys: _Keys, tensors: Container[str], config: dict[str, Any]) -> dict[str, Any]:
    layers, assumed = config["num_hidden_layers"], []
    biased = any(f"blk.{i}.exp_probs_b{end}" in tensors for i in range(layers) for end in (".bias", ""))
    gating = keys.get("expert_gating_func", int)
    if gating is None:
        gating = 2 if biased else 1
        assumed.append("scoring_func")
    if gating not in (1, 2):
        raise BadArtefact(f"{keys.where}: '{keys.arch}.expert_gating_func' is {gating}, not 1 or 2.")
    experts = keys.size("expert_count", most=MAX_EXPERTS)
    groups = keys.size("expert_group_count", 0, least=0)
    used = keys.size("expert_group_used_count", groups, least=0)
    if not groups:
        groups, used = _RELEASED_GROUPS.get((experts, layers), (1, 1))
        assumed += ["n_group", "topk_group"]
    chosen, sigmoid = keys.size("expert_used_count"), gating == 2
    if not chosen <= experts or not 0 < used <= groups or experts % groups:
        raise BadArtefact(f"{keys.where}: {chosen} of {experts} experts, {used} of {groups} groups make no sense.")
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy",
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "n_shared_experts": keys.size("expert_shared_count", 0, least=0),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "moe_layer_freq": 1,
        "n_group": groups,
        "topk_group": used,
        "routed_scaling_factor": keys.get("expert_weights_scale", float, 1.0),
        "norm_topk_prob": keys.get("expert_weights_norm", bool, False),
        "gguf_assumed": assumed,
    }


def _rope_scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", str)
    factor = keys.get("rope.scaling.factor", float) or keys.get("rope.scale_linear", float) or 1.0
    if kind == "linear" or (kind is None and factor != 1.0):
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind in (None, "none"):
        return None
    if kind != "yarn":
        raise BadArtefact(f"{keys.where}: '{keys.arch}.rope.scaling.type' {kind[:40]!r} is not supported.")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if keys.get(f"rope.scaling.{key}", float, 1.0) != 1.0:
            raise BadArtefact(f"{keys.where}: '{keys.arch}.rope.scaling.{key}' is not supported.")
    found = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.size("rope.scaling.original_context_length"),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }
    multiplier = keys.get("rope.scaling.yarn_log_multiplier", float)
    if keys.arch == "deepseek2" and multiplier:
        # The converter stores 0.1 * mscale_all_dim. Every release has mscale equal to mscale_all_dim.
        found["mscale"] = found["mscale_all_dim"] = round(10 * multiplier, 6)
    return found
