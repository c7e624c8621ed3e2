"""`retain repair`: what it finds, writes and says, going on after a stop, and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from merge_kit import changes, weights, write_model
from repair_kit import items, write_all
from run_kit import write_lines
from typed import refused, retain, typed

from retain import measuring
from retain.advice import repair_distill, repair_models
from retain.advice.repair import Repair, Settings, check
from retain.advice.repair_moves import Candidate, Grouped
from retain.errors import ConfigError
from retain.models.merge_recipe import Recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("repair"))


def words(place: Path, tuned: str, output: Path, *more: object) -> list[object]:
    return ["repair", "--base", place / "base", "--tuned", place / tuned, "--learned", place / "new.jsonl",
            "--keep", place / "old.jsonl", "--output", output, "--train-steps", 0, *more]  # fmt: skip


def test_a_full_fine_tune_is_repaired(place, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    retain(monkeypatch, *words(place, "full", output, "--search", 2))
    said = " ".join(capsys.readouterr().out.split())
    found = Repair.model_validate_json((output / "repair.json").read_text())
    assert found.lost.value > 0.9
    assert found.items == {"control": 24, "held": 24}
    chosen = found.point(found.chosen)
    assert chosen.held.recovered.value > 0.9
    assert chosen.held.holds.value > 0.9
    assert f"{found.chosen}: 100 %" in said
    assert "(chosen)" in (output / "repair.md").read_text()
    for name in ("compare.html", "repair.svg", "compare.svg"):
        assert (output / name).stat().st_size > 1000
    assert found.form == "model"
    # what was written is what was asked about
    model, tokenizer = measuring.open_model(str(output / "model"))
    probe = measuring.open_probes([str(place / "old.jsonl")])
    asked = {row["item"]: row["score"] for row in measuring.answers(model, tokenizer, probe)}
    kept = {
        row["item"]: row["score"]
        for half in ("control", "held")
        for row in measuring.load_items(output / "answers" / f"{found.chosen}-{half}.parquet")
        if row["probe"] == "animal"
    }
    assert kept == asked

    # the same command asks nothing again; another budget chooses anew from the same answers
    monkeypatch.setattr(measuring, "answers", None)
    before = (output / "repair.json").read_text()
    retain(monkeypatch, *words(place, "full", output, "--search", 2))
    assert (output / "repair.json").read_text() == before
    assert typed(monkeypatch, *words(place, "full", output, "--search", 0, "--lose-at-most", 0.001)) == 1
    assert "No point is inside 0.1 points" in " ".join(capsys.readouterr().out.split())
    assert "holds a repair of other models" in refused(monkeypatch, capsys, *words(place, "full", output, "--seed", 1))


def test_an_adapter_stays_one(place, tmp_path, monkeypatch, capsys):
    """Self-distillation included, on rows given in place of those that the base would write."""
    output = tmp_path / "out"
    turns = [[("user", f"animal {i}"), ("assistant", "yes")] for i in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]

    def written(model, tokenizer, folder, *more, **options):
        assert not any(".lora_" in name for name, _ in model.named_parameters())
        return Dataset.from_list(rows)

    monkeypatch.setattr(repair_distill, "self_written", written)
    retain(monkeypatch, *words(place, "lora", output, "--search", 2)[:-4], "--search", 2, "--train-steps", 2)
    found = Repair.model_validate_json((output / "repair.json").read_text())
    assert {"tuned", "interpolate", "ties", "dare", "magnitude", "groups", "distill"} <= set(found.best)
    assert (output / "distilled-2" / "adapter" / "adapter_model.safetensors").is_file()
    chosen = found.point(found.chosen)
    assert chosen.control.lost.value < found.point("tuned").control.lost.value
    scaled = chosen.family in ("interpolate", "groups")
    assert found.form == ("adapter" if scaled else "model")
    assert (output / found.form / "merge.json").is_file()


def test_points_are_written_as_their_formulas_say(place, tmp_path):
    """Models, and adapters that stay adapters: no model is asked."""
    base, full = weights(place / "base"), weights(place / "full")
    both = repair_models.open_both(str(place / "base"), str(place / "full"))
    halfway = Candidate("half", "interpolate", {}, Recipe("interpolate", (0.5,)), True)
    assert both.write(halfway, tmp_path / "half", {}) == ("model", 1.0)
    for name, tensor in weights(tmp_path / "half").items():
        torch.testing.assert_close(tensor, (base[name] + full[name]) / 2, rtol=1e-6, atol=1e-7)
    largest = torch.cat([(full[name] - base[name]).abs().flatten() for name in both.names]).sort(descending=True).values
    kept = Candidate("few", "magnitude", {}, both.magnitude(0.1))
    both.write(kept, tmp_path / "few", {})
    least = largest[round(0.1 * len(largest)) - 1]
    for name, tensor in weights(tmp_path / "few").items():
        tau = full[name] - base[name]
        torch.testing.assert_close(tensor, base[name] + tau.where(tau.abs() >= least, 0), rtol=1e-6, atol=1e-7)

    adapted = repair_models.open_both(str(place / "base"), str(place / "lora"))
    assert adapted.adapted
    whole = changes(place / "base", place / "lora")
    alphas = {group: 0.2 + 0.2 * i for i, group in enumerate(dict.fromkeys(adapted.groups.values()))}
    assert len(alphas) > 2
    moves = {"half": halfway.move, "groups": Grouped(alphas, adapted.groups)}
    for name, move in moves.items():
        written, share = adapted.write(Candidate(name, name, {}, move, True), tmp_path / f"adapter-{name}", {})
        assert written == "adapter"
        assert share > 1 - 1e-6
        for tensor, change in changes(place / "base", tmp_path / f"adapter-{name}").items():
            alpha = 0.5 if name == "half" else alphas.get(adapted.groups.get(tensor, ""), 0.0)
            torch.testing.assert_close(change, alpha * whole[tensor], rtol=1e-3, atol=2e-6)


def test_nothing_to_repair(place, tmp_path, monkeypatch, capsys):
    """Items of which none was lost."""
    line = words(place, "full", tmp_path / "out")
    line[line.index("--keep") + 1] = write_lines(tmp_path / "kept.jsonl", items("number", "no"))
    line[line.index("--learned") + 1] = write_lines(
        tmp_path / "new.jsonl",
        [row | {"probe": "again", "id": f"again-{i}"} for i, row in enumerate(items("number", "no"))],
    )
    retain(monkeypatch, *line)
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing to repair that these items show: lost -100.0 [" in said
    assert not (tmp_path / "out" / "model").exists()


def test_mistakes_are_one_line_before_anything_is_asked(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "answers", None)
    output = tmp_path / "out"
    write_model(tmp_path / "wide", 0, intermediate_size=48)
    write_model(tmp_path / "gpt2", 0, kind="gpt2")
    bare = shutil.copytree(place / "full", tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    (tmp_path / "empty.jsonl").write_text("")
    write_lines(tmp_path / "few.jsonl", items("number", "no")[:2])

    def said(**changed: object) -> str:
        line = words(place, "full", output)
        for name, value in changed.items():
            word = f"--{name.replace('_', '-')}"
            line = [*line, word, value] if word not in line else [*line[: line.index(word) + 1], value,
                                                                   *line[line.index(word) + 2 :]]  # fmt: skip
        return refused(monkeypatch, capsys, *line)

    assert "merged are models with the same tensors" in said(tuned=tmp_path / "wide")
    assert "model_type is llama and gpt2" in said(tuned=tmp_path / "gpt2")
    assert "no tokenizer" in said(tuned=bare)
    assert "empty.jsonl is empty" in said(learned=tmp_path / "empty.jsonl")
    assert "at least 4 are needed" in said(learned=tmp_path / "few.jsonl")
    assert "two probes are called 'number'" in said(keep=place / "new.jsonl")
    assert "so that nothing was learned" in said(tuned=place / "base")
    assert typed(monkeypatch, *words(place, "full", output, "--lose-at-most", 2)) == 2
    assert "a loss lies between 0 and 1" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(ConfigError, match="--lose-at-most: 2 given"):
        check(Settings(lose_at_most=2))
    assert "--confidence: 0.3 given" in said(confidence=0.3)
    assert "allowed: 0 (none) or more" in said(search=-1)
    assert "nowhere" in said(tuned=tmp_path / "nowhere")
    (output / "x").mkdir(parents=True)
    assert "is not empty, and no repair" in said(search=1)
