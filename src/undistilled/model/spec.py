"""A model's description, read from `config.json` alone: enough to plan it without its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .. import scheme as schemes
from ..errors import BadArtefact, UsageError
from .fields import MAX_EXPERTS, MAX_LAYERS, bad, ids, need, number, table


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
    truncate: bool = True  # yarn: whole dimensions bound what is stretched


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
    stored: dict[str, str] = field(default_factory=dict, hash=False, compare=False)  # weight -> scheme, if it says so

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


OURS = "undistilled"  # the config's key for what compress/ did: the scheme of every weight
PACKED = ("awq", "gptq", "compressed-tensors")  # `quant_method`s of other programs
NATIVE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _native(config: dict[str, Any]) -> str:
    quant = table(config, "quantization_config")
    if OURS in config or is_packed(config):
        return "mixed"
    if quant is None:
        return NATIVE.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), "bf16")
    block = quant.get("weight_block_size")
    if quant.get("quant_method") == "fp8" and quant.get("fmt", "e4m3") == "e4m3" and block == [128, 128]:
        return "fp8_block"
    raise BadArtefact(
        f"config.json: quantization_config {quant.get('quant_method')!r:.80}, blocks {block!r:.80}, is not read yet.",
        f"Known: fp8 (e4m3) with 128 x 128 blocks, as DeepSeek-R1 is released, {', '.join(PACKED)}.",
    )


def is_packed(config: dict[str, Any]) -> bool:
    """Whether another program quantised the checkpoint; quantized.py reads how."""
    quant = config.get("quantization_config")
    return OURS not in config and isinstance(quant, dict) and quant.get("quant_method") in PACKED


def _stored(config: dict[str, Any]) -> dict[str, str]:
    """Weight name -> scheme, of a checkpoint that we compressed; empty for others."""
    said = table(table(config, OURS) or {}, "schemes") or {}
    if OURS in config and (not said or not all(isinstance(name, str) for name in said.values())):
        raise bad(config, OURS, "an object with the scheme of every weight in `schemes`")
    for weight, name in said.items():
        try:
            schemes.get(name)
        except UsageError as error:
            raise BadArtefact(f"config.json: {weight} is stored as {name!r:.80}: no scheme.", error.hint) from None
    return said


POSITIVE = ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")


def _rope(config: dict[str, Any], dim: int, interleaved: bool) -> Rope:
    scaling = table(config, "rope_parameters") or table(config, "rope_scaling") or {}
    theta = number(scaling, "rope_theta", number(config, "rope_theta", 10000.0, over=1), over=1)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise BadArtefact(f"config.json: rope scaling {kind!r:.80} is not known.", "Known: linear, llama3, yarn.")
    if dim % 2:
        raise BadArtefact(f"config.json: {dim} rotary dimensions per head (head_dim) do not form pairs.")
    if kind == "default":
        return Rope(dim, theta, interleaved)
    longest = need(config, "max_position_embeddings")
    original = need(scaling, "original_max_position_embeddings", null=longest)
    numbers = {key: number(scaling, key, getattr(Rope, key)) for key in POSITIVE}
    numbers |= {key: number(scaling, key, 0, over=-1) for key in ("mscale", "mscale_all_dim")}
    if scaling.get("attention_factor") is not None:
        numbers["attention_factor"] = number(scaling, "attention_factor", 1)
    factor, truncate = number(scaling, "factor", longest / original), bool(scaling.get("truncate", True))
    rope = Rope(dim, theta, interleaved, kind, factor, original, truncate=truncate, **numbers)
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise bad(scaling, "high_freq_factor", "more than low_freq_factor")
    return rope


KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # here and below: what transformers takes for a missing key


def _common(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act", "silu") != "silu":
        raise BadArtefact(f"config.json: activation {config['hidden_act']!r:.80} is not known.", "Known: silu.")
    kind, heads = config["model_type"], need(config, "num_attention_heads")
    kv_heads = need(config, "num_key_value_heads", KV_HEADS.get(kind), null=heads)
    if heads % kv_heads:
        raise BadArtefact(f"config.json: num_key_value_heads {kv_heads} does not divide {heads} attention heads.")
    return {
        "model_type": kind,
        "hidden": need(config, "hidden_size"),
        "vocab": need(config, "vocab_size"),
        "layers": need(config, "num_hidden_layers", most=MAX_LAYERS),
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": need(config, "intermediate_size"),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "max_context": need(config, "max_position_embeddings"),
        "native": _native(config),
        "stored": _stored(config),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "bos": next(iter(ids(config, "bos_token_id")), None),
        "eos": ids(config, "eos_token_id"),
    }


BIASED = {"qwen2": ("q", "k", "v")}


def _llama(config: dict[str, Any]) -> ModelSpec:
    common = _common(config)
    kind, hidden, heads = common["model_type"], common["hidden"], common["heads"]
    share = None if hidden % heads else hidden // heads
    head_dim = need(config, "head_dim", 128 if kind == "qwen3" else None, null=share)
    window = need(config, "sliding_window", 0 if kind == "llama" else 4096, null=0, least=0)
    if window and config.get("use_sliding_window", kind == "mistral"):
        common["max_context"] = min(common["max_context"], window)  # within it full attention is the same function
    if config.get("mlp_bias"):
        raise BadArtefact("config.json: mlp_bias is not known.", "Known: models without it.")
    bias = BIASED.get(kind, ("q", "k", "v", "o") if config.get("attention_bias") else ())
    common |= {"head_dim": head_dim, "rope": _rope(config, head_dim, interleaved=False)}
    return ModelSpec(**common, attention_bias=bias, qk_norm=kind == "qwen3")


def _deepseek(config: dict[str, Any]) -> ModelSpec:
    common = _common(config)
    mla = Mla(
        need(config, "q_lora_rank", null=0, least=0),
        *(need(config, key) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    )
    if config.get("attention_bias"):
        raise BadArtefact("config.json: attention_bias is not known for DeepSeek.", "Known: false.")
    return ModelSpec(
        **common | {"kv_heads": common["heads"]},
        head_dim=mla.qk_head_dim,
        rope=_rope(config, mla.qk_rope_head_dim, interleaved=bool(config.get("rope_interleave", True))),
        mla=mla,
        moe=_moe(config, common["model_type"] == "deepseek_v3") if config.get("n_routed_experts") else None,
        mtp_layers=need(config, "num_nextn_predict_layers", null=0, least=0, most=MAX_LAYERS - common["layers"]),
    )


def _moe(config: dict[str, Any], v3: bool) -> Moe:
    groups, top_groups = need(config, "n_group", 8 if v3 else 1, 1), need(config, "topk_group", 4 if v3 else 1, 1)
    if not v3 and config.get("topk_method") != "group_limited_greedy":
        groups = top_groups = 1
    scale = 1.0 if "routed_scaling_factor" in config or not v3 else 2.5  # for null, or without the key
    moe = Moe(
        experts=need(config, "n_routed_experts", most=MAX_EXPERTS),
        per_token=need(config, "num_experts_per_tok"),
        width=need(config, "moe_intermediate_size"),
        shared=need(config, "n_shared_experts", 1 if v3 else 2, null=0, least=0),
        groups=groups,
        top_groups=top_groups,
        scoring="sigmoid" if v3 else "softmax",
        # transformers never normalises V2's weights, whatever its config says; released V2 configs say not to
        normalise=bool(config.get("norm_topk_prob", True)) if v3 else False,
        scale=number(config, "routed_scaling_factor", scale),
        first_dense=need(config, "first_k_dense_replace", 3 if v3 else None, null=0, least=0),
    )
    if moe.experts % moe.groups or moe.top_groups > moe.groups:
        raise BadArtefact(f"config.json: {moe.experts} experts: n_group {moe.groups}, topk_group {moe.top_groups}.")
    if moe.per_token > moe.experts // moe.groups * moe.top_groups:
        raise BadArtefact(f"config.json: a token cannot choose {moe.per_token} experts from {moe.top_groups} groups.")
    return moe


ARCHITECTURES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama)
ARCHITECTURES |= dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek)


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of a Hugging Face style config; BadArtefact names the field that makes no sense."""
    if not isinstance(config, dict):
        raise BadArtefact("config.json is not a JSON object.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        if "auto_map" in config:
            raise BadArtefact("config.json asks for code of its own (auto_map).", "Code from checkpoints is never run.")
        if not isinstance(kind, str):
            raise bad(config, "model_type", f"one of {', '.join(ARCHITECTURES)}")
        raise BadArtefact(
            f"This architecture ({kind:.80}) is not supported.", f"Supported model_types: {', '.join(ARCHITECTURES)}."
        )
    try:
        spec = ARCHITECTURES[kind](config)
        if is_packed(config):
            from .quantized import with_stored  # which needs the weights of a spec

            return with_stored(spec, config)
        return spec
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise BadArtefact(f"config.json makes no sense ({type(error).__name__}: {str(error)[:200]}).") from error
