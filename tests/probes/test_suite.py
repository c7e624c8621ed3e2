"""Loading probes from files of every form."""

from __future__ import annotations

import json

import pytest

from retain.errors import DataError
from retain.probes.suite import kinds, load_probes, probes_from_rows


def write(folder, name, *rows):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_kinds_are_the_modules():
    told = {"answer", "choice", "classification", "instruction", "pair", "perplexity", "refusal"}
    assert set(kinds()) >= told | {"divergence", "hallucination"}
    assert all(kind == cls.kind == cls.__module__.rpartition(".")[2] for kind, cls in kinds().items())


def test_the_built_in_suite_loads():
    probes = {probe.name: probe for probe in load_probes("core")}
    elsewhere = {"classification", "divergence", "hallucination"}
    assert {probe.kind for probe in probes.values()} == set(kinds()) - elsewhere
    assert probes["countries"].group == "knowledge"
    assert all(len({item.id for item in probe.items}) == len(probe.items) > 0 for probe in probes.values())


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ({"question": "Q", "choices": ["a", "b"], "answer": 1}, "choice", {"prompt": "Q", "layout": "question"}),
        ({"prompt": "P", "choices": ["a", "b"], "answer": 1}, "choice", {"prompt": "P"}),
        ({"prompt": "P", "response": "R"}, "answer", {"answers": ["R"]}),
        ({"prompt": "P", "response": "long R", "final": "R"}, "answer", {"answers": ["R"]}),
        ({"prompt": "P", "response": "R", "answers": ["X", "Y"]}, "answer", {"answers": ["X", "Y"]}),
        ({"prompt": "P", "response": "b", "label": "b", "options": ["a", "b"]}, "answer", {"answers": ["b"]}),
        ({"question": "Q", "prompt": "P", "response": "R"}, "answer", {"prompt": "P"}),
        ({"question": "Q", "answers": ["R"]}, "answer", {"prompt": "Q"}),
        ({"good": "G", "bad": "B"}, "pair", {"good": "G"}),
        ({"text": "T"}, "perplexity", {"text": "T"}),
        ({"prompt": "P", "check": {"words_max": 3}}, "instruction", {"check": {"words_max": 3}}),
        ({"prompt": "P", "safe": True}, "refusal", {"safe": True}),
        ({"prompt": "P", "answers": ["R"], "answerable": True}, "hallucination", {"answers": ["R"]}),
        ({"prompt": "P", "label": "unsafe"}, "refusal", {"safe": False}),
        ({"prompt": "P", "label": "b", "labels": ["a", "b"]}, "classification", {"label": "b"}),
        ({"prompt": "P", "label": "b", "labels": ["a", "b"], "response": "b"}, "classification", {"label": "b"}),
    ],
)
def test_forms(row, kind, fields, tmp_path):
    (probe,) = load_probes(write(tmp_path, "things.jsonl", row))
    assert (probe.name, probe.kind, probe.group) == ("things", kind, kinds()[kind].group)
    assert fields.items() <= probe.items[0].fields.items()


def test_a_row_says_what_it_is(tmp_path):
    path = write(
        tmp_path, "x.jsonl",
        {"id": 7, "probe": "first", "kind": "answer", "group": "behaviour", "prompt": "P", "answers": ["R"]},
        {"probe": "second", "text": "T"},
        "",
        {"probe": "first", "group": "behaviour", "prompt": "P2", "answers": ["R"]},
    )  # fmt: skip
    first, second = load_probes(path, normalisation="raw")
    assert (first.name, first.group, first.items[0].id, len(first.items)) == ("first", "behaviour", "7", 2)
    assert (second.name, second.kind) == ("second", "perplexity")
    assert first.options == {"normalisation": "raw"}


def test_names_come_from_the_file_the_folder_or_the_caller(tmp_path):
    (tmp_path / "arc").mkdir()
    path = write(tmp_path / "arc", "test.jsonl", {"text": "T"})
    assert load_probes(path)[0].name == "arc"
    assert load_probes(path, name="mine")[0].name == "mine"
    write(tmp_path, "b.jsonl", {"text": "T"})
    write(tmp_path, "a.jsonl", {"text": "T"})
    assert [probe.name for probe in load_probes(tmp_path)] == ["a", "b"]


