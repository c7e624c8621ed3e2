"""Router by likelihood: under which expert is the question itself likelier than under the base?

    score_k = (log p_k(question) − log p_base(question)) / tokens        nats per token

It needs no training and knows what the experts' weights know, but it reads the question once with every expert and
once with the base: K + 1 passes, and every expert must be loaded. It says something only about experts that learned to
predict such questions; training on the answers alone teaches that little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.experts.routing.base import Labels, Learned, Progress, Router, ends

#: log-likelihood and tokens of every text under an expert, None for the base: [n, 2].
Scorer = Callable[[str | None, Sequence[str]], NDArray[np.float64]]
#: Of a longer question the beginning and the end are scored.
CHARACTERS = 2000


class Likelihood(Router):
    """Gain in log-likelihood per token, expert against base.

    Args:
        scorer: as `pool_scorer` makes one.
        settings: as for `Router`.
    """

    name = "likelihood"

    def __init__(self, scorer: Scorer, **settings: Any):
        super().__init__(**settings)
        self.scorer = scorer

    def read(self, prompts: Sequence[str], progress: Progress = lambda n: None) -> NDArray[np.float64]:
        """Gains [n, K] in nats per token."""
        texts = [ends(prompt, CHARACTERS) for prompt in prompts]
        base = self.scorer(None, texts)
        tokens = np.maximum(base[:, 1], 1)
        gains = [(self.scorer(name, texts)[:, 0] - base[:, 0]) / tokens for name in self.experts]
        progress(len(texts))
        return np.stack(gains, axis=1)

    def learn(self, rows: NDArray[np.float64], labels: Labels) -> Learned:
        return {"passes": np.array([len(self.experts) + 1])}  # nothing is learnt but the calibration

    def held_out(self, rows: Any, labels: Labels) -> NDArray[np.float64]:
        return self.score({}, rows)

    def score(self, learned: Learned, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([rows, np.zeros((len(rows), 1))], axis=1)

    def explain(self, prompt: str, row: NDArray[np.float64], scores: NDArray[np.float64], expert: int) -> str:
        told = "likelier" if row[expert] >= 0 else "less likely"
        return f"the question is {told} under it than under the base, by {abs(row[expert]):.2f} nats per token"


def pool_scorer(pool: Any, tokenizer: Any) -> Scorer:
    """Scores by the experts of an `AdapterPool`, one after the other; the one that was active is so again."""
    from retain.models.likelihood import text_log_likelihood

    def score(name: str | None, texts: Sequence[str]) -> NDArray[np.float64]:
        with pool.lock:
            before = pool.active
            pool.activate(name)
            try:
                found = text_log_likelihood(pool.model, tokenizer, texts)
            finally:
                pool.activate(before)
        return np.array([(one.log_likelihood, one.tokens) for one in found], dtype=float)

    return score
