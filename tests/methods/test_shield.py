"""Shield: the columns with the largest scores stay bit for bit, under decay and with LoRA."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_kit import merged, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.lora import LoRA
from retain.methods.shield import Shield
from retain.models import params, passes

Q = "model.layers.0.self_attn.q_proj.weight"


def started(folder, model=None, **settings):
    """A trainer whose methods have begun, as before step 1."""
    made = trainer([Shield(**settings)], folder, model)
    with params.evaluating(made.model):
        made.stack.on_model_ready(made.model, made.run)
        made.run.start = params.snapshot(params.trainable(made.model))
        made.stack.on_task_start(made.model, made.run)
    return made, made.stack.methods[0]


def columns(tensor, other):
    """Which columns are equal bit for bit."""
    return (tensor == other).all(0)


def test_scores_are_those_of_old_inputs_over_real_tokens(tmp_path):
    made, method = started(tmp_path, samples=12)
    model = made.model
    squares = torch.zeros(32, dtype=torch.float64)
    for inputs, _ in made.run.batches(made.run.old, 5):
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs["input_ids"])).detach().double()
        for row, mask in zip(x, inputs["attention_mask"]):
            for token, real in zip(row, mask):
                squares += token.square() * float(real)
    weight = model.get_parameter(Q).detach()
    scores = [sum(abs(float(w)) for w in weight[:, j]) * float(squares[j].sqrt()) for j in range(32)]
    largest = sorted(range(32), key=lambda j: -scores[j])[:16]
    assert sorted(method._masks[Q][0].nonzero()[:, 0].tolist()) == sorted(largest)
    _, again = started(tmp_path, samples=12, batch_size=1)
    assert all(torch.equal(mask, again._masks[name]) for name, mask in method._masks.items())


def test_shielded_columns_stay_under_decay_and_the_others_learn(tmp_path):
    model = tiny_model(tiny_tokenizer())
    before = stored(model)
    made = train([Shield(share=0.25)], tmp_path, model, weight_decay=0.3)
    after, masks = stored(made.model), made.stack.methods[0]._masks
    layers = passes.linear_layers(made.model)
    assert len(layers) == 14
    for layer in layers:
        name = layer.name + ".weight"
        same = columns(after[name], before[name])
        assert torch.equal(same, masks[name][0])
        assert int(same.sum()) == before[name].shape[1] // 4
    assert all(not torch.equal(after[n], t) for n, t in before.items() if t.dim() == 1)


@pytest.mark.parametrize("shielded", [True, False])
def test_rows_of_special_tokens(shielded, tmp_path):
    model = tiny_model(tiny_tokenizer())
    before = stored(model)
    after = stored(train([Shield(special_tokens=shielded)], tmp_path, model, weight_decay=0.3).model)
    ids = tiny_tokenizer().all_special_ids
    others = [i for i in range(len(tiny_tokenizer())) if i not in ids]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert bool((after[name][ids] == before[name][ids]).all()) == shielded
        assert bool((after[name][others] != before[name][others]).any(1).all())


def test_with_lora_the_merged_columns_are_the_old_ones(tmp_path):
    model = tiny_model(tiny_tokenizer())
    before = stored(model)
    made = train([LoRA(r=4), Shield(share=0.5)], tmp_path, model, weight_decay=0.3)
    masks = {name.split(".lora_A")[0]: mask for name, mask in made.stack.methods[1]._masks.items()}
    after = merged(made.model)
    assert len(masks) == 14
    for name, mask in masks.items():
        assert torch.equal(columns(after[f"{name}.weight"], before[f"{name}.weight"]), mask[0])
        assert int(mask.sum()) == mask.numel() // 2


def test_inputs_of_transposed_weights_are_rows(tmp_path):
    model = tiny_model(tiny_tokenizer(), kind="gpt2")
    before = stored(model)
    made = train([Shield()], tmp_path, model)
    name = "transformer.h.0.mlp.c_fc.weight"
    same = columns(stored(made.model)[name].T, before[name].T)
    assert before[name].shape == (32, 128)
    assert torch.equal(same, made.stack.methods[0]._masks[name][:, 0])
    assert int(same.sum()) == 16


def test_gradients_of_what_stays_are_zero_before_clipping(tmp_path):
    made, method = started(tmp_path)
    for p in params.trainable(made.model).values():
        p.grad = torch.ones_like(p)
    made.run.learning_rate, noted = 0.5, {}
    made.run.log = noted.__setitem__
    method.edit_gradients(made.model, made.run)
    zeros = {name: int((p.grad == 0).sum()) for name, p in params.trainable(made.model).items()}
    assert zeros[Q] == 16 * 32
    assert all(zeros[name] == 0 for name, p in params.trainable(made.model).items() if p.dim() == 1)
    assert noted["loss/shield"] == pytest.approx(0.5 * sum(zeros.values()))


def test_a_continued_run_shields_what_it_shielded_before(tmp_path):
    _, method = started(tmp_path)
    state = method.state_dict()
    made = trainer([Shield()], tmp_path / "again", old=rows(12, 3))  # other old rows: the scores would differ
    made.run.start = params.snapshot(params.trainable(made.model))
    fresh = made.stack.methods[0]
    made.run.restored = True
    made.run.old_rows = lambda *args: pytest.fail("statistics were made again")
    fresh.on_model_ready(made.model, made.run)
    fresh.load_state_dict(state)
    fresh.on_task_start(made.model, made.run)
    assert same_bits(fresh.state_dict(), state)


def test_an_adapter_that_has_learned_and_nothing_to_shield_are_errors(tmp_path):
    made = trainer([LoRA(r=2), Shield()], tmp_path)
    with torch.no_grad():
        next(t for name, t in made.model.named_parameters() if "lora_B" in name)[0, 0] = 1
    with pytest.raises(ConfigError, match=r"methods\.shield: an adapter has learned before") as caught:
        made.stack.on_model_ready(made.model, made.run)
    assert "\n" not in str(caught.value)
    for name, p in made.model.named_parameters():
        p.requires_grad_("norm" in name)
    with pytest.raises(ConfigError, match=r"methods\.shield: no linear layer learns"):
        made.stack.on_model_ready(made.model, made.run)


def test_layers_that_no_old_row_reaches_are_left_free(tmp_path, monkeypatch):
    whole = passes.input_sums
    monkeypatch.setattr(
        passes, "input_sums", lambda model, layers, *rest, **more: whole(model, layers[:3], *rest, **more)
    )
    _, method = started(tmp_path)
    assert len([n for n in method._masks if "layers" in n]) == 3
