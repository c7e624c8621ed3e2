"""Experts out of runs: the adapter, and a card whose numbers are those of the run's results."""

import json
import shutil

import pytest
import torch
import yaml
from expert_kit import alone
from run_kit import carry_out, response_rows, write_config, write_lines
from safetensors.torch import load_file

from retain.errors import DataError, RunError
from retain.experts.library import ExpertLibrary
from retain.experts.made import of_run, questions, questions_of
from retain.pipeline import load_run
from retain.results import load_results

LORA = {"methods": [{"lora": {"r": 4}}], "old": None}


@pytest.fixture(scope="module")
def ran(shop, tmp_path_factory):
    """The directory of a finished run of one task."""
    place = tmp_path_factory.mktemp("made") / "count"
    carry_out(shop, place, tasks=[str(shop / "count")], **LORA)
    return place


def test_the_adapter_of_a_run_is_what_the_run_learned(ran, shop, tmp_path):
    adapter, base, fields = of_run(ran, 5)
    books = ExpertLibrary(tmp_path / "experts")
    books.add("count", adapter, base=base, **fields)
    assert books.base == str(shop / "model")
    learned, _ = load_run(ran)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(shop / "model", books.path("count"))(ids).logits, learned.eval()(ids).logits)


def test_the_card_says_what_the_results_say(ran, shop, tmp_path):
    adapter, base, fields = of_run(ran, 5)
    card = ExpertLibrary(tmp_path / "experts").add("count", adapter, base=base, **fields)
    results = load_results(ran)
    assert {m.probe: (m.before, m.after, m.difference.low) for m in card.probes} == {
        c.probe: (c.before.value, c.after.value, c.difference.low) for c in results.changes
    }
    assert {m.role for m in card.probes} == {"reference", "task"}
    assert card.forgetting.value == results.verdict.forgetting
    assert card.forgetting.kept == results.verdict.difference
    assert card.forgetting.learned == results.verdict.learned
    assert card.forgetting.sentence in card.readme()
    assert card.data.source == str(shop / "count")
    assert card.data.rows == results.training[0].new_rows > 0
    assert card.data.test_rows == 4
    assert card.data.digest == json.loads((ran / "data.json").read_text())["tasks.count"]["training rows"]
    assert card.training["methods"]["lora"]["r"] == 4
    assert card.training["steps"] == results.training[0].steps
    assert "peft" in card.training["versions"]
    assert card.rank == 4
    assert len(card.examples) == 5
    rows = [json.loads(line)["prompt"] for line in (shop / "count" / "train.jsonl").read_text().splitlines()]
    assert set(card.examples) <= set(rows)
    assert card.examples != rows[:5]  # a sample, not the first ones
    assert of_run(ran, 5)[2]["examples"] == card.examples  # the same one again


def test_rows_that_are_gone_cost_the_examples_alone(ran, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(ran, copy)
    text = (copy / "run.yaml").read_text()
    (copy / "run.yaml").write_text(text.replace("/count\n", "/gone\n"))
    (copy / "tasks" / "01-count").rename(copy / "tasks" / "01-gone")
    said = []
    assert of_run(copy, say=said.append)[2]["examples"] == []
    assert "--examples-from" in said[0]
    assert of_run(ran, 0, said.append)[2]["examples"] == []
    assert len(said) == 1


def test_a_private_run_keeps_no_question(shop, tmp_path):
    private = {"private": True, "methods": [{"lora": {"r": 2}}], "old": None}
    carry_out(shop, tmp_path / "run", tasks=[str(shop / "count")], **private)
    said = []
    _, _, fields = of_run(tmp_path / "run", say=said.append)
    assert fields["examples"] == []
    assert "private" in said[0]
    assert "count 1" not in json.dumps(fields, default=str)


def test_runs_that_leave_no_expert(shop, ran, tmp_path):
    with pytest.raises(RunError, match=r"no run\.yaml"):
        of_run(tmp_path)
    carry_out(shop, tmp_path / "whole", tasks=[str(shop / "count")], methods=["none"], old=None)
    with pytest.raises(RunError, match="it left model"):
        of_run(tmp_path / "whole")
    shutil.copytree(ran, tmp_path / "cut")
    (tmp_path / "cut" / "tasks" / "01-count" / "done.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        of_run(tmp_path / "cut")
    values = yaml.safe_load((ran / "run.yaml").read_text())
    write_config(tmp_path / "cut" / "run.yaml", values | {"tasks": [*values["tasks"], {"data": str(shop / "which")}]})
    with pytest.raises(RunError, match="learned 2 tasks"):
        of_run(tmp_path / "cut")
    adapted = tmp_path / "cut" / "adapted"
    shutil.copytree(ran / "tasks" / "01-count" / "adapter", adapted)
    shutil.copytree(ran, tmp_path / "onto")
    write_config(tmp_path / "onto" / "run.yaml", values | {"model": str(adapted)})
    with pytest.raises(RunError, match="is an adapter itself"):
        of_run(tmp_path / "onto")


def test_questions_of_rows():
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who  am\nI?"}]
    rows = [
        {"prompt": said, "completion": []},
        {"prompt": [{"role": "user", "content": "who am i?"}]},  # the same but for its spelling
        {"messages": [*said[:1], {"role": "user", "content": "x" * 900}]},
        {"text": "A text."},
        {"prompt": "plain"},
        {"messages": []},
    ]
    found = questions(rows, 10)
    assert sorted(found, key=len) == [
        "plain",
        "A text.",
        next(q for q in found if q.casefold() == "who am i?"),
        "x" * 500,
    ]
    assert len(questions(rows, 2)) == 2
    assert questions(iter(rows), 1) == ["Who am I?"]  # of a stream the first ones


def test_questions_of_a_file(tmp_path):
    (tmp_path / "q.txt").write_text("What is one?\n\nWhat is two?\nWhat is one?\n")
    assert questions_of(tmp_path / "q.txt", 5) == ["What is one?", "What is two?"]
    write_lines(tmp_path / "rows.jsonl", response_rows(6))
    assert sorted(questions_of(tmp_path / "rows.jsonl", 10)) == [f"count {i}" for i in range(6)]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        questions_of(tmp_path / "empty.txt", 5)
    with pytest.raises(DataError, match="no_such"):
        questions_of(tmp_path / "no_such.txt", 5)


def test_what_a_run_trained_is_what_the_file_holds(ran, tmp_path):
    adapter, base, _ = of_run(ran, 0)
    books = ExpertLibrary(tmp_path / "experts")
    books.add("count", adapter, base=base)
    kept, made = (load_file(f / "adapter_model.safetensors") for f in (books.path("count"), adapter))
    assert all(torch.equal(kept[name], made[name]) for name in made)
