"""Classification: the label chosen by likelihood or in writing, and the numbers of the classes."""

from __future__ import annotations

import json

import pytest
from sklearn.metrics import accuracy_score, classification_report, f1_score

from retain.errors import DataError
from retain.models.generation import Generated
from retain.probes.asking import ask, is_written
from retain.probes.base import Item, Subject
from retain.probes.choice import Choice
from retain.probes.classification import Classification, label_in
from retain.probes.suite import probes_from_rows
from retain.results import without_text
from retain.totals import totals

LABELS = ["good", "bad", "not known"]


def rows(count=12, **more):
    return [{"prompt": f"Review {i}: it {i * 7 % 5}", "labels": LABELS, "label": LABELS[i % 3], **more}
            for i in range(count)]  # fmt: skip


def probe(*given, **options):
    return Classification("test", [Item(str(i), row) for i, row in enumerate(given)], **options)


@pytest.mark.parametrize("options", [{}, {"normalisation": "raw", "layout": "chat"}])
def test_likelihood_is_that_of_choice(options, model, tokenizer):
    given = rows()
    found = probe(*given, **options)
    items = [Item(str(i), {"prompt": row["prompt"], "choices": LABELS, "answer": i % 3}) for i, row in enumerate(given)]
    expected = Choice("test", items, **options).look(Subject(model, tokenizer))
    assert not is_written(found)
    assert found.chance == pytest.approx(1 / 3)
    for mine, theirs in zip(found.look(Subject(model, tokenizer)), expected):
        assert (mine.prompt, mine.reference, mine.output, mine.score) == (
            theirs.prompt, theirs.reference, theirs.output, theirs.score
        )  # fmt: skip
        assert mine.details == theirs.details | {"classes": 3, "labels": LABELS}


@pytest.mark.parametrize("by", ["likelihood", "answer"])
def test_numbers_are_those_of_scikit_learn(by, model, tokenizer, monkeypatch):
    said = [
        "good",
        "It is bad.",
        "Good!",
        "not known",
        "bad",
        "good",
        "bad",
        "bad or good",
        "x",
        "good",
        "",
        "Not known",
    ]
    if by == "answer":
        written = [Generated(text, 3, True) for text in said]
        monkeypatch.setattr("retain.probes.asking.generate", lambda *a, **k: written)
    (asked,) = probes_from_rows(rows(by=by), "test")
    table = ask([asked], Subject(model, tokenizer))
    truth = [i % 3 for i in range(12)]
    details = [json.loads(row["details"]) for row in table]
    chosen = [one["chosen"] for one in details]
    assert [one["answer"] for one in details] == truth
    if by == "answer":
        assert chosen == [0, 1, 0, 2, 1, 0, 1, None, None, 0, None, 2]
        assert asked.chance is None
    chosen = [-1 if one is None else one for one in chosen]
    found = totals(table)
    assert found.numbers["accuracy"] == accuracy_score(truth, chosen) == sum(row["score"] for row in table) / 12
    occur = sorted({*truth, *chosen} - {-1})
    assert found.numbers["macro_f1"] == f1_score(truth, chosen, labels=occur, average="macro")
    report = classification_report(
        truth, chosen, labels=range(3), target_names=LABELS, output_dict=True, zero_division=0
    )
    for label in LABELS:
        numbers = found.classes[label]
        theirs = report[label]
        assert (numbers.precision, numbers.recall, numbers.f1) == (
            theirs["precision"], theirs["recall"], theirs["f1-score"]
        )  # fmt: skip
        assert numbers.items == theirs["support"] == 4
    private = totals([without_text(row) for row in table])
    assert private.numbers == found.numbers
    assert list(private.classes) == ["0", "1", "2"]
    assert list(private.classes.values()) == list(found.classes.values())


@pytest.mark.parametrize(
    ("text", "labels", "found"),
    [
        ("Spam.", ["spam", "no spam"], 0),
        ("This is no spam", ["spam", "no spam"], 1),
        ("positive, not negative", ["positive", "negative"], None),
        ("unpositive", ["positive", "negative"], None),
        ("", ["positive", "negative"], None),
        ("这是不好的", ["好", "不好"], 1),
        ("正面。", ["正面", "负面", "中性"], 0),
        ("情感：负面", ["正面", "负面", "中性"], 1),
        ("ＮＥＵＴＲＡＬ", ["positive", "neutral"], 1),
        ("A", ["A", "B"], 0),
        ("class 12", ["1", "2", "12"], 2),
        ("both a and b", ["A", "B", "both"], None),
    ],
)
def test_the_label_in_a_written_answer(text, labels, found):
    assert label_in(text, labels) == found


def test_labels_are_shared():
    first, second, third = rows(3)
    del second["labels"], third["labels"]
    said = [{**row, "kind": "classification"} for row in (second, first, third)]
    assert probes_from_rows(said, "test")[0].labels == LABELS
    bare = [{"kind": "classification", "prompt": "P", "label": label} for label in "ab"]
    assert probes_from_rows(bare, "test", labels=["b", "a"])[0].labels == ["b", "a"]
    with pytest.raises(DataError, match="labels None given; allowed is a list of two or more"):
        probes_from_rows(bare, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "god"}, "label: unknown 'god'. Did you mean 'good'"),
        ({"labels": ["good"]}, "allowed is a list of two or more different texts"),
        ({"labels": ["good", "Good "]}, "two or more different texts"),
        ({"labels": ["good", 1]}, "two or more different texts"),
        ({"labels": ["good", "bad"]}, "allowed is one list for a probe"),
        ({"by": "vote"}, "by: unknown 'vote'"),
        ({"by": "answer"}, "allowed is one for a probe"),
        ({"layout": "poem"}, "layout: unknown 'poem'"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(DataError, match=message):
        probe(*rows(2), {**rows(1)[0], **change})


def test_labels_that_look_alike_in_writing_are_refused():
    row = {"prompt": "P", "labels": ["C", "C++"], "label": "C"}
    assert probe(row).labels == ["C", "C++"]
    with pytest.raises(DataError, match=r"labels C, C\+\+ cannot be told apart"):
        probe(row, by="answer")
