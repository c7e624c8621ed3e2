"""Digests of rows: the same for the same rows, others for any change."""

import os

from retain.data import fingerprint
from retain.data.tasks import load_task


def rows(count, word="answer"):
    return [{"prompt": f"question {i}", "response": f"{word} {i}"} for i in range(count)]


def test_any_change_of_the_rows_changes_the_digest(lines):
    def digest(given):
        return fingerprint.of_task(load_task(lines("x.jsonl", given), hold_out=0.2))

    first = digest(rows(1500))
    assert digest(rows(1500)) == first
    for other in (rows(1499), rows(1500, "reply"), rows(1500)[::-1]):
        assert digest(other)["training rows"] != first["training rows"]
    assert fingerprint.of_rows(rows(3)) != fingerprint.of_rows(rows(2))


def test_rows_that_are_not_used_do_not_count(lines, tmp_path):
    task = load_task(lines("a.jsonl", [row | {"note": "x"} for row in rows(9)]), hold_out=0)
    other = load_task(lines("b.jsonl", [row | {"note": "y"} for row in rows(9)]), hold_out=0)
    assert fingerprint.of_task(task) == fingerprint.of_task(other)


def test_a_stream_is_known_by_its_file_and_its_test_rows(lines, tmp_path):
    path = lines("s/train.jsonl", rows(20))
    lines("s/test.jsonl", rows(3))

    def digest():
        return fingerprint.of_task(load_task(tmp_path / "s", streaming=True))

    first = digest()
    assert digest() == first
    os.utime(path, ns=(0, 0))
    later = digest()
    assert later["training rows"] != first["training rows"]
    assert later["test rows"] == first["test rows"]
    lines("s/test.jsonl", rows(4))
    assert digest()["test rows"] != first["test rows"]
