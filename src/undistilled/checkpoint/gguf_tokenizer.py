"""A `tokenizers` tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

The metadata name the splitting rules only by a word (`tokenizer.ggml.pre`). Rules: llama.cpp's llama-vocab.cpp
and, where it differs, the released tokenizer.json of the family.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from undistilled.errors import BadArtefact

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
MAX_PIECE = 512
"""Characters of the longest piece whose merges are derived: the work is quadratic in it."""
MAX_CHARACTERS = 1 << 23
"""Of all pieces together, likewise; a 256k vocabulary has some two million."""
_NO_TOKEN = (1 << 32) - 1

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Cased letters as DeepSeek's first tokenizer lists them, by code point because some look like others.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
_PUNCTUATION = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_CJK = "4E00-9FA5 800-4E00 AC00-D7FF"
_CJK_KANA = "4E00-9FA5 3040-309F 30A0-30FF"


def _one_of(ranges: str) -> str:
    """A regex class from hexadecimal code points and ranges."""
    parts = ("-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split())
    return f"[{''.join(parts)}]"


_OLD_DEEPSEEK = [r"[\r\n]", rf"\s?{_one_of(_CASED)}+", rf"\s?{_one_of(_PUNCTUATION)}+", r"\s+$", f"{_one_of(_CJK)}+"]
_DIGITS = "digits"
"""Not a pattern: the release uses `Digits`, which counts a few code points beyond \\p{N} as digits."""
SPLITS: dict[str, list[str]] = {
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "llama-bpe": [_WORDS % "{1,3}"],
    "qwen2": [_WORDS % ""],
    "deepseek-llm": [*_OLD_DEEPSEEK, r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", f"{_one_of(_CJK_KANA)}+", _DEEPSEEK_V3],
}
_ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
}


class _Vocabulary:
    """The tokenizer metadata, checked for type, length and range."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.tokens: list[str] = self.list("tokens", str)
        if not self.tokens:
            self.fail("tokens", "is missing or empty")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            self.fail("tokens", f"holds {twice[:60]!r} twice")
        self.types: list[int] = self.list("token_type", int) or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            self.fail("token_type", f"has {len(self.types)} entries for {len(self.tokens)} tokens")

    def fail(self, key: str, what: str) -> NoReturn:
        raise BadArtefact(f"{self.where}: metadata 'tokenizer.ggml.{key}' {what}.", "The tokenizer cannot be rebuilt.")

    def list(self, key: str, kind: type) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or (value and {type(item) for item in value} != {kind}):
            self.fail(key, f"is not a list of {kind.__name__}")
        return value

    def one(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not None and type(value) is not kind:
            self.fail(key, f"is {str(value)[:60]!r}, not {kind.__name__}")
        return value

    def id(self, key: str) -> int | None:
        value = self.one(f"{key}_token_id", int)
        if value is None or value == _NO_TOKEN:
            return None
        if not 0 <= value < len(self.tokens):
            self.fail(f"{key}_token_id", f"is {value}, outside the {len(self.tokens)} tokens")
        return value


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str = "GGUF file") -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, which adds no special tokens by itself, and `special`: bos_id, eos_id, pad_id, unk_id (int
    or None), stop_ids (every end of turn), add_bos, add_eos, chat_template (str or None).

    Text whose bytes the vocabulary lacks is dropped, as the released tokenizers do (SmolLM2 has no token for
    some control characters). Raises BadArtefact, naming the key, for unknown kinds and inconsistent lists.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.one("model", str)
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary)
    else:
        vocabulary.fail("model", f"{str(kind)[:60]!r} is not supported; gpt2 and llama are")
    _add_tokens(tokenizer, vocabulary)
    return tokenizer, _special(vocabulary, kind)


def _pre_name(vocabulary: _Vocabulary) -> str:
    pre = vocabulary.one("pre", str, "default")
    name = _ALIASES.get(pre, pre)
    if name not in SPLITS:
        known = ", ".join(sorted([*SPLITS, *_ALIASES]))
        vocabulary.fail("pre", f"{pre[:60]!r} is not a known pre-tokenizer (known: {known})")
    return name


def _split(pattern: str) -> Any:
    if pattern == _DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    name = _pre_name(vocabulary)
    merges = []
    for index, line in enumerate(vocabulary.list("merges", str)):
        # From position 1, since the left part may itself begin with a space.
        cut = line.find(" ", 1)
        pair = line[:cut], line[cut + 1 :]
        if cut < 0 or any(part not in vocabulary.ids for part in (*pair, "".join(pair))):
            vocabulary.fail("merges", f"has entry {index}, {line[:60]!r}, which does not join two known tokens")
        merges.append(pair)
    # Llama 3's release looks a whole word up before it merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits = [_split(pattern) for pattern in SPLITS[name]]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _derived_merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose union scores best; every split of every piece, best union first."""
    pieces = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == NORMAL}
    if sum(map(len, pieces)) > MAX_CHARACTERS:
        vocabulary.fail("tokens", f"holds more than {MAX_CHARACTERS} characters")
    found = []
    for token, index in pieces.items():
        if len(token) <= MAX_PIECE:
            cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            pairs = [pair for pair in cuts if pair[0] in pieces and pair[1] in pieces]
            pairs.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
            found += [(-scores[index], pair) for pair in pairs]
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    scores = vocabulary.list("scores", float)
    if len(scores) != len(vocabulary.tokens):
        vocabulary.fail("scores", f"has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    unknown = vocabulary.id("unknown")
    if unknown is None:
        unknown = vocabulary.types.index(UNKNOWN) if UNKNOWN in vocabulary.types else 0
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_derived_merges(vocabulary, scores),
        unk_token=vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in vocabulary.types,
    )
    tokenizer = Tokenizer(model)
    prefix = vocabulary.one("add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens are special (left out when decoding so asked); user-defined ones are matched as text."""
    control: list[AddedToken] = []
    user: list[AddedToken] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, USER) and token:
            (control if kind == CONTROL else user).append(AddedToken(token, normalized=False, special=kind == CONTROL))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user)


def _special(vocabulary: _Vocabulary, kind: str) -> dict[str, Any]:
    ends = [vocabulary.id(key) for key in ("eos", "eot", "eom")]
    # llama.cpp's defaults for files that do not say.
    adds_bos = kind == "llama" or _pre_name(vocabulary) == "llama-bpe"
    template = vocabulary.metadata.get("tokenizer.chat_template")
    return {
        "bos_id": vocabulary.id("bos"),
        "eos_id": ends[0],
        "pad_id": vocabulary.id("padding"),
        "unk_id": vocabulary.id("unknown"),
        "stop_ids": sorted({end for end in ends if end is not None}),
        "add_bos": vocabulary.one("add_bos_token", bool, adds_bos),
        "add_eos": vocabulary.one("add_eos_token", bool, False),
        "chat_template": template if isinstance(template, str) else None,
    }
