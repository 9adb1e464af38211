"""A synthetic shard at R1's widths (FP8, about 4.3 GB) through the loader to INT4: rate and peak memory.

    python benchmarks/streaming.py [--gigabytes 4.3] [--scheme int4] [--folder DIR]

The shard is written first (and kept for the next run). Loading then runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

from undistilled.checkpoint.resolve import find
from undistilled.model.spec import spec_from_config
from undistilled.model.weights import Weight, weights
from undistilled.scheme.fp8_block import BLOCK

LOAD = """
import json, sys, time
from undistilled.checkpoint.resolve import find
from undistilled.load.build import build
from undistilled.memory import peak_bytes
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve
model = find(sys.argv[1])
plan = solve(model.name, model.config, model.spec, load_machine("this"), Ask(sys.argv[2], 128, 1, False, "cpu"))
before, began = peak_bytes(), time.perf_counter()
decoder = build(plan, model.spec, model.source())
seconds = time.perf_counter() - began
cpu = plan.predicted.devices["cpu"].bytes
print(json.dumps(dict(seconds=seconds, peak=peak_bytes(), before=before, weights=cpu.weights, planned=cpu.total)))
"""


def config_for(gigabytes: float, vocab: int = 1024) -> dict:
    """R1's config with one MoE layer, a small vocabulary, and as many experts as fill the shard, R1's at most."""
    r1 = find("deepseek-r1").config
    experts = min(256, max(16, int((gigabytes * 1e9 - 0.25e9) / 44.05e6) // 8 * 8))
    return r1 | {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": experts,
        "vocab_size": vocab,
    }


def write_shard(folder: Path, config: dict) -> None:
    """A checkpoint of random FP8 blocks, written tensor by tensor."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, tensors, offset = {}, [], 0
    pool = torch.randn(1 << 26).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    for w in weights(spec_from_config(config)):
        for name in w.tensor_names:
            for part, dtype, shape, count in parts(w):
                header[name + part] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
                tensors.append((dtype, shape))
                offset += count
    text = json.dumps(header).encode()
    unfinished = folder / "model.part"
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, shape in tensors:
            file.write(random_bytes(torch, dtype, shape, pool))
    unfinished.rename(folder / "model.safetensors")


def parts(w: Weight):
    rows, cols = (w.shape[0], w.shape[-1]) if len(w.shape) == 2 else (1, w.shape[0])
    if w.is_linear:
        blocks = [-(-rows // BLOCK), -(-cols // BLOCK)]
        yield "", "F8_E4M3", [rows, cols], rows * cols
        yield "_scale_inv", "F32", blocks, blocks[0] * blocks[1] * 4
    else:
        dtype, size = ("F32", 4) if w.role == "router_bias" else ("BF16", 2)
        yield "", dtype, list(w.shape), rows * cols * size


def random_bytes(torch, dtype: str, shape: list[int], pool) -> bytes:
    """FP8 values are a stretch of the pool from a random place on: drawing billions takes longer than writing them."""
    if dtype == "F8_E4M3":
        first = int(torch.randint(len(pool), ()))
        return np.resize(np.roll(pool, -first), shape).tobytes()
    if dtype == "F32":
        return (torch.rand(shape) * 0.01 + 1e-4).numpy().tobytes()
    return torch.randn(shape).bfloat16().view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / ".peers" / "r1-wide")
    args = parser.parse_args()
    if not (args.folder / "model.safetensors").exists():
        write_shard(args.folder, config_for(args.gigabytes))
    size = (args.folder / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", LOAD, args.folder, args.scheme], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    over = found["peak"] - found["weights"]
    print(f"read {size / 1e9:.2f} GB in {found['seconds']:.1f} s: {size / found['seconds'] / 1e9:.3f} GB/s")
    print(f"result {found['weights'] / 1e9:.2f} GB, peak {found['peak'] / 1e9:.2f} GB: {over / 1e9:.2f} GB above it")
    print(f"planned {found['planned'] / 1e9:.2f} GB: measured / planned = {found['peak'] / found['planned']:.3f}")


if __name__ == "__main__":
    main()
