"""SAM: the gradient at the worst point nearby, and weights that come back bit for bit."""

import copy

import pytest
import torch
from families import family_model, token_batch
from tiny import tiny_model, tiny_tokenizer
from training_kit import distance, same_bits, stored, train

from retain.errors import ConfigError
from retain.methods import sam
from retain.methods.agem import AGEM
from retain.methods.context import Draws, Run, StepBatch
from retain.methods.dft import DFT
from retain.methods.distill import Distill
from retain.methods.replay import Replay
from retain.methods.sam import SAM
from retain.models import params


def step_batches(count=2):
    """Micro-batches with different numbers of supervised tokens, and how many there are in all."""
    batches = []
    for i in range(count):
        ids = token_batch(rows=2, length=6, seed=i)
        labels = ids.clone()
        labels[:, : 2 + i] = -100
        batches.append(StepBatch({"input_ids": ids}, labels, torch.zeros(2)))
    return batches, float(sum((b.labels[:, 1:] != -100).sum() for b in batches))


def run_of(model):
    batches, tokens = step_batches()
    return Run(directory=None, model=model, step_batches=batches, step_tokens=tokens)


def slow_gradient(model, batches):
    """Of the mean cross-entropy over all supervised tokens, by whole logits."""
    logits = torch.cat([model(**b.inputs).logits[:, :-1].flatten(0, 1) for b in batches]).double()
    labels = torch.cat([b.labels[:, 1:].flatten() for b in batches])
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    return torch.autograd.grad(loss, list(params.trainable(model).values()))


@pytest.mark.parametrize("radius", [0.05, 2.0])
def test_gradient_is_that_of_the_worst_point_nearby(radius):
    model = family_model("llama").double()
    run = run_of(model)
    here = slow_gradient(model, run.step_batches)
    length = torch.cat([g.flatten() for g in here]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(params.trainable(moved).values(), here):
            p.add_(radius * g / length)
    there = slow_gradient(moved, run.step_batches)
    for p, g in zip(params.trainable(model).values(), here):
        p.grad = g.clone()
    before = stored(model)
    SAM(radius=radius).edit_gradients(model, run)
    assert same_bits(stored(model), before)
    for p, wanted in zip(params.trainable(model).values(), there):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(there, here)) > 1e-4 * radius


class Bowl(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.still = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))


def test_on_a_bowl_it_is_the_closed_form_and_other_terms_stay(monkeypatch):
    hessian = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64))
    monkeypatch.setattr(sam, "answer_loss", lambda model, inputs, labels: 0.5 * model.place @ hessian @ model.place)
    model = Bowl()
    batch = StepBatch({}, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1))
    logged = {}
    run = Run(directory=None, step_batches=[batch], step_tokens=1.0, log=logged.__setitem__)
    other = torch.tensor([7.0, 7.0, 7.0], dtype=torch.float64)  # say, the gradient of a distillation term
    here = hessian @ model.place.detach()
    model.place.grad = here + other
    SAM(radius=0.3).edit_gradients(model, run)
    worst = model.place.detach() + 0.3 * here / here.norm()
    torch.testing.assert_close(model.place.grad, hessian @ worst + other)
    assert logged["loss/sam"] == pytest.approx(float(0.5 * worst @ hessian @ worst))
    assert model.still.grad is None
    assert torch.equal(model.still, torch.ones(2, dtype=torch.float64))


def test_weights_come_back_even_when_the_second_pass_fails(monkeypatch):
    model = family_model("llama")
    before, run, calls = stored(model), run_of(model), []

    def failing(model, inputs, labels):
        calls.append(1)
        if len(calls) > 2:
            assert not same_bits(stored(model), before)
            raise RuntimeError("out of memory")
        return sum(p.square().sum() for p in model.parameters())

    monkeypatch.setattr(sam, "answer_loss", failing)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="out of memory"):
        SAM(radius=0.1).edit_gradients(model, run)
    assert same_bits(stored(model), before)


