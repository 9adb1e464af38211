"""SmolLM2 as each engine reads it: all from the BF16 rounding of one file, under benchmarks/.peers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from environments import program
from ggufs import write_gguf

OPENVINO = {"int8": [], "int4": ["--group-size", "64", "--ratio", "1.0"]}  # 576 inputs are no multiple of its usual 128


def folder(peers: Path, _: str = "") -> Path:
    """As transformers reads it."""
    import torch
    from safetensors.torch import save_file

    from undistilled.checkpoint.resolve import find

    path = peers / "transformers"
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    model = find("smollm2")
    source = model.source()
    state = {n: source.dense(n, 0, source.shape(n)[0]).to(torch.bfloat16) for n in source.names()}
    config = {k: v for k, v in model.config.items() if not k.startswith("gguf")}
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    model.tokenizer().save(path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def quantized(peers: Path, scheme: str) -> Path:
    """As `quantize` makes it, calibrated on its built-in text."""
    path = peers / f"ours-{scheme}"
    if not path.exists():
        make = [program(peers, ""), "-m", "undistilled", "quantize", folder(peers), path]
        subprocess.run([*make, "--scheme", scheme, "--traces", "0"], check=True)
    return path


def gguf_file(peers: Path, kind: str) -> Path:
    """With its matrices in a type of GGML's."""
    path = peers / f"smollm2-{kind}.gguf"
    if not path.exists():
        import gguf

        from undistilled.checkpoint.resolve import find

        write_gguf(gguf, gguf.GGUFReader(find("smollm2").path), getattr(gguf.GGMLQuantizationType, kind), path)
    return path


def onnx_folder(peers: Path, precision: str) -> Path:
    """By ONNX Runtime GenAI's model builder."""
    options = ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    make = [program(peers, "onnx"), "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"]
    return _converted(peers, f"onnx-{precision}", [*make, "-i", folder(peers), "-c", peers / "cache"], ["-o"], options)


def openvino_folder(peers: Path, precision: str) -> Path:
    """By optimum-intel."""
    make = [program(peers, "openvino", "optimum-cli"), "export", "openvino", "-m", folder(peers)]
    make += ["--task", "text-generation-with-past", "--weight-format", precision, *OPENVINO[precision]]
    return _converted(peers, f"openvino-{precision}", make, [], [])


def _converted(peers: Path, name: str, command: list, before: list[str], options: list[str]) -> Path:
    path, part = peers / name, peers / f"{name}.part"
    if not path.exists():
        done = subprocess.run([*command, *before, part, *options], capture_output=True, text=True, env=_offline())
        if done.returncode:
            raise SystemExit(f"{command[0]} could not make {name}: {done.stderr[-800:]}")
        os.replace(part, path)
    return path


def _offline() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}
