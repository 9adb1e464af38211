"""From text to token ids and back. Reads JSON only: no code of a checkpoint runs, nothing is unpickled."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import BadArtefact
from .detokenizer import Detokenizer


class Tokenizer:
    """A `tokenizers.Tokenizer`, and what the model's files say beside it.

    bos: begins a prompt, where `add_bos`; eos_ids: ids that end an answer; chat_template: Jinja source;
    generation: generation_config.json (temperature, top_p, ...).
    Control tokens are the added tokens that are not mere white space: roles, `</think>`, tool marks.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        bos: int | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.bos, self.eos_ids, self.add_bos = bos, tuple(eos_ids), add_bos
        self.chat_template, self.generation = chat_template, generation or {}
        added = tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._special = {id for id, token in added.items() if token.special}
        self.control = {text: id for id, text in self._added.items() if text.strip()}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder. BadArtefact where a file is missing or malformed."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise BadArtefact(
                f"{folder} has no tokenizer.json.",
                "Copy it from the model's repository; tokenizers that need Python code or pickles are not run.",
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise BadArtefact(f"{file} is not a tokenizer: {error}") from error
        config, generation = _json(folder / "tokenizer_config.json"), _json(folder / "generation_config.json")
        bos = _id(tokenizer, config.get("bos_token"))
        eos = [_id(tokenizer, config.get("eos_token")), *_ids(generation.get("eos_token_id"))]
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = bos is not None and tokenizer.encode("a").ids[:1] == [bos]
        known = tuple(dict.fromkeys(id for id in eos if id is not None))
        return cls(tokenizer, bos, known, bool(add_bos), _chat_template(folder, config), generation)

    def save(self, folder: Path) -> None:
        """The files that `from_folder` reads the same tokenizer from."""
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str())
        named = {"bos_token": self.bos, "eos_token": self.eos_ids[0] if self.eos_ids else None}
        config: dict[str, Any] = {k: self._tokenizer.id_to_token(id) for k, id in named.items() if id is not None}
        config |= {"add_bos_token": self.add_bos, "tokenizer_class": "PreTrainedTokenizerFast"}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        generation = self.generation | {"eos_token_id": list(self.eos_ids)}
        for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, state: dict[str, Any]) -> Tokenizer:
        """The tokenizer that `dump` wrote."""
        return cls(tokenizers.Tokenizer.from_str(state["tokenizer"]), *(state[name] for name in _STATE))

    def dump(self) -> dict[str, Any]:
        """Everything, as JSON types, for another process."""
        return {"tokenizer": self._tokenizer.to_str(), **{name: getattr(self, name) for name in _STATE}}

    @property
    def vocab_size(self) -> int:
        """Ids in use; a model may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, control: bool) -> list[int]:
        """Ids of `text`, without BOS. `control`: whether control tokens in it become their ids or stay text.

        UnicodeEncodeError where `text` has half of a surrogate pair.
        """
        tokenizer = self._tokenizer if control else self._plain
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            text.encode()
            raise
        if not control and not self._control_ids.isdisjoint(ids):
            raise ValueError("plain text came out as a control token")
        return ids

    def encode_prompt(self, text: str, *, control: bool = True) -> list[int]:
        """Ids of a whole prompt: BOS first where the model wants one and the text has none."""
        ids = self.encode(text, control=control)
        return [self.bos, *ids] if self.add_bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def control_in(self, text: str) -> bool:
        """Whether control tokens would come out of `text`, also after the tokenizer's own normalising."""
        if self._control_pattern.search(text):
            return True
        normalizer = self._tokenizer.normalizer
        return normalizer is not None and bool(self._control_pattern.search(normalizer.normalize_str(text)))

    def split_control(self, text: str) -> list[str]:
        """`text` cut around control tokens: even items are between them, odd items are they."""
        return self._control_pattern.split(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        detokenizer = Detokenizer(self, skip_special)
        return detokenizer.push(ids) + detokenizer.flush()

    def token_bytes(self, id: int) -> bytes:
        """What the token stands for, with a word's leading space; b"" for an id that is not in use."""
        text = self._added.get(id)
        if text is not None:
            return text.encode()
        piece = self._tokenizer.id_to_token(id)
        if piece is None:
            return b""
        if self.kind == "bytes":
            return _unescape(piece)
        if self.kind == "pieces":
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
        return piece.encode()

    def token_text(self, id: int) -> str:
        return self.token_bytes(id).decode("utf-8", "replace")

    def is_special(self, id: int) -> bool:
        return id in self._special

    def is_control(self, id: int) -> bool:
        return id in self._control_ids or self.is_special(id)

    @cached_property
    def kind(self) -> str:
        """How pieces join: "bytes" (byte-level BPE), "pieces" (SentencePiece, byte fallback), or "other"."""
        decoder = self._decoder
        parts = [decoder, *decoder.get("decoders", [])]
        if any(part.get("type") == "ByteLevel" for part in parts):
            return "bytes"
        return "pieces" if any(part.get("type") in ("ByteFallback", "Metaspace") for part in parts) else "other"

    @cached_property
    def drops_space(self) -> bool:
        """Whether a text's first space is not part of it."""
        found = json.dumps(self._decoder)
        return self.kind == "pieces" and ('"Strip"' in found or '"Metaspace"' in found)

    @cached_property
    def _decoder(self) -> dict[str, Any]:
        decoder = self._tokenizer.decoder
        return json.loads(decoder.__getstate__()) if decoder is not None else {}

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({_trie(set(self.control))})" if self.control else "((?!))")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer with control tokens renamed to what nobody can write."""
        state = json.loads(self._tokenizer.to_str())
        nonce = secrets.token_hex(16)
        names = {text: f"\0{nonce}:{id}\0" for text, id in self.control.items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename(state["model"], names)
        state["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(state))


_STATE = ("bos", "eos_ids", "add_bos", "chat_template", "generation")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_of_char()


def _unescape(piece: str) -> bytes:
    try:
        return bytes(_BYTES[c] for c in piece)
    except KeyError:
        return piece.encode()


def _trie(words: set[str]) -> str:
    """A regular expression for the longest of `words`; each character of a text is tried against one branch."""
    prefix = os.path.commonprefix(list(words))
    rests = {word[len(prefix) :] for word in words}
    heads = sorted({rest[0] for rest in rests if rest})
    branches = "|".join(_trie({rest for rest in rests if rest[:1] == head}) for head in heads)
    return re.escape(prefix) + (f"(?:{branches})" + "?" * ("" in rests) if branches else "")


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give pieces of a tokenizer's model new names; merges that would build one are dropped."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if isinstance(model.get("merges"), list):
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [pair for pair in pairs if not names.keys() & {pair[0], pair[1], "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadArtefact(f"{file} cannot be read as text: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    """A file's object, {} where there is no file. BadArtefact where it is something else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise BadArtefact(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadArtefact(f"{file} is not a JSON object.")
    return value


def _id(tokenizer: tokenizers.Tokenizer, token: Any) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if isinstance(content, str) else None


def _ids(value: Any) -> list[int]:
    """eos_token_id is an int, a list of ints or absent."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template as a file of its own, or in tokenizer_config.json (alone, or "default" of a list)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
