"""A tokenizer as GGUF metadata, the inverse of gguf_tokenizer.py.

GGUF names the rules by which text is split only by a word. The word is found by trying: it is the one with which
gguf_tokenizer.py makes a tokenizer that cuts a sample into the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

from ..errors import BadArtefact, UsageError
from .gguf_tokenizer import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, USER, tokenizer_from_gguf
from .tokenizer import Tokenizer

SAMPLE = (
    "It's 1234567 o'clock, said I; they'LL come at 12:30.\n\n\n  def f(x):\n\treturn x**2 + 0.5  # ¿qué?\r\n"
    "Ünïcödé ǅ naïve café, Größe 東京タワーへ行く 你好，世界。 Привет мир! नमस्ते दुनिया ٣٤٥ Ⅻ ½ 🙂👍🏽 e\u0301 "
    "http://a.b/c?d=e&f=1 <tag> [x] {y} -- ... !!! 'tis A1b2 x_y ​ \u00a0 end   "
)


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a model whose embedding has `rows` rows. UsageError where GGUF cannot say the tokenizer."""
    state = tokenizer.dump()
    raw = tokenizers.Tokenizer.from_str(state["tokenizer"])
    model = json.loads(state["tokenizer"])["model"]
    if model.get("type") != "BPE" or raw.get_vocab_size() > rows:
        raise UsageError(f"GGUF cannot say this tokenizer ({model.get('type')}).", "BPE can be exported.")
    common = _tokens(tokenizer, raw, model, rows) | _special(tokenizer)
    ids = raw.encode(SAMPLE, add_special_tokens=False).ids
    for guess in _guesses(tokenizer, model, common["tokenizer.ggml.tokens"]):
        if _same(common | guess, ids):
            return common | guess
    raise UsageError(
        "GGUF has no word for how this tokenizer splits text.", f"Known: llama (SentencePiece), {', '.join(SPLITS)}."
    )


def _same(metadata: dict[str, Any], ids: list[int]) -> bool:
    try:
        made, _ = tokenizer_from_gguf(metadata)
    except BadArtefact:
        return False
    return made.encode(SAMPLE, add_special_tokens=False).ids == ids


def _guesses(tokenizer: Tokenizer, model: dict[str, Any], tokens: list[str]) -> Iterator[dict[str, Any]]:
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if tokenizer.kind == "bytes":
        for pre in SPLITS:
            merges = [" ".join(pair) for pair in pairs]
            yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
        return
    best: dict[str, float] = {}
    for rank, pair in enumerate(pairs):
        best.setdefault("".join(pair), -float(rank))
    scores = [best.get(token, -1e6) for token in tokens]
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }


def _tokens(tokenizer: Tokenizer, raw: tokenizers.Tokenizer, model: dict[str, Any], rows: int) -> dict[str, Any]:
    """Every row's token and its kind; rows without one are called [PAD...], as llama.cpp's converter does."""
    added = raw.get_added_tokens_decoder()
    tokens, kinds = [], []
    for id in range(rows):
        token = raw.id_to_token(id)
        tokens.append(f"[PAD{id}]" if token is None else token)
        if token is None:
            kinds.append(UNUSED)
        elif token == model.get("unk_token"):
            kinds.append(UNKNOWN)
        elif id in added:
            kinds.append(CONTROL if added[id].special else USER)
        else:
            byte = tokenizer.kind == "pieces" and re.fullmatch("<0x[0-9A-F]{2}>", token)
            kinds.append(BYTE if byte else NORMAL)
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if UNKNOWN in kinds:
        found["tokenizer.ggml.unknown_token_id"] = kinds.index(UNKNOWN)
    return found


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    names = dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False))
    found: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": id for name, id in names.items()}
    if tokenizer.bos is not None:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.bos
    found["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
