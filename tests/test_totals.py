"""Numbers of whole probes from an item table."""

from __future__ import annotations

import json

import pytest
import sacrebleu

from retain.data.matching import token_f1
from retain.models.generation import Generated
from retain.probes.answer import Answer
from retain.probes.base import Item
from retain.results import without_text
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
