"""Tiny random models of every architecture, written as real checkpoints, and their transformers twins."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.load.build import build
from undistilled.model.spec import spec_from_config
from undistilled.model.weights import weights
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve

YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 256,
    "vocab_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 320,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "vocab_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 224,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# wide enough for four ranks of whole FP8 blocks; three get uneven shares
WIDE = {
    "deepseek": DEEPSEEK
    | {"num_attention_heads": 8, "num_key_value_heads": 8, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
    | {"v_head_dim": 64, "moe_intermediate_size": 512, "intermediate_size": 512, "num_hidden_layers": 4},
    "llama": LLAMA
    | {"head_dim": 128, "num_key_value_heads": 4, "intermediate_size": 512, "num_hidden_layers": 4},
}
CONFIGS = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3-no-q-lora": DEEPSEEK | {"q_lora_rank": None, "rope_scaling": None},
    "deepseek_v3-mtp": DEEPSEEK | {"num_nextn_predict_layers": 1},
    "deepseek_v2": DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "q_lora_rank": None,
    },
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama3-rope": LLAMA
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_checkpoint(folder: Path, config: dict, *, seed: int = 0, fp8: bool = False, dtype=torch.float32) -> Path:
    """A random checkpoint as a release would write it; `fp8` uses R1's block format for the linears."""
    folder.mkdir(parents=True, exist_ok=True)
    if fp8:
        config = config | {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "weight_block_size": [128, 128],
                "activation_scheme": "dynamic",
            }
        }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for w in weights(spec_from_config(config)):
        for name in w.tensor_names:
            values = torch.randn(w.shape, generator=generator)
            if w.role == "norm":
                values = 1 + 0.1 * values
            elif w.role == "router_bias":
                values = 0.05 * values
            else:
                values = values * w.shape[-1] ** -0.5
            if fp8 and w.is_linear:
                parts = schemes.get("fp8_block").compress(values)
                tensors[name], tensors[name + "_scale_inv"] = parts["values"], parts["scales"]
            else:
                tensors[name] = values if w.role == "router_bias" else values.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(
    folder: Path,
    *,
    scheme: str | None = None,
    context: int = 256,
    batch: int = 4,
    mtp: bool = False,
    kv=None,
    device="cpu",
    dtype="auto",
):
    """(decoder, plan) of a checkpoint; `device` None leaves the choice to the planner."""
    model = find(str(folder))
    machine = load_machine("this")
    plan = solve(model.name, model.config, model.spec, machine, Ask(scheme, context, batch, mtp, device, kv, dtype))
    return build(plan, model.spec, model.source()), plan


def twin(folder: Path, config: dict, dtype=torch.float32):
    """transformers' model with the same weights in `dtype`, FP8 ones dequantised first."""
    import transformers

    source = find(str(folder)).source()
    state = {n: source.dense(n, 0, source.shape(n)[0]) for n in source.names()}
    plain = folder.with_name(folder.name + "-float32")
    plain.mkdir(exist_ok=True)
    config = {k: v for k, v in config.items() if k != "quantization_config"} | {"torch_dtype": "float32"}
    (plain / "config.json").write_text(json.dumps(config))
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=dtype, attn_implementation="eager")
    return model.eval()
