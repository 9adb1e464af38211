"""Loading: streamed exactly, within its memory, and malformed checkpoints refused by name (faults 10, 12, 13)."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import CONFIGS, load, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.checkpoint.safetensors import read_header
from undistilled.errors import BadArtefact


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "m", CONFIGS["llama"])


def rewrite(folder, edit):
    """Change the header of a checkpoint by hand."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_streaming_in_ranges_is_compressing_whole(folder, monkeypatch):
    import undistilled.load.ranges as module

    whole = {n: p.clone() for n, p in load(folder, scheme="int4")[0].named_parameters()}
    monkeypatch.setattr(module, "RANGE", 1000)
    for name, part in load(folder, scheme="int4")[0].named_parameters():
        assert torch.equal(part, whole[name]), name


def test_shards_read_as_one(folder):
    tensors = load_file(folder / "model.safetensors")
    expected = {n: p.clone() for n, p in load(folder)[0].named_parameters()}
    names = sorted(tensors)
    shards = {f"s{i}.safetensors": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(p, expected[n]) for n, p in load(folder)[0].named_parameters())
    (folder / "s1.safetensors").unlink()
    with pytest.raises(BadArtefact, match=r"s1\.safetensors.*missing"):
        load(folder)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"])
def test_an_index_that_points_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(BadArtefact, match=r"index\.json"):
        load(folder)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", 2**63) + b"{}" * 9,
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_malformed_headers(tmp_path, raw):
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw)
    with pytest.raises(BadArtefact, match=r"x\.safetensors"):
        read_header(file)


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


@pytest.mark.parametrize(
    "edit, names",
    [
        (overlap, "overlap"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 10**12]), "model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[-8, 504]), "model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(shape=[2**40, 2**40]), "model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(shape=[0]), "model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(shape="x"), "model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(dtype="F64"), "F64"),
        (lambda h: h["model.norm.weight"].update(dtype=["F32"]), "model.norm.weight"),
        (lambda h: h["model.norm.weight"].update(dtype=None), "model.norm.weight"),
        (lambda h: h.pop("model.norm.weight"), "model.norm.weight"),
    ],
)
def test_lying_headers_name_the_tensor(folder, edit, names):
    rewrite(folder, edit)
    with pytest.raises(BadArtefact, match=names):
        load(folder)


def test_truncation_names_the_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadArtefact, match=r"model\.safetensors.*truncated"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_nan_and_infinity_name_the_tensor(folder, value, scheme):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadArtefact, match=r"layers\.1\.mlp\.up_proj"):
        load(folder, scheme=scheme)


@pytest.mark.parametrize("scheme", [None, "int4"])
@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_nan_in_fp8_names_the_tensor(tmp_path, scheme, part):
    folder = write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"], fp8=True, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.3.up_proj.{part}"
    tensors[name].view(torch.uint8 if part == "weight" else torch.float32)[0, 0] = (
        127 if part == "weight" else float("nan")
    )
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadArtefact, match=r"experts\.3\.up_proj"):
        load(folder, scheme=scheme)


def test_pickles_are_never_opened(tmp_path, folder):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (exec, ("open('/tmp/undistilled-pwned', 'w')",))

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    code = (
        "from undistilled.checkpoint.resolve import find\n"
        f"try: find({str(folder)!r}).source()\n"
        "except Exception as e: raise SystemExit(e.exit_code)"
    )
    for flags in ([], ["-O"]):
        assert subprocess.run([sys.executable, *flags, "-c", code]).returncode == 3
    with pytest.raises(BadArtefact, match="pickle"):
        find(str(folder / "model.pt"))
    import os

    assert not os.path.exists("/tmp/undistilled-pwned")


def test_code_in_a_checkpoint_is_never_imported(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling_evil.py").write_text("raise SystemExit(99)")
    config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadArtefact, match="auto_map"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "llama"}', '{"model_type": "llama", "hidden_size": -3}']
)
def test_broken_configs(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(BadArtefact, match=r"config\.json"):
        load(folder)


def test_no_model_and_no_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadArtefact, match="HF_HUB_OFFLINE"):
        find("nobody/nothing-here")
    with pytest.raises(BadArtefact, match="smollm2"):
        find("nothing-here")
    for name in ("~nouser/x", "~nouser", "x" * 5000, "a/" + "x" * 5000, "x\0"):
        with pytest.raises(BadArtefact) as error:
            find(name)
        assert name[:20] in str(error.value) or "\0" in name
        assert len(str(error.value)) < 500


def test_an_index_that_is_a_folder(folder):
    (folder / "model.safetensors.index.json").mkdir()
    with pytest.raises(BadArtefact, match=r"index\.json: Is a directory"):
        load(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.extra.weight"])
def test_a_tensor_without_a_place_is_refused(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(4)}, folder / "model.safetensors")
    with pytest.raises(BadArtefact, match="no place"):
        load(folder)


def test_unused_oddities_are_left_alone(folder):
    tensors = load_file(folder / "model.safetensors")
    odd = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "counter": torch.zeros(3, dtype=torch.int64)}
    save_file(tensors | odd, folder / "model.safetensors")
    load(folder)


@pytest.mark.parametrize("scheme", ["fp16", "int4"])
def test_values_beyond_float16_are_refused(folder, scheme):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e7
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadArtefact, match="float16"):
        load(folder, scheme=scheme)
