"""A budget is kept to in training and made sure of after it, goes on after a stop, and refuses what it cannot do."""

import json
import sys
from pathlib import Path

import pytest
import torch
from run_kit import carry_out, settings, write_lines
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, merged, same_bits, stored, train, trainer

from retain import EWC, Distill, ForgettingBudget, Interpolate, KeyLayers, LoRA, OLoRA, Replay, methods
from retain.config import BudgetConfig, parse
from retain.errors import ConfigError
from retain.methods.base import WITH_AUTO, Method
from retain.methods.context import Run
from retain.models import params
from retain.pipeline import plan
from retain.training.control import Control
from retain.training.way import Way

sys.path.insert(0, str(Path(__file__).parent))
from monitor_kit import TEXTS, habits


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """Ten questions that the tiny model has right before training, and three texts."""
    return str(habits(tmp_path_factory.mktemp("probes") / "habits.jsonl"))


def budget(probes, limit=0.9, nats=50.0, **given):
    """Loose unless told otherwise."""
    usual = {"on": probes, "anchors": TEXTS, "every": 2, "lose_at_most_nats": nats, "say": lambda line: None}
    return ForgettingBudget(limit, **(usual | given))


def records(path):
    """What a budget wrote, without what differs between two runs."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in found if r["kind"] == "budget"]


# -- the way ------------------------------------------------------------------------------------------------
def moved(model, dtype=torch.float32):
    """A model after some change, its start, and its end."""
    start = params.snapshot(params.trainable(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in params.trainable(model).values():
            p.add_(torch.randn_like(p), alpha=0.02)
    return start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_a_way_are_there_bit_for_bit(dtype):
    model = tiny_model(tiny_tokenizer()).to(dtype)
    before = stored(model)
    start, after = moved(model), stored(model)
    way = Way(model, start)
    for share in (0.3, 0.0, 0.7, 1.0, 0.0, 1.0):
        way.go(share)
        if share in (0, 1):
            assert same_bits(stored(model), after if share else before)
    way.go(0.25)
    for name, weight in stored(model).items():
        wanted = before[name].double() + 0.25 * (after[name].double() - before[name].double())
        assert (weight.double() - wanted).abs().max() <= (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_began_at_zero_goes_straight(dora, tmp_path):
    made = trainer([LoRA(r=2, dora=dora)], tmp_path)
    before = merged(made.model)
    start = moved(made.model)
    held, end = stored(made.model), merged(made.model)
    way = Way(made.model, start)
    way.go(0.4)
    if not dora:
        for name, weight in merged(made.model).items():
            wanted = before[name].double() + 0.4 * (end[name].double() - before[name].double())
            assert (weight.double() - wanted).abs().max() < 1e-6
    way.go(0.0)
    assert all(torch.equal(stored(made.model)[name], tensor.cpu()) for name, tensor in start.items())
    way.go(1.0)
    assert same_bits(stored(made.model), held)


# -- training -----------------------------------------------------------------------------------------------
def test_where_nothing_can_be_raised_it_only_watches(probes, tmp_path):
    plain = train([], tmp_path / "plain", steps=6)
    made = train([], tmp_path / "watched", steps=6, budget=budget(probes, jump=1e-6))
    assert same_bits(stored(plain.model), stored(made.model))
    found = records(tmp_path / "watched" / "budget.jsonl")
    assert [r["step"] for r in found] == [2, 4, 6]
    assert {r["factor"] for r in found} == {1.0}
    assert all(r["drift"] > 0 and r["taken_back"] is None for r in found)
    outcome = made.budget.outcome
    assert (outcome.share, outcome.feasible, outcome.advice, outcome.items) == (1.0, True, [], 13)
    assert json.loads((tmp_path / "watched" / "budget" / "budget.json").read_text())["share"] == 1.0
    logged = [e["budget/drift"] for e in made.state.log_history if "budget/drift" in e]
    assert logged == [r["drift"] for r in found]


def test_one_factor_follows_the_drift(probes, tmp_path):
    tight, loose = Distill(rows="all", strength=0.1), Distill(rows="all", strength=0.1)
    given = {"steps": 8, "learning_rate": 5e-3}
    one = train([tight, Replay(fraction=0.25)], tmp_path / "tight", budget=budget(probes, drift=1e-4), **given)
    two = train([loose, Replay(fraction=0.25)], tmp_path / "loose", budget=budget(probes, drift=1e4), **given)
    assert one.budget.driven == two.budget.driven == ["distill", "replay"]
    factors = [r["factor"] for r in records(tmp_path / "tight" / "budget.jsonl")]
    assert factors == pytest.approx([1.6487, 2.7183, 4.4817, 7.3891], rel=1e-3)  # e^½ per look
    assert tight.boost == factors[-1]
    assert one._sampler._raised[-1][1] == factors[-1]
    assert loose.boost == pytest.approx(2.7183**-2, rel=1e-3)
    assert two._sampler._raised[-1][1] == 1.0  # replay cannot be lowered
    assert one.budget.standing.drift < two.budget.standing.drift
    assert one.budget.standing.taken > 0


def test_nothing_is_loosened_before_the_probes_were_asked(probes, tmp_path):
    """The first limit is a guess: in a world in which it was far too high, all had been lost by the first look."""
    given = {"steps": 8, "learning_rate": 1e-5}
    team = [Distill(rows="all", strength=0.1)]
    train(team, tmp_path / "asked", budget=budget(probes, 0.9, 0.9, calibrate=1), **given)
    found = records(tmp_path / "asked" / "budget.jsonl")
    asked = next(i for i, record in enumerate(found) if "upper" in record)
    assert asked > 0
    assert {r["factor"] for r in found[:asked]} == {1.0}
    assert found[-1]["factor"] < 1
    train([Distill(rows="all", strength=0.1)], tmp_path / "never", budget=budget(probes, calibrate=0), **given)
    assert records(tmp_path / "never" / "budget.jsonl")[0]["factor"] < 1  # there never will be any other


def test_jumps_are_taken_back_to_what_is_allowed(probes, tmp_path):
    made = train(
        [Distill(rows="all", strength=1e-3)], tmp_path, steps=1, learning_rate=2e-2,
        budget=budget(probes, drift=0.02, every=1, jump=0.5),
    )  # fmt: skip
    record = records(tmp_path / "budget.jsonl")[0]
    assert 0 < record["taken_back"] < 1
    assert record["rose_to"] > record["drift"]
    assert record["drift"] == pytest.approx(0.01, rel=0.2)  # the drift grows with the square of the way
    assert made.budget.standing.taken == 1


def test_a_limit_far_below_the_drift_does_not_stop_the_training(probes, tmp_path):
    """A leap is large for what there is, too; else a model that is once above a low limit could not move again."""
    made = train(
        [Distill(rows="all", strength=1e-3)], tmp_path, steps=6, learning_rate=2e-2,
        budget=budget(probes, drift=1e-6, every=1, jump=1e3),
    )  # fmt: skip
    found = records(tmp_path / "budget.jsonl")
    assert found[0]["taken_back"] > 0.5
    assert [r["taken_back"] for r in found[2:]] == [None] * 4
    assert made.budget.standing.taken <= 2


def test_the_probes_set_the_limit_right(probes, tmp_path):
    train([Distill(rows="all")], tmp_path, steps=8, learning_rate=2e-2, budget=budget(probes, 0.9, 0.5))
    found = records(tmp_path / "budget.jsonl")
    assert ["upper" in r for r in found] == [True, True, True, False]  # the end is asked after training
    assert found[0]["limit"] != found[1]["limit"]
    assert len(found[-1]["standing"]["seen"]) == 3


class Remembers(Method):
    """What the weights were when the task ended."""

    name, seen = "remembers", None

    def on_task_end(self, model, run):
        self.seen = stored(model)


def test_the_last_step_goes_as_far_as_is_inside(probes, tmp_path):
    given = {"steps": 6, "learning_rate": 2e-2}
    plain, remembers = train([], tmp_path / "plain", **given), Remembers()
    held = budget(probes, 0.9, 0.02, tasks=[probes])
    held.control.learned = held.control.learned[:1]
    made = train([remembers], tmp_path / "held", budget=held, **given)
    outcome = made.budget.outcome
    assert 0 < outcome.share < 1
    chosen = next(p for p in outcome.points if p.share == outcome.share)
    assert chosen.inside
    assert chosen.upper_nats <= 0.02
    assert all(p.share > outcome.share for p in outcome.points if not p.inside)
    assert len(outcome.points) == 6
    assert [p.share for p in outcome.points] == sorted(p.share for p in outcome.points)
    base = stored(tiny_model(tiny_tokenizer()))
    for name, weight in stored(made.model).items():
        wanted = base[name] + outcome.share * (stored(plain.model)[name] - base[name])
        assert (weight - wanted).abs().max() < 1e-6
    assert same_bits(remembers.seen, stored(made.model))
    assert outcome.learned_without == -outcome.points[-1].loss.value  # the same probe stands for both
    assert any("learning rate" in line for line in outcome.advice)
    assert any("lose_at_most_nats" in line for line in outcome.advice)


def test_the_start_is_always_inside(probes, tmp_path):
    made = train([], tmp_path, steps=4, learning_rate=5e-2, budget=budget(probes, 0.9, 1e-9))
    assert same_bits(stored(made.model), stored(tiny_model(tiny_tokenizer())))
    outcome = made.budget.outcome
    assert (outcome.share, outcome.feasible) == (0.0, False)
    assert 0 not in [p.share for p in outcome.points]


# -- goes on ------------------------------------------------------------------------------------------------
def test_killed_and_resumed_equals_uninterrupted_also_from_an_earlier_checkpoint(probes, tmp_path):
    saving = {"steps": 8, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}

    def start(folder, *more):
        team = [Distill(rows="all"), Replay(fraction=0.25), LoRA(r=2)]
        held = budget(probes, 0.9, 0.05, jump=0.05)
        return trainer(team, folder, budget=held, callbacks=more, **saving)

    whole = start(tmp_path / "whole")
    whole.train()
    assert whole.budget.standing.taken > 0
    with pytest.raises(Killed):
        start(tmp_path / "killed", StopAt(7)).train()
    for checkpoint in (6, 3):
        again = start(tmp_path / "killed")
        again.train(resume_from_checkpoint=str(tmp_path / "killed" / f"checkpoint-{checkpoint}"))
        assert same_bits(stored(again.model), stored(whole.model))
        assert again.budget.outcome == whole.budget.outcome
        assert records(tmp_path / "killed" / "budget.jsonl") == records(tmp_path / "whole" / "budget.jsonl")


def test_killed_in_the_search_and_resumed_equals_uninterrupted(probes, tmp_path, monkeypatch):
    saving = {"steps": 4, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 4}
    point, ask, asked = Control.point, Control.ask, []
    monkeypatch.setattr(Control, "ask", lambda self, *given: asked.extend(given[-1][:1]) or ask(self, *given))
    whole = train([], tmp_path / "whole", budget=budget(probes, 0.9, 0.02, calibrate=0), **saving)
    once = len(asked)

    def killed(self, share, answers):
        if share < 0.9:
            raise Killed
        return point(self, share, answers)

    first = trainer([], tmp_path / "killed", budget=budget(probes, 0.9, 0.02, calibrate=0), **saving)
    with monkeypatch.context() as patch:
        patch.setattr(Control, "point", killed)
        with pytest.raises(Killed):
            first.train()
    again = trainer([], tmp_path / "killed", budget=budget(probes, 0.9, 0.02, calibrate=0), **saving)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(whole.model))
    assert again.budget.outcome.points == whole.budget.outcome.points
    assert len(asked) == 2 * once, "what was answered before the stop is not asked again"
    assert not list(tmp_path.rglob("asked"))


@pytest.mark.slow
def test_two_processes_equal_one(probes, tmp_path, launch):
    for processes, batch in ((1, 4), (2, 2)):
        (tmp_path / str(processes)).mkdir()
        launch("budget_cases.py", tmp_path / str(processes), probes, batch, processes=processes)
    one, first, second = (
        load_file(tmp_path / place) for place in ("1/end-0.safetensors", "2/end-0.safetensors", "2/end-1.safetensors")
    )
    assert same_bits(first, second)
    assert max(float((one[name] - first[name]).abs().max()) for name in one) < 3e-6
    looks = [records(tmp_path / n / "run" / "budget.jsonl") for n in ("1", "2")]
    assert [r["step"] for r in looks[0]] == [r["step"] for r in looks[1]] == [2, 4, 6, 8]
    assert [r["factor"] for r in looks[0]] == pytest.approx([r["factor"] for r in looks[1]], rel=1e-3)
    assert any(r["taken_back"] for r in looks[0])
    assert "inside it" in (tmp_path / "2" / "said-0.txt").read_text()
    assert (tmp_path / "2" / "said-1.txt").read_text() == ""


# -- automatic strength -------------------------------------------------------------------------------------
def test_auto_drives_only_those_that_ask_for_it(probes, tmp_path):
    mine, fixed = Distill(rows="all", strength="auto"), EWC(strength=1.0)
    assert (mine.config.strength, mine.auto, fixed.auto) == (Distill().config.strength, True, False)
    assert "strength='auto'" in repr(mine)
    made = train([mine, fixed, Replay(fraction=0.25)], tmp_path, steps=4, budget=budget(probes, drift=1e-5))
    assert made.budget.driven == ["distill"]
    assert mine.boost > 1 == fixed.boost
    assert made._sampler._raised == []


@pytest.mark.parametrize(("strength", "given", "most"), [(1.0, {}, 8), ("auto", {}, 32), ("auto", {"most": 2}, 2)])
def test_a_strength_that_nobody_chose_may_move_further(probes, tmp_path, strength, given, most):
    tight = budget(probes, drift=1e-6, **given)
    made = train([Distill(rows="all", strength=strength)], tmp_path, steps=20, budget=tight)
    assert made.budget.standing.dual["factor"] == made.stack.methods[0].boost == most


def test_auto_without_a_budget_follows_the_usual_one_and_takes_no_last_step(tmp_path, monkeypatch, probes):
    made = trainer([Distill(rows="all", strength="auto")], tmp_path, steps=2)
    assert made.budget.settings == BudgetConfig()
    made.budget.control.kept = []  # the core suite would take its time
    made.budget.texts, made.budget.settings = TEXTS, BudgetConfig(every=1, calibrate=0)
    made.train()
    assert made.budget.outcome is None
    assert len(records(tmp_path / "budget.jsonl")) == 2


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_auto_needs_units_in_which_its_beginning_means_something(name):
    made = methods.load(name)(strength="auto", units="raw")
    with pytest.raises(
        ConfigError, match=rf"^methods\.{name}\.strength: 'auto' begins at 1, .* raw units\. Give a number"
    ):
        made.check()
    methods.load(name)(strength="auto").check()
    methods.load(name)(strength=1e4, units="raw").check()


def test_auto_is_for_every_method_whose_strength_can_be_followed():
    made = [methods.load(name)() for name in methods.names()]
    assert [m.name for m in made if m.boosts and "strength" in type(m).Config.model_fields] == WITH_AUTO
    assert all(methods.load(name)(strength="auto").auto for name in WITH_AUTO)


def test_a_boost_of_key_layers_and_of_olora_is_a_strength(tmp_path):
    boosted = KeyLayers(strength=0.5)
    boosted.boost = 4.0
    one = train([boosted], tmp_path / "boost", steps=2)
    two = train([KeyLayers(strength=2.0)], tmp_path / "strength", steps=2)
    assert same_bits(stored(one.model), stored(two.model))
    ends = []
    for place, method, boost in (
        ("first", OLoRA(), 1.0),
        ("b", OLoRA(strength=0.5), 4.0),
        ("s", OLoRA(strength=2), 1.0),
    ):
        method.boost, task = boost, 1 if place == "first" else 2
        run = Run(tmp_path / place, task_index=task, shared=tmp_path / "run", say=lambda line: None)
        made = train([LoRA(r=2), method], tmp_path / place, steps=2, run=run)
        ends.append(stored(made.model))
    assert same_bits(ends[1], ends[2])
    assert not same_bits(ends[0], ends[1])


# -- refused ------------------------------------------------------------------------------------------------
def test_what_cannot_be_done_is_refused_before_training(probes, tmp_path):
    with pytest.raises(ConfigError, match=r"budget.lose_at_most: 10 items \(1 probe\) .* 2\d\d are needed|3\d\d are"):
        trainer([], tmp_path, budget=budget(probes, 0.01))
    with pytest.raises(ConfigError, match="budget: got 'much'"):
        trainer([], tmp_path, budget="much")
    with pytest.raises(ConfigError, match="budget: got True"):
        trainer([], tmp_path, budget=True)
    with pytest.raises(ConfigError, match=r"interpolate.strength: 'auto' has no effect.*distill.*l2sp"):
        Interpolate(strength="auto")
    with pytest.raises(ConfigError, match=r"unknown 'evry'\. Did you mean 'every'"):
        ForgettingBudget(evry=3)
    from retain.methods.slao import SLAO

    with pytest.raises(ConfigError, match="budget: not with `slao`"):
        trainer([LoRA(r=2), SLAO()], tmp_path, budget=budget(probes))


# -- runs ---------------------------------------------------------------------------------------------------
SHORT = {"every": 2, "anchor_count": 4, "tries": 3}


def more_probes(shop, count=60):
    """A probe that `probes.reference` does not name, of so many questions."""
    items = [
        {"probe": "more", "prompt": f"What is {i}? Answer:", "choices": [" bird", " ship"], "answer": i % 2}
        for i in range(count)
    ]
    return str(write_lines(shop / "more.jsonl", items))


def test_a_run_keeps_a_budget_for_every_task(shop, tmp_path):
    more = more_probes(shop)
    wanted = SHORT | {"lose_at_most": 0.05 + 0.01, "on": [more]}
    team = [{"distill": {"rows": "all", "strength": "auto"}}, {"lora": {"r": 2}}]
    results, said = carry_out(shop, tmp_path / "run", methods=team, budget=wanted)
    assert [b.task for b in results.budgets] == ["count", "which"]
    assert all(b.probes == ["more"] and b.items == 60 and b.confidence == 0.95 for b in results.budgets)
    assert {i.name: i.role for i in results.probes}["more"] == "reference"
    assert results.methods["distill"]["strength"] == "auto"
    assert sum("of the way" in line or "nothing of what was learned" in line for line in said) == 2
    assert any("of them flip by chance" in line for line in said)
    table = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {r["task"] for r in table if r["kind"] == "budget"} == {"count", "which"}
    # what the budget says of the end is what the stage's own probes say
    for stage, held in zip(results.stages[1:], results.budgets):
        lost = results.scores["00-base"]["more"].value - results.scores[stage]["more"].value
        chosen = next((p for p in held.points if p.share == held.share), None)
        if chosen is not None:
            assert chosen.loss.value == pytest.approx(lost, abs=1e-9)
    again, _ = carry_out(shop, tmp_path / "run", methods=team, budget=wanted)
    assert again.budgets == results.budgets


def test_a_run_that_cannot_come_to_anything_is_refused(shop, tmp_path):
    with pytest.raises(ConfigError, match=r"budget.lose_at_most: 4 items .* needed"):
        carry_out(shop, tmp_path / "few", budget=0.01)
    assert not (tmp_path / "few").exists()
    raised = {"action": "raise", "raised": "replay"}
    with pytest.raises(ConfigError, match=r"monitor\.raised"):
        plan(parse(settings(shop, tmp_path / "two", budget=0.9, monitor=raised)))
    with pytest.raises(ConfigError, match="slao"):
        plan(parse(settings(shop, tmp_path / "slao", budget=0.9, methods=[{"lora": {"r": 2}}, "slao"])))
