"""A monitor sees what is there, leaves no trace in the training, goes on after a stop, and acts when asked."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import carry_out, settings
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, rows, same_bits, stored, train, trainer
from warm import Script

from retain import EWC, L2SP, Distill, ForgettingMonitor, LoRA, Replay
from retain.config import parse
from retain.errors import ConfigError, DataError, RunError
from retain.pipeline import plan
from retain.report.trend import trend, write_trend
from retain.results import load_metrics, load_records
from retain.training import looks as looks_module

sys.path.insert(0, str(Path(__file__).parent))
from monitor_kit import TEXTS, habits, host, kept, looks


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """A probe file that the tiny model has right before training."""
    return str(habits(tmp_path_factory.mktemp("probes") / "habits.jsonl"))


def monitor(probes, every=2, **given):
    return ForgettingMonitor(**({"every": every, "probes": [probes], "anchors": TEXTS} | given))


# -- every trainer, and no trace --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_every_trainer_ends_with_the_same_bits(kind, probes, tmp_path):
    said: list[str] = []
    plain = host(kind, tmp_path / "plain")
    plain.train()
    watched = host(kind, tmp_path / "watched", [monitor(probes, say=said.append)])
    watched.train()
    assert same_bits(stored(plain.model), stored(watched.model))
    assert [e["loss"] for e in plain.state.log_history if "loss" in e] == [
        e["loss"] for e in watched.state.log_history if "loss" in e
    ]
    records = looks(tmp_path / "watched" / "monitor.jsonl")
    assert [r["step"] for r in records] == [0, 2, 4, 6]  # optimizer steps, of two micro-batches each
    assert records[0]["kl"] == {"value": 0, "low": 0, "high": 0}
    assert all(r["kl"]["low"] > 0 for r in records[1:])
    assert records[-1]["why"] == "last"
    assert set(records[-1]["probes"]) == {"habits", "prose"}
    assert records[-1]["probes"]["habits"]["before"] == 1.0
    # the same numbers went through the trainer's own log
    logged = {e["step"]: e for e in watched.state.log_history if "drift/kl" in e}
    assert {step: e["drift/kl"] for step, e in logged.items()} == {r["step"]: r["kl"]["value"] for r in records}
    last = logged[6]
    assert last["forgetting/overall"] == records[-1]["forgetting"]["value"]
    assert last["kept/habits"] == pytest.approx(100 * records[-1]["probes"]["habits"]["score"]["value"])


def test_model_is_left_as_it_was(probes, tmp_path):
    seen = []

    class Watched(ForgettingMonitor):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.model.layers[1].eval()  # a flag that differs from the rest
            flags = [m.training for m in model.modules()]
            marks = [p.requires_grad for p in model.parameters()]
            draws = torch.get_rng_state(), np.random.get_state()[1].copy()
            checkpointing = model.is_gradient_checkpointing
            super().on_step_end(args, state, control, model=model, **kwargs)
            assert flags == [m.training for m in model.modules()]
            assert marks == [p.requires_grad for p in model.parameters()]
            assert torch.equal(draws[0], torch.get_rng_state())
            assert (draws[1] == np.random.get_state()[1]).all()
            assert checkpointing == model.is_gradient_checkpointing
            assert torch.is_grad_enabled()
            seen.append(state.global_step)
            return control

    model = tiny_model(tiny_tokenizer())
    model.model.embed_tokens.requires_grad_(False)
    made = host("trainer", tmp_path, [Watched(every=1, probes=[probes], anchors=TEXTS)], model, max_steps=2)
    made.train()
    assert seen == [1, 2]


def test_under_adapters_the_base_is_what_the_adapter_began_with(probes, tmp_path):
    made = train([LoRA(r=2), Replay(fraction=0.25)], tmp_path, callbacks=[monitor(probes)], steps=4, bf16=True)
    records = looks(tmp_path / "monitor.jsonl")
    assert [r["step"] for r in records] == [0, 2, 4]
    assert records[-1]["kl"]["low"] > 0
    assert made.model.peft_config


def test_trackers_get_the_numbers(probes, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    host("sft", tmp_path / "run", [monitor(probes)], report_to="tensorboard", max_steps=4).train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    records = looks(tmp_path / "run" / "monitor.jsonl")
    asked = [(r["step"], r["forgetting"]["value"]) for r in records if "forgetting" in r]
    assert asked
    found = [(e.step, e.value) for e in board.Scalars("train/forgetting/overall")]
    assert found == [(step, pytest.approx(value, rel=1e-6, abs=1e-9)) for step, value in asked]
    assert [e.step for e in board.Scalars("train/drift/kl")] == [0, 2, 4]
    tags = set(board.Tags()["scalars"])
    assert {"train/forgetting/habits", "train/kept/habits", "train/drift/loss"} <= tags


# -- what is measured -------------------------------------------------------------------------------------
def test_numbers_are_those_of_dense_logits(probes, tmp_path, monkeypatch):
    monkeypatch.setattr(looks_module, "TOP", 10**6)  # all tokens of the vocabulary
    tokenizer, base = tiny_tokenizer(), tiny_model(tiny_tokenizer(), attention_dropout=0.1)
    made = host("sft", tmp_path, [monitor(probes)], max_steps=2)
    made.train()
    record = looks(tmp_path / "monitor.jsonl")[-1]
    divergence = loss = before = tokens = 0.0
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            old, new = (
                torch.log_softmax(m.eval()(input_ids=ids).logits[0, :-1].double(), -1) for m in (base, made.model)
            )
            divergence += float((old.exp() * (old - new)).sum())
            places = torch.arange(ids.shape[1] - 1), ids[0, 1:]
            loss -= float(new[places].sum())
            before -= float(old[places].sum())
            tokens += ids.shape[1] - 1
    assert record["kl"]["value"] == pytest.approx(divergence / tokens, rel=1e-4)
    assert record["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert record["loss_rise"]["value"] == pytest.approx((loss - before) / tokens, rel=1e-3, abs=1e-5)


def test_probes_wait_for_their_turn_or_for_a_move(probes, tmp_path):
    calm = {"probes_every": 3, "move": 50.0}
    host("sft", tmp_path / "calm", [monitor(probes, every=1, **calm)], max_steps=5).train()
    assert [r["why"] for r in looks(tmp_path / "calm" / "monitor.jsonl")] == ["baseline", "", "", "turn", "", "last"]
    host("sft", tmp_path / "moved", [monitor(probes, every=1, probes_every=3, move=0.01)], max_steps=2).train()
    assert [r["why"] for r in looks(tmp_path / "moved" / "monitor.jsonl")] == ["baseline", "moved", "last"]
    host("sft", tmp_path / "none", [monitor(probes, every=1)], max_steps=2, learning_rate=0.0).train()
    records = looks(tmp_path / "none" / "monitor.jsonl")
    assert [r["why"] for r in records] == ["baseline", "", "last"]
    assert records[-1]["forgetting"]["value"] == 0
    assert records[-1]["kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_anchors_of_the_core_suite_are_the_same_every_time():
    texts = looks_module.anchor_texts(40)
    assert texts == looks_module.anchor_texts(40) == looks_module.anchor_texts(128)[:40]
    assert len(set(texts)) == 40
    chats = looks_module.anchor_texts(40, tokenizer=tiny_tokenizer())
    turned = [(plain, chat) for plain, chat in zip(texts, chats) if plain != chat]
    assert 0 < len(turned) < 40  # sentences and passages stay as they are
    for plain, chat in turned:
        question, _, answer = plain.rpartition("\n")
        assert chat.startswith(f"<|im_start|>user\n{question}")  # the tiny template's form
        assert answer in chat


# -- going on ---------------------------------------------------------------------------------------------
def test_resumed_training_has_one_baseline_and_the_same_looks(probes, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = host("sft", tmp_path / "whole", [monitor(probes, patience=1)], **saves)
    whole.train()
    with pytest.raises(Killed):
        host("sft", tmp_path / "cut", [monitor(probes, patience=1), StopAt(5)], **saves).train()
    folder = tmp_path / "cut"
    assert [r["step"] for r in looks(folder / "monitor.jsonl")] == [0, 2, 4]  # 4 is made again
    written = (folder / "monitor" / "baseline.safetensors").stat().st_mtime_ns
    made = host("sft", folder, [monitor(probes, patience=1)], **saves)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert looks(folder / "monitor.jsonl") == looks(tmp_path / "whole" / "monitor.jsonl")
    assert (folder / "monitor" / "baseline.safetensors").stat().st_mtime_ns == written
    assert same_bits(stored(whole.model), stored(made.model))
    other = host("sft", folder, [monitor(probes, anchors=[*TEXTS, "another text"])], **saves)
    with pytest.raises(ConfigError, match="other anchors or probes"):
        other.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    (folder / "monitor" / "baseline.safetensors").write_bytes(b"no tensors")
    damaged = host("sft", folder, [monitor(probes)], **saves)
    with pytest.raises(RunError, match="damaged"):
        damaged.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_kill_9_loses_no_look(probes, tmp_path):
    kept(tmp_path / "whole", probes)
    script, log = Path(__file__).parent / "scripts" / "monitor_run.py", tmp_path / "cut" / "monitor.jsonl"
    process = Script(script, [str(tmp_path / "cut"), probes], tmp_path)
    until = time.monotonic() + 200
    while len(load_records(log)) < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    held = [r["step"] for r in load_records(log)]
    assert held[:4] == [0, 2, 4, 6]
    with open(log, "a") as file:
        file.write('{"kind": "monitor", "task": "", "step": 99, "kl"')  # half a line
    assert [r["step"] for r in load_records(log)] == held
    kept(tmp_path / "cut", probes)
    assert looks(log) == looks(tmp_path / "whole" / "monitor.jsonl")
    assert same_bits(*(load_file(tmp_path / name / "end.safetensors") for name in ("whole", "cut")))
    # a checkpoint with each look
    assert (tmp_path / "whole" / "checkpoint-14").is_dir()
    assert not list(tmp_path.rglob("*.part"))


def test_two_processes_look_once(probes, tmp_path, launch):
    launch("monitor_cases.py", tmp_path, probes)

    def weights(name: str) -> list[dict]:
        return [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]

    def notes(name: str) -> list[list[str]]:
        return [(tmp_path / f"{name}-{rank}.txt").read_text().split("\n") for rank in range(2)]

    for name in ("plain", "warn", "stop", "restore", "raise"):
        assert same_bits(*weights(name)), name
        assert notes(name)[0][0] == notes(name)[1][0], name
    assert same_bits(weights("plain")[0], weights("warn")[0])
    assert [r["step"] for r in looks(tmp_path / "warn" / "monitor.jsonl")] == [0, 2, 4, 6]
    stopped = next(r["step"] for r in looks(tmp_path / "stop" / "monitor.jsonl") if "stop" in r["did"])
    assert notes("stop")[0][0] == str(stopped)
    assert notes("stop")[0][2]
    assert not notes("stop")[1][2:] or not notes("stop")[1][2]
    restored = looks(tmp_path / "restore" / "monitor.jsonl")[-1]
    assert restored["did"] == ["stop", "restore"]
    best = load_file(tmp_path / "restore" / "monitor" / f"best-{restored['standing']['best_step']}.safetensors")
    end = weights("restore")[1]
    assert all(torch.equal(end[name], value) for name, value in best.items())
    raised = looks(tmp_path / "raise" / "monitor.jsonl")
    assert raised[-1]["standing"]["factor"] > 1
    replayed = [sum(x) for x in zip(*(json.loads(note[1]) for note in notes("raise")))]
    per_step = [sum(replayed[i : i + 2]) for i in range(0, len(replayed), 2)]
    assert per_step[0] == 2  # a quarter of 8 rows
    assert max(per_step) >= 4


# -- actions ----------------------------------------------------------------------------------------------
STRICT = {"max_forgetting": 0.01, "patience": 2}
FAST = {"learning_rate": 5e-2}


def test_warns_after_two_looks_in_a_row(probes, tmp_path):
    said: list[str] = []
    host("sft", tmp_path, [monitor(probes, every=1, say=said.append, **STRICT)], max_steps=5, **FAST).train()
    records = looks(tmp_path / "monitor.jsonl")[1:]
    above = [r.get("forgetting", {"value": 0})["value"] > 0.01 for r in records]
    expected = [i > 0 and above[i] and above[i - 1] for i in range(len(above))]
    assert any(expected)
    assert [r["did"] == ["warn"] for r in records] == expected
    assert len(said) == sum(expected)
    assert "old abilities forgotten (above 1%)" in said[0]
    assert "\n" not in said[0]


def test_stops(probes, tmp_path):
    said: list[str] = []
    watch = monitor(probes, every=1, action="stop", say=said.append, **STRICT)
    made = host("sft", tmp_path, [watch], max_steps=40, **FAST)
    made.train()
    last = looks(tmp_path / "monitor.jsonl")[-1]
    assert last["did"] == ["stop"]
    assert made.state.global_step == last["step"] < 40
    assert said[-1].endswith("training stops.")


def test_restores_the_best_weights(probes, tmp_path):
    watch = monitor(probes, every=1, action="restore", score="balance", max_forgetting=0.3)
    made = host("sft", tmp_path, [watch], max_steps=40, **FAST)
    made.train()
    records = looks(tmp_path / "monitor.jsonl")
    assert records[-1]["did"] == ["stop", "restore"]
    scored = {r["step"]: r["score"] for r in records if "score" in r}
    best = max(scored, key=scored.get)
    assert records[-1]["standing"]["best_step"] == best < records[-1]["step"]
    assert [f.name for f in (tmp_path / "monitor").glob("best-*")] == [f"best-{best}.safetensors"]
    again = host("sft", tmp_path / "again", max_steps=40, **FAST)  # the same training up to there
    again.add_callback(StopAt(best))
    with pytest.raises(Killed):
        again.train()
    assert same_bits(stored(made.model), stored(again.model))


def test_a_training_that_the_monitor_ended_stays_ended(probes, tmp_path):
    watch = {"every": 1, "action": "restore", "max_forgetting": 0.3, "checkpoint": True}
    made = host("sft", tmp_path, [monitor(probes, **watch)], max_steps=40, **FAST)
    made.train()
    last = made.state.global_step
    again = host("sft", tmp_path, [monitor(probes, **watch)], max_steps=40, **FAST)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
    assert same_bits(stored(made.model), stored(again.model))
    assert again.state.global_step == last + 1


def test_early_stop_by_the_new_task_and_the_old(probes, tmp_path):
    said: list[str] = []
    watch = monitor(probes, every=1, early_stop=2, tasks=[probes], say=said.append)
    with pytest.raises(DataError, match="two probes are called"):
        host("sft", tmp_path / "twice", [watch], max_steps=2).train()
    task = tmp_path / "task.jsonl"
    task.write_text(Path(probes).read_text().replace('"habits"', '"learned"').replace('"prose"', '"other"'))
    watch = monitor(probes, every=1, early_stop=2, tasks=[str(task)], say=said.append)
    made = host("sft", tmp_path, [watch], max_steps=40, **FAST)
    made.train()
    records = looks(tmp_path / "monitor.jsonl")
    scores = [(r["step"], r["score"]) for r in records if "score" in r]
    best = max(scores, key=lambda one: one[1])[0]
    assert records[-1]["did"] == ["stop"]
    assert [step for step, _ in scores if step > best] == [step for step, _ in scores[-2:]]
    assert "no better efficiency" in said[-1]
    assert records[-1]["probes"]["learned"]["role"] == "task"


@pytest.mark.parametrize(("name", "method"), [("l2sp", L2SP(strength=0.1)), ("distill", Distill(strength=0.1))])
def test_raises_the_strength_of_a_method(name, method, probes, tmp_path):
    watch = monitor(probes, every=1, action="raise", raised=name, factor=3.0, most=6.0, **STRICT)
    made = train([method], tmp_path, callbacks=[watch], steps=8, learning_rate=5e-2, train_rows=rows(32))
    factors = [r["standing"]["factor"] for r in looks(tmp_path / "monitor.jsonl")]
    assert sorted(set(factors)) == [1.0, 3.0, 6.0]
    assert factors == sorted(factors)
    assert method.boost == 6.0
    assert method.config.strength == 0.1
    without = train([type(method)(strength=0.1)], tmp_path / "fixed", steps=8, learning_rate=5e-2, train_rows=rows(32))
    assert not same_bits(stored(made.model), stored(without.model))


def test_a_boost_is_a_strength(tmp_path):
    """Three times the factor is three times the strength, bit for bit where the product is exact."""
    for method, field in ((L2SP, 2.0), (Distill, 2.0), (EWC, 2.0)):
        boosted = method(strength=field)
        boosted.boost = 4.0
        name = method.name
        one = train([boosted], tmp_path / f"{name}-boost", steps=2)
        two = train([method(strength=4 * field)], tmp_path / f"{name}-strength", steps=2)
        worst = max(float((a - b).abs().max()) for a, b in zip(stored(one.model).values(), stored(two.model).values()))
        assert worst < 1e-6, name


def test_raises_the_share_of_replay_also_after_a_resume(probes, tmp_path):
    watch = {"every": 1, "action": "raise", "raised": "replay", "patience": 1, "max_forgetting": 0.01, "most": 3.0}
    given = {"steps": 10, "learning_rate": 5e-2, "train_rows": rows(48), "save_strategy": "steps", "save_steps": 4}

    def start(folder, *more):
        return trainer([Replay(fraction=0.25)], folder, callbacks=[monitor(probes, **watch), *more], **given)

    made = start(tmp_path / "whole")
    made.train()
    records = looks(tmp_path / "whole" / "monitor.jsonl")
    first = next(r["step"] for r in records if "raise" in r["did"])
    replayed = [sum(s > 0 for s in one["source"]) for one in made.seen]
    assert set(replayed[: first + 1]) == {1}
    assert replayed[-1] == 3
    assert made.rows_seen() == (40 - sum(replayed), sum(replayed))
    with pytest.raises(Killed):
        start(tmp_path / "cut", StopAt(7)).train()
    again = start(tmp_path / "cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert [one["ids"] for one in again.seen] == [one["ids"] for one in made.seen[4:]]
    assert looks(tmp_path / "cut" / "monitor.jsonl") == records
    assert same_bits(stored(made.model), stored(again.model))


# -- mistakes ---------------------------------------------------------------------------------------------
def test_mistakes_are_named(probes, tmp_path):
    with pytest.raises(ConfigError, match=r"of kind divergence\. Leave it out"):
        ForgettingMonitor(probes=["divergence"], limit=2)
    with pytest.raises(ConfigError, match="Did you mean 'every'"):
        ForgettingMonitor(evry=3)
    with pytest.raises(ConfigError, match="go together"):
        ForgettingMonitor(action="raise")
    with pytest.raises(ConfigError, match="Give `probes`"):
        ForgettingMonitor(probes=[], action="stop")
    with pytest.raises(DataError, match="2 such texts"):
        host("sft", tmp_path, [monitor(probes, anchors=["one text is too few"])]).train()
    with pytest.raises(ConfigError, match="no methods to raise"):
        host("sft", tmp_path, [monitor(probes, action="raise", raised="ewc")]).train()
    with pytest.raises(ConfigError, match="unknown 'lora'"):
        train([LoRA(r=2), L2SP()], tmp_path, callbacks=[monitor(probes, action="raise", raised="lora")])
    with pytest.raises(ConfigError, match="no share of replay"):
        train([L2SP()], tmp_path, callbacks=[monitor(probes, action="raise", raised="replay")])


# -- in a run ---------------------------------------------------------------------------------------------
def test_a_run_is_watched_from_one_base(shop, tmp_path):
    own = {"every": 2, "probes": [str(shop / "probes.jsonl")], "probes_every": 2, "limit": 4, "anchor_count": 6}
    plain, _ = carry_out(shop, tmp_path / "plain")
    watched, _ = carry_out(shop, tmp_path / "watched", monitor=own)
    assert watched.scores == plain.scores
    for stage in watched.stages[1:]:
        files = [tmp_path / n / "tasks" / stage / "model" / "model.safetensors" for n in ("plain", "watched")]
        assert same_bits(*map(load_file, files))
    records = [r for r in load_metrics(tmp_path / "watched") if r["kind"] == "monitor"]
    assert [(r["task"], r["step"]) for r in records] == [("count", s) for s in (0, 2, 4, 6, 8)] + [
        ("which", s) for s in (0, 2, 4, 6)
    ]
    assert [r["why"] for r in records if r["step"] == 0] == ["baseline", "start"]
    second = next(r for r in records if r["task"] == "which")
    assert second["kl"]["value"] > 0  # from the base of the run, not from where the task begins
    assert "count" in records[4]["probes"]
    assert "which" in records[-1]["probes"]
    picture = trend(load_metrics(tmp_path / "watched"))
    assert picture is not None
    assert "Watched while training" in (tmp_path / "watched" / "report.html").read_text()
    assert (tmp_path / "watched" / "figures" / "trend.svg").is_file()
    assert write_trend(tmp_path / "watched" / "metrics.jsonl", tmp_path / "trend.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "plain" / "figures" / "trend.svg").exists()


def test_settings_of_a_run(shop, tmp_path):
    assert parse(settings(shop, tmp_path)).monitor is None
    assert parse(settings(shop, tmp_path, monitor=True)).monitor.every == 100
    assert parse(settings(shop, tmp_path, monitor=False)).monitor is None
    with pytest.raises(ConfigError, match=r"monitor: unknown 'evry'\. Did you mean 'every'"):
        parse(settings(shop, tmp_path, monitor={"evry": 3}))
    with pytest.raises(ConfigError, match=r"monitor\.raised: unknown 'ewc'"):
        plan(parse(settings(shop, tmp_path, monitor={"action": "raise", "raised": "ewc"})))
    few = tmp_path / "few.jsonl"
    few.write_text('{"probe": "few", "text": "one text"}')
    with pytest.raises(DataError, match=r"monitor\.probes: 'few' has 1 item"):
        carry_out(shop, tmp_path / "few", monitor={"probes": [str(few)]})
    assert not (tmp_path / "few").exists()
