"""Schedules, the reservoir and the mixture of an epoch."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from retain.errors import ConfigError, DataError
from retain.functional.sampling import Reservoir, mix, new_order, parse_expression, schedule


def test_schedules_at_start_middle_and_end():
    expected = {
        "linear": (0.2, 0.12, 0.04),
        "cosine": (0.3, 0.2, 0.1),
        "rising": (0.15, 0.225, 0.30),
    }
    for kind, values in expected.items():
        assert [schedule(kind)(t) for t in (0.0, 0.5, 1.0)] == pytest.approx(values)
    assert [schedule("constant", 0.1)(t) for t in (0.0, 1.0)] == [0.1, 0.1]
    assert schedule("linear", 0.5)(1.0) == pytest.approx(0.1)
    assert schedule("linear", 0.5, 0.0)(1.0) == 0
    assert schedule("cosine", 0.4, 0.2)(0.25) == pytest.approx(0.2 + 0.1 * (1 + math.sqrt(0.5)))


def test_custom_expression_equals_python():
    text = "0.1 + 0.2*min(t, 1 - t)**2 - -0.01*sin(pi*t) + exp(-5*t)/10 + max(0, cos(t), sqrt(t))/20"
    value = schedule("custom", expression=text)
    for t in np.linspace(0, 1, 11):
        expected = (
            0.1 + 0.2 * min(t, 1 - t) ** 2 + 0.01 * math.sin(math.pi * t) + math.exp(-5 * t) / 10
            + max(0, math.cos(t), math.sqrt(t)) / 20
        )  # fmt: skip
        assert value(t) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("0.1 + x", "character 7"),
        ("__import__('os').system('true')", "character 1"),
        ("0.1 + t.real", "character 7"),
        ("0.1 +", "character 6"),
        ("min(t)", "min"),
        ("sin(t, t)", "sin"),
        ("True", "True"),
        ("'a'", "'a'"),
        ("0.1 if t < 1 else 0", "character 1"),
        ("[t][0]", "character 1"),
        ("(lambda: t)()", "character 1"),
        ("max(*t, t)", "character 5"),
        ("t % 2", "character 1"),
        ("t" + "+t" * 200, "300"),
    ],
)
def test_bad_expressions_name_the_place(text, place):
    with pytest.raises(ConfigError) as error:
        parse_expression(text)
    assert place in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["1/t", "9**9**9", "sqrt(t - 1)", "(t - 2)**0.5", "t", "t - 0.5"])
def test_expressions_without_a_fraction_somewhere_are_refused(text):
    with pytest.raises(ConfigError):
        schedule("custom", expression=text)


def test_a_warmup_reaches_the_fraction_and_annealed_replay_comes_last():
    warm, late = schedule("warmup", 0.3, part=0.5), schedule("annealed", 0.3, part=0.5)
    assert [warm(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.15, 0.3, 0.3])
    assert [late(t) for t in (0, 0.49, 0.5, 1)] == pytest.approx([0, 0, 0.6, 0.6])
    assert [schedule("warmup")(t) for t in (0.1, 0.2)] == pytest.approx([0.05, 0.1])
    assert schedule("annealed")(0.9) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=r"Raise `part` above 0\.3"):
        schedule("annealed", 0.3)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "rising", "warmup", "annealed"])
@pytest.mark.parametrize("epochs", [1, 2.5])
def test_what_is_replayed_is_the_time_integral_of_the_share(kind, epochs):
    fraction = schedule(kind, 0.15)
    rows = [mix(np.ones(2000), np.ones(50), fraction, seed=1, epoch=e, epochs=epochs) for e in range(int(epochs + 0.5))]
    shown = np.concatenate(rows)
    if epochs == 2.5:
        shown = shown[: np.flatnonzero(shown < 2000)[4999] + 1]  # the last pass is planned up to its middle
    integral = np.mean([fraction((i + 0.5) / 10_000) for i in range(10_000)])
    most = max(fraction(t) / (1 - fraction(t)) for t in np.linspace(0, 1, 101)) + 1  # rows that one new row brings
    assert (shown >= 2000).mean() == pytest.approx(integral, abs=most / len(shown))
    # and at every moment, t being the part of all rows that was shown
    for t in (0.1, 0.5, 0.85):
        so_far = shown[: round(t * len(shown))]
        owed = np.mean([fraction(t * (i + 0.5) / 1000) for i in range(1000)])
        assert (so_far >= 2000).mean() == pytest.approx(owed, abs=2 * most / len(so_far))


def test_schedule_errors():
    for arguments in (
        {"kind": "linear", "part": 0.2}, {"kind": "warmup", "part": 0.0}, {"kind": "annealed", "part": 1.1},
        {"kind": "warmup", "end": 0.2}, {"kind": "annealed", "start": 0.2, "part": 0.2}, {"kind": "custom", "part": 1},
        {"kind": "linaer"}, {"kind": "constant"}, {"kind": "constant", "start": 0.1, "end": 0.2},
        {"kind": "custom"}, {"kind": "linear", "expression": "t"}, {"kind": "linear", "start": 1.0},
        {"kind": "rising", "end": -0.1}, {"kind": "custom", "start": 0.1, "expression": "0.1"},
        {"kind": "constant", "start": float("nan")},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            schedule(**arguments)


def kept(reservoir, items):
    slots = {}
    for item in items:
        slot = reservoir.offer()
        if slot is not None:
            slots[slot] = item
    return slots


def test_every_item_is_kept_equally_often():
    runs, capacity, length = 4000, 5, 20
    counts = np.zeros(length)
    for seed in range(runs):
        counts[list(kept(Reservoir(capacity, seed), range(length)).values())] += 1
    assert counts.sum() == runs * capacity
    # inclusions within a run exclude each other, which shrinks the variance by (1 − M/n)·n/(n − 1)
    chi2 = ((counts - runs * 0.25) ** 2 / (runs * 0.25)).sum() / (0.75 * 20 / 19)
    assert 1e-4 < stats.chi2.sf(chi2, length - 1) < 1 - 1e-4


def test_item_after_filling_may_be_refused_and_slots_are_uniform():
    slots = [kept(Reservoir(4, seed), range(5)) for seed in range(4000)]
    where = [next((slot for slot, item in s.items() if item == 4), None) for s in slots]
    entered = [w for w in where if w is not None]
    assert abs(len(entered) / 4000 - 0.8) < 4 * math.sqrt(0.16 / 4000)
    assert stats.chisquare(np.bincount(entered, minlength=4)).pvalue > 1e-4


def test_reservoir_continues_from_json():
    whole, first = Reservoir(3, 1), Reservoir(3, 1)
    expected = [whole.offer() for _ in range(40)]
    begun = [first.offer() for _ in range(17)]
    second = Reservoir(9, 5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [second.offer() for _ in range(23)] == expected
    with pytest.raises(ConfigError, match="capacity"):
        Reservoir(0)


def lengths(count, seed):
    return np.random.default_rng(seed).integers(1, 60, count)


KINDS = [schedule("constant", 0.25), schedule("linear"), schedule("cosine"), schedule("rising", 0.0, 0.6)]


def times(fraction, ratio, number):
    """Slow reference: t when k of `number` new rows were shown, walking through training in small steps."""
    cells, shown = 100_000, [0.0]
    for cell in range(cells):
        odds = fraction((cell + 0.5) / cells) / (1 - fraction((cell + 0.5) / cells)) * ratio
        shown.append(shown[-1] + 1 / (1 + odds))
    found, cell = [], 0
    for k in range(number):
        while shown[cell + 1] / shown[-1] <= k / number:
            cell += 1
        found.append(cell / cells)
    return found


@pytest.mark.parametrize("by", ["rows", "tokens"])
@pytest.mark.parametrize("fraction", KINDS)
def test_share_follows_the_schedule_at_every_prefix_over_all_epochs(by, fraction):
    new, replay, epochs = lengths(211, 0), lengths(37, 1), 3
    weight = np.concatenate([new, replay]) if by == "tokens" else np.ones(248)
    owed = paid = 0.0
    seen = 0
    t = times(fraction, weight[:211].mean() / weight[211:].mean(), 211 * epochs)
    largest = weight[211:].max() * 1.01  # the reference is coarse
    for epoch in range(epochs):
        # window=1 shows the order before shuffling
        for row in mix(new, replay, fraction, seed=4, epoch=epoch, epochs=epochs, by=by):
            assert paid - owed <= largest / 2 + 1e-6
            if row < 211:  # all replay for the rows before is in
                assert abs(paid - owed) <= largest / 2 + 1e-6
                f = fraction(t[seen])
                owed += weight[row] * f / (1 - f)
                seen += 1
            else:
                paid += weight[row]
        assert abs(paid - owed) <= largest / 2 + 1e-6


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_constant_share_is_exact_to_one_row(by):
    new, replay = lengths(500, 0), lengths(50, 1)
    rows = mix(new, replay, schedule("constant", 0.2), seed=0, by=by, window=16)
    weight = np.concatenate([new, replay]) if by == "tokens" else np.ones(550)
    old = weight[rows[rows >= 500]].sum()
    assert abs(old - 0.25 * weight[:500].sum()) <= weight[500:].max() / 2 + 1e-6


def test_every_window_has_its_share_of_rows():
    rows = mix(np.ones(400), np.ones(30), schedule("constant", 0.25), seed=3, window=16)
    share = [(rows[i : i + 16] >= 400).sum() for i in range(0, len(rows) - 15, 16)]
    assert set(share) <= {3, 4, 5}
    first = [int(np.argmax(rows[i : i + 16] >= 400)) for i in range(0, len(rows) - 15, 16)]
    assert len(set(first)) > 2  # not at the same place in every batch


@pytest.mark.parametrize("by", ["rows", "tokens"])
@pytest.mark.parametrize("window", [1, 8, 1000])
def test_new_rows_once_per_epoch_and_replay_in_full_passes_across_epochs(by, window):
    new, replay = lengths(60, 0), lengths(11, 1)
    drawn = []
    for epoch in range(4):
        options = {"seed": 2, "epoch": epoch, "epochs": 4, "by": by}
        rows = mix(new, replay, schedule("constant", 0.3), window=window, **options)
        assert sorted(rows[rows < 60]) == list(range(60))
        plain = mix(new, replay, schedule("constant", 0.3), window=1, **options)
        assert np.array_equal(plain[plain < 60], new_order(60, 2, epoch))
        for i in range(0, len(rows), window):
            assert sorted(rows[i : i + window]) == sorted(plain[i : i + window])
        drawn += (plain[plain >= 60] - 60).tolist()
    assert len(drawn) > 33
    passes = [drawn[i : i + 11] for i in range(0, len(drawn), 11)]
    assert all(sorted(p) == list(range(11)) for p in passes[:-1])
    assert len(set(passes[-1])) == len(passes[-1])
    assert passes[0] != passes[1]


def test_same_arguments_same_rows_other_seed_or_epoch_other_rows():
    def rows(**changes):
        options = {"seed": 5, "epoch": 1, "epochs": 2, "window": 8, "by": "tokens"} | changes
        return mix(lengths(80, 0), lengths(20, 1), schedule("linear"), **options)

    assert np.array_equal(rows(), rows())
    assert rows().dtype == np.int64
    assert not np.array_equal(rows(), rows(seed=6))
    assert not np.array_equal(rows()[:80], rows(epoch=0)[:80])


def test_fraction_zero_is_the_plain_order_whatever_the_buffer():
    off = schedule("constant", 0.0)
    for replay in ([], [3, 4], np.ones(1000)):
        for window in (1, 8):
            rows = mix(np.ones(50), replay, off, seed=1, epoch=1, epochs=2, window=window)
            assert np.array_equal(rows, new_order(50, 1, 1))
    assert len(mix([], [], off, seed=0)) == 0


def test_schedule_that_starts_at_zero_leaves_its_first_windows_alone():
    rows = mix(np.ones(400), np.ones(30), schedule("rising", 0.0, 0.5), seed=3, window=8)
    begin = int(np.argmax(rows >= 400)) // 8 * 8
    assert begin > 0
    assert np.array_equal(rows[:begin], new_order(400, 3, 0)[:begin])


def test_mix_errors():
    some = schedule("constant", 0.2)
    with pytest.raises(ConfigError, match="buffer is empty"):
        mix([1, 1], [], some, seed=0)
    with pytest.raises(DataError, match="row 1"):
        mix([1, 1], [4, 0], some, seed=0, by="tokens")
    for bad in ({"by": "words"}, {"epoch": 1}, {"window": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            mix([1, 1], [1], some, **({"seed": 0} | bad))
    with pytest.raises(ConfigError, match="below 1"):
        mix([1, 1], [1], lambda t: 1.0, seed=0)
