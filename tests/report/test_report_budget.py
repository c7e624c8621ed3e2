"""A forgetting budget in the report, the card, the gate and the terminal: met, met in part, not met."""

from __future__ import annotations

import io
import json
import re
from xml.etree import ElementTree

import pytest
from browser import Page
from rich.console import Console

from retain.report import budget, card, gate, markdown, terminal
from retain.report import flips as flip
from retain.report.budget_figures import curve, draw, held
from retain.report.language import speaking
from retain.report.page import write_report
from retain.results import Budget, BudgetPoint, Estimate, load_results, save_results

ADVICE = [
    "more probe items: about 3100 in place of 431 would show that all of what was learned is inside the budget",
    "replay and distill stronger: the factor ended at its largest (8)",
    "replay: rows that stand for old data, which nothing here mixes in by the budget",
    "more replay: a larger `fraction` or more rows",
    "a lower learning rate: 3 jumps of the drift were taken back",
    "a lower learning rate",
    "a looser budget: `lose_at_most: 0.018, lose_at_most_nats: 0.06` would let all of what was learned stay",
]


def point(share, loss, upper, inside, nats=None):
    estimate = Estimate(value=loss, low=loss - 0.01, high=loss + 0.01)
    bound = None if nats is None else nats + 0.01
    return BudgetPoint(share=share, loss=estimate, upper=upper, nats=nats, upper_nats=bound, inside=inside)


def found(task="one", **changes):
    """A budget of which 64 % of the step is inside; `share=1` and `feasible=False` are the other two outcomes."""
    values = {
        "task": task,
        "lose_at_most": 0.01,
        "lose_at_most_nats": 0.05,
        "confidence": 0.95,
        "probes": ["countries", "plain text"],
        "items": 431,
        "feasible": True,
        "share": 0.64,
        "points": [
            point(0.64, 0.002, 0.008, True, 0.012),
            point(0.8, 0.008, 0.014, False, 0.021),
            point(1.0, 0.012, 0.018, False, 0.034),
        ],
        "learned": 0.123,
        "learned_without": 0.15,
        "factor": 2.4,
        "drift": 0.021,
        "drift_limit": 0.03,
        "taken_back": 3,
        "items_needed": 3100,
        "advice": ADVICE,
    }
    return Budget(**values | changes)


NOT_MET = {
    "feasible": False,
    "share": 0.0,
    "learned": 0.0,
    "points": [point(0.05, 0.009, 0.016, False, 0.03), point(1.0, 0.02, 0.028, False, 0.04)],
}
LOOKS = [
    {"kind": "budget", "task": "one", "step": 10 * k, "drift": 0.01 * k, "limit": 0.03, "factor": 2.0 ** (k / 2)}
    for k in range(5)
]


def with_budgets(directory, *budgets, looks=()):
    results = load_results(directory).model_copy(update={"budgets": list(budgets)})
    save_results(results, directory)
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(look) + "\n" for look in looks)
    return load_results(directory)


def shown(results):
    out = io.StringIO()
    Console(file=out, width=160).print(terminal.summary(results))
    return " ".join(out.getvalue().split())


@pytest.mark.parametrize(
    ("changes", "word", "said"),
    [
        (
            {},
            "Budget met",
            "64 % of the way to what training reached is kept; the rest would have cost too much. With 95 % confidence "
            "at most 0.8 points of the old score are lost; the budget is 1 point.",
        ),
        ({"share": 1.0, "lose_at_most": 0.02}, "Budget met", "all that was learned is kept. With 95 % confidence"),
        (
            NOT_MET,
            "Budget not met",
            "no part of what was learned could be shown to stay inside the budget, so the model is as it was before "
            "this task. The smallest step that was tried, 5 % of the way, may lose up to 1.6 points; the budget is 1",
        ),
    ],
)
def test_the_outcome_stands_on_top_in_every_form(changes, word, said, make_run):
    directory = make_run(tasks=["one"])
    results = with_budgets(directory, found(**changes), looks=LOOKS)
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert page.open == []
    top, rest = page.text.split("Forgetting budget", 1)
    for text in (top, (directory / "report.md").read_text(encoding="utf-8"), card.render(results), shown(results)):
        text = " ".join(text.split())
        assert f"one: {said}" in text
        assert word in text
    assert ("budget not met" in page.text.split("What was lost")[0]) == (not results.budgets[0].feasible)
    assert said[1:] in rest
    for part in (
        "on 431 items: countries, plain text",
        "More replay: a larger ",
        "3,100",
        "3 jumps were taken back in part",
    ):
        assert part in rest
        assert part in (directory / "report.md").read_text(encoding="utf-8")
    assert "what would help" in rest.lower()


def test_what_it_cost_is_the_difference_in_what_was_learned(make_run):
    results = with_budgets(make_run(tasks=["one"]), found())
    (block,) = budget.blocks(results)
    rows = {name: (value, interval, meaning) for name, value, interval, meaning in block.numbers}
    assert rows["Allowed"][0] == "1 point; 0.050 nats per token"
    assert rows["Lost"][:2] == ("0.2 points", "[−0.8, 1.2]; at most 0.8 points")
    assert rows["Lost, perplexity"][:2] == ("0.012 nats per token", "at most 0.022 nats per token")
    assert rows["New task"][0] == "+12.3 points"
    assert rows["New task"][2].endswith("+15.0 points: the budget cost 2.7 points")
    assert rows["Drift while training"][2].startswith("at the last look; the limit was 0.030 nats per token; the stre")
    assert [row[0] for row in block.points] == ["64 %", "80 %", "100 %"]
    assert [row[-1] for row in block.points] == ["inside", "outside", "outside"]
    same = budget.blocks(with_budgets(make_run("same", tasks=["one"]), found(learned=0.15)))[0]
    assert "cost nothing" in {n: m for n, _, _, m in same.numbers}["New task"]


