"""Distillation: the dense divergence to the start, its gradient, teachers that stay or follow, and plain texts."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, family_model, take_steps, token_batch
from run_kit import settings, workshop
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, distance, merged, other_rows, rows, same_bits, stored, train, trainer

from retain.config import parse
from retain.errors import ConfigError, DataError
from retain.functional import divergence
from retain.methods.context import Batch, Run
from retain.methods.distill import Distill, _predicts
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.models import params
from retain.models.teachers import Other
from retain.pipeline import run as run_all

STRENGTH = 0.7


def student_and_run(model, steps=2, replay=False):
    """A model some steps after its start, and the run that remembers the start."""
    run = Run(directory=None, model=model, start=params.snapshot(params.trainable(model)), has_replay=replay)
    take_steps(model, steps)
    return model, run


def batch_of(model, ids, labels, source=None, mask=None):
    inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    hidden = params.hidden_states(model, inputs)
    return Batch(inputs, labels, hidden, torch.zeros(len(ids), dtype=torch.long) if source is None else source)


def loss(model, run, batch, **settings):
    method = Distill(**({"strength": STRENGTH} | settings))
    method.on_task_start(model, run)
    return method.batch_loss(batch, run)


def masked_labels(ids):
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, -2:] = -100
    return labels


def dense(student_logits, teacher_logits, mask, temperature, direction):
    """The sum over supervised tokens by torch's own kl_div on whole distributions."""
    p = torch.log_softmax(student_logits[:, :-1][mask] / temperature, -1)
    p0 = torch.log_softmax(teacher_logits[:, :-1][mask] / temperature, -1)
    if direction == "jsd":
        return divergence.jsd(teacher_logits[:, :-1][mask], student_logits[:, :-1][mask], temperature=temperature).sum()
    first, second = (p, p0) if direction == "forward" else (p0, p)
    return temperature**2 * F.kl_div(first, second, reduction="sum", log_target=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_value_and_gradient_are_zero_at_the_start(kind):
    model, run = student_and_run(family_model(kind).double(), steps=0)
    ids = token_batch()
    value = loss(model, run, batch_of(model, ids, masked_labels(ids)), temperature=2.0)
    assert abs(float(value.detach())) < 1e-9
    slopes = torch.autograd.grad(value, list(params.trainable(model).values()), allow_unused=True)
    assert max(float(s.abs().max()) for s in slopes if s is not None) < 1e-9


def taught_by(kind, model, run, settings):
    """A method whose teacher is known, and that teacher as a model of its own."""
    method = Distill(strength=STRENGTH, **settings)
    if kind == "start":
        method.on_task_start(model, run)
        weights = run.start
    elif kind == "ema":
        method = Distill(strength=STRENGTH, teacher="ema", decay=0.6, **settings)
        method.on_task_start(model, run)
        weights = {name: 0.6 * run.start[name] + 0.4 * p.detach() for name, p in params.trainable(model).items()}
        method.see_step(model, run)
    else:
        method.on_task_start(model, run)
        other = copy.deepcopy(model)
        take_steps(other, 3)
        weights = params.snapshot(params.trainable(other))
        method._teacher = Other(other, model)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in params.trainable(teacher).items():
            p.copy_(weights[name])
    return method, teacher


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("teacher", ["start", "ema", "frozen"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_value_and_gradient_are_the_dense_ones(kind, teacher, temperature, direction):
    model, run = student_and_run(family_model(kind).double())
    method, past = taught_by(teacher, model, run, {"temperature": temperature, "direction": direction})
    ids = token_batch()
    labels = masked_labels(ids)
    mask = labels[:, 1:] != -100
    with torch.no_grad():
        teacher_logits = past(ids).logits
    wanted = STRENGTH * dense(model(ids).logits, teacher_logits, mask, temperature, direction)
    found = method.batch_loss(batch_of(model, ids, labels), run)
    assert float(wanted.detach()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    learning = params.trainable(model)
    slopes = torch.autograd.grad(found, list(learning.values()))
    truths = torch.autograd.grad(wanted, list(learning.values()))
    for name, slope, truth in zip(learning, slopes, truths):
        torch.testing.assert_close(slope, truth, rtol=1e-5, atol=1e-8, msg=name)


def test_padding_has_no_influence():
    model, run = student_and_run(family_model("llama").double())
    ids = token_batch()
    labels = masked_labels(ids)
    plain = loss(model, run, batch_of(model, ids, labels, mask=torch.ones_like(ids)))
    longer, more = F.pad(ids, (0, 4), value=5), F.pad(labels, (0, 4), value=-100)
    mask = F.pad(torch.ones_like(ids), (0, 4))
    padded = loss(model, run, batch_of(model, longer, more, mask=mask))
    torch.testing.assert_close(plain, padded, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_teacher_is_a_separately_loaded_base(kind):
    base = family_model(kind)
    model = LoRA(r=3).prepare_model(family_model(kind), Run(directory=None))
    model, run = student_and_run(model)
    ids = token_batch()
    with torch.no_grad():
        past = params.hidden_states(model, {"input_ids": ids}, run.start)
        assert (past - params.hidden_states(base, {"input_ids": ids})).abs().max() < 1e-6
        now = params.hidden_states(model, {"input_ids": ids})
        assert (past - now).abs().max() > 1e-3
    found = loss(model, run, batch_of(model, ids, masked_labels(ids)))
    mask = masked_labels(ids)[:, 1:] != -100
    wanted = STRENGTH * dense(model(ids).logits, base(ids).logits.detach(), mask, 1.0, "forward")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_only_the_chosen_rows_count():
    model, run = student_and_run(family_model("llama").double(), replay=True)
    ids = token_batch(4)
    labels, source = masked_labels(ids), torch.tensor([0, 1, 0, 1])

    def value(chosen, which):
        batch = batch_of(model, ids[chosen], labels[chosen], source[chosen])
        found = loss(model, run, batch, rows=which)
        return None if found is None else found.detach()

    everything, replayed, new = torch.arange(4), torch.tensor([1, 3]), torch.tensor([0, 2])
    torch.testing.assert_close(value(everything, "replay"), value(replayed, "all"))
    torch.testing.assert_close(value(everything, "new"), value(new, "all"))
    torch.testing.assert_close(value(everything, "auto"), value(everything, "replay"))
    torch.testing.assert_close(value(everything, "all"), value(everything, "new") + value(everything, "replay"))
    assert value(new, "replay") is None


def test_rows_that_are_not_chosen_get_no_gradient():
    model, run = student_and_run(family_model("llama").double(), replay=True)
    ids = token_batch()
    batch = batch_of(model, ids, masked_labels(ids), torch.tensor([0, 1, 0]))
    (slope,) = torch.autograd.grad(loss(model, run, batch, rows="replay"), batch.hidden)
    assert not slope[[0, 2]].any()
    assert slope[1].any()


def test_the_teacher_does_not_move_while_the_student_trains(tmp_path, model):
    start = stored(model)
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        before = params.hidden_states(model, {"input_ids": ids})
    made = train([Distill(strength=1.0)], tmp_path, model)
    assert same_bits(made.run.start, start)
    with torch.no_grad(), params.evaluating(made.model):
        after = params.hidden_states(made.model, {"input_ids": ids}, made.run.start)
        now = params.hidden_states(made.model, {"input_ids": ids})
    assert torch.equal(before, after)
    assert (now - before).abs().max() > 1e-3


@pytest.mark.parametrize("methods", [[Distill()], [LoRA(), Distill()]], ids=["full", "lora"])
def test_the_teacher_computes_in_the_precision_of_the_student(methods, tmp_path):
    made = train(methods, tmp_path, steps=2, bf16=True)
    first, second = (line["loss/distill"] for line in made.state.log_history if "loss" in line)
    assert first == 0.0  # nothing has moved yet, so any difference would be one of rounding
    assert second > 0.0


@pytest.mark.parametrize("teacher", ["start", "ema"])
def test_half_precision_weights_are_taught_in_half_precision(teacher, tmp_path, model):
    made = train([Distill(teacher=teacher)], tmp_path, model.to(torch.bfloat16), steps=3)
    values = [line["loss/distill"] for line in made.state.log_history if "loss/distill" in line]
    assert values[0] == 0.0, "copies in full precision would differ by rounding"
    assert values[-1] > 0.0


def test_it_holds_the_student_nearer_to_the_start(tmp_path):
    def divergence_after(*methods):
        made = train(methods, tmp_path / str(len(methods)), steps=8)
        ids = torch.tensor([row[:12] for row in made.seen[0]["ids"]])
        with torch.no_grad(), params.evaluating(made.model):
            logits = params.hidden_states(made.model, {"input_ids": ids}) @ params.head(made.model)[0].T
            past = params.hidden_states(made.model, {"input_ids": ids}, made.run.start)
            past = past @ params.head(made.model, made.run.start)[0].T
        return float(divergence.kl(past, logits).mean())

    assert divergence_after(Distill(strength=5.0)) < 0.8 * divergence_after()


def test_the_logged_terms_add_up_to_the_loss(tmp_path):
    made = train([Distill(strength=1.0)], tmp_path, gradient_accumulation_steps=2, batch=2)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/main"] + line["loss/distill"], rel=1e-3)
    assert lines[-1]["loss/distill"] > 0


def test_settings_without_effect_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"rows: 'replay' without replayed rows"):
        train([Distill(rows="replay")], tmp_path)
    with pytest.raises(ConfigError, match="teacher still equals the student"):
        train([Distill()], tmp_path, steps=9, learning_rate=1e-30)
    with pytest.raises(ConfigError, match="temperature"):
        Distill(temperature=0)


def test_with_replay_it_applies_to_the_replayed_rows(tmp_path):
    made = trainer([Replay(fraction=0.5), Distill()], tmp_path)
    made.train()
    assert made.stack.methods[1]._rows == "replay"


@pytest.mark.parametrize(("rows_of", "origin"), [("new", 0), ("replay", 1)])
def test_in_a_training_it_applies_to_the_rows_it_says(rows_of, origin, tmp_path):
    method = Distill(rows=rows_of)
    made = trainer([Replay(fraction=0.5), method], tmp_path)
    seen, ask = [], params.hidden_states
    plain = method.batch_loss

    def spy(batch, run):
        method._teacher.hidden = lambda inputs: seen.append(inputs["input_ids"]) or ask(run.model, inputs, run.start)
        seen.append(batch.inputs["input_ids"][batch.source == origin])
        return plain(batch, run)

    method.batch_loss = spy
    made.train()
    assert len(seen) >= 8
    for wanted, asked in zip(seen[::2], seen[1::2]):
        assert torch.equal(wanted, asked)
    assert {s for micro in made.seen for s in micro["source"]} == {0, 1}


# -- the running average -----------------------------------------------------------------------------------
class Trail(Distill):
    """Remembers the weights after every step."""

    name = "distill"

    def see_step(self, model, run):
        super().see_step(model, run)
        self.trail = [*getattr(self, "trail", []), params.snapshot(params.trainable(model))]


@pytest.mark.parametrize("lora", [False, True])
def test_the_average_is_the_closed_form_and_moves(lora, tmp_path):
    method = Trail(teacher="ema", decay=0.7)
    made = train([*([LoRA(r=4)] if lora else []), method], tmp_path, steps=5)
    average, start = method._teacher.average, made.run.start
    for name in start:
        wanted = 0.7**5 * start[name].double()
        for step, weights in enumerate(method.trail):
            wanted += 0.3 * 0.7 ** (4 - step) * weights[name].double()
        torch.testing.assert_close(average[name].double(), wanted, rtol=1e-5, atol=1e-7)
    assert distance(average, start) > 1e-3
    assert distance(average, method.trail[-1]) > 1e-3


def test_the_average_is_held_in_full_precision(tmp_path, model):
    method = Distill(teacher="ema", decay=0.999)
    made = train([method], tmp_path, model.to(torch.bfloat16), learning_rate=1e-3)
    assert {t.dtype for t in method._teacher.average.values()} == {torch.float32}
    assert {t.dtype for t in method._teacher.weights().values()} == {torch.bfloat16}
    moved = sum(int((method._teacher.average[name] != made.run.start[name]).sum()) for name in made.run.start)
    rounded = sum(int((method._teacher.average[n].bfloat16() != made.run.start[n]).sum()) for n in made.run.start)
    assert moved > 10 * max(rounded, 1)


def test_a_killed_run_goes_on_with_the_average_it_had(tmp_path):
    saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    first, second = (Distill(teacher="ema", decay=0.8, strength=2.0) for _ in range(2))
    straight = train([first], tmp_path / "straight", **saving)
    with pytest.raises(Killed):
        train([Distill(teacher="ema", decay=0.8, strength=2.0)], tmp_path / "killed", callbacks=[StopAt(5)], **saving)
    again = trainer([second], tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(straight.model))
    assert same_bits(second._teacher.average, first._teacher.average)


# -- another model -----------------------------------------------------------------------------------------
def folder_of(path, seed=3, words=None):
    words = words or tiny_tokenizer()
    model = tiny_model(words, seed)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return model


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_another_model_teaches_and_never_moves(dtype, tmp_path):
    other = folder_of(tmp_path / "other")
    method = Distill(teacher="frozen", model=str(tmp_path / "other"), dtype=dtype, strength=20.0)
    made = train([method], tmp_path / "run", steps=40, learning_rate=3e-2)
    held = method._teacher.model
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    kept = stored(other.to(torch.bfloat16) if dtype == "bfloat16" else other)
    assert same_bits(stored(held), kept)
    losses = [line["loss/distill"] for line in made.state.log_history if "loss/distill" in line]
    assert losses[-1] < 0.7 * losses[0], "the student does not go to its teacher"
    assert not {id(p) for p in held.parameters()} & {id(p) for p in made.model.parameters()}


def test_another_tokenizer_is_refused_in_one_line(tmp_path):
    words = copy.deepcopy(tiny_tokenizer())
    words.add_tokens(["unheard"])
    folder_of(tmp_path / "other", words=words)
    method = Distill(teacher="frozen", model=str(tmp_path / "other"))
    for ask in (lambda: method.check_inputs(tiny_tokenizer()), lambda: train([method], tmp_path / "run")):
        with pytest.raises(ConfigError, match=r"^methods\.distill\.model: .*another tokenizer.*'unheard'") as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^methods\.distill\.model: ") as caught:
        Distill(teacher="frozen", model=str(tmp_path / "nowhere")).check_inputs(tiny_tokenizer())
    assert "\n" not in str(caught.value)


# -- plain texts -------------------------------------------------------------------------------------------
TEXTS = ["The sea is cold.", "Seven small ships sailed over the sea.", "A bird can fly", "one two three four", "No."]


def text_file(folder, kind="jsonl"):
    folder.mkdir(exist_ok=True)
    path = folder / f"texts.{kind}"
    lines = [json.dumps({"text": text, "more": 1}) for text in TEXTS]
    path.write_text("\n".join(lines) if kind == "jsonl" else "\n \n\n".join(TEXTS) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("teacher", ["start", "ema"])
def test_texts_give_the_mean_of_the_dense_divergence_over_all_tokens(teacher, kind, tmp_path, model):
    settings = {"rows": "text", "text": text_file(tmp_path, kind), "batch_size": 3, "teacher": teacher}
    method = Distill(strength=STRENGTH, temperature=2.0, **settings, **({"decay": 0.5} if teacher == "ema" else {}))
    made = train([method], tmp_path / "run", model.double(), steps=3)
    run, words = made.run, tiny_tokenizer()
    made.release()  # a copy would keep the trainer's `forward` of the original
    made.model.eval()
    past = copy.deepcopy(made.model)
    with torch.no_grad():
        for name, p in params.trainable(past).items():
            p.copy_(method._teacher.weights()[name])
    drawn = np.random.default_rng([run.seed, run.task_index, run.step, 2]).permutation(len(TEXTS))[:3]
    total, count = 0.0, 0
    for number in drawn:
        ids = torch.tensor([words(TEXTS[number])["input_ids"] + [words.eos_token_id]])
        p0, p = (torch.log_softmax(m(ids).logits[0, :-1] / 2, -1) for m in (past, made.model))
        total = total + 4 * F.kl_div(p, p0.detach(), reduction="sum", log_target=True)
        count += ids.shape[1] - 1
    run.step_batches, run.step_tokens = [None], 10.0
    found, wanted = method.batch_loss(None, run), STRENGTH * 10 * total / count
    assert float(wanted.detach()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    learning = list(params.trainable(made.model).values())
    for slope, truth in zip(torch.autograd.grad(found, learning), torch.autograd.grad(wanted, learning)):
        torch.testing.assert_close(slope, truth, rtol=1e-5, atol=1e-8)
    run.step_batches = [None, None]
    assert method.batch_loss(None, run) is None, "once per step"


def test_texts_do_not_depend_on_accumulation(tmp_path):
    def run(folder, batch, accumulate):
        method = Distill(rows="text", text=text_file(tmp_path), batch_size=2, strength=2.0, teacher="ema", decay=0.8)
        settings = {"batch": batch, "gradient_accumulation_steps": accumulate, "adam_epsilon": 1e-4}
        return merged(train([method], tmp_path / folder, tiny_model(tiny_tokenizer()).double(), **settings).model)

    assert distance(run("whole", 8, 1), run("split", 2, 4)) < 2e-7


@pytest.mark.parametrize("padding_free", [False, True])
def test_texts_are_the_same_after_a_resume_and_differ_between_steps(padding_free, tmp_path):
    def method():
        return Distill(rows="text", text=text_file(tmp_path), batch_size=2, strength=2.0)

    saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    saving |= {"padding_free": True, "max_length": None} if padding_free else {}
    straight = train([method()], tmp_path / "straight", **saving)
    with pytest.raises(Killed):
        train([method()], tmp_path / "killed", callbacks=[StopAt(5)], **saving)
    again = trainer([method()], tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(straight.model))
    drawn = [np.random.default_rng([0, 1, step, 2]).permutation(5)[:2].tolist() for step in range(6)]
    assert len({tuple(d) for d in drawn}) > 3


def test_flattened_texts_count_the_same_tokens():
    apart = {"input_ids": torch.zeros(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    flat = {"input_ids": torch.zeros(1, 8), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])}
    assert _predicts(apart).tolist() == [[True] * 4, [True, True, False, False]]
    assert _predicts(flat).tolist() == [[True, True, True, True, False, True, True]]
    assert int(_predicts(apart).sum()) == int(_predicts(flat).sum()) == 5 + 3 - 2


def test_texts_hold_the_student_on_what_they_are_about(tmp_path):
    def drift(*methods):
        made = train(methods, tmp_path / str(len(methods)), steps=12, train_rows=other_rows(16))
        ids = tiny_tokenizer()(TEXTS[1], return_tensors="pt")["input_ids"]
        with torch.no_grad(), params.evaluating(made.model):
            now = params.hidden_states(made.model, {"input_ids": ids}) @ params.head(made.model)[0].T
            past = params.hidden_states(made.model, {"input_ids": ids}, made.run.start)
            past = past @ params.head(made.model, made.run.start)[0].T
        return float(divergence.kl(past, now).mean())

    assert drift(Distill(rows="text", text=text_file(tmp_path), strength=5.0)) < 0.5 * drift()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.9}, r"decay: has no effect unless `teacher: ema`"),
        ({"model": "x"}, r"model: has no effect unless `teacher: frozen`"),
        ({"dtype": "float32"}, r"dtype: has no effect unless `teacher: frozen`"),
        ({"text": "x.txt"}, r"text: has no effect unless `rows: text`"),
        ({"batch_size": 2}, r"batch_size: has no effect unless `rows: text`"),
        ({"teacher": "frozen"}, r"model: needed with `teacher: frozen`"),
        ({"rows": "text"}, r"text: needed with `rows: text`"),
        ({"teacher": "ema", "decay": 1.0}, r"decay: "),
        ({"strength": -1}, r"strength: "),
    ],
)
def test_a_setting_without_effect_or_sense_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=rf"^methods\.distill\.{message}") as caught:
        Distill(**settings)
    assert "\n" not in str(caught.value)


def test_texts_that_are_not_there_are_found_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Distill(rows="text", text=str(tmp_path / "none.txt")).check_inputs(None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="need a column 'text'"):
        Distill(rows="text", text=str(tmp_path / "rows.jsonl")).check_inputs(None)
    (tmp_path / "empty.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match="no text in it"):
        Distill(rows="text", text=str(tmp_path / "empty.txt")).check_inputs(None)


def test_a_run_is_refused_before_it_begins(tmp_path):
    shop = workshop(tmp_path / "shop")
    asked = {"rows": "text", "text": str(tmp_path / "none.txt")}
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        run_all(parse(settings(shop, tmp_path / "run", methods=[{"distill": asked}])), say=lambda line: None)
    assert not (tmp_path / "run").exists()
    Distill(**Distill(teacher="ema").config.model_dump())


def test_many_parts_of_the_first_step_are_no_teacher_that_equals_the_student(tmp_path):
    """They come before anything has moved, so there the two are rightly equal."""
    settings_ = {"batch": 1, "gradient_accumulation_steps": 10, "steps": 2, "train_rows": rows(40)}
    made = train([Distill(rows="all")], tmp_path, **settings_)
    assert made.state.global_step == 2


def test_a_teacher_that_never_differs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Distill, "compare", lambda self, student, head, past, labels: student.sum(-1) * 0.0)
    with pytest.raises(ConfigError, match="after 8 steps the teacher still equals the student"):
        train([Distill(rows="all")], tmp_path, steps=12, train_rows=rows(48))
