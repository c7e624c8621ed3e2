"""Gradients of the frozen base weights under LoRA, also of quantised ones, which cannot have any themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from retain.functional.fisher import Gradients, plain_gradients
from retain.models import params
from retain.models.params import LoraPair


@contextmanager
def base_gradients(model: Any) -> Iterator[tuple[dict[str, Any], Gradients]]:
    """The base weights under the LoRA pairs by module name, and how to differentiate by them, for a block.

    Both as `fisher.accumulate` takes them. Quantised weights are stood for by tensors of their shape [out, in].
    """
    pairs = params.lora_pairs(model)
    if not all(pair.base.is_floating_point() for pair in pairs.values()):
        with observed(model, pairs) as found:
            yield found
        return
    bases = {name: pair.base for name, pair in pairs.items()}
    for base in bases.values():
        base.requires_grad_(True)
    try:
        yield bases, plain_gradients
    finally:
        for base in bases.values():
            base.requires_grad_(False)


@contextmanager
def observed(model: Any, pairs: dict[str, LoraPair]) -> Iterator[tuple[dict[str, Any], Gradients]]:
    """The same from what goes into each layer, x_t, and the slope of what comes out, δ_t: ∂/∂W = Σ_t δ_t x_tᵀ.

    One matrix of the size of W is there at a time.
    """
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in pairs}
    stand_ins: dict[str, Any] = {}
    handles = []
    for name, pair in pairs.items():

        def note(module: Any, args: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_(True)
            seen[name].append((args[0].detach(), output))
            return output

        layer: Any = params.causal(model).get_submodule(name)
        handles.append(layer.get_base_layer().register_forward_hook(note))
        shape = (pair.B.shape[0], pair.A.shape[1])
        one = torch.zeros((), device=pair.B.device, requires_grad=True)
        stand_ins[name] = one.expand(shape[::-1] if pair.transposed else shape)

    def gradients(scalar: torch.Tensor, weights: Sequence[Any], keep_graph: bool) -> Iterator[torch.Tensor | None]:
        calls = [(name, x, output) for name in pairs for x, output in seen[name]]
        if not keep_graph:
            for name in pairs:
                seen[name] = []
        slopes = torch.autograd.grad(
            scalar, [output for _, _, output in calls], retain_graph=keep_graph, allow_unused=True
        )
        for name, pair in pairs.items():
            parts = [
                slope.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                for (owner, x, _), slope in zip(calls, slopes)
                if owner == name and slope is not None
            ]
            whole = torch.stack(parts).sum(0) if parts else None
            yield whole.T if whole is not None and pair.transposed else whole

    try:
        yield stand_ins, gradients
    finally:
        for handle in handles:
            handle.remove()
