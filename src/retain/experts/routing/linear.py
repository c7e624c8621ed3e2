"""Multinomial logistic regression by scikit-learn, as two arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def fit_linear(features: Any, labels: NDArray[np.intp], strength: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """(weights [K, F], offsets [K]) so that softmax(x Wᵀ + b) are the probabilities of K labels; float32.

    Every label weighs alike, however many rows it has.

    Args:
        features: [n, F], dense or sparse.
        labels: [n], 0..K − 1, each of them there.
        strength: scikit-learn's C, the inverse of the penalty on W.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(features, labels)
    coefficients, offsets = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps the second against the first
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        offsets = np.concatenate([-offsets / 2, offsets / 2])
    return coefficients.astype(np.float32), offsets.astype(np.float32)
