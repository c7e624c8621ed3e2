"""How models are merged: the method with its settings, checked, and what it makes of one tensor, piece by piece."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from retain.errors import ConfigError, unknown
from retain.functional import task_vectors

METHODS = ("linear", "slerp", "task", "ties", "dare", "stock", "interpolate")
#: Methods that are about what the models changed in a base.
ON_BASE = ("task", "ties", "dare", "stock", "interpolate")
#: λ without a validation set: 0.4 on every task vector; TIES keeps the largest fifth (Yadav 2023, arXiv:2306.01708).
_WEIGHT = {"task": 0.4, "dare": 0.4, "interpolate": 0.5}
_DENSITY = {"ties": 0.2, "dare": 0.5}


@dataclass(frozen=True)
class Pieces:
    """One tensor of n models, and of their base, read in pieces along its first dimension.

    Args:
        name: of the tensor.
        entries: how many it has.
        spans: the pieces, in order.
        models: n functions of a span, all with the same floating-point dtype, which `Recipe.computes_in` gives; what
            they return is written into.
        start: the same of the base; None where there is none, or where `models` gives changes.
    """

    name: str
    entries: int
    spans: Sequence[slice]
    models: Sequence[Callable[[slice], Tensor]]
    start: Callable[[slice], Tensor] | None = None

    def change(self, i: int, rows: slice) -> Tensor:
        """τ of model i."""
        return self.models[i](rows) if self.start is None else self.models[i](rows).sub_(self.start(rows))

    def changes(self, rows: slice) -> list[Tensor]:
        """τ of all models; the base is read once."""
        start = None if self.start is None else self.start(rows)
        return [read(rows) if start is None else read(rows).sub_(start) for read in self.models]


def _wide(stored: Collection[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, stored, torch.float32)


class Combining(Protocol):
    """What makes one tensor of several models' and their base's."""

    def combine(self, pieces: Pieces) -> Iterator[tuple[slice, Tensor]]:
        """The tensor, span by span, in the dtype of the pieces."""

    def computes_in(self, stored: Collection[torch.dtype]) -> torch.dtype:
        """The dtype in which pieces are given: float32, or float64 where a model is.

        Args:
            stored: of the tensors that take part, base and result included.
        """
        return _wide(stored)


class Sharing(Combining, Protocol):
    """The same for adapters."""

    @property
    def seed(self) -> int:
        """Of what is drawn."""

    def needs_angles(self) -> bool:
        """Whether the shares depend on the angles between the changes."""

    def shares(self, products: Tensor | None = None) -> list[float] | None:
        """By what each model's change is multiplied; None where that is not one number for all entries."""


@dataclass(frozen=True)
class Recipe:
    """A merge without its models; made by `recipe`.

    Args:
        method: one of `METHODS`.
        weights: of the models that take part: all those whose weight is not zero.
        density: share of the entries that TIES and DARE keep.
        scale: by which the merged change is multiplied (task, ties, dare).
        seed: of what DARE drops.
    """

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    scale: float = 1.0
    seed: int = 0

    def needs_angles(self) -> bool:
        """Whether the shares depend on the angles between the changes."""
        return self.method in ("slerp", "stock") and len(self.weights) > 1

    def computes_in(self, stored: Collection[torch.dtype]) -> torch.dtype:
        """The dtype in which pieces are given: float32, or float64 where a model is; float16 or bfloat16 where the
        whole sum is one `lerp` of two that are stored in it, which computes in float32 and rounds once itself: the same
        bits in two thirds of the time.

        Args:
            stored: of the tensors that take part, base and result included.
        """
        one_lerp = self.method == "linear" and len(self.weights) == 2
        if one_lerp and set(stored) in ({torch.float16}, {torch.bfloat16}):
            return next(iter(stored))
        return _wide(stored)

    def shares(self, products: Tensor | None = None) -> list[float] | None:
        """By what each model's change is multiplied; None where entries are dropped one by one.

        Args:
            products: [n, n] inner products of the changes, where `needs_angles`.
        """
        if self.method in ("linear", "slerp"):
            shares = [weight / sum(self.weights) for weight in self.weights]
            return (
                shares
                if products is None or self.method == "linear"
                else [*task_vectors.spherical(products, shares[1])]
            )
        if self.method == "stock" and products is not None:
            return [task_vectors.stock(products) / len(self.weights)] * len(self.weights)
        if self.method == "interpolate":
            return list(self.weights)
        if self.density < 1 or (self.method == "ties" and len(self.weights) > 1):
            return None
        return [self.scale] if self.method == "ties" else [weight * self.scale for weight in self.weights]

    def combine(self, pieces: Pieces) -> Iterator[tuple[slice, Tensor]]:
        """The merged tensor, span by span, in the dtype of the pieces; read twice or more where the method asks for it.

        Models that are equal stay as they are bit for bit, and so does a model that is alone with weight 1.
        """
        products = None
        if self.needs_angles():
            products = task_vectors.gram(pieces.changes(rows) for rows in pieces.spans)
        shares = self.shares(products)
        if shares is not None:
            for rows in pieces.spans:
                yield rows, self._sum(pieces, rows, shares)
            return
        sparse = self._trimmed(pieces) if self.method == "ties" else self._dropped(pieces)
        for rows in pieces.spans:
            merged = sparse(rows) * self.scale
            yield rows, merged if pieces.start is None else merged.add_(pieces.start(rows))

    def _sum(self, pieces: Pieces, rows: slice, shares: list[float]) -> Tensor:
        if shares == [1.0]:
            return pieces.models[0](rows)
        if self.method == "linear":  # as seen from the first: equal models give the same again
            first = pieces.models[0](rows)
            if len(shares) == 2:
                return first.lerp_(pieces.models[1](rows), shares[1])
            total = first.clone()
            for read, share in zip(pieces.models[1:], shares[1:]):
                total.add_(read(rows).sub_(first), alpha=share)
            return total
        if pieces.start is None:
            if not shares:
                raise ValueError("a merge of nothing without a base")
            total = pieces.models[0](rows) * shares[0]
            for read, share in zip(pieces.models[1:], shares[1:]):
                total.add_(read(rows), alpha=share)
            return total
        start = pieces.start(rows)
        total = start.clone()
        for read, share in zip(pieces.models, shares):
            total.add_(read(rows).sub_(start), alpha=share)
        return total

    def _trimmed(self, pieces: Pieces) -> Callable[[slice], Tensor]:
        keep = task_vectors.kept_entries(pieces.entries, self.density)

        def least_kept(i: int) -> Tensor:
            return task_vectors.kth_magnitude(lambda: (pieces.change(i, rows) for rows in pieces.spans), keep)

        least = [least_kept(i) for i in range(len(self.weights))]

        def merged(rows: slice) -> Tensor:
            changes = [task_vectors.trim(tau, bound) for tau, bound in zip(pieces.changes(rows), least)]
            return task_vectors.elect(changes, self.weights)

        return merged

    def _dropped(self, pieces: Pieces) -> Callable[[slice], Tensor]:
        randoms = []
        for i in range(len(self.weights)):  # each tensor of each model has its own draws, whatever else is merged
            text = f"{self.seed} {i} {pieces.name}".encode()
            number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
            randoms.append(torch.Generator().manual_seed(number))

        def merged(rows: slice) -> Tensor:
            left = [task_vectors.drop(t, self.density, r) for t, r in zip(pieces.changes(rows), randoms)]
            total = left[0] * self.weights[0]
            for tau, weight in zip(left[1:], self.weights[1:]):
                total.add_(tau, alpha=weight)
            return total

        return merged


