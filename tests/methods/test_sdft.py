"""On-policy self-distillation: TRL's loss on the model's own answers, with a teacher that this package keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from run_kit import settings
from tiny import tiny_model, tiny_tokenizer
from training_kit import distance, merged, rows, same_bits, stored, train, trainer
from trl import SFTConfig
from trl.experimental.sdft import SDFTConfig

from retain import ContinualSDFTTrainer, ContinualTrainer
from retain.config import parse
from retain.errors import ConfigError, DataError
from retain.methods.base import Stack
from retain.methods.distill import Distill
from retain.methods.ewc import EWC
from retain.methods.freeze import Freeze
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.methods.sdft import SDFT
from retain.methods.stm import STM
from retain.models import params
from retain.models.load import load_stage
from retain.pipeline import plan, run
from retain.training.on_policy import demonstrations, settle

SHORT = {"max_new_tokens": 12}


def losses(made):
    return [line["loss"] for line in made.state.log_history if "loss" in line]


# -- presets -----------------------------------------------------------------------------------------------
def test_the_preset_of_the_paper_in_fields_of_trl():
    found = SDFT().fields()
    wanted = {
        "distillation_alpha": 1.0,
        "distillation_mode": "full_logits",
        "num_loss_tokens_to_skip": 3,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.01,
        "num_generations": 1,
        "generate_from_teacher": False,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert (
        found["teacher_prompt_template"]
        .format(prompt="Q", privileged_context="A")
        .startswith("Q\n\nThis is an example")
    )
    usual = SDFTConfig("unused", use_cpu=True, bf16=False)
    assert all(getattr(usual, name) != wanted[name] for name in list(wanted)[:5]), "then no preset is needed"
    top = SDFT(logits="top_k", top_k=20).fields()
    assert (top["distillation_mode"], top["distillation_topk"], top["distillation_add_tail"]) == (
        "topk_logits",
        20,
        True,
    )


def test_the_preset_of_trl_is_what_trl_does_by_itself():
    usual = SDFTConfig("unused", use_cpu=True, bf16=False)
    for name, value in SDFT(preset="trl").fields().items():
        assert value == getattr(usual, name), name


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"alpha": 0.3}, "distillation_alpha", 0.3),
        ({"teacher": "start"}, "teacher_model_kind", "base"),
        ({"teacher": "live"}, "teacher_model_kind", "live"),
        ({"rate": 0.2}, "teacher_update_rate", 0.2),
        ({"skip": 0}, "num_loss_tokens_to_skip", 0),
        ({"logits": "sampled"}, "distillation_mode", "sampled_token"),
        ({"generations": 4}, "num_generations", 4),
        ({"max_new_tokens": 7}, "max_completion_length", 7),
        ({"temperature": 0.7}, "temperature", 0.7),
        ({"write": "teacher"}, "generate_from_teacher", True),
    ],
)
def test_every_setting_reaches_trl(given, field, value, tmp_path):
    method = SDFT(**given)
    made = trainer([method], tmp_path)
    assert method.fields()[field] == value == getattr(made.args, field)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "start", "rate": 0.1}, "rate: has no effect unless `teacher: ema`"),
        ({"top_k": 5}, "top_k: has no effect unless `logits: top_k`"),
        ({"tail": False}, "tail: has no effect unless `logits: top_k`"),
        ({"logits": "sampled", "alpha": 0.5}, "logits: 'sampled' goes with `alpha: 1` only"),
        ({"template": "{prompt}"}, r"template: \{privileged_context\} is missing"),
        ({"skip": -1}, "skip: "),
    ],
)
def test_a_setting_without_effect_or_sense_is_one_line(given, message):
    with pytest.raises(ConfigError, match=rf"^methods\.sdft\.{message}") as caught:
        SDFT(**given)
    assert "\n" not in str(caught.value)


# -- the loss ----------------------------------------------------------------------------------------------
def shown(count=8, answer=""):
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(count)]
    return Dataset.from_list([{"prompt": prompt, "privileged_context": answer} for prompt in prompts])


@pytest.mark.parametrize("lora", [False, True])
def test_without_an_example_the_model_has_nothing_to_tell_itself(lora, tmp_path):
    method = SDFT(teacher="live", template="{prompt}{privileged_context}", skip=0, **SHORT)
    made = train([*([LoRA(r=4)] if lora else []), method], tmp_path, train_rows=shown(), steps=2)
    assert losses(made) == pytest.approx([0, 0], abs=1e-7)
    assert max(line["grad_norm"] for line in made.state.log_history if "grad_norm" in line) < 1e-5
    other = train([SDFT(teacher="live", skip=0, **SHORT)], tmp_path, train_rows=shown(answer="seven"), steps=2)
    assert min(losses(other)) > 1e-2


def answers(made, count=3, length=6):
    """A batch as TRL makes it, with answers of different length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (count, 5 + length), generator=generator)
    more = torch.randint(3, 300, (count, 4), generator=generator)
    mask = (torch.arange(length)[None] < torch.tensor([length, length - 2, 2])[:, None]).long()
    return {
        "prompt_ids": ids[:, :5],
        "prompt_mask": torch.ones(count, 5, dtype=torch.long),
        "completion_ids": ids[:, 5:],
        "completion_mask": mask,
        "teacher_input_ids": torch.cat([more, ids], 1),
        "teacher_attention_mask": torch.cat([torch.ones(count, 9, dtype=torch.long), mask], 1),
    }


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_exactly_the_first_tokens_of_an_answer_do_not_count(skip, tmp_path):
    made = train([SDFT(skip=skip, **SHORT)], tmp_path, steps=1)
    batch = answers(made)
    found = made._compute_teacher_student_logits(made.model, None, batch)
    wanted = batch["completion_mask"].clone()
    wanted[:, :skip] = 0
    assert torch.equal(found.loss_mask.long(), wanted)
    found.student_logits.retain_grad()
    made._compute_self_distillation_loss(made.model, batch, found).backward()
    counts = found.student_logits.grad.abs().sum(-1) > 0
    assert torch.equal(counts, wanted.bool())


