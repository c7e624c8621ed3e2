"""Router by words and by what the base model makes of them: `keyword` and `gate`, their log-probabilities added.

The two err on different questions: words know endings and rare terms that few examples show, states know what words
mean. Both are fitted on the same questions, and the sum is calibrated on held-out ones like any score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from retain.experts.routing.base import Labels, Learned, Progress, Router
from retain.experts.routing.gate import Gate
from retain.experts.routing.keyword import Keyword
from retain.experts.routing.vectors import Reader


@dataclass(frozen=True)
class Rows:
    """Texts [n] and states [n, H] of the same questions."""

    texts: Any
    states: Any

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.texts[index], self.states[index])


class Combined(Router):
    """Sum of the log-probabilities of `keyword` and `gate`.

    Args:
        reader: texts → vectors [n, H], as `models.states.StateReader`.
        settings: as for `Router`.
    """

    name = "combined"

    def __init__(self, reader: Reader, **settings: Any):
        super().__init__(**settings)
        self.reader = reader
        self.words, self.states = Keyword(), Gate(reader)

    def read(self, prompts: Sequence[str], progress: Progress = lambda n: None) -> Rows:
        return Rows(self.words.read(prompts), self.reader(prompts, progress))

    def learn(self, rows: Rows, labels: Labels) -> Learned:
        self._tell()
        words, states = self.words.learn(rows.texts, labels), self.states.learn(rows.states, labels)
        return {f"words.{k}": v for k, v in words.items()} | {f"states.{k}": v for k, v in states.items()}

    def score(self, learned: Learned, rows: Rows) -> NDArray[np.float64]:
        self._take(learned)
        words = self.words.score(self.words.learned, rows.texts)
        states = self.states.score(self.states.learned, rows.states)
        return log_softmax(words, axis=1) + log_softmax(states, axis=1)

    def explain(self, prompt: str, row: Rows, scores: NDArray[np.float64], expert: int) -> str:
        self._take(self.learned)
        words = self.words.explain(prompt, row.texts, scores, expert)
        return f"{words}; its nearest question is {self.states.nearest_to(row.states, expert)}"

    def _tell(self) -> None:
        for part in (self.words, self.states):
            part.experts, part.about, part.examples, part.labels = self.experts, self.about, self.examples, self.labels

    def _take(self, learned: Learned) -> None:
        """Give each part what was learnt for it; once, as the parts keep what they make of it."""
        if getattr(self, "_taken", None) is learned:
            return
        self._tell()
        for name, part in (("words.", self.words), ("states.", self.states)):
            part.learned = {k.removeprefix(name): v for k, v in learned.items() if k.startswith(name)}
        self._taken = learned
