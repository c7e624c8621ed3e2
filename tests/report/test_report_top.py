"""What stands first: lost, learned and how sure, in this order, with intervals and names, before anything else."""

from __future__ import annotations

import pytest
from browser import Page

from retain.report import markdown, top, wording, write_report
from retain.results import Estimate, load_results, save_results

OLD = ("countries", "everyday facts", "grammar", "arithmetic", "instructions")


def judged(results, conclusions, low, high, value=None, sided=None, large=()):
    """The results with these conclusions on the old probes and this macro difference."""
    words = dict(zip(OLD, conclusions))
    changes = [c.model_copy(update={"conclusion": words[c.probe]}) if c.probe in words else c for c in results.changes]
    changes = [c for c in changes if c.probe != "plain text"]
    macro = Estimate(value=(low + high) / 2 if value is None else value, low=low, high=high)
    one_sided = Estimate(value=macro.value, low=sided[0], high=sided[1]) if sided else None
    update = {"difference": macro, "one_sided": one_sided, "lost_over_threshold": list(large)}
    verdict = results.verdict.model_copy(update=update)
    return results.model_copy(update={"changes": changes, "verdict": verdict})


@pytest.mark.parametrize(
    ("conclusions", "low", "high", "sided", "word", "why"),
    [
        (["kept"] * 5, -0.015, 0.01, None, "Kept", "more than 2 points is ruled out"),
        (["lost"] * 5, -0.08, -0.03, None, "Lost", "more than 2 points is certain"),
        (["lost"] * 5, -0.05, -0.01, None, "Lost", "whether it is more than 2 points is not"),
        (["lost"] * 5, -0.015, -0.01, None, "Lost", "but of at most 2 points"),
        (["cannot tell"] * 5, -0.05, 0.03, None, "Not enough items to tell", "neither shown nor ruled out"),
        (["cannot tell"] * 5, -0.021, 0.03, (-0.019, 0.02), "Kept", "ruled out"),  # by the one-sided bound
        (["lost", *["kept"] * 4], -0.015, 0.01, None, "Kept on average", "ruled out"),
        (["kept"] * 5, -0.03, 0.01, None, "Kept", "Every old probe"),
    ],
)
def test_how_sure(make_run, conclusions, low, high, sided, word, why):
    results = judged(load_results(make_run(items=False, metrics=False)), conclusions, low, high, sided=sided)
    lost, learned, sure = top.facts(results)
    assert (lost.label, learned.label, sure.label) == ("What was lost", "What was learned", "How sure is that?")
    assert sure.value == word
    assert why in sure.interval
    assert ("countries" in sure.note) == (conclusions[0] == "lost")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.045, 0.033, "95 % interval: 3.3 gained to 4.5 lost"),
        (-0.08, -0.03, "95 % interval: 3.0 lost to 8.0 lost"),
        (0.0, 0.02, "95 % interval: 2.0 gained to no change"),
    ],
)
def test_nobody_has_to_know_which_sign_is_worse(make_run, low, high, words):
    results = judged(load_results(make_run(items=False, metrics=False)), ["cannot tell"] * 5, low, high)
    assert top.facts(results)[0].interval == words


def test_several_tasks_have_the_interval_of_their_mean(make_run):
    results = load_results(make_run(tasks=("one", "two"), items=False, metrics=False))
    assert "one test [" in top.facts(results)[1].interval  # as older results have it
    gain = sum(c.difference.value for c in results.changes if c.probe.endswith(" test")) / 2
    learned = Estimate(value=gain, low=gain - 0.1, high=gain + 0.2)
    results = results.model_copy(update={"verdict": results.verdict.model_copy(update={"learned": learned})})
    fact = top.facts(results)[1]
    assert fact.interval == f"95 % interval: +{100 * learned.low:.1f} to +{100 * learned.high:.1f} points"
    assert "one test +" in fact.note
    assert fact.value == f"+{100 * gain:.1f} points"


def test_what_was_lost_in_large_part_is_named(make_run):
    directory = make_run(drop=0.2)
    large = ("grammar", "arithmetic")
    words = ["kept", "kept", "lost", "cannot tell", "kept"]
    results = judged(load_results(directory), words, -0.05, 0.03, large=large)
    assert wording.headline(results)[0].endswith("; large loss: grammar; large drop, may be chance: arithmetic")
    rows = {row.words.split(":")[0]: row for row in top.fallen(results)}
    assert {name: row.shown for name, row in rows.items()} == {"grammar": True, "arithmetic": False}
    change = next(c for c in results.changes if c.probe == "grammar")
    assert f"{100 * change.before.value:.1f} % → {100 * change.after.value:.1f} %" in rows["grammar"].words
    save_results(results, directory)
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    text = (directory / "report.md").read_text(encoding="utf-8")
    for shown in (page.text, text):
        first = [shown.index(w) for w in ("What was lost", "What was learned", "How sure is that?", "Dropped by more")]
        assert first == sorted(first)
        assert rows["grammar"].words in shown
    assert page.text.index("Dropped by more") < page.text.index("In pictures")


def test_no_probe_says_that_it_shows_more_than_everything(make_run):
    results = load_results(make_run(items=False, metrics=False))
    info, change = wording.changes_of(results, "reference")[0]
    few = change.model_copy(update={"detectable": 1.31})
    assert wording.detectable(info, few) == "nothing: too few items"
    assert wording.detectable(info, change.model_copy(update={"detectable": 1.0})) == "100.0 points"
    assert "nothing: too few items" in markdown.change_row(info, few)
    text, nats = next(pair for pair in wording.changes_of(results, "reference") if pair[0].kind == "perplexity")
    assert wording.detectable(text, nats.model_copy(update={"detectable": 1.31})) == "1.310 nats"


def test_without_old_abilities_or_without_training(make_run):
    results = load_results(make_run(items=False, metrics=False))
    tasks = [c for c in results.changes if c.probe == "reasoning test"]
    bare = results.model_copy(update={"changes": tasks, "verdict": None})
    assert [fact.value for fact in top.facts(bare)][::2] == ["–", "Not measured"]
    assert top.facts(load_results(make_run("measured", tasks=()))) == []
