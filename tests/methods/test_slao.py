"""SLAO: one adapter through a sequence of tasks, the earlier product out of the base, and what remains as published."""

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, distance, merged, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError, RunError
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.freeze import Freeze
from retain.methods.lora import LoRA
from retain.methods.slao import SLAO
from retain.models import params
from retain.models.load import settled

QUICK = {"steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}


class Seen(Method):
    """Remembers the factors, and the weights as they act, when a task begins and ends."""

    name = "seen"
    off = {}

    @property
    def active(self):
        return True

    def on_task_start(self, model, run):
        self.start, self.acting = self.factors(model), merged(model)

    def see_step(self, model, run):
        self.tuned = self.factors(model)

    def factors(self, model):
        pairs = params.lora_pairs(model).items()
        return {name: (pair.A.detach().double().clone(), pair.B.detach().double().clone()) for name, pair in pairs}


def spec(folder, index):
    return Run(folder / str(index), task_index=index, shared=folder, say=lambda line: None)


def task(folder, index, methods, model=None, **settings):
    run = spec(folder, index)
    options = QUICK | settings
    made = train(methods, run.directory, model, run=run, train_rows=rows(16, 50 * index), **options)
    made.release()
    return made


def sequence(folder, count, **settings):
    """(what each task saw, the weights after it) of tasks in a row; r = 3, s = 2."""
    found, model = [], None
    for index in range(1, count + 1):
        seen = Seen()
        made = task(folder, index, [SLAO(**settings), LoRA(r=3), seen], model)
        model = settled(made.model)
        found.append((seen, stored(model)))
    return found


def acting(base, products):
    """The base weights with ΔW added to layers."""
    return {n: t + products[n[: -len(".weight")]] if n[: -len(".weight")] in products else t for n, t in base.items()}


def double(weights):
    return {name: t.double() for name, t in weights.items()}


@pytest.mark.parametrize("weight", ["sqrt", "mean", "last"])
def test_three_tasks_are_the_published_recursion(weight, tmp_path):
    """Against the algorithm in float64 on the untouched first base: begin, and deploy, s = 2, r = 3."""
    base = double(stored(tiny_model(tiny_tokenizer())))
    previous: dict = {}
    for i, (seen, after) in enumerate(sequence(tmp_path, 3, weight=weight), 1):
        tuned = {name: (a[:3], b[:, :3]) for name, (a, b) in seen.tuned.items()}
        if i > 1:
            for name, (a, b) in seen.start.items():
                last_a, last_b, _ = previous[name]
                q, r = torch.linalg.qr(last_a.T)
                torch.testing.assert_close(a[:3], (q * r.diagonal().sign()).T, atol=1e-6, rtol=0)
                torch.testing.assert_close(a[:3] @ a[:3].T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
                assert torch.equal(b[:, :3], last_b)
            products = {name: 2 * b[:, :3] @ a[:3] for name, (a, b) in seen.start.items()}
            assert distance(double(seen.acting), acting(base, products)) < 1e-5, (
                "the earlier product is out of the base"
            )
        share = {"sqrt": i**-0.5, "mean": 1 / i, "last": 1.0}[weight]
        for name, (a, b) in tuned.items():
            before = previous[name][2] if i > 1 else b
            previous[name] = (a, b, before + share * (b - before))
        products = {name: 2 * m @ a for name, (a, _, m) in previous.items()}
        assert distance(double(after), acting(base, products)) < 1e-5
        last = {name: 2 * b @ a for name, (a, b) in tuned.items()}
        assert (distance(double(after), acting(base, last)) < 1e-5) == (i == 1 or weight == "last")


def test_the_first_task_is_plain_lora_bit_for_bit(tmp_path):
    plain = task(tmp_path / "plain", 1, [LoRA()])
    assert same_bits(stored(plain.model), stored(task(tmp_path / "alone", 1, [SLAO()]).model))
    plain = task(tmp_path / "plain3", 1, [LoRA(r=3)])
    assert same_bits(stored(plain.model), stored(task(tmp_path / "listed", 1, [SLAO(), LoRA(r=3)]).model))


def test_what_is_taken_out_stays_bit_for_bit(tmp_path):
    """Weight decay and the optimizer leave it alone."""
    ((first, _), (second, _)) = sequence(tmp_path, 2)
    for name, (a, b) in second.tuned.items():
        assert len(a) == b.shape[1] == 6
        assert torch.equal(a[3:], first.tuned[name][0])
        assert torch.equal(b[:, 3:], -first.tuned[name][1])
        assert not torch.equal(a[:3], second.start[name][0][:3])


def test_what_is_taken_out_has_no_part_in_the_norm_that_is_clipped(tmp_path):
    first = task(tmp_path, 1, [SLAO(), LoRA(r=3)])
    made = task(tmp_path, 2, [SLAO(), LoRA(r=3)], settled(first.model), steps=1)
    for p in params.trainable(made.model).values():
        p.grad = torch.ones_like(p)
    made.stack.edit_gradients(made.model, made.run)
    for pair in params.lora_pairs(made.model).values():
        assert pair.A.grad[:, 0].tolist() == pair.B.grad[0].tolist() == [1, 1, 1, 0, 0, 0]
        assert pair.A.grad.sum() == pair.A.grad.numel() / 2


def test_the_kept_adapter_gives_the_same_model(tmp_path):
    """From the folder, on the model after the first task, as a run that is continued loads it."""
    first = task(tmp_path, 1, [SLAO(), Freeze(share=0.5), LoRA(r=3)])
    base = stored(settled(first.model))
    model = tiny_model(tiny_tokenizer())
    model.load_state_dict(base)
    second = task(tmp_path, 2, [SLAO(), Freeze(share=0.5), LoRA(r=3)], model)
    second.model.save_pretrained(tmp_path / "adapter")
    again = tiny_model(tiny_tokenizer())
    again.load_state_dict(base)
    loaded = settled(PeftModel.from_pretrained(again, str(tmp_path / "adapter"), is_trainable=True))
    assert same_bits(stored(loaded), merged(second.model))
    wide = {name for name, p in second.model.named_parameters() if "lora_A" in name and len(p) == 6}
    assert wide
    assert all("layers.1." in name for name in wide), "adapters in frozen layers stay as they are"


def test_a_resumed_later_task_ends_with_the_same_bits(tmp_path):
    first = task(tmp_path, 1, [SLAO(), LoRA(r=3)])
    base = stored(settled(first.model))
    ends = []
    for killed in (None, 3):
        model = tiny_model(tiny_tokenizer())
        model.load_state_dict(base)
        settings = QUICK | {"steps": 4, "save_strategy": "steps", "save_steps": 2, "train_rows": rows(16, 100)}
        run = spec(tmp_path, 2)
        folder = tmp_path / f"second{killed}"
        team = [SLAO(), LoRA(r=3)]
        if killed is not None:
            with pytest.raises(Killed):
                train(team, folder, model, run=run, callbacks=[StopAt(killed)], **settings)
            model = tiny_model(tiny_tokenizer())
            model.load_state_dict(base)
        made = trainer([SLAO(), LoRA(r=3)], folder, model, run=spec(tmp_path, 2), **settings)
        made.train(resume_from_checkpoint=killed is not None)
        ends.append(stored(made.model))
    assert same_bits(*ends)


def test_another_rank_or_scale_or_no_earlier_task_are_errors(tmp_path):
    with pytest.raises(RunError, match=r"01\.safetensors: task 1 left nothing here"):
        task(tmp_path, 2, [SLAO()])
    task(tmp_path, 1, [SLAO(), LoRA(r=3)], steps=1)
    for other in ({"r": 2}, {"r": 3, "alpha": 1}, {"r": 3, "targets": "qv"}):
        with pytest.raises(ConfigError, match=r"methods\.slao: the adapter has other layers, rank or scale") as caught:
            task(tmp_path, 2, [SLAO(), LoRA(**other)])
        assert "\n" not in str(caught.value)


def test_dora_and_a_quantised_base_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.slao: with DoRA"):
        task(tmp_path, 1, [SLAO(), LoRA(r=2, dora=True)])
    model.is_quantized = True
    with pytest.raises(ConfigError, match=r"methods\.slao: .*a quantised base"):
        trainer([SLAO()], tmp_path, model)