def test_all_passes_draw_the_same_dropout_and_the_trainers_draws_stay():
    model = family_model("llama").double()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    run = run_of(model)
    cpu = torch.device("cpu")
    run.step_batches = [b._replace(draws=(torch.rand(1), Draws.now(cpu))[1]) for b in run.step_batches]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state = torch.get_rng_state()
    SAM(radius=1e-9).edit_gradients(model, run)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 < max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-6
    learning = list(params.trainable(model).values())
    first, _ = SAM().gradient(model, learning, run)
    torch.rand(1)
    run.step_batches = [b._replace(draws=Draws.now(cpu)) for b in run.step_batches]
    second, _ = SAM().gradient(model, learning, run)
    assert max(float((a - b).abs().max()) for a, b in zip(first, second)) > 1e-3, "dropout is not active"


class Counting(SAM):
    """Counts its passes and remembers what the step's gradient was before and after."""

    name = "sam"

    def __init__(self, **options):
        super().__init__(**options)
        self.passes, self.before, self.after = [], [], []

    def gradient(self, model, learning, run):
        found = super().gradient(model, learning, run)
        self.passes[-1] += 1
        return found

    def edit_gradients(self, model, run):
        self.passes.append(0)
        self.before.append({n: p.grad.clone() for n, p in params.trainable(model).items()})
        super().edit_gradients(model, run)
        self.after.append({n: p.grad.clone() for n, p in params.trainable(model).items()})


class Always(Counting):
    """Takes the gradient at the start in a pass of its own."""

    name = "sam"

    def edit_gradients(self, model, run):
        run.plain_gradient = False
        super().edit_gradients(model, run)


class Undrawn(Always):
    """Without the draws of the trainer's own passes."""

    name = "sam"

    def edit_gradients(self, model, run):
        run.step_batches[:] = [batch._replace(draws=None) for batch in run.step_batches]
        super().edit_gradients(model, run)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("replay", [False, True])
def test_one_more_pass_is_enough_where_nothing_else_is_in_the_gradient(dropout, replay, tmp_path):
    """The trainer's gradient is the one that a pass of its own would find, with the same dropout masks."""
    ends = []
    for kind in (Counting, Always, Undrawn):
        method = kind(radius=0.5)
        model = tiny_model(tiny_tokenizer(), attention_dropout=dropout).double()
        team = [method, Replay(fraction=0.5)] if replay else [method]
        settings = {"optim": "sgd", "steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
        train(team, tmp_path / kind.__name__, model, **settings)
        assert method.passes == [1 if kind is Counting else 2] * 2
        ends.append(method)
    for i in range(2):
        one, other, undrawn = (method.after[i] for method in ends)
        assert distance(ends[0].before[i], one) > 1e-3
        assert distance(one, other) < 5e-5  # the host's head works in float32
        assert (distance(one, undrawn) > 5e-3) == (dropout > 0)


def test_other_terms_and_weights_cost_a_pass(tmp_path):
    """Edits of the gradient do not, wherever they are listed: they come after it."""
    cases = [([AGEM(), SAM], 1), ([SAM, AGEM()], 1), ([SAM, Distill(strength=1.0)], 2), ([SAM, DFT()], 2)]
    for i, (team, passes) in enumerate(cases):
        method = Counting()
        train([method if m is SAM else m for m in team], tmp_path / str(i), steps=1)
        assert method.passes == [passes]
    method = Counting()
    train([method], tmp_path / "smoothed", steps=1, label_smoothing_factor=0.1)
    assert method.passes == [2]


def test_without_the_rows_of_a_step_it_is_an_error():
    model = family_model("llama")
    next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    with pytest.raises(ConfigError, match=r"methods\.sam: the rows of this step were not kept") as caught:
        SAM().edit_gradients(model, Run(directory=None))
    assert "\n" not in str(caught.value)


def test_a_run_logs_a_loss_above_the_one_it_started_from(tmp_path):
    made = train([SAM(radius=0.5)], tmp_path)
    lines = [e for e in made.state.log_history if "loss/sam" in e]
    assert len(lines) == 4
    assert all(line["loss/sam"] > line["loss/main"] if "loss/main" in line else line["loss"] for line in lines)
