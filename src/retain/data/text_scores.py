"""How near a written answer comes to its references: BLEU, ROUGE-L and key words, in English and in Chinese.

BLEU is sacrebleu's and ROUGE-L is rouge-score's; here it is decided in which tokens they count. The language is
that of the references (`language_of`), never that of the answer, so that two models are measured alike.

    English   BLEU in the tokens `13a`, ROUGE-L in the tokens of rouge-score (lower case, letters and digits)
    Chinese   BLEU in the tokens `zh`, ROUGE-L in characters (Latin words and numbers whole), both after
              `plain_forms`; simplified and traditional characters are different characters
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from retain.data.matching import contains, words

Language = Literal["en", "zh"]

_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_ONE_HAN = re.compile(f"[{_HAN}]")
_MARKS = str.maketrans({"。": ".", "、": ",", "“": '"', "”": '"', "‘": "'", "’": "'"})
#: Words of English that carry grammar rather than content. Negations count as content; so do words that are also
#: names once case is folded (US, May).
_FUNCTION_WORDS = """
    a an the this that these those i you he she it we they me him her them my your his its our their who whom whose
    which what is am are was were be been being do does did have has had having will would shall should can could of in
    on at by for with from to into onto about as than then there here and or but if so because while when where how also
    very just
"""
_PARTICLES = re.compile("[的了是在和与與也就而或之吗嗎呢吧啊]")


def language_of(text: str) -> Language:
    """`zh` when at least half of the words are single Han characters, otherwise `en`."""
    found = words(text, articles=True)
    han = sum(_ONE_HAN.match(word) is not None for word in found)
    return "zh" if found and 2 * han >= len(found) else "en"


def plain_forms(text: str) -> str:
    """Full-width forms as the usual ones (NFKC), Chinese full stop, comma and quotes as Latin ones.

    Brackets and book titles （《》「」 and the like) stay, and traditional characters are not made simplified ones.
    """
    return unicodedata.normalize("NFKC", text).translate(_MARKS)


def bleu(text: str, accepted: Sequence[str], language: Language) -> tuple[float, list[int]]:
    """Sentence BLEU against all references together, 0 to 1, and the counts that corpus BLEU is made of.

    sacrebleu's, with effective order and its default smoothing (Post 2018, arXiv:1804.08771). Case counts.

    Returns:
        the score, and [length of the text, of the nearest reference, 4 × n-grams found, 4 × n-grams].
    """
    if language == "zh":
        text, accepted = plain_forms(text), [plain_forms(one) for one in accepted]
    found = _bleu(language).sentence_score(text, list(accepted))
    # rounding takes equal texts to 100.00000000000004, which would be no share any more
    return min(1.0, found.score / 100), [found.sys_len, found.ref_len, *found.counts, *found.totals]


def rouge_l(text: str, accepted: Sequence[str], language: Language) -> float:
    """F-measure of the longest common subsequence of tokens, 0 to 1, the best over the references.

    rouge-score's `rougeL` without stemming (Lin 2004, aclanthology.org/W04-1013). Its own tokens drop every letter
    that is not ASCII; references with such letters are therefore counted in the words of `matching.words`.
    """
    foreign = any(c.isalpha() and not c.isascii() for one in accepted for c in one)
    scorer = _rouge(language == "zh" or foreign)
    return float(scorer.score_multi(list(accepted), text)["rougeL"].fmeasure)


def key_words(text: str) -> set[str]:
    """What carries the content of a text: its words without function words; of Chinese, characters and their pairs.

    Chinese is not cut into words (that takes a dictionary): each Han character counts, and each two that stand next
    to each other, particles (的, 了, 是 …) left out. Of a text of function words alone, all count.
    """
    found = {word for word in words(text, possessive=False) if not _ONE_HAN.match(word)} - set(_FUNCTION_WORDS.split())
    for run in re.findall(f"[{_HAN}]+", _PARTICLES.sub(" ", unicodedata.normalize("NFKC", text))):
        found |= set(run) | {run[i : i + 2] for i in range(len(run) - 1)}
    return found or set(words(text, possessive=False, articles=True))


def keyword_cover(text: str, reference: str) -> tuple[float, float]:
    """Share of the reference's key words that are in the text, and its band.

    Bands: below 20 % 0.2, from 20 % 0.4, from 40 % 0.6, from 60 % 0.8, from 80 % 1.0; so nothing found is 0.2.
    """
    wanted = key_words(reference)
    if not wanted:  # symbols only
        whole = contains(text, reference)
        return float(whole), 1.0 if whole else 0.2
    found = len(wanted & (key_words(text) | set(words(text, possessive=False, articles=True))))
    return found / len(wanted), min(5, 5 * found // len(wanted) + 1) / 5


@functools.cache
def _bleu(language: Language) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True, tokenize={"en": "13a", "zh": "zh"}[language])


class _Words:
    """The words of `matching`, as rouge-score asks for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text, articles=True)


@functools.cache
def _rouge(ours: bool) -> Any:
    from rouge_score import rouge_scorer, tokenizers

    tokenizer = _Words() if ours else tokenizers.DefaultTokenizer(use_stemmer=False)
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizer)
