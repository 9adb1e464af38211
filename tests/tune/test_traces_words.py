"""Thoughts on words, lists, logic and countdown: re-read step by step against the question, scored by reasoning-gym."""

import ast
import re
from itertools import product

import pytest

pytest.importorskip("reasoning_gym")

import reasoning_gym

from undistilled.prove import suite
from undistilled.prove.levels import WORDS
from undistilled.tune.traces import countdown, lists, logic, strings

TRACES = lists.TRACES | strings.TRACES | logic.TRACES | countdown.TRACES
COUNT = 200
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def cases(task):
    """(question, thought, answer) of COUNT questions of each level of a task."""
    for level in range(len(WORDS[task])):
        stream = suite.stream(task, level, 5, test=False)
        for _ in range(COUNT):
            item = next(stream)
            yield item.question, *TRACES[task](item.entry)


def test_every_task_has_a_trace():
    assert TRACES.keys() == WORDS.keys()


@pytest.mark.parametrize("task", sorted(WORDS))
@pytest.mark.parametrize("level", range(3))
def test_answers_are_right_and_thoughts_short(task, level):
    stream, lengths = suite.stream(task, level, 3, test=False), []
    for _ in range(COUNT):
        item = next(stream)
        thought, answer = TRACES[task](item.entry)
        assert suite.score(item, answer) >= suite.RIGHT, (item.question, thought, answer)
        assert thought == thought.strip() and "think>" not in thought
        assert type(thought) is str and type(answer) is str  # not NumPy's
        lengths.append(len(thought))
    assert max(lengths) <= 700 and sum(lengths) / COUNT <= 250


@pytest.mark.parametrize("task", sorted(WORDS))
def test_held_out_questions_of_every_level(task):
    levels = [item.level for item in suite.test_items(task, 100)]
    assert len(levels) == 100 and all(levels.count(level) >= 28 for level in range(3))


def test_number_sorting():
    for question, thought, answer in cases("number_sorting"):
        asked = [float(n) for n in NUMBER.findall(question.splitlines()[0])]
        copied, *groups = thought.split("\n")
        assert [float(n) for n in re.findall(r"[+-][\d.]+", copied)] == asked
        ascending, walked = "ascending" in question, []
        assert [group[0] for group in groups] == sorted({group[0] for group in groups}, reverse=ascending)
        for group in groups:
            buckets = group[1:].split(";")
            assert "".join(b[0] for b in buckets) == "0123456789"[:: 1 if (group[0] == "+") == ascending else -1]
            for tens, _, numbers in (bucket.partition(":") for bucket in buckets):
                assert all(n[0] == tens or n.startswith("100") for n in filter(None, numbers.split(",")))
                walked += [group[0] + n for n in filter(None, numbers.split(","))]
        values = [float(n) for n in walked]
        assert values == sorted(asked, reverse=not ascending) == [float(n) for n in ast.literal_eval(answer)]


def test_number_filtering():
    for question, thought, answer in cases("number_filtering"):
        verb, relation, limit, listed = re.match(
            r"(\w+) all numbers (\w+) than (\S+) in this list: (.*)", question
        ).groups()
        rule, *lines = thought.split("\n")
        wanted = {"Keeplarger": ">", "Keepsmaller": "<", "Removelarger": "<=", "Removesmaller": ">="}[verb + relation]
        sign, number = re.fullmatch(r"keep ([<>]=?)([+-][\d.]+)", rule).groups()
        assert sign == wanted and float(number) == float(limit)
        asked, kept = ast.literal_eval(listed), []
        for text, line in zip(asked, lines, strict=True):
            number, sign, verdict = re.fullmatch(r"([+-][\d.]+)([<=>])(yes|no)", line).groups()
            assert float(number) == float(text)
            assert eval(f"{float(text)} {sign.replace('=', '==')} {float(limit)}")
            assert (verdict == "yes") == (sign in wanted)
            first = next(other for other in asked if float(other) == float(text))  # what the package writes for both
            kept += [first] * (verdict == "yes")
        assert str(kept) == answer


def test_word_sorting():
    for question, thought, answer in cases("word_sorting"):
        asked = question.split("comma-separated list: ")[1].split(", ")
        copied, firsts, ordered = thought.split("\n")
        spelled = [re.fullmatch(r"(\S+) ((?:\S )*\S)", part).groups() for part in copied[7:].split(", ")]
        assert copied.startswith("words: ") and [word for word, _ in spelled] == asked
        sorted_ = [part.rsplit(" ", 1) for part in ordered.split(", ")]
        for letters, word in [(b, a) for a, b in spelled] + sorted_:
            assert letters == " ".join(word[:4])
        words = [word for _, word in sorted_]
        assert words == sorted(asked, reverse="in descending" in question) == answer.split(", ")
        assert firsts.split(" ") == [word[0] for word in words]


