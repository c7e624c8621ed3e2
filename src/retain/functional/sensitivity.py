"""How much each weight matters for the size of what a model puts out (Memory Aware Synapses).

    Ω_i = (1/N) Σ_n |∂ ‖f(x_n)‖² / ∂θ_i|        over N samples

(Aljundi et al. 2018, arXiv:1711.09601.) The absolute value is taken per sample: in that of a batch samples cancel. No
label is read. Nothing here touches `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from retain.errors import ConfigError, DataError
from retain.functional.fisher import Importance, plain_gradients


def accumulate(
    weights: Mapping[str, Tensor],
    samples: Iterable[Any],
    norm: Callable[[Any], Tensor | None],
    by_sums: bool = False,
) -> Importance:
    """Ω of every weight, not normalised; accumulated in float32 (float64 for float64 weights).

    Args:
        weights: by name; each must require a gradient.
        samples: one at a time, anything that `norm` understands.
        norm: runs the model on one sample: ‖f(x)‖², a scalar with its graph; None leaves the sample out.
        by_sums: of 2-D weights [m, n] keep only the row sums [m] and column sums [n].

    Raises:
        ConfigError: nothing to protect.
        DataError: no sample.
    """
    if not weights:
        raise ConfigError("sensitivity: no weight is protected; allowed: at least one. Freeze less.")
    result = Importance(estimator="sensitivity")
    for name, p in weights.items():
        zeros = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        if by_sums and p.dim() == 2:
            result.rows[name], result.columns[name] = zeros.sum(1), zeros.sum(0)
        else:
            result.diagonal[name] = zeros
    for sample in samples:
        value = norm(sample)
        if value is None:
            continue
        result.sequences += 1
        for name, slope in zip(weights, plain_gradients(value, list(weights.values()), False)):
            if slope is None:
                continue
            if name in result.diagonal:
                result.diagonal[name] += slope.abs()
            else:
                size = slope.abs().to(result.rows[name].dtype)
                result.rows[name] += size.sum(1)
                result.columns[name] += size.sum(0)
    if result.sequences == 0:
        raise DataError("sensitivity: no sample with a supervised token; give rows that have an answer or a text.")
    for group in (result.diagonal, result.rows, result.columns):
        for total in group.values():
            total /= result.sequences
    return result
