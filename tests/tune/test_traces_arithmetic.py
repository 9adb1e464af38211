"""Every step that a thought writes is true, its last line is the answer, and it is short."""

from __future__ import annotations

import ast
import re
from itertools import islice, pairwise
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from undistilled.prove import suite
from undistilled.prove.levels import ARITHMETIC
from undistilled.tune.traces import algebra, arithmetic

TRACES = arithmetic.TRACES | algebra.TRACES
CASES = [(task, level) for task, levels in ARITHMETIC.items() for level in range(len(levels))]
QUESTIONS = 200
NUMBER = re.compile(r"-?\d+")


def items(task: str, level: int) -> list[suite.Item]:
    return list(islice(suite.stream(task, level, 11, test=False), QUESTIONS))


def value(expression: str) -> int:
    """An expression of +, -, *, / (rounded down, as reasoning-gym does) and parentheses."""
    assert re.fullmatch(r"[-+*/()\d]+", expression), expression
    return int(eval(compile(ast.parse(expression.replace("/", "//"), mode="eval"), "thought", "eval")))


def equations(thought: str, answer: str) -> list[tuple[str, str]]:
    """(left, right) of every `=`; labels dropped, an unknown replaced by the answer; `a-b=c-d=e` gives two."""
    found = []
    for step in re.split(r"[\n,]", thought):
        step = re.sub(r"^(\d+:|gcd|lcm|[a-z ]+ (?=\d))", "", step)
        step = re.sub(r"[a-z]", f"({answer})", step)
        found += [(left, right) for left, right in pairwise(step.split("=")) if left]
    return found


def exact(expression: str) -> bool:
    """Whether a lone quotient leaves nothing; True of anything else."""
    quotient = re.fullmatch(r"(\d+)/(\d+)", expression)
    return quotient is None or int(quotient[1]) % int(quotient[2]) == 0


def last(thought: str) -> str:
    """What the last line comes to: its right side, or all of it."""
    return thought.split("\n")[-1].split("=")[-1]


def test_every_task_has_a_trace() -> None:
    assert TRACES.keys() == ARITHMETIC.keys()


@pytest.mark.parametrize(("task", "level"), CASES)
def test_the_answer_is_right_and_is_what_the_thought_ends_with(task: str, level: int) -> None:
    for item in items(task, level):
        thought, answer = TRACES[task](item.entry)
        assert suite.right(item, answer), item.question
        if task == "fraction_simplification":
            assert last(thought).split("/") == re.findall(r"\d+", answer)
        else:
            assert last(thought) == answer.replace(" × ", "*"), thought


@pytest.mark.parametrize(("task", "level"), CASES)
def test_every_equation_is_true(task: str, level: int) -> None:
    checked = 0
    for item in items(task, level):
        thought, answer = TRACES[task](item.entry)
        unknown = answer if task == "simple_equations" else "0"
        for left, right in equations(thought, unknown):
            assert value(left) == int(NUMBER.match(right)[0]), (item.question, thought, left, right)
            assert task == "basic_arithmetic" or exact(left), (thought, left)
            checked += 1
    assert checked > QUESTIONS


@pytest.mark.parametrize(("task", "level"), CASES)
def test_sums_and_remainders_work_on_numbers_that_are_there(task: str, level: int) -> None:
    """The operands of `+` and `-` stand earlier in the question or the thought: none comes out of the blue."""
    if task == "prime_factorization":  # there the products with a prime are not written
        pytest.skip("the multiples of a prime are known by heart")
    for item in items(task, level):
        thought, _ = TRACES[task](item.entry)
        seen = set(re.findall(r"\d+", item.question))
        for step in re.split(r"[\n,]", thought):
            for a, b in re.findall(r"^-?(\d+)[-+]-?(\d+)=", step):
                assert {a, b} <= seen, (item.question, thought, step)
            seen |= set(re.findall(r"\d+", step))


@pytest.mark.parametrize(("task", "level"), CASES)
def test_a_thought_is_short_plain_and_always_the_same(task: str, level: int) -> None:
    lengths = []
    for item in items(task, level):
        thought, answer = TRACES[task](item.entry)
        assert (thought, answer) == TRACES[task](item.entry)
        assert thought.isascii() and thought == thought.strip() and "\n\n" not in thought and "<" not in thought
        assert task == "leg_counting" or " " not in thought
        lengths.append(len(thought))
    assert max(lengths) <= 450
    assert sum(lengths) / QUESTIONS <= (160 if level else 80)


