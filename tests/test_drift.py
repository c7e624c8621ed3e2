"""How the answers changed, from two hand-made item tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retain.drift import SHIFTS, drift
from retain.functional import calibration, statistics
from retain.results import Drift, ProbeInfo


def info(name, kind, role="reference", metric="accuracy"):
    return ProbeInfo(name=name, kind=kind, group="knowledge", role=role, metric=metric, items=1)


def row(probe, item, output="", details=None, score=0.0, tokens=1, prompt="?"):
    return {
        "probe": probe,
        "item": str(item),
        "prompt": prompt,
        "reference": "",
        "output": output,
        "score": score,
        "correct": None,
        "tokens": tokens,
        "details": json.dumps(details or {}),
    }


def choices(values, answers, chosen=None):
    picked = [int(np.argmax(v)) for v in values] if chosen is None else chosen
    return [
        row("facts", i, "x", {"choices": len(v), "chosen": c, "answer": a, "log_likelihoods": list(v)})
        for i, (v, a, c) in enumerate(zip(values, answers, picked))
    ]


def written(texts, probe="says", **details):
    return [row(probe, i, text, {"written": 3, **details}) for i, text in enumerate(texts)]


def test_choices_agree_by_the_option_chosen_and_pairs_by_the_likelier_text():
    values = [[-1.0, -2.0]] * 4
    before = choices(values, [0] * 4, chosen=[0, 1, 1, 0])
    after = choices(values, [0] * 4, chosen=[0, 1, 0, 0])
    pairs = [[-3.0, -4.0], [-4.0, -3.0], [-2.0, -2.0]], [[-3.0, -4.0], [-3.0, -4.0], [-2.0, -1.0]]
    for table, lists in zip((before, after), pairs):
        table += [row("pairs", i, "t", {"log_likelihoods": v}, prompt="") for i, v in enumerate(lists)]
    found = drift(before, after, [info("facts", "choice"), info("pairs", "pair")])
    expected = statistics.mean_interval([1, 1, 0, 1, 1, 0, 1])  # a tie is the second text
    assert found.agreement["choices"].model_dump() == expected._asdict()


def test_written_answers():
    before = written(["Paris.", "a b c d", "one two", "- item"])
    after = written(["Paris.", "a b x d", "one", "**item**"])
    found = drift(before, after, [info("says", "answer")])
    assert found.agreement["answers"].value == pytest.approx(1 / 4)
    assert found.agreement["beginning"].value == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    length = found.shifts["words"]
    assert (length.before, length.after, length.items) == (8 / 4, 7 / 4, 4)
    expected = statistics.paired_interval([1, 4, 2, 1], [1, 4, 1, 1])
    assert length.difference.model_dump() == expected._asdict()
    assert (found.shifts["lists"].before, found.shifts["lists"].after) == (0.25, 0)
    assert (found.shifts["bold"].before, found.shifts["bold"].after) == (0, 0.25)
    assert set(found.shifts) <= set(SHIFTS)


def test_a_share_of_nothing_is_left_out_of_its_number_only():
    found = drift(written(["7", "ab", "我 a"]), written(["8", "ab", "a a"]), [info("says", "answer")])
    assert found.shifts["words"].items == 3
    assert found.shifts["cjk"].items == 2
    assert found.shifts["cjk"].difference.value == pytest.approx(-0.25)


def test_calibration_is_that_of_all_choices():
    rng = np.random.default_rng(1)
    values, answers = rng.normal(size=(80, 3)), rng.integers(3, size=80).tolist()
    before, after = choices(values.tolist(), answers), choices((4 * values).tolist(), answers)
    found = drift(before, after, [info("facts", "choice")])
    old, new = (calibration.confidences(v, answers) for v in (values, 4 * values))
    shift = found.shifts["ece"]
    assert shift.before == pytest.approx(calibration.calibration_error(*old[:2]))
    assert shift.after == pytest.approx(calibration.calibration_error(*new[:2]))
    assert shift.difference.value == pytest.approx(shift.after - shift.before)
    assert shift.difference.low > 0  # the same choices, much surer
    assert found.shifts["brier"].after == pytest.approx(new[2].mean())
    assert found.shifts["confidence"].before == pytest.approx(old[0].mean())
    assert found.agreement["choices"].value == 1


def test_caution_is_told_apart_by_what_was_asked():
    asked = [(False, True), (False, False), (True, False), (True, True)]
    before = [row("h", i, "x", {"declined": d, "answerable": a, "written": 2}) for i, (a, d) in enumerate(asked)]
    after = [row("h", i, "x", {"declined": True, "answerable": a, "written": 2}) for i, (a, _) in enumerate(asked)]
    for table, refused in ((before, [True, True, False, False]), (after, [False, True, True, False])):
        table += [
            row("r", i, "x", {"refused": r, "safe": i > 1, "consistency": 0.25 * (i + 1)})
            for i, r in enumerate(refused)
        ]
    found = drift(before, after, [info("h", "hallucination"), info("r", "refusal")]).shifts
    assert {name: (found[name].before, found[name].after) for name in found if "d_" in name} == {
        "declined_unanswerable": (0.5, 1),
        "declined_answerable": (0.5, 1),
        "refused_unsafe": (1, 0.5),
        "refused_safe": (0, 0.5),
    }
    assert found["consistency"].difference.value == 0


def test_divergence_is_per_token_and_agreement_weighted_by_token():
    kl = info("kl", "divergence", metric="KL")
    before = [row("kl", i, "", {"same_token": 1.0}, 0.0, n) for i, n in enumerate((10, 30))]
    after = [row("kl", i, "", {"same_token": s}, x, n) for i, (s, x, n) in enumerate(((0.5, 2.0, 10), (0.9, 1.0, 30)))]
    found = drift(before, after, [kl])
    assert found.divergence["kl"].value == pytest.approx(3 / 40)
    assert found.agreement["tokens"].value == pytest.approx((0.5 * 10 + 0.9 * 30) / 40)


def test_probes_of_tasks_and_texts_of_private_runs_are_left_out():
    task = drift(written(["a"] * 3, "new"), written(["b"] * 3, "new"), [info("new", "answer", role="task")])
    assert task is None
    private = [row("says", i, "", {"written": 3}, prompt="") for i in range(3)]
    found = drift(private, private, [info("says", "answer")])
    assert found == Drift()


def test_one_item_is_no_interval():
    found = drift(written(["a"]), written(["b"]), [info("says", "answer")])
    assert (found.agreement, found.shifts) == ({}, {})


def test_nothing_changed_means_no_difference():
    table = written(["Paris is the capital.", "- a\n- b", "我"]) + choices([[-1.0, -3.0], [-2.0, -1.0]], [0, 0])
    found = drift(table, table, [info("says", "answer"), info("facts", "choice")])
    assert {e.value for e in found.agreement.values()} == {1.0}
    assert {s.difference.value for s in found.shifts.values()} == {0.0}
    assert all(math.isfinite(s.difference.high) for s in found.shifts.values())