@pytest.mark.parametrize(("alpha", "order"), [(0.0, "forward"), (1.0, "reverse")])
@pytest.mark.parametrize("teacher", ["start", "ema", "live"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_is_the_dense_divergence_from_the_right_weights(lora, teacher, alpha, order, tmp_path):
    method = SDFT(alpha=alpha, teacher=teacher, skip=1, **({"rate": 0.3} if teacher == "ema" else {}), **SHORT)
    model = tiny_model(tiny_tokenizer()).double()
    made = train([*([LoRA(r=4)] if lora else []), method], tmp_path, model, steps=3)
    past = copy.deepcopy(made.model)
    weights = {"start": made.run.start, "ema": getattr(method.teacher, "average", None), "live": {}}[teacher]
    with torch.no_grad():
        for name, p in params.trainable(past).items():
            p.copy_(weights.get(name, p))
    batch = answers(made)
    loss = made.compute_loss(made.model, batch)

    def dense(model, ids, mask):
        logits = params.causal(model)(input_ids=ids, attention_mask=mask).logits[:, -7:-1]
        return torch.log_softmax(logits.double(), -1)

    with torch.no_grad():
        p0 = dense(past, batch["teacher_input_ids"], batch["teacher_attention_mask"])
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        p = dense(made.model, ids, mask)
    a, b = (p, p0) if order == "forward" else (p0, p)
    each = F.kl_div(a, b, reduction="none", log_target=True).sum(-1)
    counts = batch["completion_mask"] * (torch.arange(6) >= 1)
    wanted = ((each * counts).sum(1) / counts.sum(1)).mean()
    assert float(wanted) > 1e-3
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_sampled_tokens_is_that_of_the_full_divergence_on_average(tmp_path):
    """Every token of the vocabulary as the answer, weighed by how often the student writes it: no sampling error."""
    model = tiny_model(tiny_tokenizer()).double()
    made = train([SDFT(logits="sampled", alpha=1.0, teacher="start", skip=0, **SHORT)], tmp_path, model, steps=2)
    size = made.model.config.vocab_size
    one = {name: value[:1].expand(size, -1).clone() for name, value in answers(made, length=1).items()}
    one["completion_ids"][:, 0] = one["teacher_input_ids"][:, -1] = torch.arange(size)
    for mask in (one["completion_mask"], one["teacher_attention_mask"]):
        mask.fill_(1)
    found = made._compute_teacher_student_logits(made.model, None, one)
    found.student_logits.retain_grad()
    made._compute_self_distillation_loss(made.model, one, found).backward()
    each = size * found.student_logits.grad[:, 0].double()  # the loss is a mean over rows

    logits = found.student_logits[:1, 0].detach().double().requires_grad_()  # the answer does not change its own logits
    log_p, log_q = logits.log_softmax(-1), found.teacher_logits[:1, 0].double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    assert divergence.item() > 1e-3
    divergence.backward()
    torch.testing.assert_close((log_p.exp().detach() @ each), logits.grad, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(each[0], logits.grad[0], rtol=0.1)  # one token alone is not that


# -- the teacher -------------------------------------------------------------------------------------------
class Trail(SDFT):
    """Remembers the weights after every step."""

    name = "sdft"

    def see_step(self, model, run):
        super().see_step(model, run)
        self.trail = [*getattr(self, "trail", []), params.snapshot(params.trainable(model))]


@pytest.mark.parametrize("lora", [False, True])
def test_the_teacher_follows_in_closed_form(lora, tmp_path):
    method = Trail(rate=0.3, **SHORT)
    made = train([*([LoRA(r=4)] if lora else []), method], tmp_path, steps=4)
    start = made.run.start
    for name in start:
        wanted = 0.7**4 * start[name].double()
        for step, weights in enumerate(method.trail):
            wanted += 0.3 * 0.7 ** (3 - step) * weights[name].double()
        torch.testing.assert_close(method.teacher.average[name].double(), wanted, rtol=1e-5, atol=1e-7)
    assert distance(method.teacher.average, start) > 1e-4


def test_the_teacher_of_the_start_does_not_move(tmp_path):
    method = SDFT(teacher="start", **SHORT)
    made = train([method], tmp_path, steps=3)
    assert same_bits(method.teacher.weights(), made.run.start)
    assert distance(merged(made.model), made.run.start) > 1e-3


# -- rows --------------------------------------------------------------------------------------------------
def test_rows_become_prompts_and_what_the_teacher_is_shown(tmp_path):
    found = demonstrations(rows(3))
    assert found.column_names == ["prompt", "privileged_context"]
    assert found[1] == {"prompt": rows(3)[1]["prompt"], "privileged_context": rows(3)[1]["completion"][0]["content"]}
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    assert demonstrations(Dataset.from_list([{"messages": chat}]))[0] == {"prompt": chat[:3], "privileged_context": "d"}
    plain = demonstrations(Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    assert plain[0] == {"prompt": "a", "privileged_context": "b"}
    with pytest.raises(DataError, match="rows of text have no question and answer"):
        demonstrations(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(DataError, match="row 1 has no turn of the user"):
        demonstrations(Dataset.from_list([{"messages": chat[:2] + chat[1:2]}]))
    with pytest.raises(ConfigError, match="a stream of rows"):
        demonstrations(IterableDataset.from_generator(lambda: iter([{"prompt": "a", "completion": "b"}])))


def test_the_teacher_reads_the_example_and_the_student_does_not(tmp_path):
    made = trainer([SDFT(**SHORT)], tmp_path)
    seen, ask = [], made._compute_teacher_student_logits

    def spy(model, teacher, inputs):
        seen.append({key: inputs[key] for key in ("prompt_ids", "teacher_input_ids", "completion_ids")})
        return ask(model, teacher, inputs)

    made._compute_teacher_student_logits = spy
    made.train()
    words = tiny_tokenizer()
    assert len(seen) == 4
    found = 0
    texts = {tuple(p["content"] for p in row["prompt"]): row["privileged_context"] for row in made.train_dataset}
    for (question,), answer in texts.items():
        for batch in seen:
            for prompt, whole in zip(
                words.batch_decode(batch["prompt_ids"]), words.batch_decode(batch["teacher_input_ids"])
            ):
                if f"{question}<|im_end|>" in prompt:
                    assert f"the question:\n{answer}\n\nNow answer" in whole
                    assert "Now answer" not in prompt
                    found += 1
    assert found == 16


def test_every_epoch_has_its_own_order_and_a_continued_one_the_same(tmp_path):
    made = trainer([SDFT(**SHORT)], tmp_path)
    sampler = made._get_train_sampler()
    first, second = list(sampler), (sampler.set_epoch(1), list(sampler))[1]
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    fresh = made._get_train_sampler()
    fresh.set_epoch(1)
    assert list(fresh) == second


# -- what goes with it -------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", [Distill, Replay, STM])
def test_methods_that_read_given_answers_are_refused(other):
    for order in ([SDFT(), other()], [other(), SDFT()]):
        with pytest.raises(
            ConfigError, match=r"cannot be combined \(sdft learns from answers that the model writes"
        ) as caught:
            Stack(order)
        assert "\n" not in str(caught.value)


def test_methods_on_weights_act_as_ever(tmp_path, model):
    free = train([SDFT(**SHORT)], tmp_path / "free", copy.deepcopy(model), steps=4)
    held = train([SDFT(**SHORT), EWC(strength=100.0)], tmp_path / "held", copy.deepcopy(model), steps=4)
    start = stored(model)
    moved, kept = (
        sum(float((m[n] - start[n]).square().sum()) for n in start) for m in map(stored, (free.model, held.model))
    )
    assert kept < 0.9 * moved
    frozen = train([SDFT(**SHORT), Freeze(share=0.5)], tmp_path / "frozen", copy.deepcopy(model), steps=2)
    names = set(params.trainable(frozen.model))
    after = stored(frozen.model)
    assert 0 < len(names) < len(start)
    assert all(torch.equal(after[name], start[name]) for name in start.keys() - names)


def test_trainers_and_arguments_that_do_not_fit_are_one_line(tmp_path, model):
    plain = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    both = {"train_dataset": rows(8), "processing_class": tiny_tokenizer()}
    with pytest.raises(ConfigError, match="Use `ContinualSDFTTrainer`"):
        ContinualTrainer(model, plain, methods=[SDFT()], **both)
    with pytest.raises(ConfigError, match=r"Add `SDFT\(\)`"):
        ContinualSDFTTrainer(model, SDFTConfig(str(tmp_path), use_cpu=True, bf16=False), methods=[EWC()], **both)
    with pytest.raises(ConfigError, match=r"needed: trl\.experimental\.sdft\.SDFTConfig"):
        ContinualSDFTTrainer(model, plain, methods=[SDFT()], **both)
    with pytest.raises(ConfigError, match=r"^args\.distillation_alpha: 0\.25 given"):
        settle(SDFTConfig(str(tmp_path), use_cpu=True, bf16=False, distillation_alpha=0.25), SDFT().fields())
    with pytest.raises(ConfigError, match=r"generations: 5 answers per prompt do not divide the 8 rows"):
        settle(SDFTConfig(str(tmp_path), use_cpu=True, bf16=False), SDFT(generations=5).fields())


# -- whole runs --------------------------------------------------------------------------------------------
def asked(shop, output, methods, **changes):
    values = settings(shop, output, methods=methods, **changes)
    values["train"] |= {"max_steps": 2} | changes.get("train", {})
    return parse(values)


@pytest.mark.parametrize("more", [[], [{"lora": {"r": 4}}, "l2sp", {"interpolate": {"strength": 0.2}}]])
def test_two_tasks_from_configuration_to_report(more, shop, tmp_path):
    said = []
    results = run(asked(shop, tmp_path / "run", [*more, {"sdft": SHORT}]), said.append)
    assert results.tasks == ["count", "which"]
    assert len(results.matrix) == 3
    assert [step.steps for step in results.training] == [2, 2]
    assert (tmp_path / "run" / "report.html").is_file()
    folders = [tmp_path / "run" / "tasks" / stage for stage in ("01-count", "02-which")]
    kind = "adapter" if more else "model"
    assert all((folder / kind).is_dir() for folder in folders)
    config = parse(settings(shop, tmp_path / "run")).model
    base, first, second = (merged(load_stage(config, folders[:n])) for n in range(3))
    assert distance(base, first) > 0
    assert distance(first, second) > 0, "the second task begins where the first ended"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"packing": True}}, r"^configuration: train\.packing: has no effect with `sdft`"),
        ({"train": {"temperature": 2.0}}, r"^configuration: train\.temperature: a setting of the method"),
        ({"train": {"distillation_topk": 5}}, r"^configuration: train\.distillation_topk: a setting of the method"),
        ({"train": {"max_stepz": 5}}, r"^configuration: train: unknown 'max_stepz'\. Did you mean 'max_steps'"),
        ({"train": {"seed": 5}}, r"^configuration: train\.seed: set by the run itself"),
    ],
)
def test_training_settings_without_effect_are_one_line(changes, message, shop, tmp_path):
    values = settings(shop, tmp_path, methods=["sdft"])
    values["train"] = values["train"] | changes["train"]
    with pytest.raises(ConfigError, match=message) as caught:
        plan(parse(values))
    assert "\n" not in str(caught.value)


def test_tasks_must_have_one_answer_each(shop, tmp_path):
    task = {"data": str(shop / "count"), "on": "all"}
    with pytest.raises(ConfigError, match=r"^configuration: tasks\.count\.on: not with `sdft`"):
        plan(parse(settings(shop, tmp_path, methods=["sdft"], tasks=[task])))
    with pytest.raises(ConfigError, match=r"^configuration: tasks\.count\.streaming: not with `sdft`"):
        plan(parse(settings(shop, tmp_path, methods=["sdft"], tasks=[task | {"on": "completion", "streaming": True}])))
