"""Diagonal Fisher information of a language model: how much each weight matters for what it now predicts.

    F_i = (1/N) Σ_t E_{y ∼ p(·|context_t)} [(∂ log p(y) / ∂θ_i)²]     over N supervised tokens t

(Kirkpatrick 2017, arXiv:1612.00796; names of the estimators after van de Ven 2025, arXiv:2502.11756).

    sampled    one label per token drawn from the model, ONE backward of the summed log-likelihood of a batch.
               E[∇ log p] = 0 under the model and labels are independent given their contexts, so the cross
               terms of the squared sum vanish in expectation: unbiased for every batch size.
    rank1      the sampled estimate, but of a 2-D weight only its row and column sums are kept.
    empirical  true labels, squared gradient of each SEQUENCE. Not the Fisher unless the model fits the data.
    exact      all labels of every token, or the top k and one outcome for the rest (then a lower bound).

Squaring the mean, or the sum over a batch, of gradients at *true* labels is none of these: its cross terms do
not vanish and its scale depends on the batch size. The model must be in eval mode, without dropout. Nothing
here touches `.grad`; everything is element-wise or a sum over an axis, hence right on sharded tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from retain.errors import ConfigError, DataError, unknown
from retain.functional import divergence, tiled_head

Estimator = Literal["sampled", "rank1", "empirical", "exact"]
ESTIMATORS = ("sampled", "rank1", "empirical", "exact")

#: (scalar, weights, keep the graph) → one gradient per weight, None where the scalar does not depend on it.
Gradients = Callable[[Tensor, Sequence[Tensor], bool], Iterable[Tensor | None]]


@dataclass(frozen=True)
class Prediction:
    """What the model says about the N supervised tokens of a batch, with its graph.

    Args:
        logits: [N, V], or None when `hidden` and `head` are given.
        hidden, head: [N, H] and the output head; for vocabularies whose logits do not fit in memory.
        labels: [N] true next tokens; only "empirical" reads them.
        sequence: [N] number of the sequence of each token; only "empirical" reads it.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: tiled_head.Head | None = None
    labels: Tensor | None = None
    sequence: Tensor | None = None

    def __post_init__(self) -> None:
        dense, tiled = self.logits is not None, self.hidden is not None and self.head is not None
        if dense == tiled:
            raise ConfigError("fisher.Prediction: give either logits, or hidden together with head.")

    def __len__(self) -> int:
        return len(self.logits if self.logits is not None else self.hidden)  # type: ignore[arg-type]

    def sample(self, generator: torch.Generator) -> Tensor:
        """One label per token drawn from the model, [N]."""
        if self.logits is None:
            return tiled_head.sample(self.hidden, self.head, generator)  # type: ignore[arg-type]
        uniform = torch.rand(len(self), generator=generator, dtype=torch.float64, device=generator.device)
        return tiled_head.invert(self.logits.detach(), uniform.to(self.logits.device))

    def sampled(self, generator: torch.Generator) -> Tensor:
        """Σ log p of the labels that `sample` draws, a scalar."""
        if self.logits is None:
            return tiled_head.sampled_log_likelihood(self.hidden, self.head, generator)  # type: ignore[arg-type]
        return self.log_probs(self.sample(generator)).sum()

    def log_probs(self, labels: Tensor) -> Tensor:
        """log p of one label per token, [N]."""
        if self.logits is None:
            return tiled_head.log_probs(self.hidden, self.head, labels)[0]  # type: ignore[arg-type]
        return _log_softmax(self.logits).gather(1, labels[:, None])[:, 0]

    def all_log_probs(self) -> Iterator[Tensor]:
        """log p of the whole vocabulary, [V], token by token."""
        for i in range(len(self)):
            if self.logits is None:
                head, hidden = self.head, self.hidden
                ids = torch.arange(head.weight.shape[0], device=hidden.device)  # type: ignore[union-attr]
                yield tiled_head.log_probs(hidden[i : i + 1], head, ids[None])[0][0]  # type: ignore[arg-type,index]
            else:
                yield _log_softmax(self.logits[i])


@dataclass
class Importance:
    """Importances of weights by name, F ≥ 0, and what they were made of.

    Args:
        diagonal: F in the shape of the weight.
        rows, columns: for weights [m, n] of the "rank1" estimator r [m] = Σ_j F_ij and c [n] = Σ_i F_ij.
        estimator: one of `ESTIMATORS`.
        tokens: supervised tokens seen; F is divided by them.
        sequences: sequences seen ("empirical" only, else 0).
        scale: factor that `normalise` has applied, so that F / scale is in raw units.
    """

    diagonal: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    estimator: str = "sampled"
    tokens: int = 0
    sequences: int = 0
    scale: float = 1.0

    def dense(self, name: str) -> Tensor:
        """F of one weight in its own shape; for rank1 F̂ = r cᵀ / Σr, with the same row and column sums."""
        if name in self.diagonal:
            return self.diagonal[name]
        rows, columns = self.rows[name], self.columns[name]
        return torch.outer(rows, columns) / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)

    def count(self) -> int:
        """Number of weights that have an importance."""
        pairs = sum(self.rows[name].numel() * self.columns[name].numel() for name in self.rows)
        return pairs + sum(f.numel() for f in self.diagonal.values())

    def total(self) -> float:
        """Σ F over all weights."""
        return math.fsum(_number(f.sum(dtype=torch.float64)) for f in (*self.diagonal.values(), *self.rows.values()))

    def _add(self, gradients: Iterable[tuple[str, Tensor | None]], weight: float = 1.0) -> None:
        for name, gradient in gradients:
            if gradient is None:
                continue
            if name in self.diagonal:
                gradient = gradient.to(self.diagonal[name].dtype)
                self.diagonal[name].addcmul_(gradient, gradient, value=weight)
            else:
                squares = gradient.to(self.rows[name].dtype).square()
                self.rows[name].add_(squares.sum(1), alpha=weight)
                self.columns[name].add_(squares.sum(0), alpha=weight)

    def _multiply(self, factor: float) -> None:
        for group in (self.diagonal, self.rows, self.columns):
            for tensor in group.values():
                tensor.mul_(factor)


