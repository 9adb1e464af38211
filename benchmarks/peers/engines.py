"""The table of engines: what each is called, where it runs, by which program, on which form of the model."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from environments import program
from models import folder, gguf_file, onnx_folder, openvino_folder, quantized

HERE = Path(__file__).parent


class Engine(NamedTuple):
    environment: str  # "" is this one
    runner: str
    model: Callable[[Path, str], object]  # makes it where it is not there
    form: str
    suffix: str = ""


def _named(_: Path, scheme: str) -> str:
    return scheme


ENGINES = {
    "ours bf16": Engine("", "ours", _named, "bf16"),
    "llama.cpp BF16": Engine("llama", "llama", gguf_file, "BF16"),
    "transformers bf16": Engine("", "transformers", folder, ""),
    "transformers fp32": Engine("", "transformers", folder, "", ":float32"),
    "ours int8": Engine("", "ours", _named, "int8"),
    "ours int8-g128": Engine("", "ours", _named, "int8-g128"),
    "ours int8, a8": Engine("", "ours", _named, "int8", ":int8"),
    "llama.cpp Q8_0": Engine("llama", "llama", gguf_file, "Q8_0"),
    "ONNX Runtime int8": Engine("onnx", "onnx", onnx_folder, "int8"),
    "OpenVINO int8": Engine("openvino", "openvino", openvino_folder, "int8"),
    "ours int4": Engine("", "ours", _named, "int4"),
    "ours int4, calibrated": Engine("", "ours", quantized, "int4,head=int4"),
    "ours int4, calibrated, a8": Engine("", "ours", quantized, "int4,head=int4", ":int8"),
    "ours q4_0": Engine("", "ours", _named, "int4-g32-sym,head=int4-g32-sym"),
    "ours q4_0, a8": Engine("", "ours", _named, "int4-g32-sym,head=int4-g32-sym", ":int8"),
    "llama.cpp Q4_0": Engine("llama", "llama", gguf_file, "Q4_0"),
    "ONNX Runtime int4": Engine("onnx", "onnx", onnx_folder, "int4"),
    "OpenVINO int4": Engine("openvino", "openvino", openvino_folder, "int4"),
}
RIVALS = {  # whom each of ours is compared with
    "ours bf16": ("llama.cpp BF16", "transformers bf16", "transformers fp32"),
    "ours int8": ("llama.cpp Q8_0", "ONNX Runtime int8", "OpenVINO int8"),
    "ours int8-g128": ("llama.cpp Q8_0", "ONNX Runtime int8", "OpenVINO int8"),
    "ours int8, a8": ("ours int8", "llama.cpp Q8_0", "ONNX Runtime int8", "OpenVINO int8"),
    "ours q4_0": ("llama.cpp Q4_0", "ONNX Runtime int4", "OpenVINO int4"),
    "ours q4_0, a8": ("ours q4_0", "llama.cpp Q4_0", "ONNX Runtime int4", "OpenVINO int4"),
    "ours int4": ("llama.cpp Q4_0", "ONNX Runtime int4", "OpenVINO int4"),
    "ours int4, calibrated": ("llama.cpp Q4_0", "ONNX Runtime int4", "OpenVINO int4"),
    "ours int4, calibrated, a8": ("llama.cpp Q4_0", "ONNX Runtime int4", "OpenVINO int4"),
}
ORIGINAL = ENGINES["transformers fp32"]  # the BF16 weights with float32 products


def call(engine: Engine, peers: Path, threads: int, *more: object) -> str:
    """What an engine's program prints; SystemExit where it fails."""
    model = f"{engine.model(peers, engine.form)}{engine.suffix}"
    argv = [program(peers, engine.environment), HERE / f"run_{engine.runner}.py", model, "--threads", threads, *more]
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine.runner} {engine.form} failed: {done.stderr[-800:]}")
    return done.stdout


def rates(engine: Engine, peers: Path, threads: int) -> dict[str, float]:
    """Tokens a second, see measured.py."""
    return json.loads(call(engine, peers, threads).splitlines()[-1])


def logits(engine: Engine, peers: Path, threads: int, tokens: list[int]):
    """[T, V] in float32."""
    import numpy

    with tempfile.TemporaryDirectory() as room:
        text, out = Path(room) / "text.json", Path(room) / "logits.npy"
        text.write_text(json.dumps(tokens))
        call(engine, peers, threads, "--text", text, "--logits", out)
        return numpy.load(out)
