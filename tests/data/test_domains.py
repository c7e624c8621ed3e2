"""Domain question sets: from every form to one probe per domain, repetitions counted, mistakes in one line."""

from __future__ import annotations

import json

import pytest

from retain.data.domains import answer_tokens, set_rows
from retain.data.sources import load_rows
from retain.errors import DataError
from retain.probes.suite import load_probes

HISTORY = {"domain_name": "history", "questions": ["Who?", "When?"], "ground_truths": ["Ann", 1066]}
BIOLOGY = {"domain_name": "biology", "questions": ["What?"], "ground_truths": [["cell", "a cell"]], "levels": ["hard"]}


def save(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def asked(probes):
    return {p.name: [(item.fields["prompt"], item.fields["answers"]) for item in p.items] for p in probes}


WANTED = {"history": [("Who?", ["Ann"]), ("When?", ["1066"])], "biology": [("What?", ["cell", "a cell"])]}


def test_a_list_of_sets_and_a_folder_of_files_are_the_same_probes(tmp_path):
    listed = load_probes(save(tmp_path / "all.json", [HISTORY, BIOLOGY]))
    folder = tmp_path / "domains"
    folder.mkdir()
    save(folder / "a.json", HISTORY)
    save(folder / "b.json", BIOLOGY)
    filed = load_probes(folder)
    assert asked(listed) == asked(filed) == WANTED
    assert [[item.id for item in p.items] for p in listed] == [[item.id for item in p.items] for p in filed]
    assert {(p.kind, p.group) for p in listed} == {("answer", "knowledge")}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_rows_with_a_domain_become_a_probe_each(tmp_path, ending):
    import pandas

    rows = [
        {"domain": "history", "question": "Who?", "answer": "Ann", "choices": None},
        {"domain": "biology", "question": "What?", "answer": "cell", "choices": None},
        {"domain": "history", "question": "When?", "answer": "1066", "choices": None},
        {"domain": "letters", "question": "First?", "answer": "a", "choices": "a|b"},
    ]
    path = tmp_path / f"x.{ending}"
    if ending == "jsonl":
        rows[3] |= {"choices": ["a", "b"], "answer": 0}
        path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows))
    elif ending == "parquet":
        rows[3]["choices"] = ["a", "b"]
        pandas.DataFrame(rows).to_parquet(path)
    else:
        pandas.DataFrame(rows).to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    *written, letters = sorted(load_probes(path), key=lambda p: p.name == "letters")
    assert asked(written) == {"history": [("Who?", ["Ann"]), ("When?", ["1066"])], "biology": [("What?", ["cell"])]}
    assert (letters.kind, letters.items[0].fields["choices"], letters.items[0].fields["answer"]) == (
        *("choice", ["a", "b"]),
        0,
    )


def test_repeated_questions_are_left_out_and_counted(tmp_path):
    again = HISTORY | {"questions": ["Who?", " WHO? ", "who?", "When?"], "ground_truths": ["Ann", "ann", "Bea", "1066"]}
    said = []
    (probe,) = load_probes(save(tmp_path / "h.json", again), say=said.append)
    assert asked([probe]) == {"history": WANTED["history"]}
    assert said == [f"{tmp_path / 'h.json'}: history: 2 repeated questions left out, 1 of them with another answer."]
    other = BIOLOGY | {"questions": ["Who?"], "ground_truths": ["Ann"]}
    assert [len(p.items) for p in load_probes(save(tmp_path / "two.json", [HISTORY, other]))] == [2, 1], "not across"


def test_a_folder_of_data_is_no_domain(tmp_path):
    """What was read of a folder before is read now, and other files that hold no questions are named."""
    (tmp_path / "prose.jsonl").write_text('{"text": "T"}\n')
    save(tmp_path / "about.json", {"license": "free", "rows": 1})
    said = []
    assert [p.name for p in load_probes(tmp_path, say=said.append)] == ["prose"]
    assert said == [f"{tmp_path / 'about.json'}: no questions with answers in it; left out."]


