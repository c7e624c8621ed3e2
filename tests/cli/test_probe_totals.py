"""`retain probe` prints the other numbers of probes that have some."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_kit import write_lines

from retain.cli import main
from retain.results import load_items
from retain.totals import totals


def test_numbers_of_answers_and_classes_are_printed(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["yes", "no [never]"]
    rows = [{"probe": "kept", "prompt": f"Is it {i}?", "labels": labels, "label": labels[i % 2]} for i in range(4)]
    rows += [{"probe": "said", "prompt": f"{i}?", "answers": "seven ships", "score": "rouge_l"} for i in range(2)]
    source, items = write_lines(tmp_path / "qa.jsonl", rows), tmp_path / "items.parquet"
    words = ["probe", shop / "model", "--probes", source, "--items", items]
    monkeypatch.setattr(sys, "argv", ["retain", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    table = load_items(items)
    kept, answered = (totals([row for row in table if row["probe"] == name]) for name in ("kept", "said"))
    assert "ROUGE-L" in said
    assert f"kept: macro_f1 {kept.numbers['macro_f1']:.3f}" in said
    for name in ("macro_f1", "micro_f1", "corpus_bleu", "rouge_l"):
        assert f"{name} {answered.numbers[name]:.3f}" in said
    for label in labels:
        one = kept.classes[label]
        assert f"{label}: precision {one.precision:.3f}, recall {one.recall:.3f}, F1 {one.f1:.3f}, of 2" in said
