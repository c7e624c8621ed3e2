"""I-LoRA: the slow adapter is the running mean of the fast one, and the fast one is held to its hidden states."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_kit import distance, merged, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.ilora import ILoRA
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.models import params


class Watched(ILoRA):
    """Remembers the fast and the slow weights after every step, and what each loss was made from."""

    name = "ilora"

    def see_step(self, model, run):
        super().see_step(model, run)
        self.fast.append(params.snapshot(params.trainable(model)))
        self.slows.append({name: t.clone() for name, t in self.slow.items()})

    def batch_loss(self, batch, run):
        value = super().batch_loss(batch, run)
        fast = params.snapshot(params.trainable(run.model))
        self.calls.append((batch, fast, {name: t.clone() for name, t in self.slow.items()}, value))
        return value

    def on_task_start(self, model, run):
        super().on_task_start(model, run)
        self.fast, self.slows, self.calls = [], [], []


class Released(Watched):
    """As in the released code: the fast adapter is averaged with itself, under the name of the slow one."""

    def see_step(self, model, run):
        learning = params.trainable(model)
        copy = {name: p.detach().clone() for name, p in learning.items()}
        with torch.no_grad():
            for name, p in learning.items():
                p.mul_(self.config.decay).add_((1 - self.config.decay) * copy[name])


def hidden(model, weights, inputs):
    """Hidden states with some weights, by a model of their own."""
    for name, p in params.causal(model).named_parameters():
        if name in weights:
            p.data = weights[name].double()
    with torch.no_grad():
        return params.hidden_states(model.eval(), inputs)


def test_the_slow_adapter_is_the_running_mean_and_what_remains(tmp_path):
    method = Watched(decay=0.7)
    made = train([method, LoRA(r=2)], tmp_path, steps=5)
    start = made.run.start
    wanted = {
        name: 0.7**5 * t.double() + sum(0.3 * 0.7 ** (4 - k) * method.fast[k][name].double() for k in range(5))
        for name, t in start.items()
    }
    end = {name: p.detach().double() for name, p in params.trainable(made.model).items()}
    assert distance(end, wanted) < 1e-7
    assert distance(wanted, {name: t.double() for name, t in method.fast[-1].items()}) > 1e-3


def test_the_slow_adapter_moves_at_every_step_unlike_in_the_released_code(tmp_path):
    method = Watched(decay=0.9)
    made = train([method, LoRA(r=2)], tmp_path / "right", steps=3)
    before = made.run.start
    for after in method.slows:
        assert all(distance({n: before[n]}, {n: after[n]}) > 0 for n in after if "lora_B" in n)
        before = after
    wrong = Released(decay=0.9)
    other = train([wrong, LoRA(r=2)], tmp_path / "wrong", steps=3)
    assert same_bits(wrong.slow, other.run.start), "the defect: it stays at its beginning"
    assert distance(merged(other.model), stored(tiny_model(tiny_tokenizer()))) == 0
    assert distance(merged(made.model), stored(tiny_model(tiny_tokenizer()))) > 1e-4
    assert float(method.calls[-1][3].detach()) != float(wrong.calls[-1][3].detach())


@pytest.mark.parametrize("replay", [True, False])
def test_the_term_is_the_distance_to_the_slow_states(replay, tmp_path):
    """Against two models of their own in float64: on replayed rows where there are any, otherwise on all."""
    method = Watched(decay=0.5, consistency=3.0)
    made = train([method, LoRA(r=2)] + ([Replay(fraction=0.5)] if replay else []), tmp_path, steps=3)
    model = made.model.double()
    for batch, fast, slow, value in method.calls:
        h, target = (hidden(model, weights, batch.inputs) for weights in (fast, slow))
        wanted, base = 0.0, 0.0
        none = hidden(model, {name: t for name, t in made.run.start.items() if "lora_B" in name}, batch.inputs)
        for row in range(len(batch.labels)):
            if replay and not batch.source[row]:
                continue
            for t in range(batch.labels.shape[1] - 1):
                if batch.labels[row, t + 1] != -100:
                    wanted += 3.0 * float((h[row, t] - target[row, t]).square().mean())
                    base += 3.0 * float((h[row, t] - none[row, t]).square().mean())
        assert float(value.detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert wanted > 1e-3
    assert abs(base - wanted) > 0.05 * wanted, "not the distance to the states of the base model"


def test_under_autocast_equal_weights_have_no_distance(tmp_path):
    """With `decay: 0` the slow adapter is the fast one at every step, however far both have come."""
    shown = {}
    for decay in (0.0, 0.9):
        made = train([LoRA(r=2), ILoRA(decay=decay)], tmp_path / str(decay), bf16=True)
        shown[decay] = [line["loss/ilora"] for line in made.state.log_history if "loss/ilora" in line]
    assert shown[0.0] == [0.0] * 4, "any difference would be one of rounding"
    assert shown[0.9][0] == 0.0
    assert min(shown[0.9][1:]) > 0


def test_the_target_carries_no_gradient(tmp_path):
    method = Watched(decay=0.5, consistency=2.0)
    made = train([method, LoRA(r=2)], tmp_path, steps=2)
    batch, _, slow, _ = method.calls[-1]
    assert not any(t.requires_grad for t in slow.values())
    target = hidden(made.model.double(), slow, batch.inputs)
    states = batch.hidden.detach().double().requires_grad_(True)
    mask = batch.supervised
    wanted = 2.0 * (states[:, :-1] - target[:, :-1])[mask].square().mean(-1).sum()
    (slope,) = torch.autograd.grad(wanted, states)
    leaf = batch.hidden.detach().requires_grad_(True)
    method.slow = slow
    again = ILoRA.batch_loss(method, type(batch)(batch.inputs, batch.labels, leaf, batch.source), made.run)
    again.backward()
    torch.testing.assert_close(leaf.grad.double(), slope, atol=1e-5, rtol=1e-3)


def test_without_memory_and_consistency_it_is_replay(tmp_path):
    team = [LoRA(r=2), Replay(fraction=0.5)]
    plain = stored(train(team, tmp_path / "plain").model)
    assert distance(stored(train([*team, ILoRA(decay=0)], tmp_path / "no").model), plain) < 1e-6
    kept = train([*team, ILoRA(decay=0.9, consistency=0)], tmp_path / "slow").model
    assert distance(stored(kept), plain) > 1e-3


def test_consistency_holds_the_fast_adapter_back(tmp_path):
    moved = []
    for strength in (0.0, 30.0):
        method = Watched(decay=0.9, consistency=strength)
        made = train([method, LoRA(r=2)], tmp_path / str(strength), steps=6)
        moved.append(distance(method.fast[-1], made.run.start))
    assert moved[1] < moved[0]


def test_a_slow_adapter_that_does_not_arrive_is_said(tmp_path):
    for decay, said in ((0.99, 1), (0.1, 0)):
        made, lines = trainer([ILoRA(decay=decay), LoRA(r=2)], tmp_path / str(decay)), []
        made.run.say = lines.append
        made.train()
        assert len([line for line in lines if "goes 4% of the way" in line]) == said


def test_replayed_rows_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.ilora\.rows: 'replay' without replayed rows"):
        train([ILoRA(rows="replay")], tmp_path)
