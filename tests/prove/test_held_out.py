"""Which reasoning questions are held out, and that their own answers are right."""

from itertools import islice

import pytest

from undistilled.prove import suite
from undistilled.prove.levels import LEVELS


@pytest.mark.parametrize("task", LEVELS)
def test_training_and_test_never_share_a_question(task):
    test = {i.question for i in suite.test_items(task, 500)}
    levels = range(len(LEVELS[task]))
    training = {i.question for level in levels for i in islice(suite.stream(task, level, 1, test=False), 500)}
    assert len(test) >= 40 and len(training) >= 40 and not test & training
    assert all(map(suite.held_out, test)) and not any(map(suite.held_out, training))
    for item in suite.test_items(task, 6):
        assert suite.right(item, str(item.entry["answer"])) and not suite.right(item, "no idea")


def test_a_seed_gives_its_questions_and_the_split_needs_none():
    first, again, other = (suite.test_items("gcd", 40, seed) for seed in (3, 3, 4))
    assert first == again and {i.question for i in first} != {i.question for i in other}
    assert len({i.question for i in first}) == 40 and {i.level for i in first} == {0, 1, 2}
    question = first[0].question
    assert suite.held_out(question) and suite.held_out(f"  {question.replace(' ', '  ')}\n")
    names = [f"question {i}" for i in range(16_000)]
    assert sum(map(suite.held_out, names)) == pytest.approx(1000, abs=100)  # 3 standard deviations are 92
