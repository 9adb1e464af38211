"""compressed-tensors folders that `export` writes: transformers computes the same, and our reader the same parts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from byte_tokens import byte_tokenizer
from logits import our_logits
from tiny import CONFIGS, load, write_checkpoint
from undistilled.checkpoint.export import export
from undistilled.checkpoint.resolve import find
from undistilled.compress.run import Request, quantize
from undistilled.errors import BadArtefact, UsageError
from undistilled.model.weights import weights

TOKENS = torch.randint(2, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()
WIDE = {"intermediate_size": 256}  # whole blocks of 128
MTP = {"num_nextn_predict_layers": 1}


def compressed(tmp_path, name, scheme, **changes):
    source = write_checkpoint(tmp_path / "m", CONFIGS[name] | changes)
    byte_tokenizer().save(source)
    quantize(find(str(source)), tmp_path / "q", Request(scheme=scheme, solver="rtn"))
    return find(str(tmp_path / "q"))


CASES = [
    ("llama", "int4-g32-sym,head=bf16", {}),
    ("llama", "int8", {}),
    ("llama", "int2-g32-sym,attention=int8-g32,head=bf16", {}),
    ("llama-tied", "int4-g32-sym,head=bf16", {}),
    ("llama", "fp8_block", WIDE),
    ("qwen3", "fp8_block,attention=int4-g32-sym,attention.q=bf16,head=bf16", WIDE),
    ("qwen2", "bf16", {}),
    ("deepseek_v3", "int8", {}),
    ("deepseek_v3", "int4-g32-sym,head=bf16", {}),
    ("deepseek_v3", "int8,expert=int4-g32-sym,attention.o=bf16,head=bf16", MTP),
]


@pytest.mark.parametrize("name, scheme, changes", [*CASES, ("deepseek_v3", "mxfp4,head=bf16", {})])
def test_parts_are_kept_bit_for_bit(name, scheme, changes, tmp_path):
    model = compressed(tmp_path, name, scheme, **changes)
    export(model, tmp_path / "out", "compressed-tensors")
    again = find(str(tmp_path / "out"))
    one, other = model.source(), again.source()
    for weight in weights(model.spec):
        assert not again.spec.stored or again.spec.stored[weight.name] == one.scheme(weight.tensor_names[0])
        for tensor in weight.tensor_names:
            assert one.scheme(tensor) == other.scheme(tensor)
            before, after = (source.parts(tensor, 0, weight.shape[0]) for source in (one, other))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[part], after[part]) for part in before)


@pytest.mark.parametrize("name, scheme, changes", CASES)
def test_transformers_computes_the_same(name, scheme, changes, tmp_path):
    """It multiplies experts in the dtype of their scales: float16 for 4 bits, float32 for 8."""
    theirs, model = opened(tmp_path, name, scheme, changes, torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    decoder, plan = load(model.path, scheme=None, dtype="float32", kv="float32")
    error = (our_logits(decoder, plan, TOKENS) - expected).norm() / expected.norm()
    halved = model.spec.moe and theirs.model.layers[2].mlp.experts.down_proj.dtype == torch.float16
    assert error < (1e-3 if halved else 1e-5)


@pytest.mark.parametrize("name, scheme", [("mistral", "mxfp4,head=bf16"), ("deepseek_v3", "mxfp4,head=bf16")])
def test_transformers_has_the_same_weights_in_bf16(name, scheme, tmp_path):
    """Codes of MXFP4 come out in BF16 whatever the model's dtype."""
    theirs, model = opened(tmp_path, name, scheme, {}, torch.bfloat16)
    with torch.inference_mode():
        assert theirs(torch.tensor([TOKENS])).logits.isfinite().all()  # which unpacks them
    source, found = model.source(), dict(theirs.named_parameters())
    for weight in [w for w in weights(model.spec) if w.is_linear]:
        ours = torch.stack([source.dense(n, 0, weight.shape[0]) for n in weight.tensor_names])
        if weight.experts:
            stem, part = weight.name.split("*.")
            stacked = found[stem + ("down_proj" if part.startswith("down") else "gate_up_proj")]
            half = {"gate": slice(0, 128), "up": slice(128, 256), "down": slice(None)}[part.split("_")[0]]
            assert torch.equal(stacked[:, half].float(), ours)
        else:
            assert torch.equal(found[weight.name].float(), ours[0])


