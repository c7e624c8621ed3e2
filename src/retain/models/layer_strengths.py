"""Factors on a strength by tensor: along the height of a model, and by patterns of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from retain.errors import ConfigError
from retain.functional.strengths import by_height
from retain.models import params


def heights(model: Any) -> dict[str, float]:
    """How high each trainable weight or adapted layer lies: 0 in the lowest layer and all below it, 1 in the highest
    layer, the last norm and the head. A head that is tied to the embeddings lies with them."""
    whole, layers = params.causal(model), params.decoder_layers(model)
    height = {id(p): 1.0 for p in whole.parameters()}
    height |= {id(p): 0.0 for m in params.input_modules(model) for p in m.parameters()}
    height |= {id(p): i / max(1, len(layers) - 1) for i, layer in enumerate(layers) for p in layer.parameters()}
    pulled = params.outside_lora(model) | {name: pair.B for name, pair in params.lora_pairs(model).items()}
    return {name: height[id(p)] for name, p in pulled.items()}


def factors(
    model: Any, by_layer: tuple[float, float] | None, patterns: Mapping[str, float], where: str
) -> dict[str, float]:
    """Factor on the strength of each trainable weight and adapted layer, by name.

    Args:
        by_layer: factors at the bottom and at the top, linear between; None for 1 everywhere.
        patterns: regular expression on names → factor; those of all patterns that match are multiplied.
        where: the method, for messages.

    Raises:
        ConfigError: a pattern that is no regular expression or matches nothing that is pulled, or a negative factor.
    """
    found = {name: by_height(*by_layer, height) if by_layer else 1.0 for name, height in heights(model).items()}
    for pattern, factor in patterns.items():
        if not 0 <= factor < float("inf"):
            raise ConfigError(f"{where}.patterns: '{pattern}' has the factor {factor}; allowed: a finite number ≥ 0.")
        try:
            matching = [name for name in found if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"{where}.patterns: '{pattern}' is not a regular expression ({error}).") from None
        if not matching:
            raise ConfigError(
                f"{where}.patterns: '{pattern}' matches nothing that is trained. Names look like "
                f"'{next(iter(found), 'none: everything is frozen')}'."
            )
        for name in matching:
            found[name] *= factor
    return found
