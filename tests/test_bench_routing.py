"""The table of routers on a tiny model: every number is measured, the page is what the numbers say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import routing  # noqa: E402
import routing_page  # noqa: E402
import routing_questions  # noqa: E402

from retain.experts.choice import Choice  # noqa: E402

TEMPLATES = {
    "arithmetic": "Find the Greatest Common Divisor (GCD) of these numbers: {0}5, {0}30",
    "idioms": "成语“画蛇添足{0}”是什么意思？",
    "poetry": "请背诵李白的《静夜思{0}》，首句是“床前明月光{0}。”",
    "history": "Who was king number {0} of Spain?",
    "medicine": "Which drug treats fever of kind {0}?",
    "encyclopaedia": "What is the topic?\nOption: Film, Animal\nTitle: Town {0}\nText:  Town {0} is a town.\nAnswer:",
}


@pytest.fixture
def data(tmp_path):
    for name, where in [*routing_questions.SETS.items(), ("dolly", "dolly")]:
        folder = tmp_path / "data" / where
        folder.mkdir(parents=True)
        text = TEMPLATES.get(name, "Write about the number {0}.")
        for split, numbers in (("train", range(8)), ("test", range(20, 26))):
            rows = [{"task": "gcd", "prompt": text.format(n)} for n in numbers]
            rows += [{"task": "palindrome", "prompt": "no sum"}] if name == "arithmetic" else []
            lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "data"


def test_every_number_is_measured_and_shown(data, tiny_folder, tmp_path, capsys):
    out, page = tmp_path / "routing.json", tmp_path / "routing.md"
    same = ["--model", str(tiny_folder), "--out", str(out), "--page", str(page), "--states", str(tmp_path / "states")]
    size = ["--fit", "5", "--held", "4", "--nobody", "20", "--timed", "2", "--depths", "0.5", "1.0"]
    assert routing.main(["--data", str(data), *same, *size]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["routers"]) == {"keyword", "prototype", "gate", "combined"}
    for one in found["routers"].values():
        assert one["given"]["domains"][3] == 24
        assert one["given"]["core"][3] == len(routing_questions.core_prompts()) - 20
        assert one["given"]["all"][3] == one["given"]["domains"][3] + one["given"]["core"][3]
    assert found["routers"]["keyword"]["given"]["domains"][0] > 0.8
    assert list(found["depths"]) == ["1", "2"]
    assert all(found["seconds"][name]["median"] > 0 for name in [*found["routers"], "answer"])
    text = page.read_text(encoding="utf-8")
    assert routing_page.page(found) == text == capsys.readouterr().out[:-1]
    low, high = found["routers"]["gate"]["given"]["all"][1:3]
    assert f"({100 * low:.1f}–{100 * high:.1f})" in text
    assert len(list((tmp_path / "states").iterdir())) == 2, "states and their texts are kept"
    assert routing.main(same) == 0
    assert page.read_text(encoding="utf-8") == text


def test_likelihood_is_measured_with_experts_that_are_kept(data, tiny_folder, tmp_path, monkeypatch):
    for where in routing_questions.SETS.values():  # rows to learn from have answers
        path = data / where / "train.jsonl"
        rows = [json.loads(line) | {"response": "tea"} for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    out, page = tmp_path / "routing.json", tmp_path / "routing.md"
    given = ["--data", str(data), "--model", str(tiny_folder), "--out", str(out), "--page", str(page)]
    given += ["--states", str(tmp_path / "states"), "--experts", "2", "--depths", "0.5"]
    given += ["--fit", "3", "--held", "2", "--nobody", str(len(routing_questions.core_prompts()) - 5), "--timed", "1"]
    assert routing.main(given) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    one = found["routers"]["likelihood"]["given"]
    assert one["domains"][3] == 12
    assert found["seconds"]["likelihood"]["median"] > 0
    text = page.read_text(encoding="utf-8")
    assert f"| `likelihood` | {one['domains'][0]:.1%} | {one['core'][0]:.1%} |" in text
    assert "trained for 2 steps" in text
    (folder,) = (tmp_path / "states").glob("experts-*")
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"", *routing_questions.SETS}
    text = next(iter(scores[""]))
    assert len({score[text][0] for score in scores.values()}) > 1, "experts must differ from the base"
    monkeypatch.setattr("retain.pipeline.run", None)  # nothing is trained again,
    monkeypatch.setattr("retain.models.likelihood.text_log_likelihood", timed_only := Counted())
    assert routing.main(given) == 0
    assert timed_only.calls == 2 * 7, "nor read again, apart from what is timed: a question and its warm-up"
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["routers"] == found["routers"]
    out.write_text(json.dumps(found | {"routers": {k: v for k, v in found["routers"].items() if k != "likelihood"}}))
    assert routing.main([*given, "--add"]) == 0
    added = json.loads(out.read_text(encoding="utf-8"))
    assert added["routers"] == found["routers"]
    assert added["seconds"]["combined"] == found["seconds"]["combined"]
    assert "timed by itself" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="other sizes"):
        routing.main([*given, "--add", "--fit", "2"])


class Counted:
    """The real thing, counting how often it is asked."""

    def __init__(self):
        from retain.models.likelihood import text_log_likelihood

        self.calls, self.inner = 0, text_log_likelihood

    def __call__(self, *given):
        self.calls += 1
        return self.inner(*given)


def test_the_page_in_the_docs_is_what_the_numbers_say():
    found = json.loads(routing.RESULTS.read_text(encoding="utf-8"))
    assert (BENCH.parent / "docs" / "routing.md").read_text(encoding="utf-8") == routing_page.page(found)


def test_templates_come_off():
    expected = {
        "arithmetic": "75, 730",
        "idioms": "画蛇添足7",
        "poetry": "李白的《静夜思7》 床前明月光7。",
        "encyclopaedia": "Town 7. Town 7 is a town.",
    }
    assert set(expected) == set(routing_questions.TEMPLATED)
    for name, text in TEMPLATES.items():
        whole = text.format(7)
        assert routing_questions.strip(name, whole) == expected.get(name, whole)
    assert routing_questions.strip("poetry", "请写出下一句：两桨佳期近。") == "两桨佳期近。"
    assert routing_questions.strip("poetry", "下面这首诗词的作者是谁？\n败荷枯苇。") == "败荷枯苇。"
    assert routing_questions.strip("arithmetic", "Calculate ( -5 - -4 ) * -7.") == "( -5 - -4 ) * -7"


def test_what_is_fitted_is_not_asked(data):
    found = routing_questions.read(data, 8, 6, 30)
    asked = [*found.core, *found.everyday, *found.elsewhere, *(t for texts in found.held.values() for t in texts)]
    fitted = [*found.nobody, *(t for texts in found.fit.values() for t in texts)]
    assert not set(asked) & set(fitted)
    assert "no sum" not in found.fit["arithmetic"]
    assert len(found.fit["arithmetic"]) == 8


def test_auroc_is_of_the_likeliest_expert():
    def choice(a, b):
        return Choice(None, 0.5, {"a": a, "b": b}, "", 0.0)

    own, nobody = [choice(0.9, 0.0), choice(0.1, 0.6)], [choice(0.5, 0.5), choice(0.7, 0.2)]
    assert routing.auroc(own, nobody) == roc_auc_score([1, 1, 0, 0], [0.9, 0.6, 0.5, 0.7])
