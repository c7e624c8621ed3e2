"""All probes in one go: order, progress, shared batches, and the table they end in."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_model

from retain.probes.asking import WrittenProbe, ask
from retain.probes.base import Subject
from retain.probes.suite import load_probes
from retain.results import ITEM_COLUMNS, load_items, save_items


@pytest.fixture(scope="module")
def probes():
    return load_probes("core", limit=3)


def test_rows_are_in_order_and_fit_the_table(probes, model, tokenizer, tmp_path):
    seen = []
    rows = ask(probes, Subject(model, tokenizer), seen.append)
    assert [(r["probe"], r["item"]) for r in rows] == [(p.name, i.id) for p in probes for i in p.items]
    assert sum(seen) == len(rows) == 3 * len(probes)
    assert all(list(row) == list(ITEM_COLUMNS) for row in rows)
    save_items(rows, tmp_path / "00-base.parquet")
    assert load_items(tmp_path / "00-base.parquet") == rows


def test_twice_is_the_same_and_another_model_is_not(probes, model, tokenizer):
    rows = ask(probes, Subject(model, tokenizer))
    assert ask(probes, Subject(model, tokenizer)) == rows
    other = ask(probes, Subject(tiny_model(tokenizer, seed=1), tokenizer))
    assert other != rows
    assert [(r["item"], r["prompt"], r["reference"]) for r in other] == [
        (r["item"], r["prompt"], r["reference"]) for r in rows
    ]


def test_shared_batches_give_what_each_probe_gives_alone(probes, model, tokenizer):
    subject = Subject(model, tokenizer)
    rows = {row["item"]: row for row in ask(probes, subject)}
    for probe in probes:
        for outcome in probe.look(subject):
            assert rows[outcome.item]["output"] == outcome.output
            assert rows[outcome.item]["score"] == pytest.approx(outcome.score, rel=1e-5)


def test_written_probes_share_batches(probes, model, tokenizer, monkeypatch):
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(len(given["input_ids"])) or generate(**given))
    written = [probe for probe in probes if isinstance(probe, WrittenProbe)]
    ask(written, Subject(model, tokenizer, batch_tokens=10**6))
    assert calls[0] == 3 * len(written), "all at once"
    assert calls == sorted(set(calls), reverse=True), "and then those of them that have not ended"


def test_chat_off_asks_in_plain_text(probes, model, tokenizer):
    rows = ask(probes, Subject(model, tokenizer, chat=False))
    written = {probe.name for probe in probes if isinstance(probe, WrittenProbe)}
    prompts = [row["prompt"] for row in rows if row["probe"] in written]
    assert prompts
    assert all(prompt.endswith("\n") and "<|im_start|>" not in prompt for prompt in prompts)


def test_limits_come_from_the_item_the_probe_or_the_kind(tmp_path, model, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [
        {"id": "own", "prompt": "P", "answers": ["R"], "max_tokens": 2},
        {"id": "not", "prompt": "Q", "answers": ["R"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    (probe,) = load_probes(path, max_tokens=5)
    assert [probe.limit(item) for item in probe.items] == [2, 5]
    (plain,) = load_probes(path)
    assert [plain.limit(item) for item in plain.items] == [2, 32]
    details = [json.loads(row["details"]) for row in ask([probe], Subject(model, tokenizer))]
    assert [d["written"] for d in details if not d["finished"]] == [
        n for n, d in zip([2, 5], details) if not d["finished"]
    ]
    assert all(d["written"] <= n for n, d in zip([2, 5], details))


def test_nothing_to_ask(model, tokenizer):
    assert ask([], Subject(model, tokenizer)) == []
