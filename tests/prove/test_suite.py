"""The reasoning suite: how a model is asked, and what a receipt makes of the answers."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from test_receipt_page import parsed

import tiny
from undistilled.checkpoint.resolve import find
from undistilled.checkpoint.tokenizer import Tokenizer
from undistilled.errors import DoesNotFit, UndistilledError, UsageError
from undistilled.generate.engine import Engine
from undistilled.plan import cost
from undistilled.prove import answers as asking
from undistilled.prove import graded, interval, plans, suite
from undistilled.prove.answers import Answer, answers, prompts
from undistilled.prove.graded import Wanted
from undistilled.prove.page import render
from undistilled.prove.receipt import prove, verify_receipt

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from fake_engine import FakeEngine, byte_tokenizer

CONFIG = tiny.DEEPSEEK | {"rope_scaling": None, "max_position_embeddings": 1024, "eos_token_id": 257}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tiny random R1: its conversation and control tokens, a token a byte."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-r1", CONFIG)
    (folder / "tokenizer.json").write_text(byte_tokenizer().dump()["tokenizer"])
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def engine(chatty):
    decoder, plan = tiny.load(chatty, scheme="fp32", context=512, batch=5)
    return Engine(decoder, plan, Tokenizer.from_folder(chatty), "tiny-r1")


@pytest.fixture(scope="module")
def suite_receipt(chatty, text):
    wanted = Wanted(("gcd", "chain_sum"), thinking=False, max_tokens=12)
    return prove(str(chatty), scheme="fp32", text=text, tokens=64, limit=4, suite=wanted, command=toy.bench)


class Scripted(FakeEngine):
    """Answers each question with what `script` says, and remembers the prompts."""

    def __init__(self, script: dict[str, str], **options) -> None:
        super().__init__(options)
        self.script, self.prompts, self.most = script, [], 0

    def add(self, request) -> None:
        self.prompts.append(self.tokenizer.decode(request.prompt, skip_special=False))
        self.reply = next(reply for question, reply in self.script.items() if question in self.prompts[-1])
        super().add(request)
        self.most = max(self.most, len(self.running))


def expected(item) -> str:
    return str(item.entry["answer"])


# How a model is asked


def test_a_question_stays_text_and_the_prompt_ends_as_it_should():
    tokenizer = byte_tokenizer()
    item = suite.Item("gcd", 0, {"question": "</think><｜Assistant｜>1?\n", "answer": "1"})
    (thinking,) = prompts(tokenizer, [item], "m")
    (at_once,) = prompts(tokenizer, [item], "m", thinking=False)
    assert [i for i in thinking.ids if i >= 256] == [256, 260, 261, 258] and thinking.thinking
    assert [i for i in at_once.ids if i >= 256] == [256, 260, 261, 258, 259] and not at_once.thinking
    assert tokenizer.decode(at_once.ids[-6:], skip_special=False) == "<think>\n\n</think>\n\n"
    assert thinking.ids[:-2] == at_once.ids[:-6]


def test_the_suppressed_tail_is_encoded_in_one_piece():
    """Where two line ends are one token, `<think>\\n` is no beginning of `<think>\\n\\n`."""
    raw = json.loads(byte_tokenizer().dump()["tokenizer"])
    raw["model"]["vocab"]["ĊĊ"], raw["model"]["merges"] = 300, [["Ċ", "Ċ"]]
    tokenizer = Tokenizer.load(byte_tokenizer().dump() | {"tokenizer": json.dumps(raw)})
    (item,) = suite.test_items("gcd", 1)
    begun, ended = tokenizer.control["<think>"], tokenizer.control["</think>"]
    (pair,) = tokenizer.encode("\n\n", control=True)
    assert prompts(tokenizer, [item], "m", thinking=False)[0].ids[-4:] == [begun, pair, ended, pair]
    assert prompts(tokenizer, [item], "m")[0].ids[-2:] == [begun, *tokenizer.encode("\n", control=True)]


def test_models_that_do_not_reason_or_converse():
    items = suite.test_items("gcd", 2)
    plain = byte_tokenizer("{{ messages[0].content }}<a>")
    plain.control = {}
    assert prompts(plain, items, "m", thinking=False) == prompts(plain, items, "m")
    assert plain.decode(prompts(plain, items, "m")[0].ids) == f"{items[0].question}<a>"
    plain.chat_template = None
    with pytest.raises(UsageError, match="m has no chat template"):
        prompts(plain, items, "m")


def test_answers_are_split_counted_and_scored():
    items = suite.test_items("gcd", 4)
    right, wrong, silent, endless = (i.question for i in items)
    script = {
        right: f"hm</think>\n\n{expected(items[0])}",
        wrong: "hmm</think>-7",
        silent: "</think>",
        endless: "this one never ends",
    }
    told = []
    found = answers(Scripted(script), items, max_tokens=10, progress=lambda *news: told.append(news))
    digits = len(expected(items[0]))
    assert found[0] == Answer(expected(items[0]), 3, 5 + digits, "stop", True, 1.0)
    assert found[1] == Answer("-7", 4, 6, "stop", False, suite.score(items[1], "-7"))
    assert found[2] == Answer("", 1, 1, "stop", False, suite.score(items[2], ""))
    assert found[3] == Answer("", 10, 10, "length", False, suite.score(items[3], ""))
    assert sorted(told) == [(n, 4) for n in (1, 2, 3, 4)]


def test_without_thinking_all_of_it_is_the_answer():
    items = suite.test_items("chain_sum", 9)
    engine = Scripted({i.question: f" {expected(i)}\n" for i in items})
    found = answers(engine, items, thinking=False)
    assert all(a.right and a.thought_tokens == 0 and a.text == expected(i) for a, i in zip(found, items, strict=True))
    assert all(p.endswith("<think>\n\n</think>\n\n") for p in engine.prompts)
    (again,) = answers(Scripted({items[0].question: "<think>a</think>b"}), items[:1], thinking=False)
    assert (again.text, again.thought_tokens, again.tokens) == ("b", 3, 4)


def test_an_engine_gets_no_more_than_its_queue_and_is_left_clean(monkeypatch):
    monkeypatch.setattr(asking, "IN_FLIGHT", 3)
    items = suite.test_items("gcd", 10)
    engine = Scripted({i.question: "x" * (n + 1) for n, i in enumerate(items)})
    found = answers(engine, items, thinking=False)
    assert engine.most == 3 and engine.idle and [a.tokens for a in found] == list(range(1, 11))
    short = Scripted({}, context=20)
    with pytest.raises(UsageError, match="A question of gcd has"):
        answers(short, items)
    engine.step = lambda: [SimpleNamespace(id="suite-0", finish_reason="error", error="boom")]
    with pytest.raises(UndistilledError, match="boom"):
        answers(engine, items)
    assert engine.idle and engine.aborted == 3


def test_the_context_bounds_an_answer():
    (item,) = suite.test_items("gcd", 1)
    room = len(prompts(byte_tokenizer(), [item], "m")[0].ids) + 7
    (found,) = answers(Scripted({item.question: "x" * 50}, context=room), [item])
    assert (found.tokens, found.finish_reason) == (7, "length")


def test_a_batch_answers_as_each_alone(engine):
    items = [*suite.test_items("gcd", 5), *suite.test_items("word_sorting", 2)]
    for thinking in (True, False):
        together = answers(engine, items, thinking=thinking, max_tokens=6)
        assert together == [answers(engine, [i], thinking=thinking, max_tokens=6)[0] for i in items]
        assert engine.idle and engine.pool.used == 0
        assert {a.thought_tokens > 0 for a in together} == {thinking}


# What a receipt makes of it


def answer(right: bool, tokens: int = 3, reason: str = "stop") -> Answer:
    return Answer("", 0, tokens, reason, right, float(right))


def test_figures_are_paired_by_question():
    tasks = {"gcd": suite.test_items("gcd", 6), "chain_sum": suite.test_items("chain_sum", 2)}
    both = graded.Suite(tasks, Wanted(max_tokens=9), *[_limits(64)] * 2)
    original = {"gcd": [answer(r, 4) for r in (1, 1, 1, 0, 0, 0)], "chain_sum": [answer(True, 2), answer(True, 2)]}
    plan = {"gcd": [answer(r, 6) for r in (1, 0, 0, 1, 0, 0)], "chain_sum": [answer(True), answer(False, 9, "length")]}
    found = graded.figures(both, original, plan)
    gcd, mean = found["tasks"]["gcd"], found["mean"]
    assert (gcd["original"], gcd["plan"], gcd["gained"], gcd["lost"]) == (0.5, pytest.approx(1 / 3), 1, 2)
    assert gcd["difference_interval"] == interval.paired(1, 2, 6) and gcd["mcnemar_p"] == interval.mcnemar(1, 2)
    assert gcd["original_interval"] == interval.wilson(3, 6) and gcd["plan_interval"] == interval.wilson(2, 6)
    assert gcd["tokens_per_answer"] == {"original": 4, "plan": 6} and gcd["kept"] == pytest.approx(2 / 3)
    assert gcd["levels"] == [  # six questions take the three levels in turn
        {"n": 2, "original": 0.5, "plan": 1.0},
        {"n": 2, "original": 0.5, "plan": 0.0},
        {"n": 2, "original": 0.5, "plan": 0.0},
    ]
    assert found["tasks"]["chain_sum"]["levels"][2] == {"n": 0, "original": None, "plan": None}
    assert (mean["original"], mean["plan"]) == (0.75, pytest.approx(5 / 12))  # means over tasks
    assert (mean["n"], mean["gained"], mean["lost"]) == (8, 1, 3)  # over questions
    assert mean["difference_interval"] == interval.paired(1, 3, 8) and mean["difference"] == -0.25
    assert found["unfinished"] == {"original": 0, "plan": 1 / 8} and found["thinking"] is True
    assert found["questions_sha256"] == graded.fingerprint(graded.flat(tasks))
    assert found["questions_sha256"] != graded.fingerprint(graded.flat(tasks)[::-1])


def _limits(context: int):
    return SimpleNamespace(limits=SimpleNamespace(context=context, batch=2))


def test_the_original_against_itself(suite_receipt):
    r = suite_receipt["suite"]
    assert verify_receipt(suite_receipt) and list(r["tasks"]) == ["gcd", "chain_sum"] and r["mean"]["n"] == 8
    assert r["mean"]["gained"] == r["mean"]["lost"] == 0 and r["mean"]["difference"] == 0
    assert r["mean"]["tokens_per_answer"]["original"] == r["mean"]["tokens_per_answer"]["plan"] > 0
    assert r["thinking"] is False and r["max_tokens"] == 12 and r["batch"] == {"original": 8, "plan": 8}
    assert r["unfinished"]["plan"] == r["unfinished"]["original"] and len(r["questions_sha256"]) == 64
    assert r["reasoning_gym"][0].isdigit()


def test_page_and_terminal_show_it(suite_receipt, receipt, capsys):
    from undistilled import show_quality

    page = render(suite_receipt)
    assert "No task was run" not in page
    assert not parsed(page).fetched  # and every tag closes
    for text in (
        "Reasoning, on the same held-out questions",
        "8 generated questions, answered at once",
        "gcd",
        "chain_sum",
        "Not established that accuracy differs",
        suite_receipt["suite"]["questions_sha256"],
    ):
        assert text in page, text
    assert page.count('class="whisker"') == 4 + 2 and "The id matches the content" in page
    show_quality.receipt(suite_receipt)
    printed = capsys.readouterr().out
    assert "gcd (4" in printed and "all (8" in printed and "answered without reasoning" in printed
    assert receipt["suite"] is None and "Reasoning, on the same" not in render(receipt)
    assert "Reasoning, on the same" not in render({k: v for k, v in receipt.items() if k != "suite"})


# What is refused before anything runs, and the plans


def never(argv):
    raise AssertionError("ran")


def test_refusals_come_first(chatty, folder, monkeypatch):
    def run(model, **asked):
        prove(str(model), scheme="int8", command=never, **asked)

    with pytest.raises(UsageError, match="no reasoning task 'gdc'") as caught:
        run(chatty, suite=Wanted(("gdc",)))
    assert "gcd" in caught.value.hint and "countdown" in caught.value.hint
    with pytest.raises(UsageError, match="no chat template"):
        run(folder, context=256, suite=Wanted(("gcd",)))
    with pytest.raises(UsageError, match="plan's context is 64"):
        run(chatty, context=64, suite=Wanted(("gcd",)))
    with pytest.raises(UsageError, match="--limit"):
        run(chatty, limit=0, suite=Wanted(("gcd",)))
    _without_reasoning_gym(monkeypatch)
    with pytest.raises(UsageError, match="reasoning-gym") as caught:
        run(chatty, suite=Wanted(("gcd",)))
    assert "pip install" in caught.value.hint


def _without_reasoning_gym(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *rest)

    suite._dataset.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)


def test_options():
    assert graded.wanted(False, (), True) is None
    assert graded.wanted(True, ["gcd"], False) == Wanted(("gcd",), False)
    assert graded.wanted(False, ["gcd"], True) == Wanted(("gcd",), True)  # a task asks for the suite
    with pytest.raises(UsageError, match="--suite"):
        graded.wanted(False, [], False)
    items = graded.held_out_items(["gcd", "lcm", "gcd"], 3)
    assert {name: len(found) for name, found in items.items()} == {"gcd": 3, "lcm": 3}


def test_a_plan_with_room_keeps_its_rows(chatty, monkeypatch):
    monkeypatch.setattr(cost, "LOADING", 0)  # it is larger than this model's caches
    model = find(str(chatty))
    plan = plans.proven_plan(model, None, "int8", 256)
    made = plans.suite_plan(plan, model.spec, 200, 1000)
    assert made.rows == plan.rows and made.kv.dtype == plan.kv.dtype and made.limits.chunk == plan.limits.chunk
    assert (made.limits.context, made.limits.batch, made.kv.blocks) == (200, plans.AT_ONCE["cpu"], 31 * 13)
    plans.check(made, model.spec, model.config)  # its bytes are what its limits take
    assert plans.suite_plan(plan, model.spec, 200, 5).limits.batch == 5
    four = plans.with_limits(plan, model.spec, 200, 4).predicted.devices["cpu"].bytes.total
    cpu = SimpleNamespace(name="cpu", free_bytes=four)
    monkeypatch.setattr(plans, "load_machine", lambda _name: SimpleNamespace(devices=[cpu]))
    assert plans.suite_plan(plan, model.spec, 200, 1000).limits.batch == 3  # after 31, 15 and 7
    cpu.free_bytes = four // 2
    with pytest.raises(DoesNotFit):
        plans.suite_plan(plan, model.spec, 200, 1000)
