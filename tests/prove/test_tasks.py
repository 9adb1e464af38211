import gzip
import json
import math

import pytest
import toy

from undistilled.checkpoint.tokenizer import Tokenizer
from undistilled.errors import BadArtefact, UsageError
from undistilled.prove import interval, tasks

GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


def test_reads_both_forms_and_the_limit(tmp_path):
    plain, packed = tmp_path / "q.jsonl", tmp_path / "z.jsonl.gz"
    plain.write_text("\n".join(json.dumps(GOOD) for _ in range(5)) + "\n\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [len(tasks.read_task(f).questions) for f in (plain, packed)] == [5, 5]
    assert tasks.read_task(packed, 2).name == "z" and len(tasks.read_task(packed, 2).questions) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "q.jsonl").write_text(plain.read_text())
    with pytest.raises(UsageError, match="'q'"):
        tasks.read_tasks([plain, other / "q.jsonl"])


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "3",
        "[" * 100_000,
        '{"context": "a"}',
        json.dumps(GOOD | {"answer": 2}),
        json.dumps(GOOD | {"answer": True}),
        json.dumps(GOOD | {"answer": -1}),
        json.dumps(GOOD | {"choices": ["b"]}),
        json.dumps(GOOD | {"choices": ["b", ""]}),
        json.dumps(GOOD | {"choices": "bc"}),
        json.dumps(GOOD | {"context": ""}),
        json.dumps(GOOD | {"context": 3}),
    ],
)
def test_a_malformed_line_is_named(tmp_path, bad):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + bad + "\n")
    with pytest.raises(BadArtefact, match=r"bad\.jsonl: line 2: "):
        tasks.read_task(file)


def test_files_that_are_none(tmp_path):
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 500)[:-20])
    fake = tmp_path / "fake.jsonl.gz"
    fake.write_text("not gzip")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for file in (cut, fake, binary, empty, tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(BadArtefact, match=file.name):
            tasks.read_task(file)


def test_a_file_that_cannot_be_opened_has_no_line(tmp_path):
    for file in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(BadArtefact) as caught:
            tasks.read_task(file)
        assert "line" not in caught.value.message.removeprefix(str(file))


def test_encoding_is_bos_context_and_what_the_choice_adds(folder):
    tokenizer = Tokenizer.from_folder(folder)
    question = tasks.Question(1, "One plus <bos>", ("two", "three"), 0)
    found = tasks.encode(question, tokenizer)
    assert found.context[0] == tokenizer.bos and tokenizer.bos not in found.context[1:]
    assert [tokenizer.decode(c) for c in found.choices] == [" two", " three"]
    assert found.lengths == [3, 5]
    task = tasks.Task("t", "", [question])
    with pytest.raises(UsageError, match="t, line 1: "):
        tasks.encode_task(task, tokenizer, 10)


class Fixed:
    """A scorer that gives each choice minus its number of tokens, plus a bonus."""

    def choice_loglikelihoods(self, context, choices):
        return [-10.0 if c == [9] else -12.0 for c in choices]


def test_likelihood_is_by_character_and_the_first_of_equals_wins():
    by_length = tasks.Encoded([1], [[9], [8]], [2, 6])  # -5 and -2 a character
    equal = tasks.Encoded([1], [[8], [8]], [6, 6])
    assert list(tasks.answers(Fixed(), [by_length, equal])) == [1, 0]


def test_paired_figures():
    task = tasks.Task("t", "x", [tasks.Question(i, "a", ("b", "c"), 0) for i in range(10)])
    found = tasks.compare(task, [0] * 8 + [1] * 2, [0] * 6 + [1] * 3 + [0])
    assert (found["original"], found["plan"], found["n"]) == (0.8, 0.7, 10)
    assert (found["gained"], found["lost"]) == (1, 2) and found["difference"] == pytest.approx(-0.1)
    assert found["kept"] == pytest.approx(0.875) and found["chance"] == pytest.approx(0.5)
    assert found["difference_interval"][0] < -0.1 < found["difference_interval"][1]
    assert found["mcnemar_p"] == pytest.approx(1.0)
    assert tasks.compare(task, [1] * 10, [0] * 10)["kept"] is None


def test_intervals_against_known_values():
    assert interval.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert [interval.wilson(0, 10)[0], interval.wilson(10, 10)[1]] == pytest.approx([0, 1])
    assert [interval.t_quantile(v) for v in (7, 10, 30)] == pytest.approx([2.3646, 2.2281, 2.0423], rel=4e-3)
    assert interval.mcnemar(2, 10) == pytest.approx(0.03857, abs=1e-5)
    assert interval.mcnemar(700, 800) == pytest.approx(0.0106, abs=1e-3)
    assert interval.paired(0, 0, 100)[0] < 0 < interval.paired(0, 0, 100)[1]
    mean, error = interval.mean_and_error([1.0, 2.0, 4.0], [1, 1, 1])
    assert (mean, error) == pytest.approx((7 / 3, math.sqrt(7 / 3 / 3)))
    assert interval.mean_and_error([1.0], [5]) == (0.2, None)


def test_real_model_answers(folder, tmp_path):
    import tiny
    from undistilled.prove.score import Scorer

    scorer = Scorer(*tiny.load(folder, scheme="fp32", context=128, batch=1))
    encoded = tasks.encode_task(tasks.read_task(toy.task_file(tmp_path)), Tokenizer.from_folder(folder), 128)
    direct = []
    for e in encoded:
        scores = []
        for choice, length in zip(e.choices, e.lengths, strict=True):
            logprobs = scorer.logits(e.context + choice).log_softmax(-1)
            scores.append(sum(logprobs[len(e.context) - 1 + i, t].item() for i, t in enumerate(choice)) / length)
        direct.append(scores.index(max(scores)))
    assert list(tasks.answers(scorer, encoded)) == direct
