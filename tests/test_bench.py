"""The speed table on a tiny model: every row runs, and what must be equal is equal."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import against_harness  # noqa: E402
import example_recipes  # noqa: E402
import method_costs  # noqa: E402
import pull  # noqa: E402
import side_by_side  # noqa: E402
import speed  # noqa: E402
import training_steps  # noqa: E402
from side_by_side import Line, Settings  # noqa: E402


@pytest.fixture
def settings(tiny_folder):
    return Settings(model=str(tiny_folder), repeats=1, batch=2, count=12)


def test_the_command_measures_every_row(tiny_folder, tmp_path, capsys):
    out, page = tmp_path / "speed.json", tmp_path / "cost.md"
    same = ["--model", str(tiny_folder), "--repeats", "1", "--batch", "2", "--count", "6", "--out", str(out)]
    rows = [row for row in speed.ROWS if row != "choice"]
    code = speed.main([*same, "--only", *rows])
    lines = [line for row in json.loads(out.read_text())["rows"].values() for line in row]
    assert code == (0 if all(Line(**line).met for line in lines) else 1)
    assert all(line["value"] > 0 and line["detail"] for line in lines)
    if pytest.importorskip("lm_eval"):
        speed.main([*same, "--only", "choice", "--write", "--page", str(page)])
    rows = json.loads(out.read_text())["rows"]
    assert tuple(rows) == speed.ROWS, "rows measured before are kept"
    text = page.read_text()
    assert speed.table([Line(**line) for row in rows.values() for line in row]) in text
    assert text.count("\n- ") == sum(map(len, rows.values()))
    assert speed.table([Line(**line) for line in rows["choice"]]).splitlines()[-1] in capsys.readouterr().out


def test_the_folder_of_a_training_goes_with_it(settings):
    made = training_steps.trainer(settings, [], 1)
    folder = Path(made.args.output_dir)
    assert folder.is_dir()
    del made
    gc.collect()
    assert not folder.exists()


def test_methods_are_measured_once_and_told(tiny_folder, tmp_path, capsys, monkeypatch):
    out, page = tmp_path / "speed.json", tmp_path / "cost.md"
    same = ["--model", str(tiny_folder), "--repeats", "1", "--batch", "2", "--out", str(out), "--page", str(page)]
    monkeypatch.setattr(speed, "ROWS", ())
    monkeypatch.setattr(method_costs, "names", lambda: ["l2sp", "olora"])
    monkeypatch.setattr(method_costs, "SLACK", 1e6)  # times of a tiny model mean nothing
    assert speed.main([*same, "--methods", "l2sp"]) == 0
    assert speed.main([*same, "--write"]) == 0
    found = json.loads(out.read_text())["methods"]
    assert list(found) == ["l2sp", "olora"]
    assert found["olora"]["against"] == "lora"
    assert found["l2sp"]["against"] == "plain"
    assert all(cost["step"] > 0 and cost["memory"] > 0 for cost in found.values())
    costs = [method_costs.Cost(**cost) for cost in found.values()]
    assert method_costs.table(costs) in page.read_text()
    assert method_costs.table(costs) in capsys.readouterr().out
    monkeypatch.setattr(method_costs, "measure", None)  # both are there: nothing is measured
    assert speed.main(same) == 0


def test_a_method_that_keeps_a_copy_needs_more_memory(settings):
    peaks: dict[str, int] = {}
    cost = method_costs.measure(["ewc"], settings, peaks)["ewc"]
    assert not cost.problem
    copies = sum(p.numel() * p.element_size() for p in training_steps.load_model(settings.model)[0].parameters())
    assert cost.memory * peaks["plain"] >= peaks["plain"] + copies  # importance; the anchor is the trainer's own


def test_a_method_that_cannot_be_trained_hides_no_other(settings, monkeypatch):
    whole = training_steps.trainer

    def trainer(settings, methods, *args, **kwargs):
        if any(method.name == "l2sp" for method in methods):
            raise ArithmeticError("broken\nin two")
        return whole(settings, methods, *args, **kwargs)

    monkeypatch.setattr(training_steps, "trainer", trainer)
    costs = method_costs.measure(["ewc", "l2sp"], settings, {})
    assert costs["ewc"].step > 0
    assert not costs["ewc"].problem
    assert not costs["l2sp"].met
    assert costs["l2sp"].cells()[-1] == "not measured: ArithmeticError: broken"


def test_methods_share_a_measurement_where_they_are_compared_with_the_same():
    groups = method_costs.together(["ewc", "olora", "l2sp", "slao", "mas"], 2)
    assert groups[:2] == [["ewc", "l2sp"], ["mas"]]
    every = [name for group in method_costs.together(method_costs.names(), 3) for name in group]
    assert sorted(every) == sorted(method_costs.names())


def test_a_method_that_writes_its_answers_is_measured_with_its_own_trainer(settings):
    cost = method_costs.measure(["sdft"], settings, {})["sdft"]
    assert not cost.problem
    assert cost.against == "lora"
    assert cost.step > 1


def test_a_step_above_what_it_should_take_is_told():
    def cost(method: str, step: float) -> method_costs.Cost:
        return method_costs.Cost(method, "plain", step, step, step, 1.0, "")

    factor, why = method_costs.EXPECTED["distill"]
    for step, met in ((1.24 * factor, True), (1.26 * factor, False)):
        assert cost("distill", step).met == met
        assert ("ABOVE" in cost("distill", step).cells()[-1]) != met
    assert why in cost("distill", 1.0).cells()
    assert cost("unheard_of", 9.0).verdict == "no figure to compare with"


@pytest.mark.parametrize("name", method_costs.names())
def test_a_method_is_compared_with_the_rest_of_its_example(name):
    entries = example_recipes.recipe(name)
    rest = example_recipes.without(entries, name)
    assert len(rest) == len(entries) - 1
    assert [*example_recipes.names_of(rest), name].count(name) == 1


def test_rows_of_other_circumstances_are_not_kept(tmp_path):
    out, line = tmp_path / "speed.json", Line("a", "b", 1.0, 2.0)
    out.write_text(json.dumps({"about": {"model": "one"}, "rows": {"ewc": [vars(line)]}}))
    assert speed.merged(out, {"model": "one"}, {}) == {"ewc": [line]}
    assert speed.merged(out, {"model": "other"}, {"fisher": [line]}) == {"fisher": [line]}


def test_a_missed_bound_is_no_success(tmp_path, monkeypatch):
    given = ["--only", "startup", "--out", str(tmp_path / "speed.json")]
    for value, code in ((0.9, 0), (1.1, 1)):
        monkeypatch.setattr(speed, "measure", lambda row, settings, value=value: [Line("a", "b", value, 1.0)])
        assert speed.main(given) == code


def test_predictions_equal_those_of_the_harness(settings):
    pytest.importorskip("lm_eval")
    time, answers = against_harness.choice(settings)
    assert time.value > 0
    assert answers.value == 0
    assert answers.met


def test_a_different_answer_is_counted(settings, monkeypatch):
    pytest.importorskip("lm_eval")
    whole = against_harness.Choice.look

    def turned(probe, subject):
        found = whole(probe, subject)
        for outcome in found:
            outcome.details["log_likelihoods"] = [-x for x in outcome.details["log_likelihoods"]]
        return found

    monkeypatch.setattr(against_harness.Choice, "look", turned)
    _, answers = against_harness.choice(settings)
    assert answers.value > 0
    assert not answers.met


def test_both_ways_to_ewc_train_the_same(settings):
    made = [
        training_steps.trainer(settings, [kind(strength=1.0)], 4)
        for kind in (training_steps.EWC, training_steps.AutogradEWC)
    ]
    for trainer in made:
        for p in trainer.model.parameters():
            p.data = p.data.double()
        trainer.args.max_grad_norm = 0
    times = side_by_side.steps_in_turn(made)
    assert [len(one) for one in times] == [4 - side_by_side.WARM_UP] * 2
    start = made[0].run.start
    one, other = (dict(trainer.model.named_parameters()) for trainer in made)
    plain = training_steps.trainer(settings, [], 4)
    for p in plain.model.parameters():
        p.data = p.data.double()
    plain.args.max_grad_norm = 0
    plain.train()
    far = sum(float((p - one[name]).detach().abs().sum()) for name, p in plain.model.named_parameters())
    near = sum(float((p - one[name]).detach().abs().sum()) for name, p in other.items())
    moved = sum(float((p - start[name]).detach().abs().sum()) for name, p in one.items())
    assert 0 < far < moved
    assert near < 1e-3 * far


def test_steps_are_taken_in_turn(settings, monkeypatch):
    order: list[int] = []
    made = [training_steps.trainer(settings, [], 3) for _ in range(2)]
    for number, trainer in enumerate(made):
        step = trainer.training_step
        monkeypatch.setattr(
            trainer, "training_step", lambda *a, n=number, step=step, **k: (order.append(n), step(*a, **k))[1]
        )
    side_by_side.steps_in_turn(made)
    assert order == [0, 1] * 3


def test_an_error_in_one_trainer_is_told(settings, monkeypatch):
    made = [training_steps.trainer(settings, [], 3) for _ in range(2)]

    def fail(*args, **kwargs):
        raise ArithmeticError("broken")

    monkeypatch.setattr(made[0], "training_step", fail)
    with pytest.raises(ArithmeticError, match="broken"):
        side_by_side.steps_in_turn(made)


def test_peak_counts_what_is_alive_at_the_same_time(settings):
    def peak(extra: int) -> int:
        def make():
            trainer = training_steps.trainer(settings, [], 2)
            trainer.kept = torch.zeros(extra, dtype=torch.uint8)
            step = trainer.training_step

            def bigger(*args, **kwargs):
                loss = step(*args, **kwargs)
                for _ in range(3):
                    torch.zeros(2**24, dtype=torch.uint8)  # released at once: counts once
                return loss

            trainer.training_step = bigger
            return trainer

        return side_by_side.peak_bytes(make)

    small, large = peak(1), peak(2**20 + 1)
    assert large - small == pytest.approx(2**20, abs=4096)
    assert 2**24 < small < 2 * 2**24


def test_the_pull_is_measured_alone(capsys):
    pull.main(["--elements", "4e4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40,000 weights")
    assert [line.split()[0] for line in lines[1:]] == ["gradient", "value", "both"]
    assert all(float(line.split()[1]) >= 0 for line in lines[1:])