def test_spell_backward():
    for question, thought, answer in cases("spell_backward"):
        forward, backward = (re.findall(r"(\d)(\D)", line) for line in thought.split("\n"))
        assert [int(index) for index, _ in forward] == list(range(len(forward)))
        assert "".join(letter for _, letter in forward) == question.rsplit(" ", 1)[1]
        assert backward == forward[::-1] and "".join(letter for _, letter in backward) == answer


def test_letter_counting():
    for question, thought, answer in cases("letter_counting"):
        target, text = re.search(r'letter "(.)" appear in the text: "(.*)"', question).groups()
        count, words = 0, []
        for part in thought.split(", "):
            word, *letters = part.split(" ")
            assert "".join(letter[0] for letter in letters) == word.lower()
            for letter in letters:
                count += letter[0] == target
                assert letter == (f"{target}={count}" if letter[0] == target else letter[0])
            words.append(word)
        assert " ".join(words) == text and answer == str(count) == re.findall(r"=(\d+)", thought)[-1]


def shifted(letter, back):
    return chr((ord(letter) - 65 - back) % 26 + 65)


def test_caesar_cipher():
    for question, thought, answer in cases("caesar_cipher"):
        cipher = question.split("text: ")[1].split(".")[0]
        probe, *rows, text = thought.split("\n")
        assert probe.split(" ") == list(cipher.replace(" ", "")[:5])
        for shift, row in enumerate(rows, 1):
            assert row == " ".join([str(shift), *(shifted(c, shift) for c in probe.split(" "))])
        clear = []
        for word in text.removeprefix("text: ").split(", "):
            hidden, *letters, equals, plain = word.split(" ")
            assert "".join(letters[::2]).upper() == hidden and "".join(letters[1::2]) == plain and equals == "="
            assert all(shifted(a.upper(), len(rows)) == b for a, b in zip(letters[::2], letters[1::2], strict=True))
            clear.append((hidden, plain))
        assert " ".join(h for h, _ in clear) == cipher and " ".join(p for _, p in clear) == answer
        assert rows[-1].split(" ")[1:] == list(answer.replace(" ", "")[:5])


def test_the_first_letters_of_a_cipher_text_tell_the_shift():
    """No wrong shift within a level turns the shifted letters into the beginning of another text."""
    begins = [
        (text.replace(" ", "")[:5], settings["max_rotation"])
        for settings in WORDS["caesar_cipher"]
        for text in reasoning_gym.create_dataset("caesar_cipher", seed=0, **settings).valid_sentences
    ]
    probes = {probe for probe, _ in begins}
    for probe, rotations in begins:
        tried = {"".join(shifted(c, -left) for c in probe) for left in range(1, rotations)}
        assert not tried & probes, probe


def english(formula, names, one, zero):
    """(how the question says a formula, the formula of its letters alone); each letter is that of its name."""
    sign = next((s for s in "&|>=" if s in formula), "&")
    atoms = [re.fullmatch(r" (\w+) ([A-Ca-c])", part).groups() for part in formula.split(sign)]
    assert all(names[letter.upper()] == name for name, letter in atoms)
    parts = [f"{name} is {one if letter.isupper() else zero}" for name, letter in atoms]
    words = {"&": " and ", "|": " or ", "=": " if and only if ", ">": " then "}
    return "if " * (sign == ">") + words[sign].join(parts), sign.join(letter for _, letter in atoms)


def truth(formula):
    """The value of a formula of 0 and 1."""
    return int(eval(formula.replace("=", "==").replace(">", "<=").replace("&", " and ").replace("|", " or ")))


def test_knights_knaves():
    for question, thought, answer in cases("knights_knaves"):
        lines = thought.split("\n")
        people = [part.split(" ") for part in lines[0].removeprefix("who: ").split(", ")]
        names = {letter: name for name, letter in people}
        assert ", ".join(names.values()) == re.search(r"inhabitants: ([^.]*)\.", question)[1].replace(", and", ",")
        one, zero = lines[1].removeprefix("1="), lines[2].removeprefix("0=")
        assert f"So who is {one} and who is {zero}?" in question
        formulas, at = {}, 0
        for letter, line in zip("ABC", lines[3 : 3 + len(names)], strict=False):
            assert line[:2] == f"{letter}:"
            said, formulas[letter] = english(line[2:], names, one, zero)
            at = question.index(said, at) + len(said)  # the question's order is that of the people
        said = len(re.findall(f" is ({one}|{zero})", question.split("So who")[0]))
        assert said == sum(map(str.isalpha, "".join(formulas.values())))
        found = check_cases(lines[3 + len(names) :], formulas)
        said = [f"{name} is {one if bit == '1' else zero}" for name, bit in zip(names.values(), found, strict=True)]
        assert answer == ", ".join(said[:-1]) + f", and {said[-1]}."


