"""Reasoning and answer, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undistilled.serve.reasoning import ReasoningSplitter

CASES = [  # starts inside reasoning, text, reasoning, content
    (True, "hm\n</think>\n\nHo", "hm", "Ho"),
    (True, "\nhm", "hm", ""),
    (True, "a</thin b</think>c", "a</thin b", "c"),
    (True, "</think>c</think>", "", "c</think>"),
    (True, "a\n\nb\n", "a\n\nb\n", ""),
    (True, "a</thi", "a</thi", ""),
    (False, "<think>\nhm\n</think>\n\nHo\n\n", "hm", "Ho\n\n"),
    (False, "\n<think>a</think>", "a", ""),
    (False, "Ho <think>", "", "Ho <think>"),
    (False, "\n\nHo", "", "\n\nHo"),
    (False, "<thi", "", "<thi"),
    (False, "", "", ""),
]


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
def test_any_cut_gives_the_same(case, data):
    inside, text, reasoning, content = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    splitter = ReasoningSplitter(inside)
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = [splitter.push(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert "".join(p.reasoning for p in pieces) == reasoning
    assert "".join(p.content for p in pieces) == content


def test_nothing_is_held_back_without_need():
    splitter = ReasoningSplitter(True)
    assert splitter.push("word").reasoning == "word"
    assert splitter.push("</think>x").content == "x"
    assert splitter.push("<think>").content == "<think>"
