"""config.json: what is malformed is named, and what is missing is what transformers takes for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny import DEEPSEEK, LLAMA, YARN
from undistilled.checkpoint.gguf import GGUFFile
from undistilled.errors import BadArtefact
from undistilled.model.spec import spec_from_config
from undistilled.ops.rope import frequencies

MALFORMED = [
    ("rope_scaling", [1]),
    ("rope_parameters", "x"),
    ("quantization_config", [1]),
    ("quantization_config", {}),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": 5}),
    ("eos_token_id", "a"),
    ("eos_token_id", ["a"]),
    ("eos_token_id", True),
    ("bos_token_id", "a"),
    ("rope_theta", "abc"),
    ("rope_theta", float("nan")),
    ("rope_theta", -1.0),
    ("rope_theta", 10**400),
    ("rope_theta", 0),
    ("model_type", ["llama"]),
    ("model_type", None),
    ("num_key_value_heads", -1),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 0),
    ("rms_norm_eps", "x"),
    ("rms_norm_eps", float("inf")),
    ("hidden_act", [1]),
    ("max_position_embeddings", "x"),
    ("hidden_size", 10**30),
    ("num_hidden_layers", True),
    ("num_hidden_layers", 1025),
    ("num_hidden_layers", 2**31 - 1),
]
DENSE = [
    ("head_dim", "x"),
    ("head_dim", 33),
    ("head_dim", 0),
    ("sliding_window", "x"),
    ("hidden_size", 100),
    ("rope_scaling", {"rope_type": ["yarn"]}),
]
LATENT = [
    ("qk_rope_head_dim", 15),
    ("q_lora_rank", "x"),
    ("n_group", "x"),
    ("n_group", 3),
    ("topk_group", -1),
    ("routed_scaling_factor", "x"),
    ("first_k_dense_replace", -1),
    ("n_shared_experts", [1]),
    ("n_routed_experts", "x"),
    ("num_nextn_predict_layers", "x"),
    ("num_experts_per_tok", 100),
    ("num_nextn_predict_layers", 1024),
    ("n_routed_experts", 4100),
]


@pytest.mark.parametrize(
    "base, key, value",
    [
        *((base, *case) for base in (LLAMA, DEEPSEEK) for case in MALFORMED),
        *((LLAMA, *case) for case in DENSE),
        *((DEEPSEEK, *case) for case in LATENT),
    ],
    ids=lambda value: f"{value}"[:20],
)
def test_malformed_values_are_named(base, key, value):
    with pytest.raises(BadArtefact, match=r"config\.json") as error:
        spec_from_config(base | {key: value})
    assert "makes no sense" not in str(error.value), "the general net caught it"
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "key, value",
    [
        ("factor", 0),
        ("factor", "x"),
        ("original_max_position_embeddings", "64"),
        ("beta_fast", -1),
        ("mscale", "x"),
        ("attention_factor", "x"),
        ("rope_theta", "x"),
    ],
)
def test_malformed_scaling_is_named(key, value):
    with pytest.raises(BadArtefact, match=rf"config\.json: '{key}' is"):
        spec_from_config(DEEPSEEK | {"rope_scaling": YARN | {key: value}})


def test_an_exception_of_any_kind_is_a_bad_artefact(monkeypatch):
    monkeypatch.setattr("undistilled.model.spec._common", lambda config: 1 // 0)
    with pytest.raises(BadArtefact, match=r"config\.json makes no sense"):
        spec_from_config(LLAMA)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "model_type", "max_position_embeddings"])
def test_a_missing_key_is_missing(key):
    with pytest.raises(BadArtefact, match=f"{key!r} is missing"):
        spec_from_config(without(LLAMA, key))


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_missing_keys_of_experts(kind):
    keys = ("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace", "n_shared_experts")
    moe = spec_from_config(without(DEEPSEEK | {"model_type": kind}, *keys)).moe
    theirs = transformers.AutoConfig.for_model(kind)
    assert (moe.groups, moe.top_groups) == (theirs.n_group or 1, theirs.topk_group or 1)
    assert moe.scale == theirs.routed_scaling_factor and moe.shared == theirs.n_shared_experts
    assert moe.first_dense == theirs.first_k_dense_replace
    moe = spec_from_config(DEEPSEEK | {"model_type": kind} | dict.fromkeys(keys)).moe
    assert (moe.groups, moe.top_groups, moe.scale, moe.first_dense, moe.shared) == (1, 1, 1.0, 0, 0)


def test_missing_keys_of_dense_models():
    wide = without(LLAMA | {"num_attention_heads": 32, "hidden_size": 1024}, "num_key_value_heads")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        theirs = transformers.AutoConfig.for_model(kind, num_attention_heads=32, hidden_size=1024)
        spec = spec_from_config(wide | {"model_type": kind})
        assert spec.kv_heads == theirs.num_key_value_heads
        assert spec.head_dim == (getattr(theirs, "head_dim", None) or 32)
        null = spec_from_config(wide | {"model_type": kind, "num_key_value_heads": None, "head_dim": None})
        assert (null.kv_heads, null.head_dim) == (32, 32)
    long = LLAMA | {"max_position_embeddings": 9000}
    assert spec_from_config(long | {"model_type": "mistral"}).max_context == 4096
    assert spec_from_config(long | {"model_type": "mistral", "sliding_window": None}).max_context == 9000
    assert spec_from_config(long).max_context == 9000


@pytest.mark.parametrize("truncate", [None, True, False])
def test_yarn_truncate(truncate):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4}
    scaling |= {} if truncate is None else {"truncate": truncate}
    ours, factor = frequencies(spec_from_config(LLAMA | {"head_dim": 64, "rope_scaling": scaling}).rope)
    config = transformers.LlamaConfig(
        **LLAMA | {"head_dim": 64, "rope_parameters": scaling | {"rope_theta": 10000.0}, "rope_scaling": None}
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    torch.testing.assert_close(ours, theirs)
    assert factor == pytest.approx(their_factor)


def test_a_gguf_file_cut_within_its_header_is_truncated(tmp_path: Path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(BadArtefact, match=r"truncated.*Download it again"):
        GGUFFile(path)
    path.write_bytes(json.dumps({}).encode() * 20)
    with pytest.raises(BadArtefact, match=r"not a GGUF file"):
        GGUFFile(path)
