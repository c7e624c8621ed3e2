"""Freeze — keeps chosen parts of the model exactly as they were.

    θ_i = θ*_i  for every frozen i          (layer freezing as in Zheng et al. 2025, arXiv:2501.13453)

θ* = weights at the start, i runs over single weights. The bottom layers hold general features and the top ones
the mapping to answers; freezing from the bottom keeps the former bit for bit.
Deviations from the paper: the share, the components and name patterns are settings and are joined together.
Needs: nothing.
Cost: none; frozen weights need no gradient and no optimizer state.
Combine with: anything; with `lora` the adapters inside frozen layers are frozen as well.   Conflicts: none.
Tune: `share` 0.5–0.8 for models of 1–7 billion parameters, more for larger ones; `{share: auto, similarity: 0.7}` takes
    the middle of what is recommended for the size, more where the new data is less like the old.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from retain.errors import ConfigError
from retain.functional.freezing import SMALLEST, recommended_share
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import params

Component = Literal["attention", "mlp", "embeddings", "norms", "head"]


class Freeze(Method):
    """Freezing by share of layers, by component, and by pattern."""

    family = "isolation"
    paper = "arXiv:2501.13453"
    off = {"share": 0.0, "components": [], "patterns": []}

    class Config(MethodConfig):
        share: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
        """Share of the layers to freeze, counted from the bottom; all below goes with them, embeddings of tokens and of
        positions. `auto` goes by the size of the model and `similarity`."""
        similarity: float | None = Field(None, ge=0, le=1)
        """For `share: auto`: how much the new data is like what the model knows; 1 is the same."""
        components: list[Component] = []
        """Parts to freeze in every layer: attention, mlp, embeddings, norms, head."""
        patterns: list[str] = []
        """Regular expressions on parameter names; one that matches nothing is an error."""

        @model_validator(mode="after")
        def _similarity_with_auto(self) -> Freeze.Config:
            if (self.share == "auto") != (self.similarity is not None):
                raise ValueError("`share: auto` and `similarity` (0 to 1) go together; set both or neither")
            return self

    def prepare_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        if self.config.share == "auto":
            run.say(self._advice(model))
        for name in self.frozen(model):
            params.causal(model).get_parameter(name).requires_grad_(False)
        learning, total = params.counts(model)
        run.say(f"freeze: {learning:,} of {total:,} parameters stay trainable ({learning / total:.1%}).")
        if learning == 0:
            raise ConfigError("methods.freeze: nothing is left to train. Lower `share`, or freeze fewer components.")
        return model

    def _share(self, model: Any) -> tuple[float, float, float]:
        """(share to freeze, from, to): one number three times, or what is recommended for the size and the likeness."""
        if self.config.share != "auto":
            return self.config.share, self.config.share, self.config.share
        low, high = recommended_share(params.causal(model).num_parameters(), self.config.similarity)
        return (low + high) / 2, low, high

    def _advice(self, model: Any) -> str:
        size, layers = params.causal(model).num_parameters(), len(params.decoder_layers(model))
        share, low, high = self._share(model)
        small = ", the range for 1–7 B as there is none below" if size < SMALLEST else ""
        return (
            f"freeze: share {share:.3g} (of {low:g}–{high:g}{small}) for {size / 1e9:.3g} B parameters and similarity "
            f"{self.config.similarity:g}: the lowest {round(share * layers)} of {layers} layers."
        )

    def frozen(self, model: torch.nn.Module) -> set[str]:
        """Names of the parameters that the settings freeze.

        Raises:
            ConfigError: a pattern or component that matches no parameter.
        """
        whole = params.causal(model)
        layers = params.decoder_layers(model)
        by_id = {id(p): name for name, p in whole.named_parameters()}

        def of(*modules: torch.nn.Module | None) -> set[str]:
            return {by_id[id(p)] for m in modules if m is not None for p in m.parameters() if id(p) in by_id}

        names: set[str] = set()
        bottom = round(self._share(model)[0] * len(layers))
        if bottom:
            names |= of(*params.input_modules(model), *layers[:bottom])
        for component in self.config.components:
            found = of(*_component(whole, layers, component))
            if not found:
                raise ConfigError(
                    f"methods.freeze.components: '{component}' matches nothing in {type(whole).__name__}. "
                    "Use `patterns` with this model's parameter names."
                )
            names |= found
        for pattern in self.config.patterns:
            found = {name for name in by_id.values() if re.search(pattern, name)}
            if not found:
                raise ConfigError(
                    f"methods.freeze.patterns: '{pattern}' matches no parameter name. "
                    f"Names look like '{next(iter(by_id.values()))}'."
                )
            names |= found
        return names


def _component(whole: Any, layers: torch.nn.ModuleList, component: str) -> list[torch.nn.Module | None]:
    """Modules of a component, told by their class, because attribute names differ between families."""
    if component == "embeddings":
        return [*params.input_modules(whole)]
    if component == "head":
        return [whole.get_output_embeddings()]
    attention = [m for b in layers for m in b.modules() if "Attention" in type(m).__name__]
    norms = [m for m in whole.modules() if "Norm" in type(m).__name__]
    if component == "attention":
        return list(attention)
    if component == "norms":
        return list(norms)
    taken = {id(inner) for m in (*attention, *norms) for inner in m.modules()}
    return [m for b in layers for m in b.modules() if not list(m.children()) and id(m) not in taken]
