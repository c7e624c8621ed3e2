"""Rows from files, folders and the hub: every form is read as written, every mistake is one line with its place."""

import gzip
import json

import datasets
import pytest

from retain.data import json_rows
from retain.data.sources import has_split, load_rows, locate
from retain.errors import DataError

ROWS = [
    {"prompt": "Wer?", "response": "Ich."},
    {"prompt": "何?", "response": "NA"},
    {"prompt": "when", "response": "1931-01-01"},
]


def fails(*arguments, **settings):
    with pytest.raises(DataError) as caught:
        list(load_rows(*arguments, **settings))  # a stream fails while it is read
    message = str(caught.value)
    assert "\n" not in message
    return message


def csv_text(rows, separator=","):
    names = list(rows[0])
    quoted = [separator.join('"' + row[name].replace('"', '""') + '"' for name in names) for row in rows]
    return "\n".join([separator.join(names), *quoted]) + "\n"


def write(path, kind):
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
        return
    text = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": csv_text(ROWS),
        "tsv": csv_text(ROWS, "\t"),
    }[kind]
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"]
)
def test_every_form_gives_the_same_rows(tmp_path, name, streaming):
    write(tmp_path / name, name.split(".")[1])
    rows = load_rows(tmp_path / name, streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert list(rows) == ROWS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": ROWS}, ROWS),
        ({"version": 1, "rows": ROWS}, ROWS),
        (
            {"domain_name": "law", "questions": ["a?", "b?"], "ground_truths": ["A", "B"]},
            [{"prompt": "a?", "response": "A", "domain": "law"}, {"prompt": "b?", "response": "B", "domain": "law"}],
        ),
        ({"questions": ["a?"]}, [{"prompt": "a?"}]),
        ({"prompt": "a", "response": "b"}, [{"prompt": "a", "response": "b"}]),
    ],
)
def test_json_objects(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert list(load_rows(path)) == expected


def test_json_lines_under_the_name_json(tmp_path):
    (tmp_path / "x.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(load_rows(tmp_path / "x.json")) == ROWS


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"a": 1}\n{"a": }\n', ["line 2", "column 7", "not JSON"]),
        ('{"a": 1}\n\n{"a": 1', ["line 3", "column 8", "not JSON"]),
        ('{"a": 1}\n{"a": \n{"a": 2}\n', ["line 2", "column 7", "not JSON"]),
        ('{"a": 1}\n[1, 2]\n', ["line 2", "list given", "object"]),
        ('"text"\n', ["line 1", "str given"]),
        ('{"a": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("\n\n", ["no rows"]),
        ("", ["no rows"]),
        ("{}\n", ["no rows"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_lines(tmp_path, text, parts, streaming):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    if text == "{}\n" and streaming:
        pytest.skip("a stream has no columns to miss")
    message = fails(path, streaming=streaming)
    assert all(part in message for part in ["bad.jsonl", *parts])


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "ok"}\n{"a": "\xff"}\n')
    assert "not UTF-8" in fails(path)
    (tmp_path / "y.jsonl.gz").write_bytes(b"not gzip")
    assert "cannot be read" in fails(tmp_path / "y.jsonl.gz")
    (tmp_path / "z.parquet").write_bytes(b"nope")
    assert "PARQUET" in fails(tmp_path / "z.parquet")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"questions": ["a"], "ground_truths": []}', "1 questions but 0"),
        ('{"questions": "a"}', "must be lists"),
        ("[1]", "row 1: int"),
        ("[{]", "line 1, column 3"),
        ("[]", "no rows"),
    ],
)
def test_malformed_json_files(tmp_path, text, part):
    (tmp_path / "x.json").write_text(text)
    assert part in fails(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "header"), ("a,a\n1,2\n", "header"), ("a,b\n", "no rows"), ("a,b\n1,2\n1,2,3\n", "CSV")],
)
def test_malformed_csv(tmp_path, text, part):
    (tmp_path / "x.csv").write_text(text)
    assert part in fails(tmp_path / "x.csv")


