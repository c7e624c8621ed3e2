"""Item tables in, records out: hand-made tables whose right answer is known."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from retain import analysis, results
from retain.errors import RunError
from retain.functional import statistics
from retain.results import Estimate, ProbeInfo


def info(name="facts", metric="accuracy", role="reference", **more):
    more = {"kind": "choice", "group": "knowledge", "items": 1, **more}
    return ProbeInfo(name=name, metric=metric, role=role, **more)


def rows(scores, probe="facts", tokens=None, right=None, choices=None):
    return [
        {
            "probe": probe,
            "item": f"q{i}",
            "prompt": "?",
            "reference": "a",
            "output": "b",
            "score": float(score),
            "correct": None if right is None else bool(right[i]),
            "tokens": 1 if tokens is None else int(tokens[i]),
            "details": json.dumps({"choices": choices} if choices else {}),
        }
        for i, score in enumerate(scores)
    ]


def right_or_wrong(kept, lost, gained, wrong, probe="facts", choices=None):
    """Rows before and after with the given numbers of items."""
    counts = [kept, lost, gained, wrong]
    before, after = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
    return rows(before, probe, right=before, choices=choices), rows(after, probe, right=after, choices=choices)


PERPLEXITY = info("text", "perplexity", kind="perplexity", higher_is_better=False)


def documents(mean, size=80, seed=0, step=0.0, noise=0.0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 400, size)
    per_token = rng.normal(mean, 0.4, size) + step + noise * np.random.default_rng(seed + 1).normal(size=size)
    return rows(per_token * tokens, "text", tokens)


def test_score():
    found = analysis.score(rows([1] * 30 + [0] * 10), info())
    assert found.value == 0.75
    assert 0.58 < found.low < 0.62
    assert 0.85 < found.high < 0.88


def test_perplexity_is_weighted_by_tokens():
    table = documents(3.0)
    found = analysis.score(table, PERPLEXITY)
    assert found.value == pytest.approx(math.exp(sum(r["score"] for r in table) / sum(r["tokens"] for r in table)))
    assert 1 < found.low < found.value < found.high
    assert analysis.score(table, PERPLEXITY, 0.5).high < found.high


def test_change_of_right_or_wrong_items():
    before, after = right_or_wrong(60, 20, 5, 15, choices=4)
    found = analysis.change(before, after[::-1], info())
    assert (found.lost, found.gained, found.kept, found.items) == (20, 5, 60, 100)
    assert found.difference.value == pytest.approx(-0.15)
    assert found.forgetting == pytest.approx(0.15 / 0.8)
    assert found.retention == pytest.approx(100 * 0.65 / 0.8)
    assert found.band == "good"
    assert found.p == pytest.approx(2 * sum(math.comb(25, i) for i in range(6)) / 2**25)
    assert found.forgetting_raw == 0.2
    assert found.forgetting_adjusted == pytest.approx(0.2 - 0.2 * 0.35 / 3)
    assert found.forgetting_paired == pytest.approx(4 / 3 * (0.2 - 0.15 / 3))
    assert found.conclusion == "lost"
    assert found.detectable == pytest.approx((1.95996 + 0.84162) * math.sqrt(27 / 102 / 100), rel=1e-4)


def test_no_options_no_chance_correction():
    found = analysis.change(*right_or_wrong(60, 20, 5, 15), info())
    assert found.forgetting_raw == 0.2
    assert found.forgetting_adjusted is None
    assert found.forgetting_paired is None


@pytest.mark.parametrize(
    ("counts", "conclusion"),
    [
        ((400, 0, 0, 100), "kept"),
        ((15, 0, 0, 5), "cannot tell"),  # nothing flipped, but 20 items show nothing
        ((40, 4, 2, 4), "cannot tell"),
        ((40, 0, 40, 4), "gained"),
        ((40, 40, 0, 4), "lost"),
        ((45, 5, 0, 0), "cannot tell"),  # five flips, p = 0.0625
    ],
)
def test_conclusions(counts, conclusion):
    found = analysis.change(*right_or_wrong(*counts), info())
    assert found.conclusion == conclusion
    assert found.difference.low <= found.difference.value <= found.difference.high


def test_margin_decides_kept():
    pair = right_or_wrong(380, 12, 10, 98)
    assert analysis.change(*pair, info()).conclusion == "kept"
    assert analysis.change(*pair, info(), margin=0.005).conclusion == "cannot tell"


def test_lower_is_better_turns_everything():
    """A rate of bad answers that rises from 10 to 40 % is a loss."""
    before, after = right_or_wrong(10, 0, 30, 60)
    bad = info("safety", "rate", higher_is_better=False)
    strip = [[{**r, "probe": "safety", "correct": None} for r in t] for t in (before, after)]
    found = analysis.change(*strip, bad)
    assert found.difference.value == pytest.approx(0.3)
    assert (found.lost, found.gained, found.kept) == (30, 0, 60)
    assert found.forgetting == pytest.approx(0.3 / 0.9)
    assert found.conclusion == "lost"
    assert analysis.change(*strip[::-1], bad).conclusion == "gained"


def test_change_of_continuous_scores():
    rng = np.random.default_rng(0)
    before = rng.uniform(0.4, 0.9, 60)
    after = before - rng.uniform(0, 0.3, 60)
    found = analysis.change(rows(before), rows(after), info(metric="token F1"))
    assert found.conclusion == "lost"
    assert found.p == pytest.approx(1 / 10_001, rel=2)
    assert (found.lost, found.gained, found.kept) == (60, 0, 0)
    assert found.forgetting_raw is None
    judged = analysis.change(rows(before, right=before > 0.6), rows(after, right=after > 0.6), info(metric="token F1"))
    assert judged.lost == ((before > 0.6) & (after <= 0.6)).sum()
    assert judged.p == found.p


def test_change_of_perplexity():
    before, worse, better = documents(3.0), documents(3.0, step=0.1, noise=0.02), documents(3.0, step=-0.1, noise=0.02)
    found = analysis.change(before, worse, PERPLEXITY)
    assert found.difference.value == pytest.approx(0.1, abs=0.01)
    assert found.difference.high - found.difference.low < 0.02  # paired: far less than the spread of documents
    assert found.forgetting == pytest.approx(math.exp(found.difference.value) - 1)
    assert found.retention == pytest.approx(100 * (1 - found.forgetting))
    assert found.conclusion == "lost"
    assert found.detectable < 0.02
    gained = analysis.change(before, better, PERPLEXITY)
    assert gained.conclusion == "gained"
    assert gained.forgetting < 0
    assert analysis.change(before, documents(3.0, noise=0.02), PERPLEXITY).conclusion == "kept"
    assert analysis.change(before, documents(3.0, noise=0.5), PERPLEXITY).conclusion == "cannot tell"


def test_divergence_from_the_base_starts_at_zero():
    drift = info("drift", "KL", higher_is_better=False)
    after = np.random.default_rng(1).uniform(0.5, 3, 50)
    found = analysis.change(rows(np.zeros(50), "drift"), rows(after, "drift"), drift)
    assert found.forgetting == pytest.approx(after.mean())
    assert found.retention == 0
    assert found.conclusion == "lost"


def test_holm_over_probes_can_take_a_finding_back():
    pairs = [right_or_wrong(40, 7, 0, 3, "a"), right_or_wrong(40, 5, 5, 3, "b"), right_or_wrong(40, 4, 5, 3, "c")]
    infos = [info(name) for name in "abc"]
    assert analysis.change(*pairs[0], infos[0]).conclusion == "lost"
    before, after = ([row for pair in pairs for row in pair[side]] for side in (0, 1))
    found = analysis.changes(before, after, infos)
    assert found[0].p == pytest.approx(2 / 2**7)
    assert found[0].p_holm == pytest.approx(3 * 2 / 2**7)
    assert found[0].conclusion == "lost"
    wider = analysis.changes(before, after, infos, confidence=0.96)
    assert wider[0].conclusion == "cannot tell"
    assert analysis.changes([], [], []) == []


def test_detectable_is_what_the_conclusion_would_have_shown():
    """Among m probes of which one changed, Holm asks its p to be below α/m: four times out of five it is."""
    pairs = [right_or_wrong(60, 20, 5, 15, name) for name in "abcd"]
    before, after = ([row for pair in pairs for row in pair[side]] for side in (0, 1))
    alone = analysis.change(*pairs[0], info("a")).detectable
    together = analysis.changes(before, after, [info(name) for name in "abcd"])[0].detectable
    corrected = (stats.norm.ppf(1 - 0.05 / 4 / 2) + stats.norm.ppf(0.8)) / (1.95996 + 0.84162)
    assert together / alone == pytest.approx(corrected, rel=1e-4)


def test_a_detectable_change_is_called_lost_four_times_in_five():
    rng, items, probes, flips = np.random.default_rng(3), 1000, 8, 0.1
    names = [f"p{i}" for i in range(probes)]

    def table(loss):  # flips are rare and even on probes that did not change
        share = [(flips + loss) / 2, (flips - loss) / 2, 0.7 * (1 - flips), 0.3 * (1 - flips)]
        lost, gained, kept, wrong = rng.multinomial(items, share)
        return lost, gained, kept, wrong

    def measured(lost):  # the same numbers as `changes`, without a bootstrap each time
        p = [statistics.mcnemar(*table(loss)[:2]) for loss in (lost, *[0.0] * (probes - 1))]
        return statistics.holm(p)[0] < 0.05

    pair = right_or_wrong(*(int(items * s) for s in (0.63, 0.05, 0.05, 0.27)), "p0")
    before, after = ([{**row, "probe": name} for name in names for row in pair[side]] for side in (0, 1))
    size = analysis.changes(before, after, [info(name) for name in names])[0].detectable
    assert np.mean([measured(size) for _ in range(600)]) == pytest.approx(0.8, abs=0.06)


def test_matrix_and_sequence():
    point = lambda x: Estimate(value=x, low=x, high=x)  # noqa: E731
    infos = [
        info("t1", role="task", task="one"),
        info("t2a", role="task", task="two"),
        info("t2b", role="task", task="two"),
        info("t2p", "perplexity", role="task", task="two", higher_is_better=False),
        info("old"),
    ]
    table = [(0.3, 0.1, 0.2, 9), (0.8, 0.1, 0.2, 9), (0.6, 0.7, 0.9, 5)]
    names = ("t1", "t2a", "t2b", "t2p")
    scores = {f"0{i}": dict(zip(names, map(point, row))) for i, row in enumerate(table)}
    found = analysis.matrix(scores, infos, ["one", "two"])
    assert np.allclose(found, [[0.3, 0.15], [0.8, 0.15], [0.6, 0.8]])
    numbers = analysis.sequence(found)
    assert isinstance(numbers, results.Sequence)
    assert numbers.forgetting == pytest.approx(0.2)
    assert numbers.backward_transfer == pytest.approx(-0.2)
    only = analysis.matrix({"00": scores["00"], "02": scores["02"]}, infos[3:4], ["two"])
    assert only == [[1 / 9], [1 / 5]]
    del scores["01"]["t1"]
    assert analysis.matrix(scores, infos, ["one", "two"])[1][0] is None
    with pytest.raises(RunError, match="no probe"):
        analysis.matrix(scores, infos, ["one", "three"])
    with pytest.raises(RunError, match="3 stages for 1 tasks"):
        analysis.matrix(scores, infos, ["one"])


def test_group_deltas():
    infos = [info("a"), info("b"), info("c", group="behaviour", higher_is_better=False), PERPLEXITY]
    base = rows([1] * 5 + [0] * 5, "a") + rows([1] * 7 + [0] * 3, "b") + rows([1] + [0] * 9, "c") + documents(3.0)
    one = rows([1] * 4 + [0] * 6, "a") + rows([1] * 6 + [0] * 4, "b") + rows([1] * 3 + [0] * 7, "c")
    found = analysis.group_deltas({"00": base, "01": one, "02": rows([1] * 6 + [0] * 4, "a")}, infos)
    assert set(found) == {"knowledge", "behaviour"}
    assert found["knowledge"][0].value == pytest.approx(-0.1)
    assert found["behaviour"][0].value == pytest.approx(-0.2)
    assert [deltas[1] for deltas in found.values()] == [None, None]
    for deltas in found.values():
        assert deltas[0].low < deltas[0].value < deltas[0].high


def test_verdict_numbers_have_intervals():
    before, after, infos = run_tables()
    found = analysis.changes(before, after, infos)
    verdict = analysis.verdict(found, infos, before, after)
    for name in ("forgetting", "improvement", "balance", "mean_reference", "stability_efficiency"):
        interval = verdict.intervals[name]
        assert interval.value == pytest.approx(getattr(verdict, name)), name
        assert interval.low < interval.value < interval.high
    assert verdict.intervals["forgetting_raw"].value == pytest.approx((30 / 200 + 4 / 400) / 2)
    assert "forgetting_paired" not in verdict.intervals  # no options: nothing to guess
    narrow = analysis.verdict(found, infos, before, after, confidence=0.5).intervals["balance"]
    assert narrow.high - narrow.low < verdict.intervals["balance"].high - verdict.intervals["balance"].low
    heavy = analysis.verdict(found, infos, before, after, keep_weight=1.0, learn_weight=0.0)
    assert heavy.intervals["balance"].value == pytest.approx(1 - heavy.forgetting)
    assert heavy.intervals["balance"].low == pytest.approx(1 - heavy.intervals["forgetting"].high, abs=1e-9)
    old = [i for i in infos if i.role == "reference"]
    assert "improvement" not in analysis.verdict(analysis.changes(before, after, old), old, before, after).intervals


def test_all_three_estimators_of_a_probe_have_an_interval():
    found = analysis.change(*right_or_wrong(60, 20, 5, 15, choices=4), info())
    for name in ("forgetting_raw", "forgetting_adjusted", "forgetting_paired"):
        interval = found.intervals[name]
        assert interval.value == getattr(found, name)
        assert interval.low < interval.value < interval.high
    assert set(analysis.change(*right_or_wrong(60, 20, 5, 15), info()).intervals) == {"forgetting_raw"}


def run_tables():
    pairs = [
        right_or_wrong(150, 30, 4, 16, "facts"),
        right_or_wrong(380, 4, 4, 12, "sums"),
        right_or_wrong(10, 0, 60, 30, "new"),
    ]
    before, after = ([row for pair in pairs for row in pair[side]] for side in (0, 1))
    before, after = before + documents(3.0), after + documents(3.0, step=0.05, noise=0.01)
    return before, after, [info("facts"), info("sums"), info("new", role="task", task="new"), PERPLEXITY]


def test_verdict():
    before, after, infos = run_tables()
    found = analysis.changes(before, after, infos)
    verdict = analysis.verdict(found, infos, before, after)
    assert verdict.difference.value == pytest.approx((-26 / 200 + 0) / 2)
    assert verdict.difference.low < -0.065 < verdict.difference.high < 0
    assert verdict.mean_reference == pytest.approx((154 / 200 + 384 / 400) / 2)
    forgotten = [c.forgetting for c in found if c.probe != "new"]
    assert verdict.forgetting == pytest.approx(np.mean(forgotten))
    assert verdict.improvement == pytest.approx(6)
    assert verdict.successful
    assert verdict.lost_over_threshold == []
    strict = analysis.verdict(found, infos, before, after, alarm=0.1, max_forgetting=0.05)
    assert strict.lost_over_threshold == ["facts"]
    assert not strict.successful
    assert "Learned +60 points on 1 task probe" in verdict.sentence
    assert "lost 6.5 points [" in verdict.sentence
    assert "on 2 old abilities" in verdict.sentence
    assert "1 of 3 shown to be kept" in verdict.sentence
    assert "lost: facts, text" in verdict.sentence
    assert "not in that average: text" in verdict.sentence
    assert "\n" not in verdict.sentence
    assert verdict.sentence.endswith(".")


def test_verdict_with_perplexity_alone_and_without_reference():
    before, after, infos = run_tables()
    found = analysis.changes(before, after, [PERPLEXITY])
    verdict = analysis.verdict(found, infos, before, after)
    assert verdict.difference is None
    assert verdict.mean_reference == pytest.approx(found[0].retention / 100)
    assert "text" in verdict.sentence
    task = analysis.changes(before, after, infos[2:3])
    assert analysis.verdict(task, infos, before, after) is None


def test_gain_from_zero_counts_as_all():
    before, after = rows([0] * 20, "new"), rows([1] * 5 + [0] * 15, "new")
    old = right_or_wrong(40, 1, 1, 3)
    infos = [info(), info("new", role="task", task="new")]
    found = analysis.changes(old[0] + before, old[1] + after, infos)
    assert analysis.verdict(found, infos, old[0] + before, old[1] + after).improvement == 1


def compared(lost_a, lost_b, n=400, **more):
    base = rows(np.ones(n))
    a, b = rows(np.arange(n) >= lost_a), rows(np.arange(n) >= lost_b)
    return analysis.compare_runs(base, a, b, [info()], **more)


def test_compare_runs():
    found = compared(120, 12)
    assert found.lost_a.value == pytest.approx(0.3)
    assert found.lost_b.value == pytest.approx(0.03)
    assert found.saved.value == pytest.approx(0.27)
    assert found.ratio.value == pytest.approx(0.1)
    assert found.ratio.low < 0.1 < found.ratio.high < 0.2
    assert found.holds
    assert found.excess.value == pytest.approx(0.03 - 0.06)
    assert not compared(120, 22).holds  # 0.18, but not certain
    assert compared(120, 22, fraction=0.5).holds
    nothing = compared(1, 0)
    assert nothing.ratio is None
    assert not nothing.holds
    assert not compared(8, 0, n=20).holds  # B lost none of 20 items: too few to say


def test_compare_runs_covers_the_true_ratio():
    rng, inside = np.random.default_rng(2), 0
    for _ in range(100):
        base = rows(np.ones(300))
        lost_a = rng.random(300) < 0.3
        lost_b = lost_a & (rng.random(300) < 0.5)
        found = analysis.compare_runs(base, rows(~lost_a), rows(~lost_b), [info()])
        inside += found.ratio.low <= 0.5 <= found.ratio.high
    assert 0.91 <= inside / 100 <= 0.99


def test_compare_runs_on_perplexity_and_mixed_kinds():
    base, a, b = documents(3.0), documents(3.0, step=0.3, noise=0.01), documents(3.0, step=0.02, noise=0.01)
    found = analysis.compare_runs(base, a, b, [PERPLEXITY])
    assert found.unit == "nats per token"
    assert found.lost_a.value == pytest.approx(0.3, abs=0.01)
    assert found.holds
    with pytest.raises(RunError, match="kinds"):
        analysis.compare_runs(base + rows([1, 0]), a + rows([1, 0]), b + rows([1, 0]), [PERPLEXITY, info()])
    with pytest.raises(RunError, match="kinds"):
        analysis.compare_runs(base, a, b, [])


def test_records_survive_json():
    before, after, infos = run_tables()
    for found in analysis.changes(before, after, infos):
        assert results.Change.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("before", "after", "probe", "says"),
    [
        ([], [], info(), "no item rows"),
        (rows([1, 0]), rows([1, 0, 1]), info(), "1 items are on one side only"),
        (rows([1, 0]) * 2, rows([1, 0]), info(), "'q0' appears twice"),
        (rows([1, 0]), rows([1, 0]) * 2, info(), "'q0' appears twice"),
        (rows([1, math.nan]), rows([1, 0]), info(), "'q1' is not a finite number"),
        (rows([9.0, 9.0], "text", [3, 4]), rows([9.0, 9.0], "text", [3, 5]), PERPLEXITY, "other tokens"),
        (rows([9.0, 9.0], "text", [3, 0]), rows([9.0, 9.0], "text", [3, 0]), PERPLEXITY, "no scored tokens"),
        (rows([9.0], "text", [3]), rows([9.0], "text", [3]), PERPLEXITY, "at least 2"),
    ],
)
def test_bad_tables_are_one_line(before, after, probe, says):
    with pytest.raises(RunError, match=says) as error:
        analysis.change(before, after, probe)
    assert "\n" not in str(error.value)