def check_cases(lines, formulas):
    """The case that the last line finds, every line before it refuted by its last check."""
    for number, (line, bits) in enumerate(zip(lines, product("10", repeat=len(formulas)), strict=False)):
        case, *checks = line.rsplit(" ", 1)[0].split(",")
        assert case == "".join(bits)
        values = dict(zip(formulas, case, strict=True))
        values |= {letter.lower(): str(1 - int(bit)) for letter, bit in values.items()}
        fits = []
        for check, speaker, formula in zip(checks, case, formulas.values(), strict=False):
            filled = "".join(values.get(c, c) for c in formula)
            assert check == f"{filled}:{truth(filled)}"
            fits.append(check[-1] == speaker)
        ends = number == len(lines) - 1
        assert all(fits[:-1]) and fits[-1] == ends == line.endswith(" ok") == (not line.endswith(" no"))
    assert len(checks) == len(formulas)
    return case


def holds(statement, world):
    """Whether "Some A not B" holds where `world` is the set of the kinds of things that there are."""
    quantifier, *words = statement.split(" ")
    subject, negation, predicate = words[0], "not" in words, words[-1]
    both = any(subject in thing and predicate in thing for thing in world)
    apart = any(subject in thing and predicate not in thing for thing in world)
    return {"All": not apart, "No": not both, "Some": apart if negation else both}[quantifier]


THINGS = ["".join(kinds) for kinds in product(("", "A"), ("", "B"), ("", "C"))]
WORLDS = [
    world
    for world in ([t for t, there in zip(THINGS, bits, strict=True) if there] for bits in product((0, 1), repeat=8))
    if set("ABC") <= set("".join(world))  # every term has members
]


def follows(premises, conclusion):
    return all(holds(conclusion, world) for world in WORLDS if all(holds(p, world) for p in premises))


def test_syllogism():
    for question, thought, answer in cases("syllogism"):
        *stated, derived = thought.split("\n")
        said = re.findall(r"(?:All|No|Some) \w+ are (?:not )?\w+", question)
        assert [re.sub(" [ABC](?= |$)", "", line[2:]) for line in stated] == [text.replace("are ", "") for text in said]
        assert [line[:2] for line in stated] == ["1 ", "2 ", "? "]
        named = re.findall(r"([a-z]+) ([ABC])\b", "\n".join(stated))
        assert [letter for _, letter in named[:4]] == list("ABBC") and len(named) == 6 and len(set(named)) == 3
        first, second, asked = (re.sub(r"\b[a-z]+ (?=[ABC]\b)", "", line[2:]) for line in stated)
        label, found = derived.split(": ")
        assert set(re.findall(r"\b[ABC]\b", asked)) == set({"1": "AB", "2": "BC", "1+2": "AC"}[label])
        sources = [text for mark, text in (("1", first), ("2", second)) if mark in label]
        results = [] if found == "nothing" else found.split(", ")
        assert all(follows(sources, result) for result in results)
        assert (answer == "Yes") == (asked in results) == follows([first, second], asked)


def test_countdown():
    kinds = set()
    for question, thought, answer in cases("countdown"):
        numbers = [int(n) for n in re.search(r"(?:\d+, )+\d+", question)[0].split(", ")]
        target = int(re.search(r"(?:equals|make|Calculate) (\d+)", question)[1])
        for left, value in re.findall(r"(\d+(?:[-+*/]\d+)+)=(\d+)", thought):
            assert eval(left) == int(value), thought
        sums, difference, *rest = thought.split("\n")
        assert int(sums.rsplit("=", 1)[1]) == sum(numbers) and f"{target}" in difference
        assert ("odd" in difference) == (sum(numbers) > target and (sum(numbers) - target) % 2 == 1)
        for verdict, number in re.findall(r"(take|keep|no) (\d+)", thought):
            assert (int(number) in numbers) == (verdict != "no")
        tried = [line for line in rest if ":" in line]
        check_last(tried, numbers, target)
        kinds.add((len(numbers), len(tried)))
        assert eval(answer) == target and sorted(map(int, re.findall(r"\d+", answer))) == sorted(numbers)
    assert kinds == {(3, 0), (3, 1), (3, 2), (3, 3), (4, 0)}


def check_last(lines, numbers, target):
    """What two numbers make and what the third needs, line by line; a number of both ends the search."""
    for place, line in enumerate(lines):
        made, needed, verdict = re.fullmatch(r"(\S+);(\S+) (no|yes \d+)", line).groups()
        a, b, last = *(n for i, n in enumerate(numbers) if i != place), numbers[place]
        big, small = max(a, b), min(a, b)
        makes = [a + b, big - small, a * b, "x" if big % small else big // small]
        assert made == f"{a},{b}:+{makes[0]}-{makes[1]}*{makes[2]}/{makes[3]}"
        product_ = target * last if target * last <= max(a * b, a + b) else "x"
        needs = [
            target - last if target >= last else "x",
            target + last,
            "x" if target % last else target // last,
            product_,
        ]
        assert needed == f"{last}:-{needs[0]}+{needs[1]}/{needs[2]}*{needs[3]}"
        common = [n for n in needs if n in makes and n != "x"]
        assert verdict == (f"yes {common[0]}" if common else "no") and bool(common) == (place == len(lines) - 1)
