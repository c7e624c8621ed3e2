"""The chart of a monitor's looks."""

import json
from xml.etree import ElementTree

import pytest

from retain.errors import RunError
from retain.report.trend import trend, watched, write_trend


def look(step, kl, forgetting=None, task="", did=(), **probes):
    record = {"kind": "monitor", "task": task, "step": step, "did": list(did)}
    record |= {"kl": {"value": kl, "low": kl / 2, "high": kl * 2}, "loss": 2.0}
    if forgetting is not None:
        record["forgetting"] = {"value": forgetting, "low": forgetting - 0.1, "high": forgetting + 0.1}
        record["probes"] = {name: {"role": "reference", "forgetting": value} for name, value in probes.items()}
        record["probes"]["new"] = {"role": "task", "forgetting": 0.9}
    return record


LOOKS = [
    look(0, 0.0),
    look(100, 0.2),
    look(200, 0.4, 0.25, facts=0.3, sums=0.2),
    look(300, 0.5, 0.35, facts=0.5, sums=0.2),
]


def texts(picture):
    return [node.text for node in ElementTree.fromstring(picture.svg).iter() if node.tag.endswith("text")]


def test_shows_probes_and_overall():
    picture = trend(LOOKS)
    assert {"facts", "sums", "overall", "forgotten, %", "KL, nats", "optimizer step"} <= set(texts(picture))
    assert "new" not in texts(picture)
    assert "At step 300 35 % of old abilities were forgotten" in picture.alt
    assert "0.500 nats per token at step 300" in picture.alt
    acted = trend([*LOOKS[:-1], look(300, 0.5, 0.35, did=["stop"], facts=0.5)])
    assert "Dotted lines" in acted.alt
    assert acted.svg.count("stroke-dasharray") > picture.svg.count("stroke-dasharray")


def test_needs_two_looks_and_can_do_without_probes():
    assert trend([]) is None
    assert trend(LOOKS[:1]) is None
    assert "forgotten, %" not in texts(trend(LOOKS[:2]))
    assert trend(LOOKS) == trend(LOOKS)


def test_steps_go_on_over_tasks_and_a_later_record_holds():
    step = {"kind": "step", "task": "one", "step": 120, "loss": 1.0}
    records = [look(0, 0.0, task="one"), look(100, 0.1, task="one"), step]
    records += [look(0, 0.2, task="two"), look(50, 0.3, task="two"), look(50, 0.4, task="two")]
    assert [(r["at"], r["kl"]["value"]) for r in watched(records)] == [(0, 0), (100, 0.1), (120, 0.2), (170, 0.4)]


def test_written_to_a_file(tmp_path):
    log = tmp_path / "monitor.jsonl"
    log.write_text("\n".join(map(json.dumps, LOOKS)) + '\n{"kind": "moni')
    path = write_trend(log, tmp_path / "trend.svg")
    ElementTree.parse(path)
    with pytest.raises(RunError, match="fewer than two looks"):
        write_trend(tmp_path / "other.jsonl", path)