def opened(tmp_path, name, scheme, changes, dtype):
    """(transformers' model of the export, ours)."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import transformers

    export(compressed(tmp_path, name, scheme, **changes), tmp_path / "out", "compressed-tensors")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    unexpected = {key for key in info["unexpected_keys"] if not key.startswith("model.layers.3.")}  # MTP, as in R1
    assert not info["missing_keys"] and not unexpected and not info["mismatched_keys"]
    return theirs.eval(), find(str(tmp_path / "out"))


REFUSED = [
    ("llama", "nl4-g32", {}, r"layers\.0\.self_attn\.q_proj\.weight, nl4-g32, is a form .* no word for"),
    ("llama", "int4-g32", {}, "int4-g32, is a form"),
    ("llama", "int4-g64-sym,head=bf16", {}, "down_proj.weight, int4-g64-sym, has 224 inputs"),
    ("llama-tied", "int8", {}, "embed_tokens.weight, int8, is an embedding"),
    ("deepseek_v3", "bf16,expert=fp8_block", {}, "experts in FP8 blocks"),
    ("deepseek_v3", "int8,expert.down=int4-g32-sym", {}, "several forms"),
    ("deepseek_v3", "int8,expert=bf16", {}, "plain where other layers are not"),
]


@pytest.mark.parametrize("name, scheme, changes, said", REFUSED)
def test_what_the_format_cannot_say_is_refused(name, scheme, changes, said, tmp_path):
    model = compressed(tmp_path, name, scheme, **changes)
    with pytest.raises(UsageError, match=said) as error:
        export(model, tmp_path / "out", "compressed-tensors")
    assert "--scheme" in error.value.hint
    assert not list(tmp_path.glob("out*"))


def test_dense_writes_what_the_format_cannot_say_as_bf16(tmp_path):
    model = compressed(tmp_path, "llama", "nl4-g32,attention=int4-g32-sym,head=bf16")
    done = export(model, tmp_path / "out", "compressed-tensors", dense=True)
    assert len(done["dense"]) == 9 and all(".mlp." in name for name in done["dense"])
    one, other, name = model.source(), find(str(tmp_path / "out")).source(), "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(one.dense(name, 0, 224).bfloat16().float(), other.dense(name, 0, 224))


def test_odd_requests_are_named(tmp_path):
    model = compressed(tmp_path, "llama", "bf16")
    with pytest.raises(UsageError, match="Unknown format 'onnx'"):
        export(model, tmp_path / "out", "onnx")
    with pytest.raises(UsageError, match="exists"):
        export(model, tmp_path / "q", "compressed-tensors")
    for form in ("compressed-tensors", "gguf"):
        with pytest.raises(UsageError, match="missing is no folder"):
            export(model, tmp_path / "missing" / "out", form)
    with pytest.raises(UsageError, match="no weights"):
        export(find("deepseek-r1"), tmp_path / "out", "compressed-tensors")


def packed_args(**changes):
    args = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32} | changes
    group = {"targets": ["Linear"], "weights": args}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize("bits, symmetric", [(4, False), (4, True), (3, True), (8, True), (6, False)])
def test_what_compressed_tensors_packs_is_read(bits, symmetric, tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationScheme

    quant = packed_args(num_bits=bits, symmetric=symmetric) | {"ignore": ["lm_head", "re:.*o_proj"]}
    scheme = QuantizationScheme(**quant["config_groups"]["group_0"], format="pack-quantized")
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    config = CONFIGS["llama"] | {"torch_dtype": "float16"}
    folder = write_checkpoint(tmp_path / "m", config, dtype=torch.float16)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    half = 1 << (bits - 1)
    for name in [w.name for w in weights(find(str(folder)).spec) if w.is_linear and "o_proj" not in w.name]:
        weight = tensors.pop(name).float()
        scales = (weight.unflatten(-1, (-1, 32)).abs().amax(-1) / half).half().float()
        zeros = torch.zeros_like(scales).char() if symmetric else torch.randint(-half, half, scales.shape).char()
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        packed = compressor.compress(state, scheme)
        expected[name] = compressor.decompress(packed, scheme)["weight"]
        stem = name.removesuffix("weight")
        tensors |= {stem + part: value.half() if part == "weight_scale" else value for part, value in packed.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quant}))
    source = find(str(folder)).source()
    assert source.scheme("model.layers.0.self_attn.o_proj.weight") == "fp16"
    for name, values in expected.items():
        assert torch.equal(source.dense(name, 0, values.shape[0]), values)
        form, sign = ("int8-g32", "") if bits == 8 else (f"int{bits}-g32", "-sym" if symmetric else "")
        assert source.scheme(name) == form + sign
    load(folder, scheme=None)
    if not symmetric:
        tensors.pop("model.layers.1.mlp.up_proj.weight_zero_point")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        with pytest.raises(BadArtefact, match="weight_zero_point' is missing"):
            load(folder, scheme=None)


ODD = [
    (packed_args(actorder="group"), "compressed-tensors"),
    (packed_args(strategy="tensor"), "tensor"),
    (packed_args(num_bits=7), "7 bits"),
    (packed_args() | {"format": "marlin-24"}, "marlin-24"),
    (packed_args(type="float", strategy="channel") | {"format": "float-quantized"}, "4 bits"),
    (packed_args() | {"ignore": ["re:("]}, "no regular expression"),
]


@pytest.mark.parametrize("quant, said", ODD)
def test_what_no_scheme_holds_is_refused_from_the_config(quant, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"quantization_config": quant}))
    with pytest.raises(BadArtefact, match=said):
        find(str(tmp_path))
