"""O-LoRA: the penalty as published, later adapters beside the earlier ones, nothing else changed."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import merged, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError, RunError
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.methods.olora import OLoRA
from retain.models import adapters, params
from retain.models.load import settled

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def task(folder, index, methods, model=None, **settings):
    """One task of a sequence; later ones learn other rows."""
    run = Run(folder / str(index), task_index=index, shared=folder, say=lambda line: None)
    made = train(methods, run.directory, model, run=run, train_rows=rows(16, 50 * index), **settings)
    made.release()
    return made


def random_tasks(folder, count, r, hidden=32):
    """Factors of earlier tasks as they are kept, drawn as PEFT draws them."""
    torch.manual_seed(7)
    model = LoRA(r=1).prepare_model(tiny_model(tiny_tokenizer(), hidden_size=hidden), Run(folder))
    for index in range(1, count + 1):
        widths = {name: pair.A.shape[1] for name, pair in params.lora_pairs(model).items()}
        drawn = {name: (torch.rand(r, width) * 2 - 1) / width**0.5 for name, width in widths.items()}
        adapters.keep(drawn, folder / "olora", index)


def cosines(first, second):
    """Largest absolute cosine between rows of the A of two tasks, per layer."""
    unit = torch.nn.functional.normalize
    return {n: float((unit(first[n].double()) @ unit(p.A.detach().double()).T).abs().max()) for n, p in second.items()}


def factors(folder, index):
    return load_file(folder / "olora" / f"{index:02d}.safetensors")


def test_the_first_task_is_plain_lora_bit_for_bit(tmp_path):
    plain = task(tmp_path / "plain", 1, [LoRA()], steps=2)
    alone = task(tmp_path / "alone", 1, [OLoRA()], steps=2)
    listed = task(tmp_path / "listed", 1, [OLoRA(), LoRA()], steps=2)
    assert same_bits(stored(plain.model), stored(alone.model))
    assert same_bits(stored(plain.model), stored(listed.model)), "settings come from `lora`, wherever it is listed"
    assert {line["loss/olora"] for line in alone.state.log_history if "loss/olora" in line} == {0.0}


@pytest.mark.parametrize("form", ["squared", "absolute"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_plain_lora_and_the_published_gradient(form, accumulate, tmp_path):
    """One step of SGD, on top of two earlier tasks, against loops in float64."""
    random_tasks(tmp_path, 2, r=2)
    settings = {"steps": 1, "batch": 4 // accumulate, "gradient_accumulation_steps": accumulate, **SGD}
    plain = task(tmp_path, 3, [LoRA(r=3)], **settings)
    wanted = {name: pair.A.detach().double() for name, pair in params.lora_pairs(plain.model).items()}
    made = task(tmp_path, 3, [OLoRA(strength=0.25, form=form, normalise=False), LoRA(r=3)], **settings)
    names = {id(p): name for name, p in params.trainable(made.model).items()}
    value = 0.0
    for name, pair in params.lora_pairs(made.model).items():
        start = made.run.start[names[id(pair.A)]].double()
        for index in (1, 2):
            for row in factors(tmp_path, index)[name].double():
                for j, own in enumerate(start):
                    product = float(row @ own)
                    value += product**2 if form == "squared" else abs(product)
                    slope = 2 * product * row if form == "squared" else product / abs(product) * row
                    wanted[name][j] -= 1e-2 * 0.25 * slope
        torch.testing.assert_close(pair.A.detach().double(), wanted[name], atol=1e-7, rtol=1e-5)
    assert made.state.log_history[0]["loss/olora"] == pytest.approx(0.25 * value, rel=1e-5)
    assert value > 0.1


def test_later_rows_become_orthogonal_to_earlier_ones(tmp_path):
    first = task(tmp_path, 1, [OLoRA(), LoRA(r=2)])
    earlier = factors(tmp_path, 1)
    kept = (tmp_path / "olora" / "01.safetensors").read_bytes()
    base = merged(first.model)
    found = {}
    for strength in (0.0, 10.0):
        model = tiny_model(tiny_tokenizer())
        model.load_state_dict(base)
        made = task(tmp_path, 2, [OLoRA(strength=strength), LoRA(r=2)], model, steps=16, learning_rate=2e-2)
        pairs = params.lora_pairs(made.model)
        found[strength] = sum(cosines(earlier, pairs).values()) / len(pairs)
        assert all(pair.B.any() for pair in pairs.values()), "it still learns"
    assert found[10.0] < 0.05 < 0.2 < found[0.0]
    lines = [line["loss/olora"] for line in made.state.log_history if "loss/olora" in line]
    assert lines[-1] < 0.1 * lines[0]
    assert (tmp_path / "olora" / "01.safetensors").read_bytes() == kept
    assert set(factors(tmp_path, 2)) == set(earlier)


@pytest.mark.parametrize(("form", "hidden", "r"), [("squared", 32, 8), ("squared", 96, 4), ("absolute", 96, 4)])
def test_the_penalty_begins_at_about_its_strength_on_any_model(form, hidden, r, tmp_path):
    random_tasks(tmp_path, 1, r, hidden)
    model = tiny_model(tiny_tokenizer(), hidden_size=hidden)
    made = task(tmp_path, 2, [OLoRA(strength=3.0, form=form), LoRA(r=r)], model, steps=1)
    assert made.state.log_history[0]["loss/olora"] == pytest.approx(3.0, rel=0.25)


def test_earlier_adapters_that_are_missing_or_fit_nowhere_are_errors(tmp_path):
    with pytest.raises(RunError, match=r"01\.safetensors: task 1 left nothing here") as caught:
        task(tmp_path, 2, [OLoRA()])
    assert "\n" not in str(caught.value)
    first = task(tmp_path, 1, [OLoRA(), LoRA(r=2, targets="qv")], steps=1)
    with pytest.raises(ConfigError, match=r"methods\.olora: no layer has an adapter now and in an earlier task"):
        task(tmp_path, 2, [OLoRA(), LoRA(r=2, targets=["up_proj"])], settled(first.model))


def test_a_quantised_base_is_refused(model, tmp_path):
    model.is_quantized = True
    with pytest.raises(ConfigError, match=r"methods\.olora: .*a quantised base"):
        trainer([OLoRA()], tmp_path, model)
