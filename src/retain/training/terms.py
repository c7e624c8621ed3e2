"""The terms of the loss, and what methods report, between two lines of the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class Terms:
    """Losses of micro-batches are added up and averaged over steps; what methods note is averaged over notes."""

    def __init__(self) -> None:
        self.noted: dict[str, list[torch.Tensor | float]] = defaultdict(list)
        self.losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.steps = 0  # since the last line

    def note(self, name: str, value: torch.Tensor | float) -> None:
        """A number from a method."""
        self.noted[name].append(value)

    def add(self, name: str, loss: torch.Tensor) -> None:
        """A term of one micro-batch, scaled as it enters the loss."""
        self.losses[name].append(loss)

    def take(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What the next line shows: terms per step, which add up to `loss`, and notes. Begins anew."""
        shown: dict[str, float] = {}
        if self.losses:
            sums = torch.stack([torch.stack(values).float().sum() for values in self.losses.values()])
            shown = dict(zip(self.losses, mean_over_ranks(sums / max(1, self.steps)).tolist()))
            self.losses.clear()
            self.steps = 0
        shown |= {name: float(np.mean([float(value) for value in values])) for name, values in self.noted.items()}
        self.noted.clear()
        return shown

    def diverged(self, loss: float, step: int, what: str, last: Path | None) -> str:
        """One line for a loss that is no number: where, which term is suspected, what was kept, what to do."""
        terms = {name: float(values[-1]) for name, values in (self.losses | self.noted).items() if values}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in terms.items()) or "plain loss only"
        bad = [n for n, v in terms.items() if not np.isfinite(v)] or [
            n for n, v in terms.items() if n != "loss/main" and abs(v) > 1e4
        ]
        blame = f"term {bad[0]}" if bad else "the main loss (or a weight update before it)"
        kept = f"last good state: {last}" if last else "no checkpoint was written yet"
        return (
            f"training step {step}: {what} became {loss:g}; first suspect: {blame} ({shown}); {kept}. "
            "Lower the learning rate or that method's strength, then run again."
        )
