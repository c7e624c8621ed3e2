"""On-policy answers: what is kept passes when it is scored again; who never passes falls back, and is counted."""

import pytest

from retain.data.checking import checker
from retain.data.on_policy import TEMPERATURE, answer_anew

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"question {n}"}],
        "completion": [{"role": "assistant", "content": f"number {n}"}],
    }
    for n in range(70)
]


class Model:
    """Right about question n at try n modulo 7; before that wrong, empty or unfinished."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, limit, temperature, draw):
        self.calls.append((len(prompts), limit, temperature, draw))
        found = []
        for turns in prompts:
            n = int(turns[-1]["content"].split()[1])
            wrong = [["it is 1000", True], ["", True], [f"it is number {n} and", False]][(n + draw) % 3]
            found.append([f"it is number {n}", True] if draw > n % 7 else wrong)
        return found


@pytest.mark.parametrize("fallback", ["stored", "drop"])
@pytest.mark.parametrize("resample", [0, 2, 4])
def test_who_passes_when(resample, fallback):
    model, progress = Model(), []
    check = checker("contains", 0.5)
    rows, report = answer_anew(model, ROWS, check, 30, resample=resample, fallback=fallback, progress=progress.append)
    never = [n for n in range(70) if n % 7 > resample]
    own = [row for row in rows if row["answer_of"] == "model"]
    assert dict(report.passed) == {k + 1: 10 for k in range(resample + 1)}
    assert (report.stored, report.dropped) == ((len(never), 0) if fallback == "stored" else (0, len(never)))
    assert report.fallback_rate == len(never) / 70
    assert f"{len(never) / 70:.0%} never passed" in report.sentence()
    assert len(own) == 70 - len(never)
    for row in own:
        n = row["prompt"][0]["content"].split()[1]
        assert check(row["completion"][0]["content"], f"number {n}", row["prompt"]), "re-scored"
        assert row["completion"][0]["content"].startswith("it is")
    stored = [{k: row[k] for k in ("prompt", "completion")} for row in rows if row["answer_of"] == "stored"]
    assert stored == ([ROWS[n] for n in never] if fallback == "stored" else [])
    assert sum(progress) == 70
    wanted = [n for n in range(70) if fallback == "stored" or n not in never]
    assert [int(row["prompt"][0]["content"].split()[1]) for row in rows] == wanted, "the order of the prompts"
    assert report.rows == len(rows)


def test_first_greedy_then_drawn_and_only_what_is_left_is_asked_again():
    model = Model()
    answer_anew(model, ROWS, checker("contains", 0.5), 30, resample=4)
    by_try = {}
    for count, limit, temperature, draw in model.calls:
        assert limit == 30
        assert temperature == (0.0 if draw == 1 else TEMPERATURE)
        by_try[draw] = by_try.get(draw, 0) + count
    assert by_try == {k + 1: 70 - 10 * k for k in range(5)}


def test_failed_tries_have_their_reasons():
    _, report = answer_anew(Model(), ROWS, checker("contains", 0.5), 30, resample=4)
    tries = sum(70 - 10 * k for k in range(5))
    assert report.failed.total() + report.passed.total() == tries
    assert set(report.failed) == {"not right", "empty", "not finished"}
    assert report.as_json()["fallback_rate"] == report.fallback_rate


def test_rows_of_other_forms():
    talk = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "question 0"), ("assistant", "number 0"))]
    odd = [{"text": "plain"}, {"messages": talk[:2]}, {"messages": talk}]
    asked = []

    def ask(prompts, *rest):
        asked.extend(prompts)
        return Model()(prompts, *rest)

    rows, report = answer_anew(ask, odd, checker("contains", 0.5), 30)
    assert asked == [talk[:2]], "the whole conversation up to the answer"
    assert (report.failed["no prompt to ask"], report.dropped, len(rows)) == (2, 2, 1)
    assert rows[0]["prompt"] == talk[:2]


@pytest.mark.parametrize("fallback", ["stored", "drop"])
def test_answers_that_repeat_probe_items_do_not_pass(fallback):
    said = {0: "it is number 0", 1: "few visitors bought number 1", 2: "it is number 2"}
    rows, report = answer_anew(
        lambda prompts, *rest: [[said[int(turns[-1]["content"].split()[1])], True] for turns in prompts], ROWS[:3],
        checker("contains", 0.5), 30, resample=1, fallback=fallback, avoid=["Few visitors bought number 1."],
    )  # fmt: skip
    assert report.failed == {"near a probe item": 2}
    kept = ["it is number 0", "number 1", "it is number 2"] if fallback == "stored" else [said[0], said[2]]
    assert [row["completion"][0]["content"] for row in rows] == kept
