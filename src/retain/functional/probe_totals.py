"""Numbers of a whole probe that are no means over its items: micro F1, corpus BLEU, precision and recall of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ClassScore(NamedTuple):
    """One class: shares between 0 and 1, and the number of items that belong to it."""

    precision: float
    recall: float
    f1: float
    items: int


def micro_f1(counts: Sequence[Sequence[int]]) -> float:
    """F1 over all tokens of a probe at once, so that long answers weigh more; the mean of the items' F1 is macro F1.

    2·Σ common / (Σ given + Σ wanted); 0 when nothing is common.

    Args:
        counts: (n, 3) common, given and wanted tokens of each item (`matching.token_counts`).
    """
    common, given, wanted = (sum(column) for column in zip(*counts))
    return 2 * common / (given + wanted) if common else 0.0


def corpus_bleu(counts: Sequence[Sequence[int]]) -> float:
    """BLEU over all n-grams of a probe at once, 0 to 1: sacrebleu's, from the counts of its items.

    Args:
        counts: (n, 10) length of the text and of its reference, 4 × n-grams found, 4 × n-grams (`text_scores.bleu`).
    """
    from sacrebleu.metrics import BLEU

    length, wanted, *ngrams = (sum(column) for column in zip(*counts))
    score = BLEU.compute_bleu(ngrams[:4], ngrams[4:], length, wanted, smooth_method="exp").score
    return min(1.0, float(score) / 100)  # rounding may take equal texts a little over 100


def class_scores(truth: Sequence[int], chosen: Sequence[int | None], classes: int) -> tuple[float, list[ClassScore]]:
    """Macro F1, and the numbers of every class: scikit-learn's `precision_recall_fscore_support`.

    The macro mean is over the classes that occur, as truth or as prediction: as scikit-learn without `labels`. What is
    divided by nothing is 0. An item without a prediction counts as missed by its own class and by no other.

    Args:
        truth: (n) classes of the items, from 0.
        chosen: (n) classes predicted; None where there is no prediction.
        classes: number of all classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    predicted = [-1 if one is None else one for one in chosen]
    columns = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=0)
    found = [ClassScore(float(p), float(r), float(f), int(n)) for p, r, f, n in zip(*columns)]
    occur = sorted({*truth, *predicted} - {-1})
    return sum(found[i].f1 for i in occur) / len(occur), found
