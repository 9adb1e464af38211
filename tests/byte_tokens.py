"""A tokenizer of bytes, with R1's control tokens."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from undistilled.checkpoint.tokenizer import Tokenizer

CONTROL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<think>",
    "</think>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
]


def byte_tokenizer(chat_template: str | None = None, generation: dict | None = None) -> Tokenizer:
    """A token a byte, and R1's control tokens from id 256 on: begin and end are special, the others are not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(CONTROL[:2])
    raw.add_tokens(CONTROL[2:])
    return Tokenizer(raw, 256, (257,), True, chat_template, generation)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of a token a byte, for a checkpoint of 256 tokens or more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.save(str(folder / "tokenizer.json"))
