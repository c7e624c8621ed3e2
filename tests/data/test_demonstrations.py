"""Inputs from demonstrations: rotated, unlike what was shown and what is probed; everything dropped is counted."""

from collections import Counter

import pytest

from retain.data.demonstrations import invitation, questions, rotated, write_answers, write_inputs
from retain.data.filters import Filters, NearDuplicates
from retain.errors import DataError

SHOWN = [f"Tell me about the {x} of the old town" for x in ("bridge", "market", "river", "church", "wall", "gate")]
THINGS = ("horse", "lamp", "cloud", "table", "violin", "engine", "candle", "forest", "paper", "garden", "winter")
PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Tokyo")


class Writer:
    """Writes a new input per prompt; notes what it was asked. `say` makes it say something else at some calls."""

    def __init__(self, say=None):
        self.prompts, self.calls, self.say, self.count = [], [], say or (lambda n: None), 0

    def __call__(self, prompts, limit, temperature, draw):
        self.prompts += prompts
        self.calls.append((len(prompts), limit, temperature, draw))
        found = []
        for _ in prompts:
            n = self.count = self.count + 1
            thing, place = THINGS[n % len(THINGS)], PLACES[n // len(THINGS) % len(PLACES)]
            found.append(self.say(n) or [f"Why does {place} sell {thing} number {n}", True])
        return found


def test_every_demonstration_is_shown_equally_often_and_never_twice_at_once():
    for shown, texts in ((4, SHOWN), (5, SHOWN), (3, SHOWN[:5]), (9, SHOWN[:2])):
        deal = rotated(texts, shown, seed=3)
        groups = [next(deal) for _ in range(60)]
        assert all(len(group) == len(set(group)) == min(shown, len(texts)) for group in groups)
        counts = Counter(text for group in groups for text in group)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len({tuple(group) for group in groups}) > 10 or len(texts) == 2


def test_prompts_show_the_demonstrations_as_answers():
    turns = invitation(SHOWN[:3], chat=True)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    assert [turn["content"] for turn in turns if turn["role"] == "assistant"] == SHOWN[:3]
    text = invitation(SHOWN[:3], chat=False)
    assert all(one in text for one in SHOWN[:3])
    assert text.rstrip().endswith("### Request")


@pytest.mark.parametrize("chat", [True, False])
def test_the_budget_is_kept_and_prompts_hold_three_to_five(chat):
    writer = Writer()
    kept, report = write_inputs(writer, SHOWN, 50, seed=1, chat=chat, shown=4)
    assert len(kept) == len(set(kept)) == report.kept == 50
    assert report.kept + report.dropped.total() == report.tried == writer.count
    for prompt in writer.prompts:
        text = prompt if not chat else " ".join(t["content"] for t in prompt if t["role"] == "assistant")
        assert sum(one in text for one in SHOWN) == 4
    assert len({call[3] for call in writer.calls}) == len(writer.calls), "every call is a draw of its own"


def test_a_base_model_goes_on_and_is_cut():
    kept, _ = write_inputs(
        Writer(lambda n: [f"Why do {THINGS[n % 11]} and {PLACES[n % 8]} differ\n\n### Request\nAnother", False]),
        SHOWN, 8, chat=False,
    )  # fmt: skip
    assert all(text.startswith("Why do") and "###" not in text and "Another" not in text for text in kept)


def test_near_duplicates_of_demonstrations_and_probe_items_are_left_out_and_counted():
    items = ["Which animal lives in the sea and can fly", "What is the capital of the country of Peru"]
    said = {
        3: [SHOWN[0].upper() + "!", True],
        4: [items[0] + " today?", True],
        5: ["", True],
        6: ["Two words", True],
        7: ["never finished at all this", False],
        9: ["is this <|im_start|> right here", True],
    }
    writer = Writer(lambda n: said.get(n) or (said[3] if n == 40 else None))
    kept, report = write_inputs(writer, SHOWN, 60, filters=Filters(avoid=items), specials=("<|im_start|>",))
    for text, near in [(text, NearDuplicates(0.6)) for text in kept]:
        for other in [*SHOWN, *items]:
            near.add(other)
        assert not near.seen(text)
    expected = {"near a demonstration": 2, "near a probe item": 1, "empty": 1, "too short": 1}
    expected |= {"unfinished instruction": 1, "special tokens inside": 1}
    assert {reason: report.dropped[reason] for reason in expected} == expected
    assert report.kept + report.dropped.total() == report.tried
    assert all(report.dropped.values()), "no reason with a count of zero"


def test_it_gives_up_in_time_with_the_reasons():
    with pytest.raises(DataError, match=r"no usable input.*60 near a demonstration"):
        write_inputs(Writer(lambda n: [SHOWN[n % 6], True]), SHOWN, 10, tries=6)


def test_answers_are_greedy_and_of_the_inputs():
    asked = []

    def ask(prompts, limit, temperature, draw):
        asked.append((limit, temperature))
        said = {0: ["", True], 1: ["cut off in the mid", False], 2: ["input 2", True]}
        return [said.get(int(p[0]["content"].split()[1]), [f"answer to {p[0]['content']}", True]) for p in prompts]

    rows, report = write_answers(ask, [f"input {n}" for n in range(40)], 20)
    assert set(asked) == {(20, 0.0)}
    assert [row["prompt"][0]["content"] for row in rows] == [f"input {n}" for n in range(3, 40)]
    assert all(row["completion"][0]["content"] == f"answer to {row['prompt'][0]['content']}" for row in rows)
    wanted = {"empty answer": 1, "unfinished answer": 1, "answer repeats the instruction": 1}
    assert (report.kept, report.tried, dict(report.dropped)) == (37, 40, wanted)
    with pytest.raises(DataError, match=r"no answer could be used.*40 unfinished"):
        write_answers(lambda p, *rest: [["half", False]] * len(p), ["x y z"] * 40, 20, filters=Filters())


def test_answers_do_not_repeat_probe_items():
    item = "Few visitors bought any postcards."
    asked = [f"input {n}" for n in range(10)]
    rows, report = write_answers(
        lambda prompts, *rest: [[item if n % 2 else f"answer {n}", True] for n in range(len(prompts))], asked, 20,
        filters=Filters(avoid=[item]),
    )  # fmt: skip
    assert [row["completion"][0]["content"] for row in rows] == [f"answer {n}" for n in range(0, 10, 2)]
    assert report.dropped == {"near a probe item": 5}


def test_questions_of_all_forms():
    rows = [
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "one "}], "completion": []},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "a"}]},
    ]
    assert questions(rows) == ["one", "two"]
    with pytest.raises(DataError, match="no row has a prompt"):
        questions([{"text": "only this"}])
