"""GGUF files that `export` writes: gguf-py reads the same values, and our reader the same parts."""

import json

import gguf
import numpy as np
import pytest
import torch

from byte_tokens import byte_tokenizer
from logits import our_logits
from tiny import CONFIGS, LLAMA, load, write_checkpoint
from undistilled.checkpoint.export import export
from undistilled.checkpoint.gguf_vocabulary import SAMPLE
from undistilled.checkpoint.resolve import find
from undistilled.compress.run import Request, quantize
from undistilled.errors import UsageError
from undistilled.model.weights import weights

TOKENS = torch.randint(2, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()
ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = CONFIGS | {"llama3": LLAMA | {"rope_scaling": ROPE}}


def compressed(tmp_path, name, scheme):
    source = write_checkpoint(tmp_path / "m", CONFIGS[name], dtype=torch.bfloat16)
    byte_tokenizer("{{ messages }}").save(source)
    quantize(find(str(source)), tmp_path / "q", Request(scheme=scheme, solver="rtn"))
    return find(str(tmp_path / "q"))


def dense(model):
    source = model.source()
    names = [name for w in weights(model.spec) for name in w.tensor_names]
    return {name: source.dense(name, 0, source.shape(name)[0]) for name in names}


CASES = [
    ("llama", "int4-g32-sym,head=int4-g32-sym", "Q4_0"),
    ("qwen2", "int4-g32,head=int4-g32", "Q4_1"),
    ("qwen3", "bf16", "BF16"),
    ("mistral", "fp16", "F16"),
    ("llama3", "int4-g64-sym,head=bf16", "Q4_0"),
    ("llama-tied", "int4-g32-sym,head=int4-g32-sym", "Q4_0"),
]


@pytest.mark.parametrize("name, scheme, kind", CASES)
def test_values_are_kept(name, scheme, kind, tmp_path):
    model, file = compressed(tmp_path, name, scheme), tmp_path / "out.gguf"
    done = export(model, file, "gguf")
    assert done["bytes"] == sum(t.n_bytes for t in gguf.GGUFReader(file).tensors)
    again, before = find(str(file)), dense(model)
    for weight, values in dense(again).items():
        assert torch.equal(values, before[weight]), weight
    assert again.source().inner.dtype("model.layers.0.mlp.up_proj.weight") == kind
    one, plan = load(tmp_path / "q", scheme=None, dtype="float32")
    other, read = load(file, scheme=scheme, dtype="float32")
    error = our_logits(other, read, TOKENS) - our_logits(one, plan, TOKENS)
    assert error.norm() < 1e-5 * our_logits(one, plan, TOKENS).norm()


def test_parts_are_kept_bit_for_bit(tmp_path):
    model, file = compressed(tmp_path, "llama", "int4-g32-sym,attention=int4-g32,head=bf16"), tmp_path / "out.gguf"
    export(model, file, "gguf")
    one, other = model.source(), find(str(file)).source()
    for weight in weights(model.spec):
        name, rows = weight.name, weight.shape[0]
        assert one.scheme(name) == other.scheme(name)
        before, after = one.parts(name, 0, rows), other.parts(name, 0, rows)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[part], after[part]) for part in before)


def test_gguf_py_reads_the_same_values(tmp_path):
    model, file = compressed(tmp_path, "llama", "int4-g32-sym,attention=int4-g32,head=bf16"), tmp_path / "out.gguf"
    export(model, file, "gguf")
    reader, before = gguf.GGUFReader(file), dense(model)
    read = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert np.array_equal(read["blk.1.ffn_up.weight"], before["model.layers.1.mlp.up_proj.weight"].numpy())
    q = torch.from_numpy(read["blk.2.attn_q.weight"]).view(8, 8, 2, 128)  # heads, pairs, halves, inputs
    assert torch.equal(q.transpose(1, 2).reshape(128, 128), before["model.layers.2.self_attn.q_proj.weight"])
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["tokenizer.ggml.tokens"].contents()[256] == "<｜begin▁of▁sentence｜>"


def test_the_tokenizer_comes_with_it(tmp_path):
    model, file = compressed(tmp_path, "llama", "bf16"), tmp_path / "out.gguf"
    export(model, file, "gguf")
    one, other = model.tokenizer(), find(str(file)).tokenizer()
    for text in (SAMPLE, "a <think> b"):
        assert one.encode(text, control=True) == other.encode(text, control=True)
    assert (one.bos, one.eos_ids, one.add_bos, one.chat_template) == (256, (257,), True, "{{ messages }}")
    assert (other.bos, other.eos_ids, other.add_bos, other.chat_template) == (256, (257,), True, "{{ messages }}")


def test_eight_bits_go_over_where_their_scales_are_float16(tmp_path):
    model = compressed(tmp_path, "llama", "int8-g32,head=bf16")
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.q_proj\.weight, int8-g32, has float32 scales"):
        export(model, tmp_path / "out.gguf", "gguf")
    assert not list(tmp_path.glob("out*"))
    done = export(model, tmp_path / "out.gguf", "gguf", dense=True)
    assert len(done["dense"]) == 21 and done["schemes"] == {"bf16": 23, "fp32": 7}


def test_eight_bits_of_a_gguf_stay(tmp_path):
    model, first, second = compressed(tmp_path, "llama", "bf16"), tmp_path / "a.gguf", tmp_path / "b.gguf"
    export(model, first, "gguf")
    reader = gguf.GGUFReader(first)
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")) and field.contents() != []:
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        quant = gguf.GGMLQuantizationType.Q8_0 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, quant), raw_dtype=quant)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    export(find(str(tmp_path / "q8.gguf")), second, "gguf")
    one, other = (gguf.GGUFReader(file).tensors for file in (tmp_path / "q8.gguf", second))
    assert {t.name: t.data.tobytes() for t in one} == {t.name: t.data.tobytes() for t in other}


REFUSED = [
    ("llama", "nl4-g32", r"layers\.0\.self_attn\.q_proj\.weight, nl4-g32, is a form that no type of GGUF holds"),
    ("deepseek_v3", "bf16", "deepseek_v3"),
    ("llama3-rope", "bf16", "rope scaling"),
]


@pytest.mark.parametrize("name, scheme, said", REFUSED)
def test_what_gguf_cannot_say_is_refused(name, scheme, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        export(compressed(tmp_path, name, scheme), tmp_path / "out.gguf", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_without_a_word_is_refused(tmp_path):
    model = compressed(tmp_path, "llama", "bf16")
    file = tmp_path / "q" / "tokenizer.json"
    state = json.loads(file.read_text())
    state["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(state))
    with pytest.raises(UsageError, match="splits text"):
        export(model, tmp_path / "out.gguf", "gguf")