def test_csv_cells_are_text_and_lists_are_read(tmp_path):
    (tmp_path / "x.csv").write_text('question,choices,answer\nq,"[""a"", ""b""]",007\nr,one|two ,None\n')
    rows = list(load_rows(tmp_path / "x.csv"))
    assert rows == [
        {"question": "q", "choices": ["a", "b"], "answer": "007"},
        {"question": "r", "choices": ["one", "two"], "answer": "None"},
    ]
    (tmp_path / "y.csv").write_text('choices\n"[1,"\n')
    assert "row 1, 'choices'" in fails(tmp_path / "y.csv")


def test_values_keep_their_type(lines):
    rows = [
        {"id": 1, "answer": 0, "kwargs": [{"n": 1}, {}], "score": 1, "when": "2020-01-01", "tags": []},
        {
            "id": "x",
            "answer": 3,
            "kwargs": [{"words": ["a"]}],
            "score": 0.5,
            "when": "2021-01-01 10:00:00",
            "tags": ["t"],
        },
        {"id": None},
    ]
    read = list(load_rows(lines("x.jsonl", rows)))
    assert read[:2] == rows[:2]
    assert read[2]["kwargs"] is None


def test_a_large_file_is_memory_mapped_and_read_again_when_it_changes(lines, monkeypatch):
    monkeypatch.setattr(json_rows, "IN_MEMORY", 0)
    path = lines("x.jsonl", ROWS)
    rows = load_rows(path)
    assert rows.cache_files
    assert list(rows) == ROWS
    lines("x.jsonl", [*ROWS, {"prompt": "p", "extra": 1}])
    assert len(load_rows(path)) == 4


def test_folders_and_splits(lines, tmp_path):
    lines("set/train.jsonl", ROWS)
    lines("set/validation.jsonl", ROWS[:1])
    assert len(load_rows(tmp_path / "set")) == 3
    assert len(load_rows(tmp_path / "set", "dev")) == 1
    assert has_split(tmp_path / "set", "val")
    assert not has_split(tmp_path / "set", "test")
    message = fails(tmp_path / "set", "test")
    assert "no file for 'test'" in message
    assert "train.jsonl, validation.jsonl" in message


def test_missing_paths_name_what_is_there(lines, tmp_path):
    lines("poems/train.jsonl", ROWS)
    message = fails(tmp_path / "peoms" / "train.jsonl")
    assert "no such file" in message
    assert f"Did you mean '{tmp_path / 'poems'}'" in message
    assert "Did you mean" in fails(tmp_path / "poems" / "tran.jsonl")
    (tmp_path / "x.docx").write_text("x")
    assert "'.docx' are not read" in fails(tmp_path / "x.docx")
    assert locate("owner/name") is None
    assert "no such file" in fails("./owner")


def test_limit_is_a_seeded_sample_in_order(lines):
    path = lines("x.jsonl", [{"text": str(i)} for i in range(50)])
    draws = {seed: [int(row["text"]) for row in load_rows(path, limit=10, seed=seed)] for seed in range(8)}
    assert all(len(draw) == 10 and draw == sorted(draw) for draw in draws.values())
    assert len({tuple(draw) for draw in draws.values()}) == 8
    assert draws[0] == [int(row["text"]) for row in load_rows(path, limit=10, seed=0)]
    assert len(load_rows(path, limit=99)) == 50
    stream = [row["text"] for row in load_rows(path, limit=10, streaming=True)]
    assert len(set(stream)) == 10
    assert "limit is 0" in fails(path, limit=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_renamed(lines, streaming):
    path = lines("x.jsonl", [{"instruction": "i", "output": "o", "prompt": "other"}])
    rows = load_rows(path, columns={"prompt": "instruction", "response": "output"}, streaming=streaming)
    assert list(rows) == [{"prompt": "i", "response": "o"}]
    assert "no column 'nothing'" in fails(path, columns={"prompt": "nothing"})
    assert "cannot stand for two" in fails(path, columns={"a": "output", "b": "output"})


def test_hub_ids(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split))
        if split == "dev":
            raise ValueError('Unknown split "dev". Should be one of [...]')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("owner/name:main", "dev")) == 3
    assert asked == [("owner/name", "main", "dev"), ("owner/name", "main", "validation")]

    def offline(*arguments, **settings):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = fails("owner/name")
    assert "owner/name: no such local path" in message
    assert "Couldn't reach the Hub" in message
    assert "local file" in message
