"""Whole runs on a tiny model: what is in the run directory, for every form of data and way of training."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from run_kit import NUMBERS, carry_out, choice_rows, response_rows, settings, tiny_folder, write_lines
from tiny import tiny_model, tiny_tokenizer
from training_kit import ON_GPU

from retain import ContinualTrainer, Replay, load_run, outcome, pipeline
from retain.config import parse
from retain.errors import RunError
from retain.inputs import read_rows
from retain.pipeline import _Runner, plan, run
from retain.report import compare, curves, judged
from retain.results import ITEM_COLUMNS, load_items, load_metrics, load_results
from retain.rundir import RunDirectory

SHORT = {"tasks": ["data/medical.jsonl"]}


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    """A run of two tasks with replay and distillation over LoRA."""
    output = tmp_path_factory.mktemp("runs") / "first"
    methods = [{"lora": {"r": 4}}, {"replay": {"fraction": 0.25}}, "distill"]
    results, _ = carry_out(shop, output, methods=methods)
    return output, results


def test_files_of_the_run_directory(finished):
    output, _ = finished
    for name in ("run.yaml", "env.json", "results.json", "metrics.jsonl", "report.html", "report.md"):
        assert (output / name).stat().st_size > 0, name
    for stage in ("00-base", "01-count", "02-which"):
        rows = load_items(output / "probes" / f"{stage}.parquet")
        assert list(rows[0]) == list(ITEM_COLUMNS)
        assert {row["probe"] for row in rows} == {"animals", "prose", "count", "which"}
    for stage in ("01-count", "02-which"):
        folder = output / "tasks" / stage
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert json.loads((folder / "done.json").read_text())["kind"] == "adapter"
        assert not list(folder.glob("checkpoint-*"))
    assert not list(output.rglob("*.part"))
    assert "torch" in json.loads((output / "env.json").read_text())["versions"]


def test_results_load_and_hold_the_matrix(finished):
    output, results = finished
    assert load_results(output) == results
    assert results.stages == ["00-base", "01-count", "02-which"]
    assert results.tasks == ["count", "which"]
    assert len(results.matrix) == 3
    assert all(len(row) == 2 for row in results.matrix)
    for i, stage in enumerate(results.stages):
        for j, task in enumerate(results.tasks):
            items = [row["score"] for row in load_items(output / "probes" / f"{stage}.parquet") if row["probe"] == task]
            assert results.matrix[i][j] == pytest.approx(sum(items) / len(items))
    assert results.verdict is not None
    assert {change.probe for change in results.changes} == {"animals", "prose", "count", "which"}
    assert list(results.methods) == ["lora", "replay", "distill"]
    assert results.old.startswith("rows given by the user")


def test_training_summaries_count_rows(finished):
    _, results = finished
    first, second = results.training
    # 24 new rows with a quarter of replay are 32, in batches of 4; 18 are 24
    assert (first.steps, first.new_rows, first.replay_rows) == (8, 24, 8)
    assert (second.steps, second.new_rows, second.replay_rows) == (6, 18, 6)
    assert 0 < first.trainable < first.parameters
    assert first.final_loss is not None


def test_metrics_hold_every_step_and_look(finished):
    output, results = finished
    records = load_metrics(output)
    steps = [(r["task"], r["step"]) for r in records if r["kind"] == "step"]
    assert steps == [(s.task, i) for s in results.training for i in range(1, s.steps + 1)]
    looks = {(r["stage"], r["probe"]): r["score"] for r in records if r["kind"] == "look"}
    assert len(looks) == 12
    for (stage, probe), score in looks.items():
        assert score == results.scores[stage][probe].value
    for record in records:
        if record["kind"] == "step":
            assert record["loss"] == pytest.approx(record["loss/main"] + record["loss/distill"], rel=1e-4)


def test_a_finished_run_is_left_alone(shop, finished):
    output, results = finished
    before = {f: f.stat().st_mtime_ns for f in (output / "tasks").rglob("*") if f.is_file()}
    before |= {f: f.stat().st_mtime_ns for f in (output / "probes").glob("*.parquet")}
    methods = [{"lora": {"r": 4}}, {"replay": {"fraction": 0.25}}, "distill"]
    again, _ = carry_out(shop, output, methods=methods)
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert again.matrix == results.matrix
    assert again.training == results.training


@contextmanager
def killed_in_the_second_task(monkeypatch):
    """A run that ends when it begins to learn its second task."""
    train = _Runner._train

    def killed(self, index, task, stage):
        if index == 2:
            raise KeyboardInterrupt
        train(self, index, task, stage)

    with monkeypatch.context() as patch:
        patch.setattr(_Runner, "_train", killed)
        yield pytest.raises(KeyboardInterrupt)


def test_a_run_killed_in_its_second_task_has_a_report_of_the_first(shop, tmp_path, monkeypatch):
    alone, _ = carry_out(shop, tmp_path / "alone", tasks=[str(shop / "count")])
    said = []
    with killed_in_the_second_task(monkeypatch) as dies, dies:
        run(parse(settings(shop, tmp_path / "run")), said.append)
    sofar = load_results(tmp_path / "run")
    assert not sofar.finished
    assert sofar.ahead == ["which"]
    assert (sofar.tasks, sofar.stages) == (["count"], ["00-base", "01-count"])
    own = {"name", "created", "command", "training", "ahead", "notes"}  # notes: all rows are read before training
    assert sofar.model_dump(exclude=own) == alone.model_dump(exclude=own)  # as if the second task had never been asked
    assert any("report so far" in line for line in said)
    words = "So far, 1 of 2 tasks; still to learn: which"
    assert words in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert words in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    with pytest.raises(RunError, match="is not finished"):
        compare.load([tmp_path / "run", tmp_path / "alone"])
    with pytest.raises(RunError, match="is not finished"):
        compare.load([tmp_path / "alone", tmp_path / "run"])
    written = []
    with monkeypatch.context() as patch:
        save = pipeline.save_results
        patch.setattr(pipeline, "save_results", lambda r, place: (written.append(r.ahead), save(r, place)))
        results, _ = carry_out(shop, tmp_path / "run")
    assert written == [["which"], []]
    assert results.finished
    assert "still to learn" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_old_abilities_can_be_asked_at_both_ends_alone(shop, finished, tmp_path, monkeypatch):
    _, whole = finished
    methods = [{"lora": {"r": 4}}, {"replay": {"fraction": 0.25}}, "distill"]
    ends = {"reference": [str(shop / "probes.jsonl")], "between": "tasks"}
    with killed_in_the_second_task(monkeypatch) as dies, dies:
        carry_out(shop, tmp_path, methods=methods, probes=ends)
    sofar = load_results(tmp_path)
    assert {change.probe for change in sofar.changes} == {"count"}
    assert (sofar.verdict, sofar.group_deltas, sofar.drift) == (None, {}, {})
    assert outcome.BETWEEN in sofar.notes
    assert "still to learn: which" in (tmp_path / "report.html").read_text(encoding="utf-8")

    results, _ = carry_out(shop, tmp_path, methods=methods, probes=ends)
    asked = {path.stem: {row["probe"] for row in load_items(path)} for path in (tmp_path / "probes").glob("*.parquet")}
    everything = {"animals", "prose", "count", "which"}
    assert asked == {"00-base": everything, "01-count": {"count", "which"}, "02-which": everything}
    assert outcome.BETWEEN not in results.notes
    # what was asked is what a run that asks everything finds
    assert (results.matrix, results.changes, results.verdict) == (whole.matrix, whole.changes, whole.verdict)
    for stage, scores in results.scores.items():
        assert scores == {probe: value for probe, value in whole.scores[stage].items() if probe in asked[stage]}
    assert results.group_deltas == {group: [None, both[1]] for group, both in whole.group_deltas.items()}
    assert results.drift == {"02-which": whole.drift["02-which"]}
    # missing, not zero
    curve = curves.kept_curves(results, load_metrics(tmp_path))[0]["animals"]
    assert list(curve) == [0, sum(step.steps for step in results.training)]
    assert judged.groups(results)[0][1] == ["–"] * len(results.group_deltas)
    assert "| after count | – |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_finished_run_is_judged_anew_by_other_thresholds(shop, tmp_path):
    carry_out(shop, tmp_path / "run", tasks=[str(shop / "count")])
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run" / "tasks").rglob("*") if f.is_file()}
    strict = {"margin": 1.0, "margin_nats": 9.0, "alarm": 0.0, "max_forgetting": 1.0, "min_reference": 0.0}
    results, _ = carry_out(shop, tmp_path / "run", tasks=[str(shop / "count")], verdict=strict)
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert results.thresholds.model_dump() == parse(SHORT | {"verdict": strict}).verdict.model_dump()
    assert {c.conclusion for c in results.changes} <= {"kept", "gained", "lost"}
    verdict = results.verdict
    assert verdict.lost_over_threshold == [c.probe for c in results.changes if c.probe != "count" and c.forgetting > 0]
    assert verdict.successful == (verdict.forgetting < 1 and verdict.improvement > 0.1)
    shown = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "mean drop below 100 %" in shown


def test_load_run_gives_the_model_that_was_probed(shop, tmp_path, monkeypatch):
    from retain import pipeline

    kept = {}
    probe = pipeline._Runner._probe

    def spy(self, stage, index):
        probe(self, stage, index)
        ids = self.tokenizer("Seven small ships", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model = self._model_of(index).eval()
            kept[stage] = model(ids.to(model.device)).logits.cpu()

    monkeypatch.setattr(pipeline._Runner, "_probe", spy)
    for name, methods in {"full": ["none"], "lora": [{"lora": {"r": 4}}]}.items():
        kept.clear()
        carry_out(shop, tmp_path / name, methods=methods, old=None)
        for stage, logits in kept.items():
            model, tokenizer = load_run(tmp_path / name, stage)
            ids = tokenizer("Seven small ships", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                found = model.to("cuda" if ON_GPU else "cpu").eval()(ids.to(model.device)).logits.cpu()
            assert torch.allclose(found, logits, atol=0 if name == "full" else 1e-4, rtol=0), (name, stage)
        assert not torch.allclose(kept["00-base"], kept["02-which"])
        assert not hasattr(load_run(tmp_path / name)[0], "peft_config")


def test_load_run_mistakes(tmp_path, finished):
    output, _ = finished
    with pytest.raises(RunError, match=r"no run\.yaml here"):
        load_run(tmp_path)
    with pytest.raises(RunError, match=r"no stage '07-x'\. Stages: 00-base, 01-count, 02-which"):
        load_run(output, "07-x")
    shutil.copytree(output, tmp_path / "bare")
    RunDirectory(tmp_path / "bare").drop_models()
    with pytest.raises(RunError, match="01-count: the weights of this task were deleted"):
        load_run(tmp_path / "bare")  # and not the base in their place


def test_every_form_of_data(shop, tmp_path):
    messages = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in response_rows(16)
    ]
    write_lines(tmp_path / "chats.jsonl", messages)
    write_lines(tmp_path / "texts.jsonl", [{"text": f"Seven small ships {i} sailed north."} for i in range(16)])
    lines = "".join(f"{r['prompt']},{r['response']}\n" for r in response_rows(16))
    (tmp_path / "table.csv").write_text("question,answer\n" + lines)
    Dataset.from_list(choice_rows(16)).to_parquet(str(tmp_path / "quiz.parquet"))
    tasks = [
        {"data": str(tmp_path / "chats.jsonl")},
        {"data": str(tmp_path / "texts.jsonl"), "on": "all"},
        {"data": str(tmp_path / "table.csv"), "columns": {"prompt": "question", "response": "answer"}},
        {"data": str(tmp_path / "quiz.parquet"), "hold_out": 0.25},
    ]
    results, said = carry_out(shop, tmp_path / "run", tasks=tasks, methods=["none"], old=None)
    assert results.tasks == ["chats", "texts", "table", "quiz"]
    kinds = {info.task: info.kind for info in results.probes if info.task}
    assert kinds == {"chats": "answer", "texts": "perplexity", "table": "answer", "quiz": "choice"}
    assert [s.new_rows for s in results.training] == [14, 14, 14, 12]
    assert next(i.items for i in results.probes if i.task == "quiz") == 4
    assert any("held out" in line for line in said)


def test_what_is_learned_is_what_on_says(shop, tmp_path, monkeypatch):
    from tiny import CHAT_TEMPLATE

    marked = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
    )
    model = tiny_folder(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", marked)
    tokenizer.save_pretrained(model)
    talk = [("user", "who"), ("assistant", "me"), ("user", "why"), ("assistant", "so")]
    rows = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in talk]} for i in range(8)]
    data = str(write_lines(tmp_path / "talks.jsonl", rows))
    seen = {}
    train = ContinualTrainer.train

    def spy(self, *args, **kwargs):
        row = self.train_dataset[0]
        kept = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
        seen[on] = tokenizer.decode(kept)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "train", spy)
    for on in ("completion", "assistant", "all"):
        tasks = [{"data": data, "on": on, "hold_out": 0}]
        carry_out(shop, tmp_path / on, model=str(model), tasks=tasks, methods=["none"], old=None)
    number = seen["completion"].split()[1].split("<")[0]
    assert seen["completion"] == f"so {number}<|im_end|>\n"
    assert seen["assistant"] == f"me {number}<|im_end|>\nso {number}<|im_end|>\n"
    assert seen["all"].startswith("<|im_start|>user\nwho")


def test_streaming_task_with_replay(shop, tmp_path):
    tasks = [{"data": str(shop / "count"), "streaming": True}]
    train = settings(shop, tmp_path)["train"] | {"max_steps": 4}
    results, _ = carry_out(shop, tmp_path / "run", tasks=tasks, train=train)
    assert results.training[0].steps == 4
    assert results.matrix[1][0] is not None


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("replay", "none is kept for later tasks"),
        ("agem", "none is kept for later tasks"),
        ({"ewc": {"samples": 4}}, "its importance is not added for later tasks"),
        ({"mas": {"samples": 4}}, "its importance is not added for later tasks"),
        ({"subspace": {"energy": 0.9}}, "the directions of its inputs are not held in later tasks"),
        ({"replay": {"buffer": 0}}, None),
        ({"ewc": {"samples": 4, "estimator": "adam", "fallback": "sampled"}}, None),
    ],
)
def test_what_is_not_kept_of_a_stream_is_said_before_training(shop, tmp_path, monkeypatch, method, what):
    from transformers import Trainer

    said = []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stop)  # the loop itself
    train = settings(shop, tmp_path)["train"] | {"max_steps": 1}
    for streaming in (False, True):
        values = {"tasks": [{"data": str(shop / "count"), "streaming": streaming}], "methods": [method]}
        said.clear()
        with pytest.raises(KeyboardInterrupt):
            run(parse(settings(shop, tmp_path / str(streaming), train=train, **values)), said.append)
        name = method if isinstance(method, str) else next(iter(method))
        line = f"{name}: 'count' is a stream, whose rows are not read again: {what}."
        assert [entry for entry in said if "is a stream" in entry] == ([line] if streaming and what else [])


def small_context(folder):
    """A model that reads 48 tokens."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, max_position_embeddings=48).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("given", [None, 512])
