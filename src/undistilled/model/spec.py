"""A model's description, read from `config.json` alone: enough to plan it without its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadArtefact


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `kind`: default, linear, llama3 or yarn."""

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    original_max: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, section 2.1). q_lora_rank 0: queries are not compressed."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values cached for a token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class Moe:
    """Mixture of experts. `scoring`: sigmoid (V3, chosen with a bias) or softmax (V2)."""

    experts: int
    per_token: int
    width: int
    shared: int
    groups: int
    top_groups: int
    scoring: str
    normalise: bool
    scale: float
    first_dense: int


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model's shape. Sizes are in elements; `native` names the scheme it was released in."""

    model_type: str
    hidden: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    max_context: int
    rope: Rope
    native: str = "bf16"
    tied: bool = False
    attention_bias: tuple[str, ...] = ()  # which of q, k, v, o add a bias
    qk_norm: bool = False
    mla: Mla | None = None
    moe: Moe | None = None
    mtp_layers: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores; YaRN's mscale is squared into it (DeepSeek-V3's reference code)."""
        width = self.mla.qk_head_dim if self.mla else self.head_dim
        scale = width**-0.5
        if self.mla and self.rope.kind == "yarn" and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    @property
    def kv_values(self) -> int:
        """Values cached for one token in one layer."""
        return self.mla.cache_width if self.mla else 2 * self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of KV cache for a token over all layers."""
        return self.kv_values * self.layers * dtype_bytes


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature (Peng et al. 2023, equation 22), with DeepSeek's multiplier."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _need(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise BadArtefact(
            f"config.json: {key!r} is {value!r}, expected a positive whole number.",
            "Is this the model's own config.json?",
        )
    return value


NATIVE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _native(config: dict[str, Any]) -> str:
    quant = config.get("quantization_config")
    if quant is None:
        return NATIVE.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), "bf16")
    block = list(quant.get("weight_block_size") or ())
    if quant.get("quant_method") == "fp8" and quant.get("fmt", "e4m3") == "e4m3" and block == [128, 128]:
        return "fp8_block"
    raise BadArtefact(
        f"config.json: quantization_config {quant.get('quant_method')!r} with blocks {block} is not read yet.",
        "Known: fp8 (e4m3) with 128 x 128 blocks, as DeepSeek-R1 is released.",
    )


def _rope(config: dict[str, Any], dim: int, interleaved: bool) -> Rope:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise BadArtefact(f"config.json: rope scaling {kind!r} is not known.", "Known: default, linear, llama3, yarn.")
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
    if kind == "default":
        return Rope(dim, theta, interleaved)
    return Rope(
        dim,
        theta,
        interleaved,
        kind,
        factor=float(scaling.get("factor") or config["max_position_embeddings"] / original),
        original_max=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0),
        low_freq_factor=float(scaling.get("low_freq_factor") or 1),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4),
        attention_factor=scaling.get("attention_factor"),
    )


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)


def _common(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act", "silu") != "silu":
        raise BadArtefact(f"config.json: activation {config['hidden_act']!r} is not known.", "Known: silu.")
    return {
        "model_type": config["model_type"],
        "hidden": _need(config, "hidden_size"),
        "vocab": _need(config, "vocab_size"),
        "layers": _need(config, "num_hidden_layers"),
        "heads": _need(config, "num_attention_heads"),
        "intermediate": _need(config, "intermediate_size"),
        "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "native": _native(config),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "bos": config.get("bos_token_id"),
        "eos": _ids(config.get("eos_token_id")),
    }


BIASED = {"qwen2": ("q", "k", "v")}


def _llama(config: dict[str, Any]) -> ModelSpec:
    common = _common(config)
    kind, heads = common["model_type"], common["heads"]
    head_dim = config.get("head_dim") or common["hidden"] // heads
    max_context = _need(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", kind == "mistral"):
        max_context = min(max_context, window)  # within the window full attention is the same function
    bias = ("q", "k", "v", "o") if config.get("attention_bias") else BIASED.get(kind, ())
    if config.get("mlp_bias"):
        raise BadArtefact("config.json: mlp_bias is not known.", "Known: models without it.")
    return ModelSpec(
        **common,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_context=max_context,
        rope=_rope(config, head_dim, interleaved=False),
        attention_bias=bias,
        qk_norm=kind == "qwen3",
    )


def _deepseek(config: dict[str, Any]) -> ModelSpec:
    common = _common(config)
    v3 = common["model_type"] == "deepseek_v3"
    mla = Mla(
        q_lora_rank=config.get("q_lora_rank") or 0,
        kv_lora_rank=_need(config, "kv_lora_rank"),
        qk_nope_head_dim=_need(config, "qk_nope_head_dim"),
        qk_rope_head_dim=_need(config, "qk_rope_head_dim"),
        v_head_dim=_need(config, "v_head_dim"),
    )
    if config.get("attention_bias"):
        raise BadArtefact("config.json: attention_bias is not known for DeepSeek.", "Known: false.")
    return ModelSpec(
        **common,
        kv_heads=common["heads"],
        head_dim=mla.qk_head_dim,
        max_context=_need(config, "max_position_embeddings"),
        rope=_rope(config, mla.qk_rope_head_dim, interleaved=config.get("rope_interleave", True)),
        mla=mla,
        moe=_moe(config, v3) if config.get("n_routed_experts") else None,
        mtp_layers=config.get("num_nextn_predict_layers") or 0,
    )


def _moe(config: dict[str, Any], v3: bool) -> Moe:
    grouped = v3 or config.get("topk_method") == "group_limited_greedy"
    moe = Moe(
        experts=_need(config, "n_routed_experts"),
        per_token=_need(config, "num_experts_per_tok"),
        width=_need(config, "moe_intermediate_size"),
        shared=config.get("n_shared_experts") or 0,
        groups=(config.get("n_group") or 1) if grouped else 1,
        top_groups=(config.get("topk_group") or 1) if grouped else 1,
        scoring="sigmoid" if v3 else "softmax",
        # transformers and the release's own code never normalise V2's weights, whatever its config says
        normalise=bool(config.get("norm_topk_prob", True)) if v3 else False,
        scale=float(config.get("routed_scaling_factor") or 1.0),
        first_dense=config.get("first_k_dense_replace") or 0,
    )
    if moe.experts % moe.groups or moe.top_groups > moe.groups:
        raise BadArtefact(
            f"config.json: {moe.experts} experts do not form {moe.groups} groups of which {moe.top_groups}."
        )
    if moe.per_token > moe.experts // moe.groups * moe.top_groups:
        raise BadArtefact(f"config.json: a token cannot choose {moe.per_token} experts from {moe.top_groups} groups.")
    return moe


ARCHITECTURES = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of a Hugging Face style config; BadArtefact names the field that makes no sense."""
    if not isinstance(config, dict):
        raise BadArtefact("config.json is not a JSON object.")
    if "auto_map" in config and config.get("model_type") not in ARCHITECTURES:
        raise BadArtefact("config.json asks for code of its own (auto_map).", "Code from checkpoints is never run.")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise BadArtefact(f"config.json: model_type {kind!r} is not known.", f"Known: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind](config)