def recipe(
    method: str,
    count: int,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float | None = None,
    seed: int = 0,
    base: bool = True,
) -> tuple[Recipe, list[int]]:
    """A checked recipe for `count` models, and which of them take part: those whose weight is not zero.

    Args:
        method: one of `METHODS`.
        weights: one per model. linear, slerp: of an average, made to sum to 1; equal by default. ties: of the votes and
            of the mean, only their ratios count; equal by default. task, dare: λ of each change, may be negative; 0.4
            by default. interpolate: how far from the base, 0 to 1; 0.5 by default. stock has none.
        density: ties and dare, above 0 to 1; 0.2 and 0.5 by default.
        scale: task, ties and dare; 1 by default.
        seed: dare.
        base: whether there is one.

    Raises:
        ConfigError: an unknown method, too few or too many models, or a setting that is impossible or does nothing.
    """
    if method not in METHODS:
        raise ConfigError(unknown("--method", method, METHODS))
    if method in ON_BASE and not base:
        raise ConfigError(f"--method {method}: works on what the models changed in a base. Give it with --base.")
    wanted = {"interpolate": "one model", "slerp": "two models"}.get(method, "two models or more")
    if count < 1 or (method == "interpolate") != (count == 1) or (method == "slerp" and count > 2):
        raise ConfigError(f"--method {method}: {count} given; it takes {wanted}.")
    for name, value, has in (
        ("--weights", weights, [m for m in METHODS if m != "stock"]),
        ("--density", density, list(_DENSITY)),
        ("--scale", scale, ["task", "ties", "dare"]),
    ):
        if value is not None and method not in has:
            raise ConfigError(f"{name}: does nothing with --method {method}; it is for {', '.join(has)}. Leave it out.")
    chosen = [_WEIGHT.get(method, 1.0)] * count if weights is None else [float(w) for w in weights]
    if len(chosen) != count:
        raise ConfigError(f"--weights: {len(chosen)} given for {count} models. Give one for each, in their order.")
    allowed: Any = (lambda w: True, "any number") if method in ("task", "dare") else (lambda w: w >= 0, "0 or more")
    if method == "interpolate":
        allowed = (lambda w: 0 <= w <= 1, "0 (the base) to 1 (the model)")
    for weight in chosen:
        if not math.isfinite(weight) or not allowed[0](weight):
            raise ConfigError(f"--weights: {weight:g} given; allowed with --method {method}: {allowed[1]}.")
    if method in ("linear", "slerp", "ties") and not any(chosen):
        raise ConfigError("--weights: all are zero. Give at least one that is not.")
    density = _DENSITY.get(method, 1.0) if density is None else density
    if not 0 < density <= 1:
        raise ConfigError(f"--density: {density:g} given; allowed: above 0, up to 1 (all entries stay).")
    scale = 1.0 if scale is None else scale
    if not math.isfinite(scale):
        raise ConfigError(f"--scale: {scale:g} given; allowed: any number.")
    used = [i for i, weight in enumerate(chosen) if weight != 0]
    return Recipe(method, tuple(chosen[i] for i in used), density, scale, seed), used