@pytest.mark.parametrize("task", ARITHMETIC)
def test_a_hundred_test_questions_exist(task: str) -> None:
    assert len(suite.test_items(task, 100)) == 100


@pytest.mark.parametrize("level", range(3))
def test_an_expression_keeps_its_value_as_it_shrinks(level: int) -> None:
    for item in items("basic_arithmetic", level):
        thought, answer = TRACES["basic_arithmetic"](item.entry)
        left = [line for line in thought.split("\n") if "=" not in line]
        assert {value(line) for line in left} == {int(answer)}, thought


@pytest.mark.parametrize("level", range(3))
def test_every_prime_up_to_the_root_is_tried(level: int) -> None:
    for item in items("prime_factorization", level):
        thought, _ = TRACES["prime_factorization"](item.entry)
        prime, square, rest = map(int, re.search(r"(\d+)\*\d+=(\d+)>(\d+)", thought).groups())
        assert square > rest
        tried = {int(p) for p in re.findall(r"^(\d+):", thought, re.M)}
        assert tried >= {p for p in range(3, prime) if p != 5 and all(p % d for d in range(2, p))}, thought


@pytest.mark.parametrize("level", range(3))
def test_a_remainder_is_smaller_than_its_prime(level: int) -> None:
    for item in items("prime_factorization", level):
        thought, _ = TRACES["prime_factorization"](item.entry)
        for prime, rest in re.findall(r"^(\d+):.*-\d+=(\d+)$", thought, re.M):
            assert int(rest) < int(prime), thought


def test_the_legs_are_those_of_reasoning_gym() -> None:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    assert arithmetic.LEGS_OF == ANIMALS


WORKED: list[tuple[str, dict[str, Any], str]] = [
    ("chain_sum", {"expression": "48 + 27 - 91"}, "48+27-91 48+27=75 75-91=-16"),
    ("products", {"expression": "347 * 286"}, "347*286 347*200=69400 347*80=27760,69400+27760=97160 "
     "347*6=2082,97160+2082=99242"),
    ("products", {"expression": "6 * 305"}, "6*305 305*6=1830"),
    ("basic_arithmetic", {"expression": "5 - -( 12 * -34 )"}, "5--(12*-34) 12*30=360 12*4=48,360+48=408 "
     "12*-34=-408 5-408 5-408=-403 -403"),
    ("basic_arithmetic", {"expression": "-( -8 / 3 )"}, "-(-8/3) -8/3=-3 3"),
    ("basic_arithmetic", {"expression": "-7"}, "-7"),
    ("gcd", {"numbers": [71, 971]}, "971,71 71*10=710,971-710=261 71*3=213,261-213=48 71-48=23 23*2=46,48-46=2 "
     "2*10=20,23-20=3 3-2=1 gcd=1"),
    ("gcd", {"numbers": [12, 18, 4]}, "18,12 18-12=6 6*2=12 gcd=6 6,4 6-4=2 2*2=4 gcd=2"),
    ("gcd", {"numbers": [9, 9]}, "9,9 9-9=0 gcd=9"),
    ("lcm", {"numbers": [1, 7]}, "7,1 gcd=1 7*1=7 lcm=7"),
    ("prime_factorization", {"number": 2}, "2 2*2=4>2 2"),
    ("prime_factorization", {"number": 77}, "77 3:7+7=14 7:77-70=7-7=0 77/7=11 7*7=49>11 7*11"),
    ("simple_equations", {"equation": "-3*x - 5 = -20"}, "-3*x-5=-20 -20+5=-15 -3*x=-15 3*x=15 3*5=15 x=5"),
    ("simple_equations", {"equation": "0 = 0"}, "0=0"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "metadata", "lines"), WORKED)
def test_a_worked_thought(task: str, metadata: dict[str, Any], lines: str) -> None:
    thought, answer = TRACES[task]({"metadata": metadata, "answer": "as given"})
    assert (thought, answer) == (lines.replace(" ", "\n"), "as given")
