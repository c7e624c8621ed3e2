"""What methods that weigh tokens share: strength, a mean weight of 1, whose tokens, and what is logged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.token_scores import BINS, counted_quantile, loss_counts
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run, Tokens
from retain.models.start_scores import StartScores, sequences


class Weighing(Method):
    """A method that weighs the tokens of the main loss; a subclass says how in `weigh`.

    The weight of a token is 1 + strength · (w − 1). With `normalise` it is divided by the mean of the steps before
    (over all ranks, decaying with `MEMORY`), so that the size of a step stays what the learning rate says and a gain
    does not come from smaller steps alone; the mean of the very first step is not known and taken as 1. All
    micro-batches of a step are divided by the same number, so the split into micro-batches changes nothing. Tokens
    that are not weighed (of replayed rows, unless `rows: all`) keep the weight 1 and do not enter the mean.
    """

    family = "tokens"
    MEMORY = 0.9  # of the running mean, per step

    class Config(MethodConfig):
        strength: float = Field(1.0, ge=0, le=1)
        """0 is off, 1 the method's own weights, between them a mixture."""
        normalise: bool = True
        """Keep the mean weight at 1; false is the form of the paper, which also takes smaller steps."""
        rows: Literal["new", "all"] = "new"
        """Whose tokens are weighed; those of replayed rows keep the weight 1 unless `all`."""

    def weigh(self, tokens: Tokens, run: Run) -> torch.Tensor:
        """The method's own weights [N] ≥ 0."""
        raise NotImplementedError

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if not run.restored:
            self._total = torch.zeros(2, dtype=torch.float64)  # decayed sums of weights, and of tokens
        self._step: list[torch.Tensor] = []

    def token_weights(self, tokens: Tokens, run: Run) -> torch.Tensor | None:
        chosen = self._chosen(tokens)
        own = _part(tokens, chosen)
        known = float(self._total[1]) > 0 and float(self._total[0]) > 0
        weights = torch.ones(len(tokens.labels), dtype=_wide(tokens.hidden), device=tokens.hidden.device)
        total = torch.zeros(2, dtype=torch.float64, device=weights.device)
        if len(own.labels):
            raw = 1 + self.config.strength * (self.weigh(own, run) - 1)
            total = torch.stack([raw.double().sum(), total.new_tensor(len(raw))])
            scale = float(self._total[0] / self._total[1]) if self.config.normalise and known else 1.0
            weights[chosen] = (raw / scale).to(weights.dtype)
        self._step.append(total)
        return weights

    def _chosen(self, tokens: Tokens) -> torch.Tensor:
        if self.config.rows == "all":
            return torch.ones_like(tokens.source, dtype=torch.bool)
        if len(tokens.batch.source) != len(tokens.batch.labels):
            raise ConfigError(
                f"methods.{self.name}.rows: rows are flattened by padding-free packing, so new and replayed ones "
                "cannot be told apart. Set `rows: all` or `padding_free: false`."
            )
        return tokens.source == 0

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        if not self._step:
            return
        seen = run.reduce(torch.stack(self._step).sum(0)).cpu()
        self._step.clear()
        self._total = self.MEMORY * self._total + seen
        if seen[1] > 0:
            run.log(f"{self.name}/weight", float(seen[0] / seen[1]))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"total": self._total}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._total = state["total"]


class WeighingByStart(Weighing):
    """Weighs by the loss that the model had on a token or sequence when the task began.

    The task's rows are looked at once before training, and their losses kept; `limit` is then exact over all of them.
    Of a stream, whose end nobody has seen, each micro-batch is looked at when it comes, and `limit` is that of the
    steps before, over all ranks.
    """

    swaps_weights = True
    unit: Literal["token", "sequence"] = "token"  # what `limit` counts

    class Config(Weighing.Config):
        batch_size: int = Field(8, ge=1)
        """Rows per forward pass of the look at all rows before training."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        super().on_task_start(model, run)
        self._start = StartScores(model, run.start)
        self._all: np.ndarray | None = None
        self._fresh: list[torch.Tensor] = []  # counts of this step's losses
        if not run.restored:
            self._counts = torch.zeros(BINS, dtype=torch.float64)
        if run.new_rows is None:
            return
        size, rows = self.config.batch_size, run.tokenise(run.new_rows)  # cut where the training cuts them
        batches = run.batches(rows, size)
        kept = self._start.keep(run.track(batches, "losses before training", -(-len(rows) // size)))
        kept = [losses for losses in kept if len(losses)]
        if self.unit == "sequence":
            kept = [losses.mean()[None] for losses in kept]
        self._all = torch.cat(kept).numpy() if kept else None

    def limit(self, share: float) -> float | None:
        """The loss that `share` of the tokens or sequences do not exceed; None before anything was seen."""
        return counted_quantile(self._counts, share) if self._all is None else float(np.quantile(self._all, share))

    def start_losses(self, tokens: Tokens) -> torch.Tensor:
        """Loss [N] at the start of the task of the tokens, or of the sequences that they stand in."""
        batch, rows = tokens.batch, tokens.rows.unique()
        inputs, labels = batch.inputs, batch.labels
        if len(rows) < len(labels):
            inputs = {key: value[rows] if _by_row(value, labels) else value for key, value in inputs.items()}
            labels = labels[rows]
        losses = counted = self._start.losses(inputs, labels)
        if self.unit == "sequence":
            owner = sequences(inputs, labels)[:, 1:][labels[:, 1:] != -100]
            _, owner = owner.unique(return_inverse=True)
            counted = torch.segment_reduce(losses, "mean", lengths=torch.bincount(owner))
            losses = counted[owner]
        if self._all is None:
            self._fresh.append(loss_counts(counted))
        return losses

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        super().on_step_end(model, run)
        if self._all is None:
            nothing = torch.zeros(BINS, dtype=torch.float64, device=next(model.parameters()).device)
            self._counts = self._counts + run.reduce(torch.stack([nothing, *self._fresh]).sum(0)).cpu()
            self._fresh.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {"counts": self._counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self._counts = state["counts"]


def _part(tokens: Tokens, chosen: torch.Tensor) -> Tokens:
    if bool(chosen.all()):
        return tokens
    parts: dict[str, Any] = {key: getattr(tokens, key)[chosen] for key in ("labels", "hidden", "rows", "source")}
    return replace(tokens, **parts)


def _wide(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _by_row(value: Any, labels: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape[:1] == labels.shape[:1]
