"""A tiny checkpoint with a byte-level tokenizer, and what a bench prints, for the tests of `prove`."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 8
BENCH = {
    "prefill_tokens_per_s": {"median": 900.0, "min": 850.0, "max": 950.0},
    "decode_tokens_per_s": {"median": 40.0, "min": 38.5, "max": 41.0},
    "peak_bytes": 432_100_000,
}


def bench(argv: list[str]) -> str:
    """What `undistilled bench --json` prints."""
    return json.dumps(BENCH)


def checkpoint(folder: Path, name: str = "llama") -> Path:
    """A random checkpoint whose tokens are bytes (and BOS 256)."""
    tiny.write_checkpoint(folder, tiny.CONFIGS[name])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "add_bos_token": True}))
    return folder


def task_file(folder: Path, count: int = 6) -> Path:
    """Questions of two choices."""
    file = folder / "toy.jsonl"
    rows = [
        {"context": f"What comes after {i}?", "choices": [f"{i + 1}.", f"{i}, again."], "answer": i % 2}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
