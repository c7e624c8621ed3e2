"""Tasks of lm-evaluation-harness as probes: the harness's own numbers, item by item, on a model in memory."""

from __future__ import annotations

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from harness_kit import ANSWERS, alone, answer_some, write_task, write_tasks
from harness_kit import tasks as all_tasks
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from retain import analysis
from retain.errors import DataError, ModelError
from retain.probes import harness_tasks
from retain.probes.asking import ask
from retain.probes.base import Subject, texts_of_items
from retain.probes.suite import kinds, load_probes
from retain.workload import questions

pytest.importorskip("lm_eval")

METRICS = [
    ("tiny_choice", "acc"),
    ("tiny_choice", "acc_norm"),
    ("tiny_choice", "acc_bytes"),
    ("tiny_choice", "acc_mutual_info"),
    ("tiny_shots", "acc"),
    ("tiny_pair", "acc"),
    ("tiny_written", "exact_match"),
    ("tiny_ending", "perplexity"),
    ("tiny_ending", "acc"),
    ("tiny_text", "word_perplexity"),
    ("tiny_text", "byte_perplexity"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    found = write_tasks(tmp_path_factory.mktemp("tasks"))
    answer_some(found, tiny_model(tokenizer), tokenizer)
    return found


@pytest.fixture(scope="module")
def theirs(folder, tokenizer):
    """Task → what the harness alone says of it."""
    model = tiny_model(tokenizer)
    return {name: alone(model, tokenizer, folder, name) for name, _ in METRICS}


def probe_of(folder, name, metric="", limit=None):
    (probe,) = load_probes(f"lm_eval:{folder / name}.yaml" + (f"@{metric}" if metric else ""), limit)
    return probe


def scored(probe, rows):
    return analysis.score(rows, probe.info("reference")).value


@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_the_score_is_the_harness_number(name, metric, folder, theirs, model, tokenizer):
    probe = probe_of(folder, name, metric)
    assert (probe.name, probe.kind, probe.metric, len(probe.items)) == (name, "lm_eval", metric, 9)
    assert probe.higher_is_better == ("perplexity" not in metric)
    rows = ask([probe], Subject(model, tokenizer))
    expected = theirs[name]["results"][name][f"{metric},none"]
    assert scored(probe, rows) == pytest.approx(expected, rel=1e-6, abs=0 if "perplexity" in metric else 1e-12)
    assert "perplexity" in metric or (name, metric) == ("tiny_ending", "acc") or 0 < expected < 1
    for row, sample in zip(rows, theirs[name]["samples"][name], strict=True):
        value = sample[metric]
        value, weight = value if isinstance(value, tuple) else (value, 1)
        assert row["score"] == pytest.approx(-value if "perplexity" in metric else value, rel=1e-5)
        assert row["tokens"] == weight
        assert row["correct"] == (None if "perplexity" in metric else value == 1)


def test_the_first_metric_is_the_score_and_the_others_are_kept(folder, model, tokenizer):
    probe = probe_of(folder, "tiny_choice")
    assert probe.metric == "acc"
    rows = ask([probe], Subject(model, tokenizer))
    assert all({"acc_norm", "acc_bytes", "acc_mutual_info"} <= json.loads(row["details"]).keys() for row in rows)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_mutual_info"])
def test_choices_are_shown_as_they_were_scored(metric, folder, model, tokenizer):
    probe = probe_of(folder, "tiny_choice", metric)
    assert probe.chance == pytest.approx(1 / 3)
    seen = set()
    for number, (item, outcome) in enumerate(zip(probe.items, probe.look(Subject(model, tokenizer)), strict=True)):
        assert outcome.prompt.startswith("Question: What is the capital of")
        assert outcome.reference == item.fields["choices"][ANSWERS[number]]
        assert outcome.correct == (outcome.output == outcome.reference)
        assert outcome.details["choices"] == len(outcome.details["log_likelihoods"]) == 3
        seen.add(outcome.details["chosen"])
    assert len(seen) > 1


def test_what_was_written_is_kept(folder, model, tokenizer, theirs):
    probe = probe_of(folder, "tiny_written")
    for row, sample in zip(
        ask([probe], Subject(model, tokenizer)), theirs["tiny_written"]["samples"]["tiny_written"], strict=True
    ):
        assert (row["prompt"], row["output"]) == (sample["arguments"][0][0], sample["filtered_resps"][0])
        assert row["reference"] == sample["target"]


def test_shots_are_the_same_at_every_look(folder, model, tokenizer):
    probe = probe_of(folder, "tiny_shots")
    first, second = (ask([probe], Subject(model, tokenizer)) for _ in range(2))
    assert first == second
    assert first[0]["prompt"].count("Question:") == 3


def test_limit_takes_the_first_as_the_harness_does(folder, model, tokenizer):
    whole, part = probe_of(folder, "tiny_choice"), probe_of(folder, "tiny_choice", limit=4)
    assert [item.id for item in part.items] == [item.id for item in whole.items[:4]]
    expected = alone(model, tokenizer, folder, "tiny_choice", limit=4)["results"]["tiny_choice"]["acc,none"]
    assert scored(part, ask([part], Subject(model, tokenizer))) == expected
    with pytest.raises(DataError, match="limit 0 given; allowed is 1 or more"):
        probe_of(folder, "tiny_choice", limit=0)


def test_a_group_gives_a_probe_per_task_and_a_folder_all(folder):
    (choice, pair) = load_probes(f"lm_eval:{folder}/tiny_group.yaml")
    assert (choice.name, pair.name) == ("tiny_choice", "tiny_pair")
    assert pair.chance == 0.5
    assert {probe.name for probe in load_probes(f"lm_eval:{folder}")} == set(all_tasks(folder))


def test_one_filter_is_the_score_and_the_others_are_kept(folder, model, tokenizer):
    settings = {"task": "tiny_filters"} | all_tasks(folder / "rows.jsonl")["tiny_written"]
    settings["filter_list"] = [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "lower", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
    ]
    path = write_task(folder.parent / "tiny_filters.yaml", settings)
    (probe,) = load_probes(f"lm_eval:{path}")
    rows = ask([probe], Subject(model, tokenizer))
    assert all("exact_match,lower" in json.loads(row["details"]) for row in rows)


def test_adapters_answer_as_the_merged_model(folder, tokenizer):
    model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    probe = probe_of(folder, "tiny_text")
    bare = ask([probe], Subject(tiny_model(tokenizer), tokenizer))
    live = ask([probe], Subject(model, tokenizer))
    merged = alone(model.merge_and_unload(), tokenizer, folder, "tiny_text")["results"]["tiny_text"]
    assert scored(probe, live) == pytest.approx(merged["word_perplexity,none"], rel=1e-5)
    assert scored(probe, live) != pytest.approx(scored(probe, bare), rel=1e-3)


def test_quantised_weights_answer(folder, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    from retain.config import ModelConfig
    from retain.models.load import load_model

    tiny_model(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path), quantize="4bit"), tokenizer=False)
    probe = probe_of(folder, "tiny_choice")
    rows = ask([probe], Subject(model, tokenizer))
    expected = alone(model, tokenizer, folder, "tiny_choice", softmax_dtype="float32")
    assert scored(probe, rows) == expected["results"]["tiny_choice"]["acc,none"]


def test_the_arithmetic_is_that_of_the_look(folder, model, tokenizer):
    probe = probe_of(folder, "tiny_text")
    plain = scored(probe, ask([probe], Subject(model, tokenizer)))
    with torch.autocast("cpu", torch.bfloat16):
        half = scored(probe, ask([probe], Subject(model, tokenizer)))
    given = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"}
    expected = alone(model, tokenizer, folder, "tiny_text", **given)["results"]["tiny_text"]["word_perplexity,none"]
    # rounding of bfloat16 depends on the batch; in float32 the same number is twenty times as far away
    assert abs(math.log(half / expected)) < 0.1 * abs(math.log(half / plain))


def test_a_look_leaves_everything_as_it_was(folder, model, tokenizer):
    model.train()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = True  # a model whose weights were set apart on purpose
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    probes = load_probes(f"lm_eval:{folder}", 3)
    counted = []
    ask(probes, Subject(model, tokenizer), counted.append)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected[1:]
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)
    assert sum(counted) == sum(len(probe.items) for probe in probes)
    assert min(counted) > 0


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_written", "tiny_text"])
def test_progress_comes_while_the_model_works(name, folder, model, tokenizer):
    counted = []
    ask([probe_of(folder, name)], Subject(model, tokenizer, batch_tokens=64), counted.append)
    assert sum(counted) == 9
    assert len(counted) > 3


