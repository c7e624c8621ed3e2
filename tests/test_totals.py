"""Numbers of whole probes from an item table."""

from __future__ import annotations

import json

import pytest
import sacrebleu
from run_kit import carry_out, write_lines

from retain.data.matching import token_f1
from retain.models.generation import Generated
from retain.probes.answer import Answer
from retain.probes.base import Item
from retain.results import load_items, load_results, without_text
from retain.totals import totals

ENGLISH = [
    ("Paris", "Paris"),
    ("The river flows through the old town of Bern.", "The Aare flows through Bern"),
    ("", "no"),
]
CHINESE = [("巴黎", "巴黎"), ("长江流过武汉和南京", "长江经过武汉"), ("不知道", "南京")]


def table(pairs):
    items = [Item(str(i), {"prompt": "?", "answers": reference}) for i, (_, reference) in enumerate(pairs)]
    found = Answer("test", items).outcomes([Generated(text, 1, True) for text, _ in pairs], [""] * len(pairs))
    return [{"prompt": "", "reference": "", "output": "", "details": json.dumps(one.details)} for one in found]


@pytest.mark.parametrize(("pairs", "tokens", "micro"), [
    (ENGLISH, "13a", 2 * (1 + 3 + 0) / (1 + 7 + 0 + 1 + 4 + 1)),
    (CHINESE, "zh", 2 * (2 + 5 + 0) / (2 + 9 + 3 + 2 + 6 + 2)),
])  # fmt: skip
def test_written_answers(pairs, tokens, micro):
    rows = table(pairs)
    found = totals(rows).numbers
    assert found["micro_f1"] == pytest.approx(micro)
    assert found["macro_f1"] == pytest.approx(sum(token_f1(*pair) for pair in pairs) / 3)
    texts, references = zip(*pairs)
    assert found["corpus_bleu"] == sacrebleu.corpus_bleu(texts, [references], tokenize=tokens).score / 100
    assert found["bleu"] == pytest.approx(
        sum(sacrebleu.sentence_bleu(a, [b], tokenize=tokens).score for a, b in pairs) / 300
    )
    assert found["contains"] == found["exact_match"] == pytest.approx(1 / 3)
    assert "similarity" not in found
    assert totals([without_text(row) for row in rows]).numbers == found


@pytest.mark.parametrize(
    "details", ['{"choices": 4, "chosen": 1, "answer": 1}', '{"bytes": 3}', "", '{"exact_match": 1}']
)
def test_other_kinds_and_older_tables_have_none(details):
    assert totals([{"details": details}]).numbers == {}
    assert totals([]).numbers == {}


def test_a_run_holds_them_at_every_stage(shop, tmp_path):
    """Written answers scored by F1, a task scored by ROUGE-L, and a classification; read back from the directory."""
    labels = ["even", "odd"]
    asked = [{"probe": "parity", "prompt": f"Is {i} odd?", "labels": labels, "label": labels[i % 2]} for i in range(4)]
    asked += [{"probe": "said", "prompt": f"Say {i}", "answers": "seven ships"} for i in range(3)]
    source = write_lines(tmp_path / "qa.jsonl", asked)
    probes = {"reference": [{"data": str(source), "score": "f1"}], "tasks": {"score": "rouge_l", "max_tokens": 5}}
    results, _ = carry_out(
        shop, tmp_path / "run", tasks=[str(shop / "count")], methods=["none"], old=None, probes=probes
    )
    assert {info.name: info.metric for info in results.probes} == {
        "parity": "accuracy", "said": "token F1", "count": "ROUGE-L"
    }  # fmt: skip
    assert load_results(tmp_path / "run").totals == results.totals
    assert list(results.totals) == results.stages == ["00-base", "01-count"]
    for stage, found in results.totals.items():
        rows = load_items(tmp_path / "run" / "probes" / f"{stage}.parquet")
        assert {name: totals([r for r in rows if r["probe"] == name]) for name in ("parity", "said", "count")} == found
        assert list(found["parity"].classes) == labels
        for name, number in (("parity", "accuracy"), ("said", "macro_f1"), ("count", "rouge_l")):
            assert found[name].numbers[number] == pytest.approx(results.scores[stage][name].value)
        written = [json.loads(row["details"])["written"] for row in rows if row["probe"] == "count"]
        assert max(written) <= 5
    questions = [json.loads(line) for line in (tmp_path / "run" / "probes" / "count.jsonl").open()]
    assert {(row["score"], row["max_tokens"]) for row in questions} == {("rouge_l", 5)}