def test_long_answers_get_room(tmp_path):
    long = " ".join(["word"] * 60)
    texts = {"questions": ["A?", "B?"], "ground_truths": ["short", long]}
    (probe,) = load_probes(save(tmp_path / "x.json", texts | {"domain_name": "d"}))
    assert [probe.limit(item) for item in probe.items] == [32, 136]
    assert answer_tokens(["word " * 1000]) == 256


def test_a_set_without_a_name_is_called_as_its_file(tmp_path):
    path = save(tmp_path / "law.json", {"questions": ["Q?"], "ground_truths": ["A"]})
    assert [p.name for p in load_probes(path)] == ["law"]


def test_sets_are_training_rows_too(tmp_path):
    rows = load_rows(save(tmp_path / "all.json", [HISTORY, BIOLOGY]))
    assert rows["response"] == ["Ann", "1066", "cell"]
    assert rows["domain"] == ["history", "history", "biology"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ground_truths": ["Ann"]}, r"x.json, domain 'history': 2 questions but 1 ground_truths"),
        ({"levels": ["hard"]}, r"2 questions but 1 levels"),
        ({"questions": ["Who?", "  "]}, r"x.json, domain 'history', question 2: '  ' given"),
        ({"questions": ["Who?", 7]}, r"question 2: 7 given"),
        ({"ground_truths": ["Ann", ""]}, r"ground_truth 2: '' given"),
        ({"ground_truths": ["Ann", None]}, r"ground_truth 2: None given"),
        ({"ground_truths": ["Ann", []]}, r"ground_truth 2: \[\] given"),
        ({"ground_truths": ["Ann", True]}, r"ground_truth 2: True given"),
        ({"ground_truths": "Ann"}, "must be lists; 'ground_truths' is a str"),
        ({"questions": [], "ground_truths": []}, "no questions"),
        ({"domain_name": ""}, "domain_name '' given"),
        ({"ground_truths": None}, "row 1: .*prompt given. Each kind needs"),
    ],
)
def test_mistakes_are_one_line_with_file_and_number(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        load_probes(save(tmp_path / "x.json", HISTORY | change))
    assert "\n" not in str(caught.value)
    assert "x.json" in str(caught.value)


def test_the_set_in_a_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"all.json, set 2, domain 'history': 2 questions but 1"):
        load_probes(save(tmp_path / "all.json", [BIOLOGY, HISTORY | {"ground_truths": ["Ann"]}]))


def test_sets_on_the_hub_are_read_from_their_test_split(monkeypatch):
    from datasets import Dataset

    from retain.data import sources

    asked_for = []

    def hub(name, split, streaming):
        asked_for.append((name, split))
        return Dataset.from_list([{"domain": "history", "question": "Who?", "answer": "Ann"}])

    monkeypatch.setattr(sources, "_from_hub", hub)
    assert asked(load_probes("someone/sets")) == {"history": [("Who?", ["Ann"])]}
    assert asked_for == [("someone/sets", "test")]


def test_a_run_asks_a_folder_of_sets(tmp_path):
    """`probes.reference` takes it, and says what was left out."""
    from retain.config import parse
    from retain.inputs import load_probes as of_run

    save(tmp_path / "h.json", HISTORY | {"questions": ["Who?", "Who?"], "ground_truths": ["Ann", "Ann"]})
    config = parse({"model": "starter", "tasks": ["x"], "probes": {"reference": [str(tmp_path)]}})
    said = []
    _, infos, _ = of_run(config.model_copy(update={"tasks": []}), [], None, said.append)
    assert [(i.name, i.role, i.kind, i.items) for i in infos] == [("history", "reference", "answer", 1)]
    assert "1 repeated question left out" in said[0]


def test_answers_may_be_missing_where_prompts_are_wanted():
    assert set_rows({"questions": ["Q?"]}, "x") == [{"prompt": "Q?"}]
