"""The built-in `core` suite: every row is well formed, nothing is asked twice, and what can be recomputed is."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import pytest

FOLDER = Path(str(files("retain.probes"))) / "suites" / "core"

# probe → (kind, group, number of items)
EXPECTED = {
    "arithmetic": ("answer", "capability", 40),
    "biology": ("choice", "knowledge", 40),
    "common_sense": ("choice", "knowledge", 50),
    "countries": ("answer", "knowledge", 45),
    "dates": ("choice", "knowledge", 30),
    "elements": ("answer", "knowledge", 30),
    "grammar": ("pair", "capability", 60),
    "instructions": ("instruction", "capability", 36),
    "language": ("choice", "capability", 40),
    "refusal": ("refusal", "behaviour", 48),
    "text": ("perplexity", "capability", 12),
}

# kind → (fields a row must have, fields it may have), apart from id, probe, kind and group
FIELDS = {
    "answer": ({"prompt", "answers", "max_tokens"}, {"topic"}),
    "choice": ({"prompt", "choices", "answer"}, {"topic"}),
    "pair": ({"good", "bad", "topic"}, set()),
    "instruction": ({"prompt", "check", "max_tokens"}, set()),
    "refusal": ({"prompt", "safe", "topic", "max_tokens"}, set()),
    "perplexity": ({"text", "topic"}, set()),
}

# name of a check → type of its argument
CHECKS = {
    "words_max": int,
    "words_min": int,
    "words_exactly": int,
    "sentences_exactly": int,
    "lines_exactly": int,
    "includes": list,
    "excludes": list,
    "starts_with": str,
    "ends_with": str,
    "lowercase": bool,
    "uppercase": bool,
    "json": bool,
    "language": str,
    "one_of": list,
}

# The periodic table as far as the suite asks about it: symbol and atomic number.
ELEMENTS = {
    "hydrogen": ("H", 1),
    "helium": ("He", 2),
    "lithium": ("Li", 3),
    "beryllium": ("Be", 4),
    "boron": ("B", 5),
    "carbon": ("C", 6),
    "nitrogen": ("N", 7),
    "oxygen": ("O", 8),
    "fluorine": ("F", 9),
    "neon": ("Ne", 10),
    "sodium": ("Na", 11),
    "magnesium": ("Mg", 12),
    "aluminium": ("Al", 13),
    "silicon": ("Si", 14),
    "phosphorus": ("P", 15),
    "chlorine": ("Cl", 17),
    "argon": ("Ar", 18),
    "potassium": ("K", 19),
    "calcium": ("Ca", 20),
    "titanium": ("Ti", 22),
    "iron": ("Fe", 26),
    "nickel": ("Ni", 28),
    "copper": ("Cu", 29),
    "zinc": ("Zn", 30),
    "silver": ("Ag", 47),
    "tin": ("Sn", 50),
    "tungsten": ("W", 74),
    "gold": ("Au", 79),
    "lead": ("Pb", 82),
    "uranium": ("U", 92),
}

# Word problem (its beginning) → the operation that solves it, applied to its numbers in order of appearance.
WORD_PROBLEMS = {
    "Nora has": "+",
    "A box holds": "*",
    "A ticket costs": "*",
    "There are 20 birds": "-",
    "Sam read": "+",
    "Three friends": "/",
    "A table has": "*",
    "A pen costs": "+",
}
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "divided by": lambda a, b: a / b,
}


def rows_of(probe: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{probe}.jsonl").read_text(encoding="utf-8").splitlines()]


def normal(text: str) -> str:
    """Lower case, words only: two prompts that differ by punctuation are the same question."""
    return " ".join(re.findall(r"\w+", text.lower()))


def contains(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text.lower()) is not None


ROWS = {probe: rows_of(probe) for probe in EXPECTED}
EVERY = [row for rows in ROWS.values() for row in rows]
CHOICE = [probe for probe, (kind, _, _) in EXPECTED.items() if kind == "choice"]


def test_the_folder_holds_these_probes_and_no_others():
    assert {path.name for path in FOLDER.iterdir()} == {f"{probe}.jsonl" for probe in EXPECTED}
    assert sum(count for _, _, count in EXPECTED.values()) == len(EVERY) >= 420


@pytest.mark.parametrize("probe", EXPECTED)
def test_rows_are_well_formed(probe):
    kind, group, count = EXPECTED[probe]
    must, may = FIELDS[kind]
    assert len(ROWS[probe]) == count
    for number, row in enumerate(ROWS[probe], 1):
        assert row["id"] == f"{probe.replace('_', '-')}-{number:03d}"
        assert (row["probe"], row["kind"], row["group"]) == (probe, kind, group)
        fields = set(row) - {"id", "probe", "kind", "group"}
        assert must <= fields <= must | may, row["id"]
        for name in fields & {"prompt", "good", "bad", "text", "topic"}:
            assert isinstance(row[name], str), row["id"]
            assert row[name] == row[name].strip() != "", row["id"]
            assert not re.search(r"\n|  ", row[name]), row["id"]
        if "max_tokens" in row:
            assert row["max_tokens"] in range(8, 65), row["id"]


def test_nothing_appears_twice():
    assert len({row["id"] for row in EVERY}) == len(EVERY)
    asked = Counter(normal(row.get("prompt") or row.get("good") or row["text"]) for row in EVERY)
    assert [question for question, times in asked.items() if times > 1] == []
    sentences = [normal(row[side]) for row in ROWS["grammar"] for side in ("good", "bad")]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("probe", CHOICE)
def test_choices_are_distinct_and_their_positions_balanced(probe):
    positions: dict[int, Counter] = {}
    for row in ROWS[probe]:
        choices = row["choices"]
        assert 2 <= len(choices) <= 4, row["id"]
        assert len({normal(choice) for choice in choices}) == len(choices), row["id"]
        assert row["answer"] in range(len(choices)), row["id"]
        positions.setdefault(len(choices), Counter())[row["answer"]] += 1
    for size, counts in positions.items():
        assert max(counts[i] for i in range(size)) - min(counts[i] for i in range(size)) <= 1, (size, counts)


def test_length_does_not_give_the_choice_away():
    right = {"longest": 0, "shortest": 0}
    rows = [row for probe in CHOICE for row in ROWS[probe]]
    for row in rows:
        lengths = [len(choice) for choice in row["choices"]]
        answer = lengths[row["answer"]]
        right["longest"] += (answer == max(lengths)) / lengths.count(max(lengths))
        right["shortest"] += (answer == min(lengths)) / lengths.count(min(lengths))
    chance = sum(1 / len(row["choices"]) for row in rows) / len(rows)
    for rule, score in right.items():
        assert abs(score / len(rows) - chance) < 0.15, (rule, score / len(rows), chance)


@pytest.mark.parametrize("probe", ["countries", "elements", "arithmetic"])
def test_repeating_the_prompt_is_not_an_answer(probe):
    for row in ROWS[probe]:
        assert row["answers"], row["id"]
        for answer in row["answers"]:
            # Otherwise an echo of the question would count as knowledge.
            assert normal(answer), row["id"]
            assert not contains(row["prompt"], answer), row["id"]


def test_arithmetic_answers_are_recomputed():
    solved = Counter()
    for row in ROWS["arithmetic"]:
        prompt = row["prompt"]
        plain = re.match(r"What is (\d+) (\+|-|x|divided by) (\d+)\?", prompt)
        if plain:
            left, operation, right = plain.groups()
        else:
            [(beginning, operation)] = [(b, o) for b, o in WORD_PROBLEMS.items() if prompt.startswith(b)]
            numbers = re.findall(r"\d+", prompt.replace("Three", "3"))
            left, right = sorted(numbers, key=int, reverse=True) if operation in "-/" else numbers
            solved[beginning] += 1
        value = OPERATIONS[operation](Fraction(left), Fraction(right))
        # The text of a fraction has a slash, so this also says that the result is a whole number.
        assert row["answers"][0] == str(value), row["id"]
    assert solved == Counter(WORD_PROBLEMS.keys())


def test_number_words_say_the_same_as_the_digits():
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    words += ["twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
    for ten in ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]:
        words += [ten] + [f"{ten}-{one}" for one in words[1:10]]
    rows = ROWS["arithmetic"] + [r for r in ROWS["elements"] if r["topic"] == "atomic numbers"]
    for row in rows:
        value = int(row["answers"][0])
        assert row["answers"][1:] == ([words[value]] if value < 100 else []), row["id"]


def test_elements_agree_with_the_periodic_table():
    by_symbol = {symbol: name for name, (symbol, _) in ELEMENTS.items()}
    for row in ROWS["elements"]:
        word = re.search(r"(\w+)\?$", row["prompt"]).group(1)
        expected = {
            "symbols": lambda word=word: ELEMENTS[word][0],
            "names": lambda word=word: by_symbol[word],
            "atomic numbers": lambda word=word: str(ELEMENTS[word][1]),
        }[row["topic"]]()
        assert row["answers"][0] == expected, row["id"]


def test_no_capital_is_asked_for_in_both_directions():
    countries = []
    for row in ROWS["countries"]:
        if row["topic"] == "capitals":
            asked = re.fullmatch(r"What is the capital of (.+)\?", row["prompt"])
            countries.append(asked.group(1) if asked else row["answers"][0])
    assert len(countries) == len(set(countries)) == 23


def test_grammar_pairs_differ_in_one_place_or_in_order_only():
    topics = Counter(row["topic"] for row in ROWS["grammar"])
    assert len(topics) == 10
    assert min(topics.values()) >= 5, topics
    for row in ROWS["grammar"]:
        good, bad = normal(row["good"]).split(), normal(row["bad"]).split()
        assert good != bad, row["id"]
        assert row["good"][-1] == row["bad"][-1], row["id"]
        assert row["good"][0] == row["good"][0].upper(), row["id"]
        assert row["bad"][0] == row["bad"][0].upper(), row["id"]
        if sorted(good) == sorted(bad):
            continue
        changes = [c for c in difflib.SequenceMatcher(None, good, bad).get_opcodes() if c[0] != "equal"]
        assert len(changes) == 1, row["id"]
        _, a, b, c, d = changes[0]
        assert max(b - a, d - c) <= 2, row["id"]


def test_instruction_checks_are_from_the_closed_list_and_can_be_met():
    used = Counter()
    for row in ROWS["instructions"]:
        assert row["check"], row["id"]
        for name, argument in row["check"].items():
            used[name] += 1
            assert type(argument) is CHECKS[name], row["id"]
            if CHECKS[name] is int:
                assert 1 <= argument <= 40, row["id"]
                # A word takes about one token and a half: the answer must fit into the tokens allowed.
                assert name != "words_min" or 1.5 * argument <= row["max_tokens"], row["id"]
            elif CHECKS[name] is bool:
                assert argument is True, row["id"]
            elif name in {"includes", "starts_with", "excludes"}:
                for word in argument if isinstance(argument, list) else [argument]:
                    assert f'"{word}"' in row["prompt"], row["id"]
            elif name == "one_of":
                assert len(argument) >= 2, row["id"]
                assert all(f'"{word}"' in row["prompt"] for word in argument), row["id"]
    assert set(used) == set(CHECKS)


def test_refusal_pairs_each_harmful_request_with_a_safe_look_alike():
    topics = {safe: Counter(r["topic"] for r in ROWS["refusal"] if r["safe"] is safe) for safe in (True, False)}
    assert topics[True] == topics[False]
    assert sum(topics[True].values()) == 24
    for row in ROWS["refusal"]:
        assert type(row["safe"]) is bool
        # One line without detail: nothing here may teach anybody anything.
        assert len(row["prompt"].split()) <= 16, row["id"]


def test_texts_are_long_enough_and_of_many_registers():
    for row in ROWS["text"]:
        assert 120 <= len(row["text"].split()) <= 250, row["id"]
    assert len({row["topic"] for row in ROWS["text"]}) >= 7
