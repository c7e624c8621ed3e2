"""Question answering: what counts as right."""

from __future__ import annotations

import importlib.util
import json

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from retain.errors import ConfigError, DataError
from retain.models.generation import Generated
from retain.probes.answer import SCORES, Answer
from retain.probes.base import Item, Subject


def judge(text, answers, **options):
    item = Item("0", {"prompt": "?", "answers": answers})
    return Answer("test", [item], **options).judge(item, Generated(text, 3, True))


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("The answer is 7.", ["7", "seven"], 1.0),
        ("Seven.", ["7", "seven"], 1.0),
        ("72", ["7", "seven"], 0.0),
        ("It is St. John’s.", "St. John's", 1.0),
        ("", ["7"], 0.0),
    ],
)
def test_right_when_an_accepted_answer_is_there(text, answers, score):
    assert judge(text, answers)[0] == score


def test_details_take_the_best_of_the_accepted_answers():
    score, reference, details = judge("The Eiffel Tower", ["a tower", "Eiffel tower"])
    assert (score, reference) == (1.0, '["a tower", "Eiffel tower"]')
    assert (details["exact_match"], details["f1"]) == (1.0, 1.0)
    details = judge("the big tower", ["a tower", "a very big red tower"])[2]
    assert (details["exact_match"], details["f1"], details["f1_counts"]) == (0.0, pytest.approx(2 / 3), [1, 2, 1])


@pytest.mark.parametrize("answers", [[], "", ["a", " "], [7], 7, None])
def test_answers_that_nothing_can_match_are_an_error(answers):
    with pytest.raises(DataError, match="item '0'"):
        judge("x", answers)


ENGLISH = ("The capital of France is the city of Paris.", ["Paris is the capital of France.", "the city of Paris"])
CHINESE = ("法国的首都是巴黎", ["巴黎是法国首都", "首都是巴黎。"])


@pytest.mark.parametrize(("text", "answers"), [ENGLISH, CHINESE])
def test_details_hold_all_scores_and_the_score_is_one_of_them(text, answers):
    details = judge(text, answers)[2]
    assert set(details) == {"contains", "exact_match", "f1", "f1_counts", "bleu", "bleu_counts", "rouge_l", "keywords",
                            "keyword_cover"}  # fmt: skip
    for score, (_, detail) in SCORES.items():
        if score != "similarity":
            assert judge(text, answers, score=score)[0] == details[detail]


def test_scores_of_an_english_answer_by_hand():
    text, answers = ENGLISH
    details = judge(text, answers)[2]
    assert (details["contains"], details["exact_match"]) == (1.0, 0.0)
    assert details["f1_counts"] == [5, 7, 5]  # all of the first; articles do not count
    assert details["f1"] == pytest.approx(2 * 5 / 12)
    assert details["bleu"] == sacrebleu.sentence_bleu(text, answers).score / 100
    assert details["rouge_l"] == rouge_scorer.RougeScorer(["rougeL"]).score_multi(answers, text)["rougeL"].fmeasure
    assert (details["keyword_cover"], details["keywords"]) == (1.0, 1.0)


def test_scores_of_a_chinese_answer_by_hand():
    details = judge(*CHINESE)[2]
    assert (details["contains"], details["exact_match"]) == (1.0, 0.0)
    assert details["f1_counts"] == [7, 8, 7]
    assert (
        details["bleu"]
        == sacrebleu.sentence_bleu(CHINESE[0], ["巴黎是法国首都", "首都是巴黎."], tokenize="zh").score / 100
    )
    assert details["rouge_l"] == pytest.approx(2 * 5 / (8 + 5))  # 首都是巴黎
    assert (details["keyword_cover"], details["keywords"]) == (1.0, 1.0)


def test_the_language_is_told_by_the_answers_or_given():
    as_english = sacrebleu.sentence_bleu("首都 巴黎", ["首都 巴黎 x"]).score / 100
    assert judge("首都 巴黎", ["首都 巴黎 x"], language="en")[2]["bleu"] == as_english
    assert judge("首都 巴黎", ["首都 巴黎 x"])[2]["bleu"] != as_english


@pytest.mark.parametrize(
    ("score", "metric", "graded"),
    [(None, "accuracy", False), ("exact", "exact match", False), ("f1", "token F1", True), ("bleu", "BLEU", True),
     ("rouge_l", "ROUGE-L", True), ("keywords", "keyword coverage", True)],
)  # fmt: skip
def test_graded_scores_are_neither_right_nor_wrong(score, metric, graded):
    items = [Item(str(i), {"prompt": "?", "answers": ["red green", "x"]}) for i in range(2)]
    probe = Answer("test", items, score=score)
    rows = probe.outcomes([Generated("red green", 2, True), Generated("red", 2, True)], ["", ""])
    assert probe.metric == metric
    assert [row.correct for row in rows] == ([None, None] if graded else [True, False])


def test_a_row_may_say_the_score_for_its_probe():
    def items(*scores):
        return [Item(str(i), {"prompt": "?", "answers": "a", "score": s}) for i, s in enumerate(scores)]

    assert Answer("test", items("f1", "f1")).metric == "token F1"
    assert Answer("test", items("f1"), score="bleu").metric == "token F1"
    with pytest.raises(DataError, match="its rows give score bleu, f1; allowed is one"):
        Answer("test", items("f1", "bleu"))
    with pytest.raises(DataError, match="score: unknown 'f2'"):
        Answer("test", items("f2"))
    with pytest.raises(DataError, match="language: unknown 'de'"):
        judge("a", ["a"], language="de")
    with pytest.raises(DataError, match="score similarity needs `embedding`"):
        judge("a", ["a"], score="similarity")


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="needs the extra `similarity`")
def test_similarity_of_what_a_model_writes(model, tokenizer, tiny_embedding):
    from retain.models.embedding import similarities

    items = [Item(str(i), {"prompt": f"Say {i}", "answers": ["the bird", "the sea"]}) for i in range(3)]
    options = {"embedding": str(tiny_embedding), "max_tokens": 4}
    rows = Answer("test", items, score="similarity", **options).look(Subject(model, tokenizer))
    cosines = similarities(str(tiny_embedding), [row.output for row in rows], [["the bird", "the sea"]] * 3)
    assert [row.score for row in rows] == [min(1.0, max(0.0, c)) for c in cosines]
    assert [row.details["cosine"] for row in rows] == cosines
    assert [row.correct for row in rows] == [None] * 3
    beside = Answer("test", items, **options).look(Subject(model, tokenizer))
    assert [row.score for row in beside] == [row.details["contains"] for row in beside]
    assert [row.details for row in beside] == [row.details for row in rows]
    json.dumps([row.details for row in rows])


def test_an_embedding_without_the_library_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"probe 'test': sentence-transformers is not installed.*\[similarity\]"):
        judge("a", ["a"], score="similarity", embedding="any")
