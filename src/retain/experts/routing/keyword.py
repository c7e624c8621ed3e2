"""Router by words: which words of a question tell domains apart. Needs no model and takes about a millisecond.

Features are TF-IDF weights of words, pairs of words, parts of words (3 to 5 characters: endings as in "-itis") and, of
Chinese, characters and pairs of characters; every number counts as the same word. Logistic regression on the example
questions, and on the descriptions and keywords of the experts' cards, says which domain each of them speaks for.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.experts.routing.base import Labels, Learned, Progress, Router, ends
from retain.experts.routing.linear import fit_linear

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af"
_PIECES = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
#: Of a longer text the beginning and the end are read: the question stands in front of a document or behind it.
CHARACTERS = 8000
#: Penalty; accuracy is flat from 10 to 100 on the five domains of bench/routing.py.
STRENGTH = 30.0
_EXPLAINED = 300  # words of a question that are looked at for its explanation
#: Texts from which on a feature must be in two of them: there are many in one alone, and they tell little apart.
_MANY = 200


class Keyword(Router):
    """Words and parts of words, by TF-IDF and logistic regression."""

    name = "keyword"
    needs_model = False

    def read(self, prompts: Sequence[str], progress: Progress = lambda n: None) -> Any:
        """The prompts themselves, [n] of texts."""
        progress(len(prompts))
        return np.array([ends(prompt, CHARACTERS) for prompt in prompts], dtype=object)

    def learn(self, rows: Any, labels: Labels) -> Learned:
        cards = [(line, k) for k, name in enumerate(self.experts) for line in self.about.get(name, ())]
        texts = [*rows, *(line for line, _ in cards)]
        vectorizer = _vectorizer(least=2 if len(texts) >= _MANY else 1)
        features = vectorizer.fit_transform(texts)
        coefficients, offsets = fit_linear(
            features, np.concatenate([labels, [k for _, k in cards]]).astype(int), STRENGTH
        )
        return {
            "vocabulary": vectorizer.get_feature_names_out().tolist(),
            "idf": vectorizer.idf_.astype(np.float32),
            "weights": coefficients,
            "offsets": offsets,
        }

    def score(self, learned: Learned, rows: Any) -> NDArray[np.float64]:
        features = self._ready(learned).transform(rows)
        return np.asarray(features @ learned["weights"].T + learned["offsets"], dtype=float)

    def explain(self, prompt: str, row: Any, scores: NDArray[np.float64], expert: int) -> str:
        words = _words(row)
        if not words:
            return "it has no words"
        weights, places = self.learned["weights"], self._ready(self.learned).vocabulary_
        others = np.delete(weights, expert, axis=0).mean(0)

        def gain(word: str) -> float:
            known = [places[f] for f in features_of(word) if f in places]
            return float(((weights[expert, known] - others[known]) * self.learned["idf"][known]).sum())

        gains = {told: gain(word) for word, told in words.items()}
        best = [told for told in sorted(gains, key=lambda one: -gains[one]) if gains[told] > 0][:3]
        if not best:
            return "none of its words speaks for it"
        told = [f"“{word}”" for word in best]
        listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
        return f"{listed} {'speaks' if len(told) == 1 else 'speak'} for it"

    def _ready(self, learned: Learned) -> Any:
        """The vectorizer of what was learnt; of the last one it is kept."""
        if getattr(self, "_kept", (None, None))[0] is not learned:
            vectorizer = _vectorizer(learned["vocabulary"])
            vectorizer.idf_ = learned["idf"]
            self._kept = (learned, vectorizer)
        return self._kept[1]


def _vectorizer(vocabulary: list[str] | None = None, least: int = 1) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=features_of, sublinear_tf=True, vocabulary=vocabulary, min_df=least)


def features_of(text: str) -> list[str]:
    """Words, pairs of neighbours, parts of words (marked by a tab in front), Chinese characters and their pairs."""
    found, words = [], []
    for piece in _PIECES.findall(_NUMBER.sub("0", text.lower())):
        if re.match(rf"[{_CJK}]", piece):
            found += [*piece, *(piece[i : i + 2] for i in range(len(piece) - 1))]
        else:
            words.append(piece)
            found += _parts(piece)
    return found + words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


@functools.lru_cache(maxsize=50_000)
def _parts(word: str) -> tuple[str, ...]:
    whole = f" {word} "
    return tuple("\t" + whole[i : i + n] for n in (3, 4, 5) for i in range(len(whole) - n + 1))


def _words(text: str) -> dict[str, str]:
    """What can be named in an explanation: words and pairs of Chinese characters, as features are made → as written.

    Words that carry no meaning, and marks, are named only where there is nothing else.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    found: dict[str, str] = {}
    for piece in _PIECES.findall(text):
        chinese = re.match(rf"[{_CJK}]", piece) and len(piece) > 1
        for word in [piece[i : i + 2] for i in range(len(piece) - 1)] if chinese else [piece]:
            found.setdefault(_NUMBER.sub("0", word.lower()), word)
        if len(found) >= _EXPLAINED:
            break
    telling = {word: told for word, told in found.items() if word not in ENGLISH_STOP_WORDS and word[0].isalnum()}
    return telling or found
