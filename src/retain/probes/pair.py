"""Minimal pairs: of two sentences that differ in little, the good one must be the likelier."""

from __future__ import annotations

from retain.models.likelihood import choice_log_likelihoods
from retain.probes.base import Outcome, Probe, Progress, Subject


class Pair(Probe):
    """Fields `good`, `bad`: two texts, scored as plain text without a chat.

    Right when Σ_t log p(good_t | good_<t) > Σ_t log p(bad_t | bad_<t), the criterion of BLiMP
    (Warstadt et al. 2020, arXiv:1912.00582, §4.2); the first token is predicted from the prefix token. A tie
    is wrong. What the two have in common at the beginning goes through the model once.
    """

    kind = "pair"
    metric = "accuracy"
    group = "capability"
    fields = frozenset({"good", "bad"})

    @property
    def chance(self) -> float | None:
        """One half."""
        return 0.5

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Score every item; outcomes in the order of `self.items`."""
        texts = [[item.fields["good"], item.fields["bad"]] for item in self.items]
        scores = choice_log_likelihoods(
            subject.model, subject.tokenizer, [""] * len(texts), texts, subject.batch_tokens, progress
        )
        outcomes = []
        for item, (good, bad), score in zip(self.items, texts, scores):
            right = score.log_likelihoods[0] > score.log_likelihoods[1]
            details = {"choices": 2, "log_likelihoods": score.log_likelihoods, "tokens": score.tokens}
            if score.truncated:
                details["truncated"] = score.truncated
            outcomes.append(Outcome(item.id, "", good, good if right else bad, float(right), right, details=details))
        return outcomes
