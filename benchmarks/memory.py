"""Peak memory of loading and running beside the plan's figure, each run in a fresh process.

python benchmarks/memory.py [MODEL ...] [--schemes bf16 int8 int4]
    python benchmarks/memory.py synthetic --schemes fp8_block int8 int4

`synthetic` is a DeepSeek-shaped model of 1.4 GB in FP8 with random weights, written first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from undistilled.checkpoint.resolve import find


def synthetic() -> str:
    """The folder of the DeepSeek-shaped model."""
    from tokenizers import Tokenizer, models

    from streaming import write_shard

    folder = Path(__file__).parent / ".peers" / "deepseek-1gb"
    config = find("deepseek-r1").config | {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "n_routed_experts": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "vocab_size": 8192,
    }
    if not (folder / "model.safetensors").exists():
        write_shard(folder, config)
        Tokenizer(models.WordLevel({f"t{i}": i for i in range(8192)}, "t0")).save(str(folder / "tokenizer.json"))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2"])
    parser.add_argument("--schemes", nargs="*", default=["bf16", "int8", "int4"])
    parser.add_argument("--prompt-tokens", default="512")
    args = parser.parse_args()
    for model in (synthetic() if m == "synthetic" else m for m in args.models):
        for scheme in args.schemes:
            command = [sys.executable, "-m", "undistilled", "bench", model, "--scheme", scheme, "--device", "cpu"]
            command += ["--prompt-tokens", args.prompt_tokens, "--new-tokens", "16", "--repeat", "1", "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            planned = found["predicted"]["bytes"]["cpu"]
            ratio = found["peak_bytes"] / planned
            name = model.rstrip("/").split("/")[-1]
            print(
                f"{name} {scheme}: peak {found['peak_bytes'] / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB, {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