def test_rows_are_held_to_the_context_and_the_report_says_so(shop, tmp_path, monkeypatch, given):
    long = [{"prompt": f"long {i}", "response": "seven small ships " * 30} for i in range(2)]
    data = write_lines(tmp_path / "tale.jsonl", [*response_rows(8), *long])
    old = write_lines(tmp_path / "before.jsonl", [*response_rows(8, 50), long[0]])
    changes = {"model": small_context(tmp_path / "model"), "old": str(old)}
    changes["train"] = settings(shop, tmp_path)["train"] | {"max_length": given, "max_steps": 2}
    seen = []
    train = ContinualTrainer.train

    def spy(self, *args, **kwargs):
        seen.extend(len(row["input_ids"]) for row in self.train_dataset)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "train", spy)
    tasks = [{"data": str(data), "hold_out": 0}, {"data": str(data), "name": "short", "long": "drop", "hold_out": 0}]
    results, said = carry_out(shop, tmp_path / "run", tasks=tasks, **changes)
    word = "null" if given is None else "512 is more than the model can read"
    notes = [
        f"train.max_length: {word}; rows are held to the model's context of 48 tokens",
        "tale: 2 of 10 rows are longer than 48 tokens: cut at the end",
        "short: 2 of 10 rows are longer than 48 tokens: left out",
        "old: 1 of 9 rows is longer than 48 tokens: cut at the end",
    ]
    assert [note for note in said if "48 tokens" in note] == notes
    assert [note for note in results.notes if "48 tokens" in note] == notes
    assert max(seen) == 48
    page, text = ((tmp_path / "run" / name).read_text() for name in ("report.html", "report.md"))
    for note in notes[1:]:
        assert note in page
        assert note in text


