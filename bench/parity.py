"""docs/parity.md: the same numbers by other libraries and by retain, on the same inputs.

    python bench/parity.py            compares and prints
    python bench/parity.py --write    also writes docs/parity.md

Models and inputs are small and made here, with fixed seeds: nothing is downloaded. Ends with 1 where a row differs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the tiny model
PAGE = ROOT / "docs" / "parity.md"

_TEXT = """# The same numbers elsewhere

Written by `python bench/parity.py --write`; a test compares them anew. Theirs is what the other library makes of the
same input, ours what `retain` makes of it. Equal means to the last digit that is shown; a bootstrap draws at random, so
there equal means closer than its error, which is written beside it.

{table}

The model is a random one of two layers, texts and scores are made up with a seed: this page is about arithmetic, not
about what a model can do. Tasks of the harness on a real model, by both: [benchmarks.md](benchmarks.md).
"""


@dataclass(frozen=True)
class Row:
    """One number by two hands, with so many digits; `error` is how far two simulations may lie apart."""

    name: str
    other: str
    theirs: float
    ours: float
    error: float = 0.0
    digits: int = 5

    @property
    def equal(self) -> bool:
        """Whether nobody could tell them apart on the page."""
        if self.error:
            return abs(self.theirs - self.ours) <= self.error
        return abs(self.theirs - self.ours) <= 0.5 * 10 ** (
            math.floor(math.log10(abs(self.theirs) or 1)) + 1 - self.digits
        )

    def shown(self, value: float) -> str:
        """The number as it stands on the page."""
        return f"{value:.{self.digits}g}"


def harness(limit: int = 9) -> Iterator[Row]:
    """Tasks of lm-evaluation-harness: alone, as a probe, and by retain's own probes on the same prompts."""
    import tempfile

    from harness_kit import alone, answer_some, write_tasks
    from tiny import tiny_model, tiny_tokenizer

    from retain import analysis
    from retain.probes.asking import ask
    from retain.probes.base import Subject
    from retain.probes.suite import load_probes, probes_from_rows

    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    subject = Subject(model, tokenizer)
    with tempfile.TemporaryDirectory() as place:
        folder = write_tasks(Path(place))
        answer_some(folder, model, tokenizer)

        def score(probe: Any) -> float:
            return analysis.score(ask([probe], subject), probe.info("reference")).value

        tasks = [("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_written", "exact_match"),
                 ("tiny_text", "word_perplexity")]  # fmt: skip
        results = {name: alone(model, tokenizer, folder, name, limit) for name, _ in tasks}
        for task, metric in tasks:
            theirs = results[task]["results"][task][f"{metric},none"]
            (probe,) = load_probes(f"lm_eval:{folder}/{task}.yaml@{metric}", limit)
            yield Row(f"{metric}, `lm_eval:` probe", "lm-evaluation-harness", theirs, score(probe))
        docs = [sample["doc"] for sample in results["tiny_choice"]["samples"]["tiny_choice"]]
        rows = [{key: doc[key] for key in ("question", "choices", "answer")} for doc in docs]
        for metric, normalisation in (("acc", "raw"), ("acc_norm", "characters")):
            theirs = results["tiny_choice"]["results"]["tiny_choice"][f"{metric},none"]
            (own,) = probes_from_rows(rows, "own", normalisation=normalisation)
            yield Row(f"{metric}, own `choice` probe", "lm-evaluation-harness", theirs, score(own))
        texts = [sample["doc"]["text"] for sample in results["tiny_text"]["samples"]["tiny_text"]]
        (own,) = probes_from_rows([{"text": text} for text in texts], "own")
        found = ask([own], subject)
        words = sum(len(text.split(" ")) for text in texts)
        theirs = results["tiny_text"]["results"]["tiny_text"]["word_perplexity,none"]
        ours = float(np.exp(sum(row["score"] for row in found) / words))
        yield Row("word_perplexity, own `perplexity` probe", "lm-evaluation-harness", theirs, ours)


