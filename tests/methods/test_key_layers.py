"""Key layers: old rows reach chosen layers only, new rows all of them, whatever the micro-batches are."""

import pytest
import torch
from families import FAMILIES, family_model
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, distance, other_rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.freeze import Freeze
from retain.methods.key_layers import KeyLayers
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.methods.unfreeze import Unfreeze
from retain.models import params

EXACT = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


class Watched(KeyLayers):
    """Remembers weights, rows and gradients of every step."""

    name = "key_layers"

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def edit_gradients(self, model, run):
        super().edit_gradients(model, run)
        found = {name: p.grad.clone() for name, p in params.trainable(model).items()}
        self.steps.append((stored(model), list(run.step_batches), found))


def slow_gradients(model, weights, batches, old):
    """Of Σ −log p over the tokens of new or of old rows, by whole logits, and the number of all tokens."""
    model.load_state_dict(weights)
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        logits = model(**batch.inputs).logits
        for row, source in enumerate(batch.source.tolist()):
            mask = batch.labels[row, 1:] != -100
            tokens += int(mask.sum())
            if (source > 0) == old:
                loss = torch.nn.functional.cross_entropy(
                    logits[row, :-1][mask], batch.labels[row, 1:][mask], reduction="sum"
                )
                total = total + loss
    if not torch.is_tensor(total):
        return {name: torch.zeros_like(p) for name, p in model.named_parameters()}, tokens
    learning = dict(model.named_parameters())
    return dict(zip(learning, torch.autograd.grad(total, list(learning.values())))), tokens


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_gradient_is_that_of_two_separate_passes(strength, batch, accumulate, tmp_path):
    """In float64 against one backward pass of the new rows and one of the old rows."""
    method = Watched(layers=[1], patterns=["lm_head"], strength=strength)
    model = tiny_model(tiny_tokenizer()).double()
    settings = {"batch": batch, "gradient_accumulation_steps": accumulate, "steps": 2, **EXACT}
    train([method, Replay(fraction=0.5)], tmp_path, model, old=other_rows(), **settings)
    slow = tiny_model(tiny_tokenizer()).double()
    assert len(method.steps) == 2
    for weights, batches, found in method.steps:
        assert {int(s) for b in batches for s in b.source} == {0, 1}
        new, tokens = slow_gradients(slow, weights, batches, old=False)
        old, _ = slow_gradients(slow, weights, batches, old=True)
        for name, slope in found.items():
            key = "layers.1." in name or "lm_head" in name
            wanted = (new[name] + strength * key * old[name]) / tokens
            torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-7)
            assert old[name].abs().max() > 1e-4


def test_all_layers_as_key_layers_are_plain_replay(tmp_path):
    """The same dropout masks too: two parts of a gradient that are drawn alike add up to the whole."""
    ends = []
    for team in ([Replay(fraction=0.5)], [KeyLayers(patterns=["."]), Replay(fraction=0.5)]):
        model = tiny_model(tiny_tokenizer(), attention_dropout=0.3).double()
        settings = {"steps": 3, "gradient_accumulation_steps": 2, **EXACT}
        ends.append(stored(train(team, tmp_path / str(len(team)), model, **settings).model))
    assert distance(*ends) < 1e-7
    assert distance(ends[0], stored(tiny_model(tiny_tokenizer()).double())) > 1e-3


