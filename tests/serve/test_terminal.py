"""The conversation in the terminal, over an engine without a model."""

from __future__ import annotations

import itertools
import signal

import pytest
from fake_engine import FakeEngine

from undistilled.errors import BadArtefact
from undistilled.schedule.request import Sampling
from undistilled.serve.terminal import Conversation, converse


def test_a_refused_turn_does_not_end_the_session(monkeypatch):
    prompts: list[str] = []
    engine, turns, shown = FakeEngine({}), iter(["Hi", "refuse", "Again", ""]), []
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda r: (prompts.append(engine.tokenizer.decode(r.prompt)), add(r)))
    converse(
        engine,
        system=None,
        max_tokens=50,
        temperature=0.0,
        ask=lambda: next(turns),
        on_text=shown.append,
        on_thought=shown.append,
    )
    text = "".join(shown)
    assert "refused\n" in text and text.count("Hello") == 2
    assert len(prompts) == 3 and "refuse" not in prompts[2] and "Hi" in prompts[2]


def test_a_bad_template_is_refused_at_the_start():
    with pytest.raises(BadArtefact, match="chat template"):
        Conversation(FakeEngine({"chat_template": "{% for i in range(10**9) %}{% endfor %}"}))


def test_a_blank_line_parts_the_reasoning_from_the_answer():
    shown: list[str] = []
    engine = FakeEngine({"reply": "\nx=11\n</think>\n\n11"})
    Conversation(engine).say("Solve", Sampling(max_tokens=50, temperature=0.0), shown.append, shown.append)
    assert "".join(shown) == "x=11\n\n11"


@pytest.fixture
def hearing():
    """Of SIGINT, which whatever started the tests may have had ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def conversed(turns, on_piece):
    """What is shown, and the prompts, of a conversation in which `on_piece` sees what the model says as it comes."""
    shown: list[str] = []
    prompts: list[str] = []
    engine, lines = FakeEngine({}), iter(turns)
    add = engine.add
    engine.add = lambda r: (prompts.append(engine.tokenizer.decode(r.prompt)), add(r))

    def see(text):
        shown.append(text)
        if text.strip():
            on_piece(text)

    how = {"system": None, "max_tokens": 50, "temperature": 0.0, "on_text": see, "on_thought": see}
    converse(engine, ask=lambda: next(lines), **how)
    return "".join(shown), prompts, engine


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(hearing):
    once, before = iter([signal.SIGINT]), signal.getsignal(signal.SIGINT)
    turns = ["Hi", "Again", ""]
    text, prompts, engine = conversed(turns, lambda _: [signal.raise_signal(s) for s in itertools.islice(once, 1)])
    assert text.count("(stopped)") == 1 and text.count("Hello, wörld") == 1  # the other is cut short
    assert "Hi" in prompts[1] and engine.idle and engine.aborted == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_is_ignored_stays_so(hearing):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    text, *_ = conversed(["Hi", ""], lambda _: signal.raise_signal(signal.SIGINT))
    assert "(stopped)" not in text and "Hello, wörld" in text


def test_a_second_ctrl_c_in_an_answer_ends(hearing):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        conversed(["Hi", ""], lambda text: (seen.append(text), signal.raise_signal(signal.SIGINT)))
    assert len(seen) == 2
