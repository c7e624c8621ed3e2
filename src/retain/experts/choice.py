"""Which expert answers a question, how sure that is, and why; plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A router's answer for one prompt; `dataclasses.asdict` makes it JSON.

    Args:
        expert: name of the expert; None means the base model answers.
        confidence: chance that `expert` is right, 0..1, calibrated on held-out questions.
        scores: chance that the prompt belongs to each expert's domain, 0..1; what they leave of 1 is nobody's, so
            the base model's.
        why: one line in words of a person.
        seconds: time that the choice took, this prompt's share of its batch.
    """

    expert: str | None
    confidence: float
    scores: dict[str, float]
    why: str
    seconds: float
