"""Looks of a run read for the curves, and the picture of a forecast."""

import json

import pytest

from retain.errors import RunError
from retain.functional import dynamics
from retain.report.dynamics import picture, read_looks, write


def log(folder, *records, name="metrics.jsonl"):
    with open(folder / name, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


def monitor(step, **more):
    return {"kind": "monitor", "step": step, "task": "a"} | more


def test_monitor_records_as_numbers_or_with_intervals(tmp_path):
    log(tmp_path, {"kind": "step", "task": "a", "step": 5, "loss": 2.0}, monitor(0, overall=0.0))
    log(
        tmp_path,
        monitor(10, overall=9),
        monitor(10, overall=0.2),
        monitor(20, overall=None),
        monitor(30, overall={"value": 0.3, "low": 0.1}),
    )
    looks = read_looks(tmp_path)
    assert looks.steps == [0, 10, 30]
    assert looks.forgetting == [0, 0.2, 0.3], "the later record of a step holds"
    assert looks.unit == "forgetting"


def test_what_most_looks_have_unless_forgetting_is_there_often_enough(tmp_path):
    records = [monitor(10 * i, loss_rise={"value": i / 10}, kl={"value": i / 5}) for i in range(8)]
    log(
        tmp_path,
        *records[:4],
        monitor(40, forgetting={"value": 0.5}, loss_rise=0.4),
        *records[5:],
        name="monitor.jsonl",
    )
    assert read_looks(tmp_path).unit == "rise of the loss, nats"
    assert read_looks(tmp_path).forgetting == pytest.approx([i / 10 for i in range(8)])
    assert read_looks(tmp_path, "kl").forgetting[-1] == 1.4
    assert read_looks(tmp_path, "forgetting").steps == [40]
    log(tmp_path, *(monitor(100 + i, forgetting={"value": 0.5 + i}) for i in range(3)), name="monitor.jsonl")
    assert read_looks(tmp_path).forgetting == [0.5, 0.5, 1.5, 2.5]


def test_steps_count_on_over_tasks(tmp_path):
    log(tmp_path, *(monitor(s, kl=s) for s in (5, 10)), *(monitor(s, kl=s, task="b") for s in (5, 10)))
    assert read_looks(tmp_path).steps == [5, 10, 15, 20]


def test_looks_of_probes_are_what_their_scores_have_fallen(tmp_path):
    scores = {0: (0.8, 0.6), 10: (0.7, 0.6), 20: (0.5, 0.5)}
    records = [
        {"kind": "look", "step": step, "probe": probe, "score": score}
        for step, pair in scores.items()
        for probe, score in zip("xy", pair)
    ]
    log(tmp_path, *records, {"kind": "look", "stage": "00-base", "probe": "z", "score": 1.0})
    looks = read_looks(tmp_path)
    assert looks.steps == [0, 10, 20]
    assert looks.forgetting == pytest.approx([0, 0.05, 0.2])


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(RunError, match="no such directory"):
        read_looks(tmp_path / "none")
    with pytest.raises(RunError, match="no looks with a step in metrics"):
        read_looks(log(tmp_path, {"kind": "step", "step": 1, "loss": 2}))
    with pytest.raises(RunError, match="Did you mean 'kl'"):
        read_looks(tmp_path, "kll")
    with pytest.raises(RunError, match="with a step and overall"):
        read_looks(log(tmp_path, monitor(1, kl=1)), "overall")


def test_a_picture_of_looks_curve_and_band(tmp_path):
    steps, lost = [10, 20, 30, 40, 50], [0.1, 0.18, 0.22, 0.27, 0.28]
    fit = dynamics.fit(steps, lost)
    band = [dynamics.forecast(fit, step) for step in (50, 100)]
    drawn = picture([(0, 0), *((f.step, f.value) for f in band)], list(zip(steps, lost)), band, up="nats")
    assert "nats" in drawn.svg
    assert f"{band[-1].value:.3g} at 100" in drawn.alt
    for name in ("a.svg", "a.html"):
        write(drawn, tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "<svg" in text
        assert "#0a0b0c" not in text, "ink that is seen on white and on black"
    assert drawn.alt in text