def scores(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Right (1) and wrong (0) before and after, of which about a quarter flips."""
    draw = np.random.default_rng(5)
    before = (draw.random(count) < 0.7).astype(float)
    after = np.where(draw.random(count) < 0.25, 1 - before, before)
    return before, after


def intervals(count: int = 200) -> Iterator[Row]:
    """Intervals and tests of right and wrong items, and the correction for several of them."""
    from scipy import stats

    from retain.functional import statistics

    before, after = scores(count)
    lost, gained = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
    wilson = stats.binomtest(int(before.sum()), count).proportion_ci(0.95, method="wilson")
    ours = statistics.mean_interval(before)
    yield Row("Wilson interval, low", "scipy `proportion_ci`", wilson.low, ours.low)
    yield Row("Wilson interval, high", "scipy `proportion_ci`", wilson.high, ours.high)
    tail = sum(comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
    yield Row("exact McNemar, p", "scipy `binomtest`", stats.binomtest(lost, lost + gained).pvalue,
              statistics.mcnemar(lost, gained))  # fmt: skip
    yield Row("exact McNemar, p", "sum of binomials", min(1, 2 * tail), statistics.mcnemar(lost, gained))
    p = [0.012, 0.001, 0.2, 0.03, 0.04]
    for place, (theirs, mine) in enumerate(zip(slow_holm(p), statistics.holm(p))):
        yield Row(f"Holm, p of test {place + 1} of 5", "closed testing", theirs, float(mine))


def slow_holm(p: list[float]) -> list[float]:
    """Holm by closed testing (Marcus et al. 1976): p of a test is the largest Bonferroni p of all sets with it."""
    from itertools import combinations

    sets = [group for size in range(1, len(p) + 1) for group in combinations(range(len(p)), size)]
    local = {group: min(1.0, len(group) * min(p[i] for i in group)) for group in sets}
    return [max(value for group, value in local.items() if i in group) for i in range(len(p))]


def bootstraps(count: int = 200, resamples: int = 10_000) -> Iterator[Row]:
    """Bootstrap intervals; the error is five times that of an end of two simulations, from their density there."""
    from scipy import stats

    from retain.functional import statistics

    values = np.random.default_rng(6).gamma(2.0, 0.2, count)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=resamples, method="BCa", rng=np.random.default_rng(1))
    ours = statistics.mean_interval(values, resamples=resamples)
    # an end at tail a has error √(a(1−a)/B)/density; t instead of normal quantiles widens ours by less than 1.5 %
    spread = float(values.std(ddof=1) / np.sqrt(count))
    noise = np.sqrt(0.025 * 0.975 / resamples) / stats.norm.pdf(stats.norm.ppf(0.025)) * spread
    wider = spread * (stats.t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1)) - stats.norm.ppf(0.975))
    for name, one, other in (("low", theirs.confidence_interval.low, ours.low),
                             ("high", theirs.confidence_interval.high, ours.high)):  # fmt: skip
        error = float(5 * np.sqrt(2) * noise + wider)
        yield Row(f"BCa bootstrap of a mean, {name}", "scipy `bootstrap`", float(one), other, error, 4)
    before, after = scores(count)
    plain = stats.permutation_test(
        (after - before,), np.mean, permutation_type="samples", n_resamples=resamples, rng=np.random.default_rng(2)
    ).pvalue
    mine = statistics.sign_flip(after - before, resamples)
    error = float(5 * np.sqrt(2 * plain * (1 - plain) / resamples))
    yield Row("sign-flip test, p", "scipy `permutation_test`", float(plain), mine, error, 4)


def classification(count: int = 200) -> Iterator[Row]:
    """Numbers of labels; macro F1 where this version of retain has classes."""
    from sklearn.metrics import accuracy_score, f1_score

    from retain.functional import statistics

    before, after = scores(count)
    agree = (before == after).astype(float)
    yield Row("accuracy", "scikit-learn", float(accuracy_score(before, after)), statistics.mean_interval(agree).value)
    if find_spec("retain.functional.probe_totals"):
        from retain.functional.probe_totals import class_scores

        mine, _ = class_scores(before.astype(int).tolist(), after.astype(int).tolist(), 2)
        yield Row("macro F1", "scikit-learn", float(f1_score(before, after, average="macro")), mine)


def written() -> Iterator[Row]:
    """Numbers of written answers, where this version of retain has them."""
    if not find_spec("retain.data.text_scores"):
        return
    from sacrebleu.metrics import BLEU

    from retain.data.text_scores import bleu

    for text, reference in PAIRS:
        theirs = BLEU(effective_order=True).sentence_score(text, [reference]).score / 100
        yield Row(f"sentence BLEU, {text!r}", "sacrebleu", theirs, bleu(text, [reference], "en")[0])


PAIRS = [
    ("the ship sailed over the sea", "the ship sailed over the cold sea"),
    ("seven birds", "seven small birds fly over the house"),
]


def rows(limit: int = 9, resamples: int = 10_000) -> list[Row]:
    """All comparisons; with fewer items and draws for a test."""
    parts: list[Iterator[Row]] = [
        harness(limit),
        intervals(),
        bootstraps(resamples=resamples),
        classification(),
        written(),
    ]
    return [row for part in parts for row in part]


def page(found: list[Row]) -> str:
    """docs/parity.md."""
    lines = ["| number | library | theirs | ours | equal |", "|---|---|---|---|---|"]
    for row in found:
        verdict = ("yes" if row.equal else "**no**") + (f" (± {row.error:.1g})" if row.error else "")
        lines.append(f"| {row.name} | {row.other} | {row.shown(row.theirs)} | {row.shown(row.ours)} | {verdict} |")
    return _TEXT.format(table="\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/parity.md")
    options = parser.parse_args()
    found = rows()
    text = page(found)
    print(text)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    return 0 if all(row.equal for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