def test_a_length_below_the_context_stays_and_nothing_is_said(shop, tmp_path):
    planned = plan(parse(settings(shop, tmp_path)))
    said = []
    rows = read_rows(planned.config, planned.train, said.append)
    assert planned.train["max_length"] == 64
    assert not [line for line in said if "context" in line]
    assert rows.notes == said


def test_without_methods_no_old_rows_are_needed(shop, tmp_path):
    results, _ = carry_out(shop, tmp_path / "run", tasks=[str(shop / "count")], methods=["none"], old=None)
    assert results.old.startswith("none")
    assert (tmp_path / "run" / "tasks" / "01-count" / "model" / "model.safetensors").is_file()
    assert results.training[0].replay_rows == 0


def test_the_model_writes_its_own_old_rows(shop, tmp_path):
    results, said = carry_out(
        shop,
        tmp_path / "run",
        tasks=[str(shop / "count")],
        methods=[{"replay": {"rows": 6}}, "distill"],
        old=None,
        train=settings(shop, tmp_path)["train"] | {"max_length": 256},
    )
    assert results.old == "text the model wrote itself before training"
    assert (tmp_path / "run" / "buffer" / "self.parquet").is_file()
    assert any("wrote" in line for line in said)
    assert results.training[0].replay_rows > 0


def test_python_api(tmp_path):
    from trl import SFTConfig

    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"count {i}"}],
                "completion": [{"role": "assistant", "content": " ".join(NUMBERS[: 1 + i % 7])}],
            }
            for i in range(16)
        ]
    )
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options["num_train_epochs"] = 1
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=4, max_length=64, logging_steps=1, **options)
    trainer = ContinualTrainer(
        tiny_model(tiny_tokenizer()),
        args,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        methods=[Replay(fraction=0.2)],
        old=rows.select(range(8)),
    )
    trainer.train()
    assert trainer.rows_seen() == (16, 4)
    assert trainer.state.global_step == 5
