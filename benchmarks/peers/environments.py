"""Each engine's environment under benchmarks/.peers: what is installed there, and how.

They see this environment's packages behind their own, torch among them: it is never installed again, so that no build
for GPUs comes with it.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

PACKAGES: dict[str, list[list[str]]] = {  # arguments of pip, one call after another
    "llama": [["llama-cpp-python", "numpy"]],
    "onnx": [["onnxruntime-genai", "onnx-ir"]],
    "openvino": [
        ["openvino", "openvino-genai", "nncf", "transformers==5.5.4"],
        ["--no-deps", "optimum", "optimum-intel"],
    ],
}
BUILDING = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}  # of llama.cpp, which takes minutes


def program(peers: Path, name: str, command: str = "python") -> Path:
    """A program of an environment, which is made where there is none; "" is this one."""
    if not name:
        return Path(sys.executable)
    folder = peers / name
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        inside = next((folder / "lib").glob("python*")) / "site-packages"
        (inside / "behind.pth").write_text("\n".join(site.getsitepackages()))
        import torch

        (folder / "torch.txt").write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        for arguments in PACKAGES[name]:
            pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", folder / "torch.txt", *arguments]
            subprocess.run(pip, check=True, env=os.environ | BUILDING)
        (folder / "ready").touch()
    return folder / "bin" / command