def test_each_task_has_a_block_and_pictures(make_run):
    directory = make_run(tasks=["one", "two"])
    results = with_budgets(directory, found(), found("two", **NOT_MET), looks=LOOKS)
    assert [p.name for p in draw(results, LOOKS)] == ["budget-1", "held-1", "budget-2"]
    assert [p.title for p in draw(results, LOOKS)][::2] == ["How far one may go: one", "How far one may go: two"]
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert page.text.count("All points that were asked about") == 2
    assert (directory / "figures" / "budget-2.svg").is_file()
    assert [said.met for said in budget.sentences(results)] == [True, False]
    assert "(two)" in budget.missed(results)


def test_without_a_budget_nothing_is_said(make_run):
    directory = make_run(tasks=["one"])
    results = load_results(directory)
    assert draw(results, LOOKS) == []
    assert budget.missed(results) == ""
    text = markdown.render(results, flip.collect(directory, results, []))
    for said in (text, card.render(results), Page(write_report(directory).read_text(encoding="utf-8")).text):
        assert "udget" not in said


def texts(picture):
    return [node.text for node in ElementTree.fromstring(picture.svg).iter() if node.tag.endswith("text")]


def test_the_picture_has_the_budget_and_what_was_kept():
    both = curve(found())
    assert {"mean loss", "upper bound", "budget", "lost, points", "lost, nats per token"} <= set(texts(both))
    assert "dashed line is the budget of 1 point" in both.alt
    assert both.alt.endswith("64 % of the way.")
    assert curve(found(**NOT_MET)).alt.endswith("Nothing was kept.")
    only = [p.model_copy(update={"nats": None, "upper_nats": None}) for p in found().points]
    assert "lost, nats per token" not in texts(curve(found(points=only)))
    nats = [p.model_copy(update={"loss": None, "upper": None}) for p in found().points]
    alone = curve(found(points=nats))
    assert "lost, points" not in texts(alone)
    assert "0.05 nats per token" in alone.alt
    assert "budget" in texts(curve(found(points=found().points[-1:])))
    assert curve(found(points=[])) is None


def test_the_thermostat_is_drawn_where_it_looked():
    picture = held(found(), [*LOOKS, LOOKS[-1]])
    assert {"drift, nats", "factor", "optimizer step"} <= set(texts(picture))
    assert picture.alt.startswith("5 looks at the drift")
    assert picture.alt.endswith("4 at the end.")
    assert held(found(), LOOKS[:1]) is None


def test_perplexity_alone_has_a_budget_in_nats(make_run):
    points = [p.model_copy(update={"loss": None, "upper": None}) for p in found().points]
    results = with_budgets(make_run(tasks=["one"]), found(points=points, probes=["plain text"]))
    (block,) = budget.blocks(results)
    assert "at most 0.022 nats per token of the old score are lost; the budget is 0.050 nats" in block.words
    assert len(block.heads) == len(block.points[0]) == 4
    assert block.numbers[0][1] == "0.050 nats per token"
    missed = found(probes=["plain text"], **NOT_MET | {"points": points})
    (block,) = budget.blocks(with_budgets(make_run("b", tasks=["one"]), missed))
    assert "may lose up to 0.022 nats per token; the budget is 0.050" in block.words


def test_a_gain_has_the_unit_of_the_tasks_probes(make_run):
    directory = make_run(tasks=["one"])
    results = with_budgets(directory, found(learned=0.31, learned_without=0.42))
    infos = [i.model_copy(update={"metric": "perplexity"}) if i.task else i for i in results.probes]
    (block,) = budget.blocks(results.model_copy(update={"probes": infos}))
    row = next(row for row in block.numbers if row[0] == "New task")
    assert row[1] == "+0.310 nats"
    assert "+0.420 nats: the budget cost 0.110 nats" in row[3]


def test_the_gate_stops_at_a_budget_that_was_not_met(make_run):
    met = gate.check(with_budgets(make_run("a", tasks=["one"], drop=0.0), found()), 0.5)
    assert met.outcome == "kept"
    assert not met.fails()
    assert "\n" not in met.said
    missed = gate.check(with_budgets(make_run("b", tasks=["one"], drop=0.0), found(**NOT_MET)), 0.5)
    assert missed.outcome == "kept"
    assert missed.fails()
    line = missed.said.splitlines()[1]
    assert line.startswith("Budget not met (one): no part of what was learned could be shown to lose at most 1 point")
    assert "What would help: More probe items: about 3100 in place of 431 would show" in line


def test_in_chinese_nothing_is_english(make_run):
    directory = make_run(tasks=["one", "two"])
    results = with_budgets(directory, found(), found("two", **NOT_MET), looks=LOOKS)
    with speaking("zh"):
        said = [*budget.sentences(results), budget.missed(results)]
        blocks = budget.blocks(results)
        pictures = draw(results, LOOKS)
    words = json.dumps([said, blocks, [(p.title, p.alt, texts(p)) for p in pictures]], ensure_ascii=False)
    for name in ("countries", "plain text", "replay and distill", "lose_at_most_nats", "lose_at_most", "fraction"):
        words = words.replace(name, "·")
    assert re.findall(r"[A-Za-z]{4,}", words.replace("true", "").replace("false", "").replace("good", "")) == []
