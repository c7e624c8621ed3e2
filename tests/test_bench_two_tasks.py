"""All methods on one small world: the world is what it says, settings are chosen and compared as described."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import example_recipes  # noqa: E402
import matched  # noqa: E402
import small_world  # noqa: E402
import two_tasks  # noqa: E402
import two_tasks_runs  # noqa: E402
from matched import Point  # noqa: E402

from retain import methods  # noqa: E402


@pytest.fixture(scope="module")
def half_taught(tmp_path_factory):
    """A model that knows some of A."""
    return small_world.pretrained(0, tmp_path_factory.mktemp("world"), steps=150)


@pytest.fixture
def quick(monkeypatch):
    """Trainings of two steps, of models that know nothing."""
    monkeypatch.setattr(two_tasks_runs, "STEPS", 2)
    monkeypatch.setattr(two_tasks_runs, "ROWS", 32)
    monkeypatch.setattr(two_tasks, "NAIVE", [two_tasks.PLAIN, two_tasks.NAIVE[0]])
    monkeypatch.setattr(small_world, "pretrained", lambda seed, folder: small_world.untrained(seed))


def point(new: float, lost: float, label: str = "", seeds: int = 3, items: int = 40) -> Point:
    """The same share of items in every seed, others in each."""
    rows = [np.roll(np.arange(items) < round(share * items), i) for share in (new, lost) for i in range(seeds)]
    table = np.array(rows, dtype=float).reshape(2, seeds, items)
    return Point(label, table[0], table[1])


# -- the world ---------------------------------------------------------------------------------------------
def test_questions_have_one_answer_and_words_are_new():
    rows = [row for family in small_world.FAMILIES for row in small_world.facts(family)] + list(small_world.words())
    assert len(dict(rows)) == len(rows)
    for family in small_world.FAMILIES:
        exam, lessons = small_world.exam(family), small_world.lessons(family, 400, 1)
        assert len(set(exam)) == small_world.ITEMS
        assert len(lessons) == 400
        facts = {row for row in exam if row in small_world.facts(family)}
        assert facts <= set(lessons), "facts can only be remembered"
        assert not set(lessons) & (set(exam) - facts), "letters must be new"
        assert len(facts) == small_world.ITEMS - (small_world.WORDS if family == "A" else 0)


def test_every_word_has_a_token_of_its_own():
    coder = small_world.tokenizer()
    for family in small_world.FAMILIES:
        for prompt, answer in [*small_world.exam(family), *small_world.lessons(family, 300, 0)]:
            for text in (prompt, answer):
                ids = coder(text)["input_ids"]
                assert coder.decode(ids) == text
                assert coder.pad_token_id not in ids


def test_scores_are_those_of_greedy_decoding(half_taught):
    from retain.models.generation import generate

    exam = small_world.exam("A")
    asked = [[{"role": "user", "content": prompt}] for prompt, _ in exam]
    written = [answer.text for answer in generate(half_taught, small_world.tokenizer(), asked, 6)]
    expected = "".join("01"[text == answer] for text, (_, answer) in zip(written, exam))
    assert small_world.answers(half_taught, "A") == expected
    assert 0 < expected.count("1") < len(expected), "the model must know some of it, or nothing is tested"


def test_a_world_is_kept(tmp_path):
    first = small_world.pretrained(3, tmp_path, steps=2)
    again = small_world.pretrained(3, tmp_path, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    path = next(tmp_path.iterdir())
    path.unlink()
    fresh = small_world.pretrained(3, tmp_path, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters()))


# -- settings ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_settings_that_can_be_built(name):
    rungs, start = two_tasks.ladder(name)
    assert 0 <= start < len(rungs) > 1
    for rung in rungs:
        assert name in [m.name for m in methods.build(rung["recipe"])]
    assert len({json.dumps(rung) for rung in rungs}) == len(rungs)
    beside = example_recipes.without(rungs[0]["recipe"], name)
    assert all(example_recipes.without(rung["recipe"], name) == beside for rung in rungs), "one thing moves"


@pytest.mark.parametrize(
    ("learned", "start", "expected"),
    [
        ([1.0, 1.0, 1.0, 0.9, 0.5], 1, 2),  # stronger until too little is learned
        ([1.0, 0.5, 0.4, 0.3, 0.2], 2, 0),  # weaker until enough is
        ([0.5, 0.6, 0.4, 0.3, 0.2], 2, 1),  # nothing learns enough: what learns most
        ([1.0] * 5, 0, 4),
    ],
)
def test_the_strongest_setting_that_learns_is_chosen(learned, start, expected):
    rungs = [{"knob": str(i)} for i in range(5)]

    def measure(setting):
        place = int(setting["knob"])
        return point(learned[place], 0.8 - 0.1 * place)

    assert two_tasks.choose(rungs, start, measure, 0.97) is rungs[expected]


# -- comparison --------------------------------------------------------------------------------------------
def test_plain_training_is_its_front():
    naive = [point(1.0, 0.9, "fast"), point(0.8, 0.5, "slow"), point(0.7, 0.6, "beaten"), point(0.4, 0.1, "early")]
    assert [p.label for p in matched.plain_front(naive)] == ["early", "slow", "fast"]
    assert matched.plain_loss(naive, 0.9).mean() == pytest.approx(0.7)  # halfway between slow and fast
    assert matched.plain_loss(naive, 0.5).mean() == pytest.approx(0.2)
    assert matched.plain_loss(naive, 0.8).mean() == pytest.approx(0.5)
    assert matched.plain_loss(naive, 0.1).mean() == pytest.approx(0.1)
    assert matched.plain_loss(naive, 1.0).mean() == pytest.approx(0.9)


def test_verdicts():
    naive = [point(1.0, 0.9), point(0.95, 0.85)]
    words = {
        matched.judge(mine, naive, 1.0).word: mine
        for mine in (point(1.0, 0.1), point(1.0, 1.0), point(0.975, 0.875), point(0.5, 0.0))
    }
    assert list(words) == ["forgets less", "forgets more", "cannot tell", "does not reach the new score"]
    naive += [point(0.4, 0.3)]  # now there is plain training that learns as little
    short = [matched.judge(point(0.5, lost), naive, 1.0).word for lost in (0.0, 0.9)]
    assert short == ["does not reach the new score, forgets less even so", "does not reach the new score"]


def test_plain_training_that_learns_as_little_and_loses_more_is_seen_too():
    """The one that learned more lost less, so it is the opponent; that less learned saves nothing was seen."""
    naive = [point(1.0, 0.5), point(0.4, 0.7)]
    found = matched.judge(point(0.5, 0.0), naive, 1.0)
    assert (found.difference.value, found.word) == (-0.5, "does not reach the new score, forgets less even so")
    unseen = matched.judge(point(0.2, 0.0), naive, 1.0)
    assert unseen.word == "does not reach the new score"


def test_a_setting_that_only_learns_less_forgets_no_less():
    """Plain training with a smaller rate, given out as a method, must not win."""
    naive = [point(1.0, 0.9), point(0.95, 0.6)]
    found = matched.judge(point(0.95, 0.6), naive, 1.0)
    assert found.difference.value == 0
    assert found.word == "cannot tell"


# -- the command -------------------------------------------------------------------------------------------
def test_the_command_writes_the_page_and_goes_on(quick, tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "out", tmp_path / "two_tasks.md"
    monkeypatch.setattr(two_tasks, "ladder", lambda name: (two_tasks_ladder(name)[0][:2], 0))
    given = ["--seeds", "0", "1", "--out", str(out), "--page", str(page)]
    assert two_tasks.main([*given, "--only", "replay", "l2sp", "--budget-minutes", "0"]) == 3
    assert not page.exists()
    assert two_tasks.main([*given, "--only", "replay"]) == 0
    text = page.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| `replay`"))
    assert "| yes |" in line, "it asked for old rows"
    assert "Not measured yet: " in text
    assert "l2sp" in text
    monkeypatch.setattr(two_tasks_runs, "train", None)  # nothing may be trained again
    assert two_tasks.main([*given, "--only", "replay"]) == 0
    assert page.read_text() == text


def test_a_method_that_fails_is_a_line_of_the_table(quick, tmp_path, monkeypatch):
    whole = two_tasks_runs.train

    def train(setting, seed, base):
        if setting["recipe"] != ["none"]:
            raise ArithmeticError("broken\nin two")
        return whole(setting, seed, base)

    monkeypatch.setattr(two_tasks_runs, "train", train)
    page = tmp_path / "two_tasks.md"
    given = ["--seeds", "0", "1", "--out", str(tmp_path / "out"), "--page", str(page), "--only", "l2sp"]
    assert two_tasks.main(given) == 1
    assert "`l2sp` is not in the table: ArithmeticError: broken.\n" in page.read_text()


def test_workers_measure_what_one_process_would(tmp_path, monkeypatch):
    """They are asked first, with the same store and budget; what they leave is read, not measured again."""
    called = []
    monkeypatch.setattr(two_tasks, "in_processes", lambda *given: called.append(given))
    monkeypatch.setattr(two_tasks_runs, "train", lambda *given: pytest.fail("nothing is left to train"))
    given = ["--seeds", "0", "1", "--out", str(tmp_path), "--page", str(tmp_path / "page.md"), "--only", "l2sp"]
    with pytest.raises(SystemExit):
        two_tasks.main([*given, "--workers", "2", "--fresh"])
    assert two_tasks.main([*given, "--workers", "2", "--budget-minutes", "0"]) == 3
    ((names, store, seeds, workers),) = called
    assert (names, seeds, workers) == (["l2sp"], [0, 1], 2)
    two_tasks._plainly(two_tasks.PLAIN, 0, store)  # the budget is spent: no error
    two_tasks._try("l2sp", store, seeds)
    assert not list(tmp_path.glob("*/*.json"))


def test_what_is_there_is_measured_again_when_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(two_tasks_runs, "train", lambda *given: calls.append(given) or {"seconds": 0})
    two_tasks.Store(tmp_path).get("none", two_tasks.PLAIN, 0)
    two_tasks.Store(tmp_path).get("none", two_tasks.PLAIN, 0)
    assert len(calls) == 1
    fresh = two_tasks.Store(tmp_path, fresh=["none"])
    for _ in range(2):
        fresh.get("none", two_tasks.PLAIN, 0)
    assert len(calls) == 2
    with pytest.raises(two_tasks.OutOfTime):
        two_tasks.Store(tmp_path, deadline=0).get("none", two_tasks.PLAIN, 1)


def test_losses_are_those_of_the_stages():
    before, between, after = (
        {"A": "1111", "B": "0000", "C": "0000"},
        {"A": "1100", "B": "1110", "C": "0000"},
        {"A": "1000", "B": "0110", "C": "1100"},
    )
    found = two_tasks.numbers([{"answers": [before, between, after]}], "x")
    assert found.new.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert found.lost.tolist() == [[0, 1, 1, 1, 1, 0, 0, 0]]


two_tasks_ladder = two_tasks.ladder
