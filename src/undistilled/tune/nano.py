"""r1-nano: DeepSeek-R1's architecture with every part it has, small enough to train in minutes.

Shapes are R1's scaled down, with R1's own proportions where they matter: a latent much narrower than the heads, a
dense first layer, eight groups of experts of which four are kept, a shared expert, a multi-token-prediction layer.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 4096
CONTEXT = 2048  # tokens; training documents are shorter, see examples.LONGEST

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "kv_lora_rank": 96,
    "max_position_embeddings": CONTEXT,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": VOCABULARY,
}
