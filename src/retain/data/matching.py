"""Does an answer say what it should? Words, numbers and characters compared in any script.

Text is cut into words the same way on both sides: compatibility forms unified (NFKC), case folded, accents of
Latin letters dropped, apostrophes and punctuation dropped, English articles dropped, `U.S.A.` joined, numbers
kept whole (`7.5`, `1,000` = `1000`, `-5`, `3/4`, `7:30`), and scripts written without spaces cut into single
characters. A number therefore never matches inside another one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from decimal import Decimal, InvalidOperation

#: Kana, Han, Hangul, Thai, Lao, Burmese, Khmer: written without spaces, or with endings glued to the word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u0963\u0966-\u0dff"  # inside a word, yet no \\w
_LETTER = rf"(?:[^\W{UNSPACED}]|[{_MARKS}])"
_TOKEN = re.compile(
    rf"(?P<number>(?:(?<![\w)\]])-)?\d+(?:,\d{{3}}(?!\d))*(?:[./:]\d+)*)(?P<unit>{_LETTER}*)"
    rf"|(?P<character>[{UNSPACED}])"
    rf"|(?P<word>{_LETTER}+(?:'{_LETTER}+|(?<=\d)\.\d+)*)"
)
_INITIALS = re.compile(rf"(?<!\w)(?:{_LETTER}\.){{2,}}")
_ARTICLES = {"a", "an", "the"}


def words(text: str, possessive: bool = True, articles: bool = False) -> list[str]:
    """The words of a text in the form in which they are compared.

    Args:
        possessive: keep the s of `France's` (as `frances`); without it the word is `france`.
        articles: keep a, an, the.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub("[’‘ʼ`´]", "'", text).replace("\u2212", "-")
    text = _without_accents(text)
    text = _INITIALS.sub(lambda match: match[0].replace(".", "") + " ", text)
    found = []
    for match in _TOKEN.finditer(text):
        if match["number"] is not None:
            found.append(match[0] if match["unit"] else _number(match["number"]))
        else:
            word = match[0]
            if not possessive and word.endswith("'s"):
                word = word[:-2]
            found.append(word.replace("'", ""))
    return found if articles else [word for word in found if word not in _ARTICLES]


def contains(text: str, accepted: str) -> bool:
    """Whether `accepted` appears in `text` as whole words, in order and next to each other.

    What consists of articles only (`A`, the letter of an option) must be the whole text; symbols without a word
    are looked for as they are; what is empty is never found.
    """
    wanted = words(accepted)
    if not wanted:
        wanted = words(accepted, articles=True)
        return wanted == words(text, articles=True) if wanted else bool(accepted.strip()) and accepted.strip() in text
    return any(
        given[i : i + len(wanted)] == wanted
        for given in (words(text), words(text, possessive=False))
        for i in range(len(given) - len(wanted) + 1)
    )


def exact_match(text: str, accepted: str) -> bool:
    """Equal after the normalisation of this module (the idea of SQuAD's exact match; arXiv:1606.05250)."""
    given, wanted = words(text), words(accepted)
    if not wanted:
        given, wanted = words(text, articles=True), words(accepted, articles=True)
    return bool(wanted) and given == wanted


def token_f1(text: str, accepted: str) -> float:
    """Harmonic mean of the precision and recall of words as bags, 0 to 1 (SQuAD; arXiv:1606.05250, §6.1).

    With c common words (counted as often as in both), p = c/|text|, r = c/|accepted|: F1 = 2pr/(p + r).
    """
    common, given, wanted = token_counts(text, accepted)
    return 2 * common / (given + wanted) if common else 0.0


def token_counts(text: str, accepted: str) -> tuple[int, int, int]:
    """What `token_f1` is made of: common words, words of the text, words of what is accepted."""
    given, wanted = Counter(words(text)), Counter(words(accepted))
    return (given & wanted).total(), given.total(), wanted.total()


def _without_accents(text: str) -> str:
    """Drop marks from Latin letters only: elsewhere (か/が, и/й, Hindi vowels) a mark is another letter."""
    kept: list[str] = []
    latin = False
    for character in unicodedata.normalize("NFD", text):
        if unicodedata.combining(character):
            if not latin:
                kept.append(character)
        else:
            latin = unicodedata.name(character, "").startswith("LATIN")
            kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept))


def _number(text: str) -> str:
    """7.50 → 7.5, 1,000 → 1000; times, dates and fractions stay as they are."""
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return text.replace(",", "")
    plain = format(value, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain in ("-0", "") else plain
