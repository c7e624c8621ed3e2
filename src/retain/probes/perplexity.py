"""Perplexity: how surprising fixed text is to the model."""

from __future__ import annotations

from retain.models.likelihood import text_log_likelihood
from retain.probes.base import Outcome, Probe, Progress, Subject


class Perplexity(Probe):
    """Field `text`. The score of an item is −Σ_t log p(x_t | x_<t) in nats, its weight the number of tokens.

    The perplexity of the probe is exp(Σ scores / Σ tokens), weighted by token. Options `window` and `stride`
    as in `text_log_likelihood`. Details hold bits per byte, −Σ log₂ p / bytes, to compare tokenizers.
    """

    kind = "perplexity"
    metric = "perplexity"
    group = "capability"
    higher_is_better = False
    fewest = 2
    fields = frozenset({"text"})
    settings = frozenset({"window", "stride"})

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Score every text; outcomes in the order of `self.items`."""
        texts = [item.fields["text"] for item in self.items]
        scores = text_log_likelihood(
            subject.model,
            subject.tokenizer,
            texts,
            window=self.options.get("window"),
            stride=self.options.get("stride"),
            batch_tokens=subject.batch_tokens,
            progress=progress,
        )
        outcomes = []
        for item, text, score in zip(self.items, texts, scores):
            size = len(text.encode("utf-8"))
            details = {
                "bytes": size,
                "windows": score.windows,
                "bits_per_byte": -score.log_likelihood / 0.6931471805599453 / max(1, size),
            }
            outcomes.append(Outcome(item.id, text, "", "", -score.log_likelihood, None, score.tokens, details))
        return outcomes
