"""Tokenizers as GGUF metadata: read back, they cut text into the same tokens."""

import json

import pytest
import tokenizers
from test_gguf_tokenizer import TEXTS, sentencepiece
from tokenizers import models, pre_tokenizers, trainers

from undistilled.checkpoint.gguf_tokenizer import SPLITS, tokenizer_from_gguf
from undistilled.checkpoint.gguf_vocabulary import SAMPLE, vocabulary
from undistilled.checkpoint.tokenizer import Tokenizer
from undistilled.errors import UsageError


def greedy_merges():
    """Merges over the bounds of words, numbers and lines, so that ids tell how a text was split."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    halves = [SAMPLE[at : at + size] for size in (2, 3, 5) for at in range(len(SAMPLE) - size)]
    raw.train_from_iterator(halves, trainers.BpeTrainer(vocab_size=1500, min_frequency=1, initial_alphabet=alphabet))
    model = json.loads(raw.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def same(one, other):
    return all(one.encode(text, control=True) == other.encode(text, control=True) for text in (*TEXTS, SAMPLE))


@pytest.mark.parametrize("pre", SPLITS)
def test_the_word_for_a_split_is_found(pre):
    tokens, merges = greedy_merges()
    metadata = {"model": "gpt2", "pre": pre, "tokens": [*tokens, "<s>", "<tool>"], "merges": merges}
    metadata["token_type"] = [1] * len(tokens) + [3, 4]
    raw, _ = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    before, rows = Tokenizer(raw, len(tokens), (len(tokens),), True), len(tokens) + 7
    found = vocabulary(before, rows)
    assert found["tokenizer.ggml.pre"] == pre and len(found["tokenizer.ggml.tokens"]) == rows
    assert found["tokenizer.ggml.token_type"][len(tokens) :] == [3, 4, 5, 5, 5, 5, 5]
    made, special = tokenizer_from_gguf(found)
    assert (special["bos_id"], special["stop_ids"], special["add_bos"]) == (len(tokens), [len(tokens)], True)
    assert same(before, Tokenizer(made))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix):
    raw, _ = tokenizer_from_gguf(sentencepiece(add_space_prefix=prefix))
    before = Tokenizer(raw, 1, (2,), True)
    found = vocabulary(before, 271)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.unknown_token_id"] == 0
    made, _ = tokenizer_from_gguf(found)
    after = Tokenizer(made)
    assert same(before, after)
    assert before.encode("hello hello", control=True) == after.encode("hello hello", control=True)


def test_more_tokens_than_rows_are_refused():
    raw, _ = tokenizer_from_gguf(sentencepiece())
    with pytest.raises(UsageError, match="tokenizer"):
        vocabulary(Tokenizer(raw), 270)
