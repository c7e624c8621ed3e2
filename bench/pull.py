"""What the pull of `ewc` costs alone: seconds of its gradient, of its value, and of both from one sweep over memory.

    python bench/pull.py                  # on the weights of the starter model
    python bench/pull.py --elements 1e7   # on a list of random tensors with so many entries

Medians of nine, after one that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from retain.functional.penalties import add_quadratic_gradient, quadratic_value
from retain.models.load import load_model


def median_seconds(work: Callable[[], Any], repeats: int = 9) -> float:
    """Of one call."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def measure(weights: list[torch.Tensor]) -> dict[str, float]:
    """Seconds by what is computed."""
    anchors = [w + 1e-3 for w in weights]
    importance = [torch.rand_like(w) for w in weights]
    gradients = [torch.randn_like(w) for w in weights]
    return {
        "gradient": median_seconds(lambda: add_quadratic_gradient(gradients, weights, anchors, importance, 1e-3)),
        "value": median_seconds(lambda: quadratic_value(weights, anchors, importance, 1e-3)),
        "both": median_seconds(lambda: add_quadratic_gradient(gradients, weights, anchors, importance, 1e-3, True)),
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, help="entries of random tensors, in place of a model")
    elements = parser.parse_args(given).elements
    if elements:
        weights = [torch.randn(int(elements) // 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    else:
        weights = [p.detach() for p in load_model("starter", tokenizer=False)[0].parameters()]
    print(f"{sum(w.numel() for w in weights):,} weights, {torch.get_num_threads()} threads")
    for name, seconds in measure(weights).items():
        print(f"{name:<10}{seconds:.3f} s")


if __name__ == "__main__":
    main()
