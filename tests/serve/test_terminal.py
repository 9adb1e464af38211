"""The conversation in the terminal, over an engine without a model."""

from __future__ import annotations

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
