"""The host's traps: scales, hook order, logging, wrappers. Each test pins one that once cost somebody a result."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from tiny import tiny_model, tiny_tokenizer
from training_kit import distance, rows, same_bits, stored, train, trainer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from retain.errors import ConfigError, TrainingDiverged
from retain.methods import build
from retain.methods.base import Method, Stack
from retain.methods.context import Run
from retain.models.pull import Pull
from retain.training import guards
from retain.training.trainer import ContinualMixin

REPLAY = {"replay": {"fraction": 0.25}}
TEAMS = {
    "none": [],
    "distill": ["distill"],
    "replay-distill": [REPLAY, "distill"],
    "l2sp": [{"l2sp": {"strength": 0.5}}],
    "ewc": [{"ewc": {"strength": 0.5, "samples": 8}}],
}


def double():
    return tiny_model(tiny_tokenizer()).double()


@pytest.mark.parametrize("team", TEAMS)
def test_weight_of_terms_does_not_depend_on_accumulation(team, tmp_path):
    """8×1, 4×2 and 2×4 rows with answers of unequal length; also with a shorter last window (20 = 8 + 8 + 4)."""
    found = []
    for batch, parts in ((8, 1), (2, 4)):
        made = train(
            build(TEAMS[team]),
            tmp_path / f"{batch}",
            double(),
            train_rows=rows(20),
            steps=3,
            batch=batch,
            gradient_accumulation_steps=parts,
        )
        assert made.state.global_step == 3
        found.append((stored(made.model), made.state.log_history))
    # the head sums in float32 and Adam divides small gradients by their own size; weights move by 3e-2
    assert distance(found[0][0], found[1][0]) < 3e-6
    for one, two in zip(*(history[:-1] for _, history in found)):
        for key in [k for k in one if k.startswith("loss")]:
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), key


def test_a_term_scaled_per_micro_batch_would_be_noticed(tmp_path):
    """The bound above is tight: four times the strength, the classical mistake, is far outside it."""
    right, wrong = (
        train(build([{"distill": {"strength": s}}]), tmp_path / f"{s}", double(), steps=3, batch=8).model
        for s in (0.5, 2.0)
    )
    assert distance(stored(right), stored(wrong)) > 1e-3


@pytest.mark.parametrize("parts", [1, 4])
def test_pulls_are_applied_once_per_optimizer_step(tmp_path, monkeypatch, parts):
    calls, when = [], []
    inner = Pull.add_gradients

    def counted(self, strength, value=False):
        calls.append(strength)
        when.append(made.accelerator.sync_gradients)
        before = [p.grad.clone() for p in self.dense]
        found = inner(self, strength, value)
        for i, parameter in enumerate(self.dense):
            expected = before[i] + strength * (parameter.detach() - self._anchors[i])
            assert torch.allclose(parameter.grad, expected, atol=1e-6)
        return found

    monkeypatch.setattr(Pull, "add_gradients", counted)
    made = trainer(build([{"l2sp": {"strength": 0.5}}]), tmp_path, steps=3, batch=2, gradient_accumulation_steps=parts)
    made.train()
    assert calls == [0.5] * 3
    assert all(when)


def test_pulls_come_before_clipping(tmp_path, monkeypatch):
    """The reported gradient norm holds the pull, and the clipped gradient is no longer than the limit."""
    norms = []
    inner = Pull.add_gradients

    def spy(self, strength, value=False):
        with torch.no_grad():
            for parameter in self.dense:
                parameter.grad.add_(1.0)  # stands for a large pull
        found = inner(self, strength, value)
        norms.append(float(torch.stack([p.grad.norm() for p in self.dense]).norm()))
        return found

    monkeypatch.setattr(Pull, "add_gradients", spy)
    made = train(build(["l2sp"]), tmp_path, steps=2, max_grad_norm=1.0)
    logged = [float(entry["grad_norm"]) for entry in made.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1.0


def test_nan_losses_are_not_smoothed_over(tmp_path):
    made = trainer([], tmp_path, logging_nan_inf_filter=True)
    assert made.args.logging_nan_inf_filter is False


class Broken(Method):
    """Returns NaN at the third step."""

    name = "broken"

    def batch_loss(self, batch, run):
        return batch.hidden.sum() * (float("nan") if run.step == 2 else 0.0)


def test_a_nan_term_stops_the_training_and_is_named(tmp_path):
    made = trainer([Broken()], tmp_path, steps=6, save_strategy="steps", save_steps=1)
    with pytest.raises(
        TrainingDiverged, match=r"training step 3: the loss became nan; first suspect: term loss/broken"
    ):
        made.train()
    assert (tmp_path / "checkpoint-2" / "complete.json").is_file()
    assert not (tmp_path / "checkpoint-3").exists()


def test_broken_weights_never_replace_a_good_checkpoint(tmp_path):
    class Spoils(Method):
        name = "spoils"

        def on_step_end(self, model, run):
            if run.step == 3:
                with torch.no_grad():
                    next(model.parameters())[0, 0] = float("inf")

    made = trainer([Spoils()], tmp_path, steps=6, save_strategy="steps", save_steps=2)
    with pytest.raises(TrainingDiverged, match=r"training step 4: the weights became nan.*checkpoint-2"):
        made.train()
    assert (tmp_path / "checkpoint-2" / "complete.json").is_file()
    assert not (tmp_path / "checkpoint-4").exists()


# -- a plain Trainer -----------------------------------------------------------------------------------------


class Plain(ContinualMixin, Trainer):
    """The mixin over the plain host."""


def tokenised(chat: Dataset) -> Dataset:
    """Rows with input_ids and labels, made without TRL."""
    tokenizer = tiny_tokenizer()

    def convert(row):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * first + ids[first:]}

    return chat.map(convert, remove_columns=chat.column_names)


@pytest.mark.parametrize("team", TEAMS)
def test_the_mixin_over_a_plain_trainer(team, tmp_path):
    """Pre-tokenised rows in a plain Trainer: the same weights as with the chat rows in the default trainer."""
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    args = TrainingArguments(
        str(tmp_path / "plain"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, **options
    )
    plain = Plain(
        double(),
        args,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        train_dataset=tokenised(rows(16)),
        processing_class=tiny_tokenizer(),
        methods=build(TEAMS[team]),
        old=tokenised(rows(12, 100)),
        run=Run(tmp_path / "plain", say=lambda line: None),
    )
    plain.train()
    default = train(build(TEAMS[team]), tmp_path / "default", double(), steps=4)
    # TRL's head sums in float32; weights move by 4e-2
    assert distance(stored(plain.model), stored(default.model)) < 5e-5
    assert plain.rows_seen() == default.rows_seen()
    assert not same_bits(stored(plain.model), stored(double()))


# -- settings of the host ------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = [
        stored(
            train(
                build([REPLAY, "distill", {"lora": {"r": 4}}]),
                tmp_path / f"{on}",
                double(),
                gradient_checkpointing=on,
            ).model
        )
        for on in (False, True)
    ]
    assert distance(*found) < 1e-6


def test_packs_hold_rows_of_one_origin(tmp_path):
    """With packing, new and replayed rows never share a pack, so that each pack keeps its origin."""
    made = train([*build([REPLAY])], tmp_path, batch=1, steps=6, packing=True, max_length=96, train_rows=rows(40))
    tokenizer = tiny_tokenizer()
    new = {tokenizer.decode(r["input_ids"]) for r in tokenised(rows(40))}
    old = {tokenizer.decode(r["input_ids"]) for r in tokenised(rows(12, 100))}
    origins = []
    for batch in made.seen:
        for ids, source in zip(batch["ids"], batch["source"], strict=True):
            text = tokenizer.decode(ids)
            assert any(row in text for row in (old if source else new))
            assert not any(row in text for row in (new - old if source else old - new))
            origins.append(source)
    assert set(origins) == {0, 1}
    assert max(len(ids) for batch in made.seen for ids in batch["ids"]) > 60  # rows are packed


def test_packing_with_rowwise_distillation_is_refused(tmp_path):
    made = trainer(build([REPLAY, "distill"]), tmp_path, batch=4, packing=True, max_length=96, train_rows=rows(80))
    with pytest.raises(ConfigError, match=r"methods\.distill\.rows"):
        made.train()


def test_a_stream_with_replay(tmp_path):
    made = train(build([{"replay": {"fraction": 0.5}}]), tmp_path, train_rows=rows(64).to_iterable_dataset(), steps=12)
    assert made.state.global_step == 12
    sources = [s for batch in made.seen for s in batch["source"]]
    assert len(sources) == 48
    assert 12 <= sum(sources) <= 36  # drawn with probability one half; outside has probability 0.0004
    tokenizer = tiny_tokenizer()
    for batch in made.seen:
        for ids, source in zip(batch["ids"], batch["source"]):
            number = int("".join(c for c in tokenizer.decode(ids).split("question")[1].split("<")[0] if c.isdigit()))
            assert (number >= 100) == (source == 1)


def test_a_stream_refuses_a_schedule(tmp_path):
    made = trainer(
        build([{"replay": {"fraction": 0.5, "schedule": "linear", "end": 0.1}}]),
        tmp_path,
        train_rows=rows(16).to_iterable_dataset(),
    )
    with pytest.raises(ConfigError, match="schedule"):
        made.train()


@pytest.mark.parametrize(("setting", "value"), [("every", 4), ("by", "tokens"), ("schedule", "warmup")])
def test_a_stream_refuses_what_needs_a_plan(setting, value, tmp_path):
    made = trainer(build([{"replay": {setting: value}}]), tmp_path, train_rows=rows(16).to_iterable_dataset())
    with pytest.raises(ConfigError, match=rf"methods\.replay\.{setting}") as caught:
        made.train()
    assert "\n" not in str(caught.value)


def test_a_stream_with_several_sources(tmp_path):
    lines = [{"prompt": f"question {1000 + i}", "response": "one"} for i in range(6)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [{"data": str(tmp_path / "more.jsonl"), "weight": 3}, {"data": "old", "weight": 1}]
    made = train(
        build([{"replay": {"fraction": 0.5, "sources": sources}}]),
        tmp_path,
        train_rows=rows(400).to_iterable_dataset(),
        steps=40,
        batch=8,
    )
    found = np.bincount([s for batch in made.seen for s in batch["source"]], minlength=3)
    assert chisquare(found, 320 * np.array([0.5, 0.375, 0.125])).pvalue > 1e-3
    logs = [line for line in made.state.log_history if "replay/more" in line]
    assert np.mean([line["replay/more"] for line in logs]) == pytest.approx(found[1] / 320)


@pytest.mark.parametrize("methods", [[], [REPLAY]])
def test_max_steps_is_kept(methods, tmp_path):
    for steps in (1, 5, 9):
        made = train(build(methods), tmp_path / f"{steps}", steps=steps)
        assert made.state.global_step == steps
        assert len(made.seen) == steps
        assert sum(made.rows_seen()) == sum(len(batch["ids"]) for batch in made.seen)


def test_epochs_show_each_new_row_once_in_another_order(tmp_path):
    made = train(build([REPLAY]), tmp_path, steps=-1, num_train_epochs=2, train_rows=rows(24))
    assert made.state.global_step == 16
    epochs = []
    for part in (made.seen[:8], made.seen[8:]):
        prompts = [
            tuple(i for i, label in zip(ids, labels) if label == -100)
            for batch in part
            for ids, labels, source in zip(batch["ids"], batch["labels"], batch["source"])
            if source == 0
        ]
        epochs.append([tuple(i for i in p if i != tiny_tokenizer().pad_token_id) for p in prompts])
    assert len(set(epochs[0])) == 24
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_every_step_has_its_share_of_replay(tmp_path):
    made = train(build([REPLAY]), tmp_path, steps=6, batch=4, train_rows=rows(24))
    assert [sum(batch["source"]) for batch in made.seen] == [1] * 6


@pytest.mark.parametrize(("parts", "every"), [(1, 1), (4, 1), (2, 3)])
def test_logged_losses_have_names_and_add_up(tmp_path, parts, every):
    made = train(
        build([REPLAY, {"distill": {"strength": 5.0}}, {"ewc": {"strength": 0.5, "samples": 8}}]),
        tmp_path,
        steps=6,
        batch=2,
        gradient_accumulation_steps=parts,
        logging_steps=every,
        train_rows=rows(48),
    )
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(every, 7, every))
    for entry in logs:
        assert entry["loss/main"] > 0
        assert entry["loss"] == pytest.approx(entry["loss/main"] + entry["loss/distill"], rel=1e-4)
        assert entry["loss/ewc"] >= 0  # a pull is not part of what goes through autograd
    assert max(entry["loss/distill"] for entry in logs) > 1e-3
    assert logs[-1]["loss/ewc"] > 0


def test_each_form_of_replay_keeps_its_mask(tmp_path):
    """New rows that are learned whole (text) do not make the prompts of replayed answers learned."""
    texts = Dataset.from_list([{"text": f"Seven small ships {i} sailed north."} for i in range(16)])
    made = train(build([{"replay": {"fraction": 0.5}}]), tmp_path, train_rows=texts)
    for batch in made.seen:
        for ids, labels, source in zip(batch["ids"], batch["labels"], batch["source"]):
            masked = sum(label == -100 and i != tiny_tokenizer().pad_token_id for i, label in zip(ids, labels))
            assert (masked > 0) == (source == 1)


# -- refusals ------------------------------------------------------------------------------------------------


def host(**settings):
    args = SimpleNamespace(fp16=settings.pop("fp16", False))
    shards = settings.pop("fsdp", False)
    return SimpleNamespace(
        is_deepspeed_enabled=settings.pop("deepspeed", False), is_fsdp_enabled=shards, args=args, model=None
    )


def test_deepspeed_and_fp16_are_refused_for_methods_that_edit_gradients():
    for name in ("ewc", "l2sp"):
        stack = Stack(build([name]))
        with pytest.raises(ConfigError, match=rf"^methods\.{name}: edits gradients, which DeepSpeed has already used"):
            guards.check_host(host(deepspeed=True), stack)
        with pytest.raises(ConfigError, match=rf"^methods\.{name}: gradients are scaled under fp16"):
            guards.check_host(host(fp16=True), stack)
        guards.check_host(host(), stack)
    losses = Stack(build(["replay", "distill"]))
    guards.check_host(host(deepspeed=True, fp16=True), losses)


def test_shards_are_refused_for_methods_that_put_the_start_weights_in_place():
    with pytest.raises(ConfigError, match=r"^methods\.distill: runs the model with its start weights"):
        guards.check_host(host(fsdp=True), Stack(build(["distill"])))
    guards.check_host(host(fsdp=True), Stack(build(["replay"])))


def test_nothing_to_train_is_refused(tmp_path):
    model = tiny_model(tiny_tokenizer()).requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        trainer([], tmp_path, model)


@pytest.mark.parametrize(("methods", "refused"), [(["l2sp"], True), (["distill"], False)])
def test_parameters_that_the_host_replaces_are_noticed(tmp_path, methods, refused):
    """As FSDP does when it shards: pulls that hold the old tensors would silently do nothing."""
    made = trainer(build(methods), tmp_path, steps=1)
    prepare = made.accelerator.prepare_model

    def replacing(model, *args, **kwargs):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
        return prepare(model, *args, **kwargs)

    made.accelerator.prepare_model = replacing
    if refused:
        with pytest.raises(ConfigError, match=r"^methods\.l2sp: the trainer replaced the model's parameters"):
            made.train()
    else:
        made.train()


def test_gradients_must_arrive():
    model = tiny_model(tiny_tokenizer())
    with pytest.raises(ConfigError, match="no trainable parameter received a gradient"):
        guards.check_gradients(model)
    next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    guards.check_gradients(model)


def test_weights_finite():
    model = tiny_model(tiny_tokenizer())
    assert guards.weights_finite(model)
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[-1] = float("nan")
    assert not guards.weights_finite(model)
    list(model.parameters())[-1].requires_grad_(False)
    assert guards.weights_finite(model)  # only what is trained is asked


@pytest.mark.parametrize(("passes", "accumulate"), [(7.0, 1), (6.5, 1), (5.0, 2)])
def test_epochs_of_unequal_length_end_where_the_learning_rate_does(passes, accumulate, tmp_path):
    settings = {"steps": -1, "num_train_epochs": passes, "lr_scheduler_type": "linear", "warmup_steps": 0}
    replay = build([{"replay": {"fraction": 0.3}}])
    parts = {"batch": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    made = train(replay, tmp_path, train_rows=rows(24), **parts, **settings)
    assert len({len(made._sampler._mixed(epoch)) for epoch in range(int(passes))}) > 1, "nothing is tested"
    assert made.state.global_step == made.state.max_steps
    new, old = made.rows_seen()
    assert new == pytest.approx(24 * passes, abs=8)
    assert old == pytest.approx(new * 0.3 / 0.7, abs=8)
    assert made.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_the_sampler_is_told_which_epoch_begins(tmp_path):
    """By the trainer itself: on several processes the host's loader forgets it in the epoch of a resume."""
    made = trainer(build([{"replay": {"fraction": 0.25}}]), tmp_path, steps=12, batch=4)
    callback = next(c for c in made.callback_handler.callbacks if type(c).__name__ == "_AfterStep")
    made._mix()
    sampler = made._get_train_sampler()
    for done, epoch in ((0.0, 0), (0.999999999, 1), (1.4, 1), (2.0, 2)):
        callback.on_epoch_begin(made.args, SimpleNamespace(epoch=done), None)
        assert sampler.epoch == epoch