def test_batches_hold_so_many_tokens(folder, model, tokenizer):
    sizes = []
    model.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    ask([probe_of(folder, "tiny_choice")], Subject(model, tokenizer, batch_tokens=4096))
    rows, width = map(max, zip(*sizes))
    assert rows > 1
    assert rows * width <= 1024  # what other probes take on a processor
    assert (rows + 1) * (width + 1) > 1024 or rows == 54


def test_the_texts_of_items_are_known(folder, tokenizer):
    texts = texts_of_items(load_probes(f"lm_eval:{folder}"))
    assert "Question: What is the capital of France 0?\nAnswer:" in texts
    assert "The bird sailed 0 times." in texts
    assert not any("The birds sails" in text for text in texts)


def test_the_work_can_be_told_before(folder, tokenizer):
    work = questions([probe_of(folder, "tiny_written")], tokenizer)
    assert work.calls == [(9, 6)]
    assert questions([probe_of(folder, "tiny_choice")], tokenizer).calls == []


def test_rows_of_probe_files_are_never_taken_for_a_task():
    assert "lm_eval" not in kinds()
    assert "harness" not in kinds()


def test_an_answer_longer_than_the_context_is_one_line(folder, tokenizer):
    probe = probe_of(folder, "tiny_written")
    probe.task.set_config("generation_kwargs", {"until": ["\n"], "max_gen_toks": 600})
    with pytest.raises(ModelError, match=r"'tiny_written': the harness cannot ask this model \(.*600"):
        ask([probe], Subject(tiny_model(tokenizer), tokenizer))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("lm_eval:", "no task"),
        ("lm_eval:nowhere/task.yaml", "no such task file"),
        ("lm_eval:{folder}/part.yaml", "neither `task:` nor `group:`"),
        ("lm_eval:{folder}/tiny_choice.yaml@f1", r"no metric 'f1'. Its metrics: acc, acc_norm"),
    ],
)
def test_what_cannot_be_asked_is_one_line(source, said, folder):
    with pytest.raises(DataError, match=said) as caught:
        load_probes(source.format(folder=folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "the data of 'broken' cannot be loaded"),
        ({"dataset_path": "someone/something"}, "Data from the hub need a network once"),
        ({"test_split": "dev"}, "KeyError"),
        ({"doc_to_txt": "question"}, "doc_to_txt"),
        ({"metric_list": [{"metric": "bleu", "aggregation": "bleu"}]}, "bleu of 'broken' is of all items together"),
        ({"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_a_broken_task_file_is_one_line(change, said, folder, tmp_path):
    settings = {"task": "broken"} | all_tasks(folder / "rows.jsonl")["tiny_choice"] | change
    with pytest.raises(DataError, match=said) as caught:
        load_probes(f"lm_eval:{write_task(tmp_path / 'broken.yaml', settings)}")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_one_line_with_suggestions(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    few = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(harness_tasks, "_manager", lambda *args, **kwargs: few)
    with pytest.raises(DataError, match=r"unknown task 'tiny_chioce'\. Did you mean 'tiny_choice'") as caught:
        load_probes("lm_eval:tiny_chioce")
    assert "\n" not in str(caught.value)
    assert [probe.name for probe in load_probes("lm_eval:tiny_group")] == ["tiny_choice", "tiny_pair"]


def test_a_name_of_the_harness_leads_to_its_file():
    """Without the network its data are not there: one line says so."""
    with pytest.raises(DataError, match=r"the data of 'arc_easy' cannot be loaded .*Data from the hub") as caught:
        load_probes("lm_eval:arc_easy")
    assert "\n" not in str(caught.value)


def test_without_the_harness_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DataError, match=r"not installed. Install it with `pip install 'retain-llm\[harness\]'`"):
        load_probes("lm_eval:arc_easy")
