"""Checkpoints of AWQ and GPTQ: their values come out as they went in, and what is odd is refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foreign import awq, gptq, quantised
from logits import our_logits
from tiny import CONFIGS, load, write_checkpoint
from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.errors import BadArtefact

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
TOKENS = torch.randint(2, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def read(source, name, ranges=((0, None),)):
    """(the scheme's values, the dense ones) in float64, put together from ranges of rows."""
    rows, cols = source.shape(name)
    scheme = source.scheme(name)
    by_parts, by_dense = [], []
    for start, stop in ranges:
        stop = rows if stop is None else stop
        by_dense.append(source.dense(name, start, stop))
        if scheme is not None:
            parts = source.parts(name, start, stop)
            by_parts.append(schemes.get(scheme).decompress(parts, (stop - start, cols), torch.float32))
    return (torch.cat(by_parts).double() if by_parts else None), torch.cat(by_dense).double()


CASES = {
    "int4-g32-sym": (gptq, GPTQ, {"symmetric": True}),
    "int4-g64-sym": (gptq, GPTQ | {"group_size": 64}, {"symmetric": True, "group": 64}),
    "int4-sym": (gptq, GPTQ | {"group_size": -1}, {"symmetric": True, "group": 0}),
    "int3-g32-sym": (gptq, GPTQ | {"bits": 3}, {"symmetric": True, "bits": 3}),
    "int2-g32-sym": (gptq, GPTQ | {"bits": 2}, {"symmetric": True, "bits": 2}),
    "int8-g32": (gptq, GPTQ | {"bits": 8}, {"symmetric": True, "bits": 8}),
    "int8": (gptq, GPTQ | {"bits": 8, "group_size": -1}, {"symmetric": True, "bits": 8, "group": 0}),
}


@pytest.mark.parametrize("scheme", CASES)
def test_symmetric_codes_and_scales_are_kept(scheme, tmp_path):
    write, quant, how = CASES[scheme]
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    dense = quantised(folder, write, quant, **how)
    source = find(str(folder)).source()
    for name, expected in dense.items():
        assert source.scheme(name) == scheme
        held, values = read(source, name, ((0, 13), (13, None)))
        assert torch.equal(held, torch.from_numpy(expected).float().double())
        assert torch.equal(values, held)


@pytest.mark.parametrize("write, quant", [(awq, AWQ), (gptq, GPTQ | {"sym": False})], ids=["awq", "gptq"])
def test_a_minimum_is_rounded_to_half_a_unit_of_float16(write, quant, tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    dense = quantised(folder, write, quant)
    source = find(str(folder)).source()
    worst = 0.0
    for name, expected in dense.items():
        held, values = read(source, name, ((0, 5), (5, 64), (64, None)) if source.shape(name)[0] > 64 else ((0, None),))
        assert source.scheme(name) == "int4-g32"
        assert torch.equal(values, torch.from_numpy(expected).float().double())
        minimums = source.parts(name, 0, source.shape(name)[0])["minimums"].double().abs().repeat_interleave(32, 1)
        error = (held - values).abs()
        assert (error <= minimums * 2.0**-11 + 1e-7 * values.abs()).all()
        worst = max(worst, float(error.max()))
    assert worst > 0  # it does round


def test_awq_is_what_compressed_tensors_converts(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    quantised(folder, awq, AWQ)
    source, tensors = find(str(folder)).source(), load_file(folder / "model.safetensors")
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for stem in ("model.layers.0.self_attn.k_proj.", "model.layers.2.mlp.down_proj."):
        made = AutoAWQConverter(group_size=32).process({n: t for n, t in tensors.items() if n.startswith(stem)})
        state = {name.removeprefix(stem): tensor for name, tensor in made.items()}
        state["weight_scale"] = state["weight_scale"].float()
        theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
        assert torch.equal(source.dense(stem + "weight", 0, theirs.shape[0]), theirs)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2"])
def test_a_model_loads_and_answers(name, tmp_path):
    config = CONFIGS[name] | {"torch_dtype": "float16"}
    folder = write_checkpoint(tmp_path / "m", config, dtype=torch.float16)
    dense = quantised(folder, awq, AWQ | {"modules_to_not_convert": ["o_proj"]}, skip=["o_proj"])
    decoder, plan = load(folder, scheme=None, dtype="float32")
    kinds = {row.scheme for row in plan.rows if row.role.startswith(("attention", "expert", "dense", "shared"))}
    assert kinds == {"int4-g32", "fp16"} and plan.scheme == "mixed"
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in ("qweight", "qzeros", "scales")}
    kept |= {name: torch.from_numpy(values).float().contiguous() for name, values in dense.items()}
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(kept, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    truth, other = load(plain, scheme="fp32")
    ours, theirs = our_logits(decoder, plan, TOKENS), our_logits(truth, other, TOKENS)
    assert (ours - theirs).norm() / theirs.norm() < 0.01


def test_inputs_in_any_order_load_dense(tmp_path):
    def shuffled(cols):
        return np.random.default_rng(1).permutation(cols) // 32

    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    dense = quantised(folder, gptq, GPTQ | {"desc_act": True}, symmetric=True, index=shuffled)
    source = find(str(folder)).source()
    for name, expected in dense.items():
        assert source.scheme(name) is None
        assert torch.equal(read(source, name)[1], torch.from_numpy(expected).float().double())
    _, plan = load(folder, scheme=None)
    assert {row.scheme for row in plan.rows} == {"fp16", "fp32"}

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadArtefact, match="g_idx"):
        load(folder, scheme=None)


@pytest.mark.parametrize("said, symmetric", [("gptq_v2", True), ("gptq_v2", False), ("gptq", True)])
def test_zero_points_of_the_second_format(said, symmetric, tmp_path):
    """Some symmetric files hold these and say that they hold the first format's."""
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    quant = GPTQ | {"checkpoint_format": said, "sym": symmetric}
    dense = quantised(folder, partial(gptq, added=0), quant, symmetric=symmetric)
    source = find(str(folder)).source()
    for name, expected in dense.items():
        assert torch.equal(read(source, name)[1], torch.from_numpy(expected).float().double())


def test_modules_that_gptq_left_alone(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    dynamic = {r"-:.*\.down_proj": {}}
    quantised(folder, gptq, GPTQ | {"dynamic": dynamic}, symmetric=True, skip=["down_proj"])
    _, plan = load(folder, scheme=None)
    schemes_of = {row.name.split(".")[-2]: row.scheme for row in plan.rows}
    assert schemes_of["down_proj"] == "fp16" and schemes_of["up_proj"] == "int4-g32-sym"


def test_biases_of_zero_are_left_out(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    quantised(folder, gptq, GPTQ, symmetric=True)
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.0.self_attn.o_proj.bias"
    save_file(tensors | {bias: torch.zeros(128, dtype=torch.float16)}, folder / "model.safetensors")
    load(folder, scheme=None)
    save_file(tensors | {bias: torch.ones(128, dtype=torch.float16)}, folder / "model.safetensors")
    with pytest.raises(BadArtefact, match="no place"):
        load(folder, scheme=None)


ODD = {
    "bits": (AWQ | {"bits": 8}, "8 bits"),
    "layout": (AWQ | {"version": "gemv"}, "gemv"),
    "group": (AWQ | {"group_size": 48}, "groups of 48"),
    "method": ({"quant_method": "eetq"}, "eetq"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups"),
    "slow pattern": (GPTQ | {"dynamic": {"-:(.*)*x": {}}}, "regular expression"),
    "nonsense": (GPTQ | {"dynamic": 3}, "sense"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_no_scheme_holds_is_refused_from_the_config(case, tmp_path):
    quant, said = ODD[case]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"quantization_config": quant}))
    with pytest.raises(BadArtefact, match=said):
        find(str(tmp_path))


def _lose(tensors):
    del tensors["model.layers.1.mlp.up_proj.scales"]


def _cut(tensors):
    tensors["model.layers.1.mlp.up_proj.qweight"] = tensors["model.layers.1.mlp.up_proj.qweight"][:8].clone()


def _skew(tensors):
    tensors["model.layers.1.mlp.up_proj.qzeros"] += 1


def _stray(tensors):
    tensors["model.layers.1.mlp.up_proj.g_idx"][3] = 99


DAMAGE = [(_lose, "missing"), (_cut, "expected"), (_skew, "zero point"), (_stray, "g_idx")]


@pytest.mark.parametrize("damage, said", DAMAGE)
def test_damage_is_named(damage, said, tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIGS["llama"] | {"torch_dtype": "float16"}, dtype=torch.float16)
    quantised(folder, gptq, GPTQ, symmetric=True)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadArtefact, match=said):
        load(folder, scheme=None)
