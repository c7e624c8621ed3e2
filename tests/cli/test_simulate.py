"""`retain simulate`: curves by settings, forecasts of a run, and mistakes in one line."""

from __future__ import annotations

import json
import sys

import pytest

from retain.cli import main
from retain.functional import dynamics


def simulate(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["retain", "simulate", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)


@pytest.fixture
def watched(tmp_path):
    """A run whose forgetting follows 0.3·(1 − exp(−s/200)), with a little scatter."""
    lost = dynamics.simulate([s / 200 for s in range(0, 501, 50)], 1e9, base_rate=0.3, ceiling=0.3)
    records = [
        {"kind": "monitor", "task": "a", "step": 50 * i, "forgetting": {"value": value + 0.002 * (-1) ** i}}
        for i, value in enumerate(lost)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_settings(monkeypatch, capsys, tmp_path):
    words = ["--parameters", "7e9", "--epochs", 3, "--similarity", 0.4, "--steps-per-epoch", 200]
    simulate(monkeypatch, *words, "--output", tmp_path / "curve.svg")
    said = capsys.readouterr().out
    assert "0.38" in said
    assert "is a guess" in said
    last = next(line.split() for line in said.splitlines() if line.split()[:2] == ["3", "600"])
    assert last[2] == f"{dynamics.simulate([3], 7e9, similarity=0.4)[0]:.1%}"
    assert "optimizer step" in (tmp_path / "curve.svg").read_text()
    simulate(monkeypatch, "--parameters", "1e8", "--base-rate", 0.5)
    said = capsys.readouterr().out
    assert "50.0% of old abilities lost per epoch" in said
    assert "guess" not in said
    assert "step" not in said


def test_a_run(monkeypatch, capsys, watched):
    simulate(monkeypatch, watched, "--at", 1000, "--at", 6000, "--output", watched / "curve.html")
    said = capsys.readouterr().out
    assert "10 looks up to step 500" in said
    lines = [line.split() for line in said.splitlines() if line.startswith(("saturating", "power"))]
    assert [line[0] for line in lines] == ["saturating", "saturating", "power", "power"]
    assert float(lines[0][-4]) == pytest.approx(0.298, abs=0.02)
    assert "more than 10 times" in said
    assert "<figcaption>" in (watched / "curve.html").read_text()
    simulate(monkeypatch, watched, "--law", "power", "--confidence", 0.8)
    said = capsys.readouterr().out
    assert "80% of looks" in said
    assert "1,000" in said, "twice as far as the looks, where no step is asked"
    assert "saturating" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing given"),
        (["--parameters", "0"], "parameters: 0"),
        (["--parameters", "1e9", "--epochs", "0"], "--epochs: 0"),
        (["--parameters", "1e9", "--at", "5"], "--at: is for a run"),
        (["--parameters", "1e9", "--output", "curve.png"], ".svg or .html"),
        (["RUN", "--similarity", "0.4"], "--similarity: is for a curve by settings"),
        (["RUN", "--law", "line"], "saturating, power"),
        (["RUN", "--at", "-5"], "step: -5"),
        (["RUN", "--measure", "kll"], "Did you mean 'kl'"),
        (["nowhere"], "no such directory"),
    ],
)
def test_mistakes_are_one_line_and_code_2(monkeypatch, capsys, watched, words, said):
    words = [str(watched) if word == "RUN" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["retain", "simulate", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_too_few_looks(monkeypatch, capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "monitor", "step": 10, "overall": 0.1}\n')
    monkeypatch.setattr(sys, "argv", ["retain", "simulate", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "1 after step 0" in capsys.readouterr().err
