"""The way from where a task began to where it ended, in weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from retain.functional.merging import interpolate
from retain.models import params


class Way:
    """θ(α) = θ_start + α (θ_end − θ_start) over all trained parameters of a model; the ends bit for bit.

    An adapter that began at zero is scaled in B alone, its A staying at the end, so that ΔW(α) = α ΔW exactly. Where
    weights are not linear in what is trained (DoRA's magnitudes, adapters that did not begin at zero), this is still a
    way from the start to the end, only not a straight one.

    Args:
        model: at the end.
        start: the trained parameters as they were, by name.
    """

    def __init__(self, model: Any, start: Mapping[str, torch.Tensor]) -> None:
        named = dict(params.causal(model).named_parameters())
        self.parameters = {name: named[name] for name in start}
        self.start = {name: params.aligned(tensor, named[name]) for name, tensor in start.items()}
        self.end = params.snapshot(self.parameters)
        names = {id(p): name for name, p in self.parameters.items()}
        self._held: set[str] = set()
        for pair in params.lora_pairs(model).values():
            b = names.get(id(pair.B))
            if b is not None and id(pair.A) in names and not bool((self.start[b] != 0).any()):
                self._held.add(names[id(pair.A)])

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Put the model at a share of the way: 0 the start, 1 the end."""
        held = self._held if 0 < share < 1 else set()
        moving = [name for name in self.parameters if name not in held]
        found = interpolate({n: self.start[n] for n in moving}, {n: self.end[n] for n in moving}, share)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.end[name] if name in held else found[name])