def test_without_replay_it_draws_old_rows_of_its_own(tmp_path):
    """One step: the plain step everywhere, and in the key layers the mean loss of the rows that were drawn."""
    settings = {"steps": 1, "learning_rate": 0.1, **EXACT}
    runs = []
    for i, team in enumerate(([], [KeyLayers(choose="top", share=0.5, batch_size=12, strength=0.5)])):
        model = tiny_model(tiny_tokenizer()).double()
        runs.append(train(team, tmp_path / str(i), model, old=other_rows(12), **settings))
    plain, made = (stored(run.model) for run in runs)
    start = tiny_model(tiny_tokenizer()).double()
    total, tokens = 0.0, 0
    for inputs, labels in runs[1].run.batches(runs[1].stack.methods[0]._rows, 3):
        mask = labels[:, 1:] != -100
        logits = start(**inputs).logits[:, :-1][mask]
        total = total + torch.nn.functional.cross_entropy(logits, labels[:, 1:][mask], reduction="sum")
        tokens += int(mask.sum())
    names = dict(start.named_parameters())
    for name, slope in zip(names, torch.autograd.grad(total / tokens, list(names.values()))):
        wanted = plain[name] - 0.1 * 0.5 * slope * ("layers.1." in name)
        torch.testing.assert_close(made[name], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", FAMILIES)
def test_shares_are_layers_of_every_family(kind):
    model = family_model(kind)
    method = KeyLayers(choose="top", share=0.5)
    blocks = method._blocks(model)
    assert [len(block) > 0 for block in blocks] == [True] * 4
    assert method._numbers(model, blocks, None) == {2, 3}
    assert KeyLayers(choose="bottom", share=0.1)._numbers(model, blocks, None) == {0}
    assert KeyLayers(layers=[-1, 1])._numbers(model, blocks, None) == {1, 3}
    names = {id(p): name for name, p in model.named_parameters()}
    assert set(blocks[2]) == {names[id(p)] for p in params.decoder_layers(model)[2].parameters()}


@pytest.mark.parametrize("replay", [True, False])
def test_auto_takes_the_layer_with_the_largest_gradient_of_old_rows(replay, tmp_path):
    chosen = set()
    for louder in (0, 1):
        model = tiny_model(tiny_tokenizer())
        quiet = model.model.layers[1 - louder]
        with torch.no_grad():  # little goes in and little comes out, so that little comes back
            for part in (
                quiet.input_layernorm,
                quiet.post_attention_layernorm,
                quiet.self_attn.o_proj,
                quiet.mlp.down_proj,
            ):
                part.weight.mul_(0.01)
        start = stored(model)
        method = KeyLayers(share=0.5)
        made = train([method] + ([Replay(fraction=0.5)] if replay else []), tmp_path / str(louder), model, steps=1)
        model.load_state_dict(start)
        total = 0.0
        for inputs, labels in made.run.batches(method._rows, 4):
            total = total + torch.nn.functional.cross_entropy(
                model.eval()(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
        model.zero_grad()
        total.backward()
        sizes = [sum(float(p.grad.square().sum()) for p in layer.parameters()) for layer in model.model.layers]
        assert method._layers == [sizes.index(max(sizes))]
        chosen.add(method._layers[0])
    assert chosen == {0, 1}


def test_a_resumed_run_keeps_its_layers_and_ends_with_the_same_bits(tmp_path):
    settings = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    team = lambda: [KeyLayers(share=0.5), Replay(fraction=0.5)]  # noqa: E731
    straight = train(team(), tmp_path / "straight", **settings)
    with pytest.raises(Killed):
        train(team(), tmp_path / "killed", callbacks=[StopAt(5)], **settings)
    again = trainer(team(), tmp_path / "killed", **settings)
    again.stack.methods[0]._slopes = None  # not asked again
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(straight.model))


def test_adapters_are_key_layers_and_frozen_layers_are_not(tmp_path):
    lines = []
    made = trainer([LoRA(r=2), Freeze(share=0.5), KeyLayers(share=1.0), Replay(fraction=0.5)], tmp_path)
    made.run.say = lines.append
    made.train()
    method = made.stack.methods[2]
    assert method._layers == [1]
    assert method._names == [name for name in params.trainable(made.model) if "layers.1." in name]
    assert sum("layers 1 of 2" in line and "(100.0%)" in line for line in lines) == 1


def test_what_another_method_closed_stays_closed(tmp_path):
    start = stored(tiny_model(tiny_tokenizer()))
    team = [Unfreeze(stages=[{"top": 1}]), KeyLayers(layers=[0, 1]), Replay(fraction=0.5)]
    end = stored(train(team, tmp_path, weight_decay=0.1).model)
    assert {n for n in start if torch.equal(start[n], end[n])} == {n for n in start if "layers.0." in n or "embed" in n}


def test_mistakes_are_one_line(tmp_path):
    cases = {
        r"layers: 7 is no layer that learns\. Those that do: 0, 1": [KeyLayers(layers=[7])],
        r"layers: 0 is no layer that learns\. Those that do: 1": [Freeze(share=0.5), KeyLayers(layers=[0])],
        r"patterns: 'nothing' matches no parameter that learns": [KeyLayers(patterns=["nothing"])],
        r"no layer learns": [Freeze(share=1.0), KeyLayers()],
    }
    for i, (words, team) in enumerate(cases.items()):
        with pytest.raises(ConfigError, match=rf"methods\.key_layers\.?.*{words}") as caught:
            train(team, tmp_path / str(i))
        assert "\n" not in str(caught.value)


def test_settings_without_effect_are_said_or_refused(tmp_path):
    for other in ({"layers": [1]}, {"patterns": ["norm"]}):
        for setting in ({"share": 0.5}, {"choose": "top"}, {"samples": 4}):
            with pytest.raises(ConfigError, match="stand in place of `share`") as caught:
                KeyLayers(**other, **setting)
            assert "\n" not in str(caught.value)
    for team, times in (([Replay(fraction=0.5)], 1), ([], 0)):
        made, lines = trainer([KeyLayers(batch_size=4, rows=8), *team], tmp_path / str(times), steps=1), []
        made.run.say = lines.append
        made.train()
        assert sum("batch_size, rows has no effect" in line for line in lines) == times


def test_rows_whose_origin_is_lost_are_an_error():
    from retain.methods.context import Batch
    from retain.methods.key_layers import check_rows

    with pytest.raises(ConfigError, match=r"methods\.key_layers: rows are flattened"):
        check_rows(Batch({}, torch.zeros(1, 6), torch.zeros(1, 6, 4), torch.tensor([0, 1])))