def test_ids_depend_on_the_content_only(tmp_path):
    rows = [{"text": f"T{i}"} for i in range(3)]
    first = load_probes(write(tmp_path, "a.jsonl", *rows))[0].items
    second = load_probes(write(tmp_path, "b.jsonl", *rows[::-1]))[0].items
    assert [item.id for item in first] == [item.id for item in second][::-1]
    assert len({item.id for item in first}) == 3


def test_limit_is_a_stable_fair_nested_sample(tmp_path):
    path = write(tmp_path, "a.jsonl", *[{"id": f"i{i:03}", "text": "T"} for i in range(300)])

    def ids(**options):
        return [item.id for item in load_probes(path, **options)[0].items]

    assert ids(limit=50) == ids(limit=50) == sorted(ids(limit=50))
    assert len(ids(limit=50)) == 50
    assert set(ids(limit=20)) < set(ids(limit=50))
    assert ids(limit=50, seed=1) != ids(limit=50)
    assert ids(limit=1000) == ids()
    thirds = [sum(int(i[1:]) // 100 == k for i in ids(limit=150)) for k in range(3)]
    assert min(thirds) > 30  # not the first ones


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "T"}', '{"text": '], r"bad.jsonl:2: not JSON \(Expecting value, column 10\)"),
        (["[1]"], r"bad.jsonl:1: a list"),
        ([{"prompt": "P"}], r"bad.jsonl:1: prompt given. Each kind needs: answer: answers, prompt"),
        ([{"kind": "choice", "prompt": "P"}], "answer, choices missing"),
        ([{"kind": "chioce", "prompt": "P"}], "Did you mean 'choice'"),
        ([{"group": "skill", "text": "T"}], "unknown 'skill'"),
        ([{"text": "T"}, {"text": "T"}], r"bad.jsonl:2: the item .* is already at .*:1"),
        ([{"text": "T"}, {"good": "G", "bad": "B"}], r"probe 'bad' is perplexity .* and pair"),
        ([{"text": " "}], "allowed is a text"),
        ([{"text": 7}], "allowed is a text"),
        ([], "no rows"),
        ([""], "no rows"),
    ],
)
def test_mistakes_are_named(rows, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        load_probes(write(tmp_path, "bad.jsonl", *rows))
    assert "\n" not in str(error.value)


def test_one_probe_of_the_suite_has_a_name(tmp_path, monkeypatch):
    whole = {probe.name: probe for probe in load_probes("core", limit=5)}
    (alone,) = load_probes("core/countries", limit=5)
    assert (alone.name, alone.kind, alone.items) == ("countries", "answer", whole["countries"].items)
    with pytest.raises(DataError, match=r"core/countires: unknown 'countires'\. Did you mean 'countries'\?"):
        load_probes("core/countires")
    # a folder of that name is the user's
    monkeypatch.chdir(tmp_path)
    (tmp_path / "core" / "countries").mkdir(parents=True)
    write(tmp_path / "core" / "countries", "mine.jsonl", json.dumps({"prompt": "Why?", "answers": ["So."]}))
    assert [probe.name for probe in load_probes("core/countries")] == ["mine"]


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="built-in suite: core"):
        load_probes("cores")
    with pytest.raises(DataError, match=r"no \*.jsonl"):
        load_probes(tmp_path)
    with pytest.raises(DataError, match="limit 0"):
        load_probes("core", limit=0)
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        load_probes(path)


def test_rows_in_memory_are_as_rows_of_a_file(tmp_path):
    rows = [
        {"id": "a", "question": "Q?", "choices": ["a", "b"], "answer": 0},
        {"id": "b", "probe": "other", "text": "T"},
    ]
    loaded = load_probes(write(tmp_path, "mine.jsonl", *rows), layout="chat")
    made = probes_from_rows(rows, "mine", layout="chat")
    assert [vars(probe) for probe in made] == [vars(probe) for probe in loaded]
    with pytest.raises(DataError, match=r"^mine, row 1: prompt given"):
        probes_from_rows([{"prompt": "P"}], "mine")