def plain_gradients(scalar: Tensor, weights: Sequence[Tensor], keep_graph: bool) -> Sequence[Tensor | None]:
    """Gradients by `torch.autograd.grad`; `keep_graph` where the batch is differentiated again."""
    return torch.autograd.grad(scalar, weights, retain_graph=keep_graph, allow_unused=True)


def accumulate(
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    predict: Callable[[Any], Prediction],
    estimator: Estimator = "sampled",
    generator: torch.Generator | None = None,
    top_k: int | None = None,
    gradients: Gradients = plain_gradients,
) -> Importance:
    """Importance of every weight, averaged over the supervised tokens of all batches.

    Args:
        params: weights by name; each must require a gradient.
        batches: anything that `predict` understands.
        predict: runs the model on a batch, with gradients.
        estimator: see the module's docstring.
        generator: source of the drawn labels ("sampled", "rank1"); a fresh one of seed 0 by default.
        top_k: "exact" only: enumerate this many labels per token and lump the rest.
        gradients: how to differentiate. Replace it where weights do not take part in the graph themselves
            (fully sharded training: backward, then read and clear `.grad`).

    Returns:
        Importance with accumulators in float32 (float64 for float64 weights), not normalised.

    Raises:
        ConfigError: unknown estimator, nothing to protect, weights that need no gradient, bad `top_k`.
        DataError: no supervised token, or labels missing for "empirical".
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(unknown("fisher.estimator", str(estimator), ESTIMATORS))
    if top_k is not None and (estimator != "exact" or top_k < 1):
        raise ConfigError(f"fisher.top_k: {top_k} given with '{estimator}'; allowed: ≥ 1 and only with 'exact'.")
    frozen = [name for name, p in params.items() if not p.requires_grad]
    if not params or frozen:
        what = f"'{frozen[0]}' needs no gradient" if frozen else "no weight is protected"
        raise ConfigError(f"fisher: {what}; allowed: weights with requires_grad. Check the pattern of weights.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    result = _empty(params, estimator)
    weights = list(params.values())
    keep_graph = estimator in ("empirical", "exact")
    for batch in batches:
        prediction = predict(batch)
        if len(prediction) == 0:
            continue
        result.tokens += len(prediction)
        for scalar, weight in _scalars(prediction, estimator, generator, top_k, result):
            result._add(zip(params, gradients(scalar, weights, keep_graph)), weight)
        del prediction, scalar  # or the graphs of two batches would be alive at once
    if result.tokens == 0:
        raise DataError("fisher: no supervised token in the data; give rows that have an answer or a text.")
    result._multiply(1 / result.tokens)
    return result


def normalise(importance: Importance, *others: Importance) -> Importance:
    """Scale F in place to a mean of 1 over all its weights, and those of `others`, by one factor; return it.

    A strength then means the same on every model, and EWC and L2-SP share their units.

    Raises:
        ConfigError: no weight has an importance, or the total is 0 or not finite.
    """
    every = (importance, *others)
    count, total = sum(part.count() for part in every), math.fsum(part.total() for part in every)
    if count == 0 or not (math.isfinite(total) and total > 0):
        raise ConfigError(
            f"fisher: {count} protected weights with a total importance of {total}; allowed: at least one "
            "weight and a positive, finite total. Check which weights are protected, and the data."
        )
    for part in every:
        part._multiply(count / total)
        part.scale *= count / total
    return importance


def unscaled(importance: Importance) -> Importance:
    """Take back in place what `normalise` did, so that F is in raw units again, and return it."""
    importance._multiply(1 / importance.scale)
    importance.scale = 1.0
    return importance


def _empty(params: Mapping[str, Tensor], estimator: str) -> Importance:
    result = Importance(estimator=estimator)
    for name, p in params.items():
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        zeros = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        if estimator == "rank1" and p.dim() == 2:
            result.rows[name], result.columns[name] = zeros.sum(1), zeros.sum(0)
        else:
            result.diagonal[name] = zeros
    return result


def _scalars(
    prediction: Prediction, estimator: str, generator: torch.Generator, top_k: int | None, result: Importance
) -> Iterator[tuple[Tensor, float]]:
    """(log-likelihood to differentiate, weight of its squared gradient) for one batch."""
    if estimator in ("sampled", "rank1"):
        yield prediction.sampled(generator), 1.0
    elif estimator == "empirical":
        if prediction.labels is None or prediction.sequence is None:
            raise DataError("fisher: 'empirical' needs the true labels and the sequence of every token.")
        log_p = prediction.log_probs(prediction.labels)
        for number in prediction.sequence.unique():
            result.sequences += 1
            yield log_p[prediction.sequence == number].sum(), 1.0
    else:
        for log_p in prediction.all_log_probs():
            if top_k is not None and top_k < len(log_p):
                log_p = log_p.topk(top_k).values
                log_p = torch.cat([log_p, divergence.log_tail(log_p)])
            for outcome, p in zip(log_p, log_p.detach().exp().tolist()):
                if p != 0:
                    yield outcome, p


def _number(scalar: Tensor) -> float:
    """Value of a scalar; that of the whole where it was reduced from a sharded tensor."""
    return (scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar).item()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
