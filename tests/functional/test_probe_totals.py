"""Numbers of whole probes against sacrebleu, scikit-learn and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import f1_score, precision_recall_fscore_support

from retain.data.matching import token_counts, token_f1
from retain.data.text_scores import bleu
from retain.functional.probe_totals import class_scores, corpus_bleu, micro_f1

ENGLISH = [
    ("The cat sat on the mat.", ["The cat sat on a mat.", "A cat was sitting on the mat."]),
    ("It costs $3.50, doesn't it?", ["It costs $3.50.", "It doesn't cost $3.50, does it?"]),
    ("no", ["Yes, it does.", "It does."]),
]
CHINESE = [
    ("北京是中国的首都", ["北京市是中国的首都", "首都是北京"]),
    ("水在100度沸腾", ["水在 100 度时沸腾", "一百度"]),
    ("", ["北京", "上海"]),
]


@pytest.mark.parametrize(("rows", "language", "tokens"), [(ENGLISH, "en", "13a"), (CHINESE, "zh", "zh")])
def test_corpus_bleu_is_that_of_sacrebleu(rows, language, tokens):
    counts = [bleu(text, accepted, language)[1] for text, accepted in rows]
    references = list(zip(*(accepted for _, accepted in rows)))
    expected = sacrebleu.corpus_bleu([text for text, _ in rows], references, tokenize=tokens).score
    assert 0 < expected < 100
    assert corpus_bleu(counts) == expected / 100
    assert corpus_bleu(counts) != pytest.approx(np.mean([bleu(*row, language)[0] for row in rows]))


def test_corpus_bleu_of_nothing_right_is_0_and_of_all_right_1():
    text = "The capital of France is Paris."
    assert corpus_bleu([bleu(text, [text], "en")[1]] * 3) == 1.0
    assert corpus_bleu([bleu("a b c", ["d e f"], "en")[1]]) == 0.0
    assert corpus_bleu([bleu("", ["d e f"], "en")[1]]) == 0.0


def test_micro_f1_weighs_by_tokens():
    rows = [("red", "red"), ("one two three four", "five six seven eight")]
    counts = [token_counts(*row) for row in rows]
    assert counts == [(1, 1, 1), (0, 4, 4)]
    assert micro_f1(counts) == pytest.approx(2 / 10)
    assert np.mean([token_f1(*row) for row in rows]) == 0.5
    assert micro_f1([(0, 0, 0)]) == micro_f1([(0, 3, 2)]) == 0.0
    assert micro_f1([token_counts("北京", "北京市"), token_counts("上海", "上海")]) == pytest.approx(2 * 4 / 9)


def test_micro_f1_is_that_of_scikit_learn_over_all_tokens_as_decisions():
    """Each token that is there or not, of each item, is one yes/no decision where no token comes twice."""
    generator = np.random.default_rng(0)
    truth, chosen = generator.random((2, 20, 30)) < 0.3
    texts = [[" ".join(f"w{i}" for i in np.flatnonzero(row)) for row in part] for part in (chosen, truth)]
    counts = [token_counts(text, wanted) for text, wanted in zip(*texts)]
    assert micro_f1(counts) == pytest.approx(f1_score(truth, chosen, average="micro"), abs=1e-15)
    assert np.mean([token_f1(*row) for row in zip(*texts)]) == pytest.approx(
        f1_score(truth, chosen, average="samples"), abs=1e-15
    )


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    truth, chosen = generator.integers(0, 4, 40).tolist(), generator.integers(0, 4, 40).tolist()
    macro, found = class_scores(truth, chosen, 4)
    assert macro == f1_score(truth, chosen, average="macro")
    expected = precision_recall_fscore_support(truth, chosen)
    assert [tuple(one) for one in found] == list(zip(*(column.tolist() for column in expected)))


def test_classes_by_hand():
    macro, (a, b, c) = class_scores([0, 0, 0, 1], [0, 0, None, 0], 3)
    assert a == (pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert b == (0.0, 0.0, 0.0, 1)
    assert c == (0.0, 0.0, 0.0, 0)
    assert macro == pytest.approx(1 / 3)  # over the two classes that occur; no answer is no class
