"""The model card, read back with the hub's own parser."""

from __future__ import annotations

import pytest
import yaml
from fake_run import HOSTILE
from huggingface_hub import ModelCard

from retain.report import card, top
from retain.results import load_results


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_hub_reads_back_what_was_measured(make_run, tmp_path, lang):
    results = load_results(make_run(drop=0.2, items=False, metrics=False))
    found = ModelCard.load(card.write(results, tmp_path / "README.md", lang))
    assert found.data.model_name == results.name
    assert found.data.base_model == "acme/small-135M-instruct"
    assert {"retain", "catastrophic-forgetting"} <= set(found.data.tags)
    measured = {result.dataset_name: result for result in found.data.eval_results}
    for change in results.changes:
        result = measured[change.probe]
        assert result.metric_value == change.after.value
        assert result.metric_args["before"] == change.before.value
        assert (result.metric_args["low"], result.metric_args["high"]) == (change.after.low, change.after.high)
    macro = results.verdict.difference
    loss = measured["mean loss on old abilities"]
    assert loss.metric_value == -macro.value
    assert (loss.metric_args["low"], loss.metric_args["high"]) == (-macro.high, -macro.low)
    assert len(found.data.eval_results) == len(results.changes) + 1
    for words in ("replay", "ewc", "reasoning", "4,884,480"):
        assert words in found.text
    assert top.facts(results)[0].value.split()[0] in found.text
    assert ("## Limits of this measurement" if lang == "en" else "## 测量的局限") in found.text


def test_limits_are_said(make_run):
    results = load_results(make_run(items=False, metrics=False))
    changes = [
        c.model_copy(update={"detectable": 1.2, "conclusion": "cannot tell"}) if c.probe == "grammar" else c
        for c in results.changes
    ]
    text = card.render(results.model_copy(update={"changes": changes}))
    items = sum(c.items for c in changes if c.probe != "reasoning test")
    assert f"{items} items in 6 probes" in text
    assert "Too few items to show any change at all: grammar" in text
    assert "One training run (seed 17)" in text
    assert "Licence" in text


def test_no_folder_of_this_machine_and_no_markup(make_run):
    results = load_results(make_run(items=False, metrics=False))
    update = {"model": "/home/me/models/base", "old": "rows given by the user: /home/me/old.jsonl", "name": HOSTILE}
    text = card.render(results.model_copy(update=update))
    assert "/home" not in text
    assert "rows given by the user: old.jsonl" in text
    data = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in data
    assert data["model-index"][0]["name"] == HOSTILE
    assert "<script" not in text.split("---\n", 2)[2]


def test_a_model_that_was_only_measured(make_run):
    found = ModelCard(card.render(load_results(make_run(tasks=()))))
    assert found.data.eval_results is None
