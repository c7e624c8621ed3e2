"""HFT — a random half of the matrices stays as it was, another half for every task.

    θ_M = θ*_M  for the matrices M that are drawn; the others learn           (Hui et al. 2024, arXiv:2404.18466, §3)

θ* = weights at the start of the task. In each layer two of the four attention matrices (q, k, v, o) stay; of the
three of the MLP (up, gate, down) two stay in a random half of the layers and one in the others.
Deviations from the paper: other shares than a half, and layers with other numbers of matrices, are drawn by the same
    rule. A bias stays with its matrix; embeddings, head and norms learn. With `lora` it is the adapters that are drawn.
Needs: nothing.
Cost: none; it saves the gradients and optimizer states of what stays.
Combine with: nearly anything.
Conflicts: blocks and bottleneck (what they add begins at zero and would stay there), ogd (which holds directions of
    the same weights in all tasks).
Tune: `share` 0.5; matrices differ in size, so the share of weights that stays is printed.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import params


class HFT(Method):
    """Half fine-tuning."""

    family = "isolation"
    paper = "arXiv:2404.18466"
    off = {"share": 0.0}

    class Config(MethodConfig):
        share: float = Field(0.5, ge=0, le=1)
        """Share of the matrices of attention, and of those of the MLPs, that stay; 0 is off."""

    def prepare_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        found = matrices(model)
        stays = drawn(found, self.config.share, np.random.default_rng([run.seed, run.task_index]))
        held = [p for name in stays for layers in found.values() for layer in layers for p in layer.get(name, ())]
        if not held:
            raise ConfigError("methods.hft.share: too small to draw one matrix of this model. Raise it, or remove hft.")
        for parameter in held:
            parameter.requires_grad_(False)
        learning, total = params.counts(model)
        run.say(
            f"hft: {len(stays)} matrices stay ({sum(p.numel() for p in held):,} weights), "
            f"{learning:,} of {total:,} parameters learn."
        )
        if learning == 0:
            raise ConfigError("methods.hft: nothing is left to train. Lower `share`, or freeze less.")
        return model


#: What learns of each matrix, by its name, for every layer: {"attention": [{…}, …], "mlp": [{…}, …]}.
Layers = dict[str, list[dict[str, list[torch.nn.Parameter]]]]


def matrices(model: torch.nn.Module) -> Layers:
    """The matrices of every layer with their biases; with adapters, the adapted ones with their factors."""
    named = {id(p): name for name, p in params.causal(model).named_parameters()}
    adapters = any(".lora_" in name for name in named.values())
    found: Layers = {"attention": [], "mlp": []}
    for block in params.decoder_layers(model):
        inner = [m for m in block.modules() if "Attention" in type(m).__name__]
        attention = {id(p) for m in inner for p in m.parameters()}
        parts: dict[str, dict[str, list[torch.nn.Parameter]]] = {"attention": {}, "mlp": {}}
        for p in block.parameters():
            name = named[id(p)]
            if not adapters or ".lora_" in name:
                part = parts["attention" if id(p) in attention else "mlp"]
                part.setdefault(_matrix(name), []).append(p)
        for kind, part in parts.items():
            found[kind].append({name: ps for name, ps in part.items() if max(p.dim() for p in ps) > 1})
    return found


def drawn(layers: Layers, share: float, chance: np.random.Generator) -> set[str]:
    """Names of matrices: of each layer ⌊share · n⌋ of n, and one more in as many layers as make up the share."""
    names: set[str] = set()
    for kind in layers.values():
        wanted = [round(share * len(layer), 6) for layer in kind]
        more = [i for i in chance.permutation(len(kind)) if wanted[i] % 1 > 0]
        more = more[: round(sum(count % 1 for count in wanted))]
        for i, layer in enumerate(kind):
            names.update(chance.permutation(sorted(layer))[: int(wanted[i]) + (i in more)].tolist())
    return names


def _matrix(name: str) -> str:
    name = name.split(".lora_")[0]
    for suffix in (".weight", ".bias", ".base_layer"):
        name = name.removesuffix(suffix)
    return name
