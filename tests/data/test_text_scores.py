"""BLEU, ROUGE-L and key words against sacrebleu, rouge-score and answers counted by hand, in English and Chinese."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from retain.data.text_scores import bleu, key_words, keyword_cover, language_of, plain_forms, rouge_l

ENGLISH = [
    ("The cat sat on the mat.", ["The cat sat on a mat."]),
    ("the Cat", ["The cat sat on a mat.", "A cat."]),
    ("It costs $3.50, doesn't it?", ["It costs $3.50.", "It doesn't cost $3.50, does it?"]),
    ("nothing of the kind", ["Every word differs here"]),
    ("", ["A cat."]),
    ("Paris", ["Paris"]),
]
CHINESE = [
    ("北京是中国的首都", ["北京市是中国的首都", "首都是北京"]),
    ("我用Python写了3个程序", ["我用 Python 写了 3 个程序"]),
    ("上海", ["北京"]),
    ("", ["北京"]),
    ("臺灣的總統府在臺北", ["台湾的总统府在台北", "臺灣總統府在臺北"]),
]


@pytest.mark.parametrize(("text", "accepted"), ENGLISH)
def test_english_bleu_is_that_of_sacrebleu(text, accepted):
    assert bleu(text, accepted, "en")[0] == min(1.0, sacrebleu.sentence_bleu(text, accepted).score / 100)


@pytest.mark.parametrize(("text", "accepted"), CHINESE)
def test_chinese_bleu_is_that_of_sacrebleu_in_its_tokens(text, accepted):
    expected = sacrebleu.sentence_bleu(text, accepted, tokenize="zh").score / 100
    assert bleu(text, accepted, "zh")[0] == min(1.0, expected)
    assert all(bleu(one, accepted, "zh")[0] == 1.0 for one in accepted if len(one) > 3)


@pytest.mark.parametrize(("text", "language"), [("The capital of France is Paris.", "en"), ("北京是中国的首都", "zh")])
def test_bleu_of_the_reference_itself_is_1_and_no_more(text, language):
    assert sacrebleu.sentence_bleu(text, [text], tokenize={"en": "13a", "zh": "zh"}[language]).score > 100
    assert bleu(text, [text], language)[0] == 1.0


def test_bleu_by_hand():
    # 6 of 7 words (1-grams), 4 of 6, 2 of 5, 1 of 4; as long as its reference, so no penalty
    score, counts = bleu("The cat sat on the mat .", ["The cat sat on a mat ."], "en")
    assert counts == [7, 7, 6, 4, 2, 1, 7, 6, 5, 4]
    assert score == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    # 1 of 1 word, and one word instead of three: exp(1 − 3)
    assert bleu("cat", ["cat and dog"], "en")[0] == pytest.approx(0.1353352832366127)
    assert bleu("北京", ["北京市区"], "zh")[0] == pytest.approx(0.36787944117144233)


def test_full_width_forms_are_the_usual_ones():
    assert plain_forms("ＡＢＣ１２３，你好。「書」") == "ABC123,你好.「書」"
    assert plain_forms("“好”、‘是’！") == "\"好\",'是'!"
    assert bleu("答案是４２，对吧。", ["答案是42,对吧."], "zh")[0] == pytest.approx(1.0)
    assert rouge_l("答案：４２", ["答案:42"], "zh") == 1.0
    assert bleu("漢語", ["汉语"], "zh")[0] < 1  # traditional and simplified are different characters


@pytest.mark.parametrize(("text", "accepted"), ENGLISH)
def test_english_rouge_is_that_of_rouge_score(text, accepted):
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    assert rouge_l(text, accepted, "en") == max(scorer.score(one, text)["rougeL"].fmeasure for one in accepted)


class Characters:
    """A tokenizer for text that is Chinese alone."""

    def tokenize(self, text):
        return list(text)


@pytest.mark.parametrize(("text", "accepted"), [row for row in CHINESE if row[0].isalpha() and "P" not in row[0]])
def test_chinese_rouge_is_that_of_rouge_score_by_character(text, accepted):
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Characters())
    assert rouge_l(text, accepted, "zh") == max(scorer.score(one, text)["rougeL"].fmeasure for one in accepted)


def test_rouge_by_hand():
    assert rouge_l("the cat on a mat", ["the cat sat on the mat"], "en") == pytest.approx(2 * 4 / (5 + 6))
    assert rouge_l("首都北京", ["北京是首都"], "zh") == pytest.approx(2 * 2 / (4 + 5))
    assert rouge_l("用 Python 3.5 写", ["我用Python写"], "zh") == pytest.approx(2 * 3 / (4 + 4))
    assert rouge_l("東京です", ["東京"], "en") == pytest.approx(2 * 2 / (4 + 2))  # its own tokens would drop all of it
    assert rouge_l("Москва", ["Москва"], "en") == rouge_l("naïve", ["naive", "naïve"], "en") == 1.0


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The capital is Beijing.", "en"),
        ("首都是北京。", "zh"),
        ("臺北", "zh"),
        ("我用 Python 和 PyTorch", "zh"),
        ("The word 你好 means hello there", "en"),
        ("42", "en"),
        ("", "en"),
        ("。！", "en"),
        ("Ответ", "en"),
    ],
)
def test_language_is_told_by_the_share_of_chinese(text, language):
    assert language_of(text) == language


def test_key_words():
    assert key_words("The heart of France's army is not in Paris.") == {"heart", "france", "army", "not", "paris"}
    assert key_words("To be or not to be") == {"not"}
    assert key_words("it is what it is") == {"it", "is", "what"}  # nothing else is there
    assert key_words("北京是中国的首都") == {*"北京中国首都", "北京", "中国", "首都"}
    assert key_words("用Ｐython３.5，写") == {"用", "写", "python3.5"}
    assert key_words("的") == {"的"}
    assert key_words("!?") == set()


@pytest.mark.parametrize(
    ("found", "band"),
    [(0, 0.2), (1, 0.2), (2, 0.4), (3, 0.4), (4, 0.6), (5, 0.6), (6, 0.8), (7, 0.8), (8, 1.0), (9, 1.0), (10, 1.0)],
)
def test_bands_of_ten_key_words(found, band):
    wanted = ["red", "orange", "yellow", "green", "blue", "indigo", "violet", "black", "white", "grey"]
    assert keyword_cover("It has " + " and ".join(wanted[:found]), " ".join(wanted)) == (found / 10, band)
    han = "甲乙丙丁戊己庚辛壬癸"
    spread = "的".join(han)  # particles between them, so there are no pairs
    assert keyword_cover("是".join(han[:found]), spread) == (found / 10, band)


@pytest.mark.parametrize("parts", range(1, 40))
def test_bands_begin_at_fifths_exactly(parts):
    wanted = [f"w{i}" for i in range(parts)]
    for found in range(parts + 1):
        band = keyword_cover(" ".join(wanted[:found]), " ".join(wanted))[1]
        assert band == sum(100 * found >= edge * parts for edge in (0, 20, 40, 60, 80)) / 5


def test_cover_of_symbols_and_of_chinese_by_hand():
    assert keyword_cover("it is ++", "++") == (1.0, 1.0)
    assert keyword_cover("it is +", "++") == (0.0, 0.2)
    assert keyword_cover("北京", "北京是中国的首都") == (pytest.approx(3 / 9), 0.4)
    assert keyword_cover("京，北", "北京是中国的首都") == (pytest.approx(2 / 9), 0.4)
    assert keyword_cover("首都北京，中国", "北京是中国的首都") == (1.0, 1.0)
    assert keyword_cover("", "北京") == (0.0, 0.2)
