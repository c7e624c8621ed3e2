"""Who a student is held near to: the model as it was, its running average, or another model.

A teacher gives the hidden states and the output head that a divergence is made from (`retain.functional.tiled_head`),
without gradient, in eval mode, and in the precision that the student computes in.
"""

from __future__ import annotations

from typing import Any

import torch

from retain.config import ModelConfig
from retain.errors import ConfigError, ModelError
from retain.functional.tiled_head import Head
from retain.models import params, passes
from retain.models.load import load_model, load_tokenizer


class Teacher:
    """The model in training with other weights in place; a subclass says which."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def weights(self) -> params.Tensors:
        """Its trainable weights, by name, in the type of the model's own."""
        raise NotImplementedError

    def hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Last hidden states [B, T, H]."""
        with torch.no_grad(), passes.precision(self.device), params.evaluating(self.model):
            return params.hidden_states(self.model, inputs, self.weights())

    def answer(self, **inputs: Any) -> Any:
        """The output of the whole model, as it would give it when called; its logits in full precision."""
        with torch.no_grad(), passes.precision(self.device), params.evaluating(self.model):
            output = torch.func.functional_call(params.causal(self.model), self.weights(), (), inputs)
        output.logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        return output

    def head(self) -> Head:
        """Its output head."""
        return Head(*params.head(self.model, self.weights()), *params.logit_rules(self.model))


class Live(Teacher):
    """The model as it is."""

    def weights(self) -> params.Tensors:
        return {}


class Start(Teacher):
    """The model when the task began.

    Where LoRA alone learns the forward pass runs without the adapters, else with the starting weights in place of the
    trainable ones.
    """

    def __init__(self, model: Any, start: params.Tensors) -> None:
        super().__init__(model)
        self._without_adapters = params.begins_at_base(model, start)
        # a start held in full precision must meet its frozen neighbours in theirs
        self._weights = {name: start[name].to(p.dtype) for name, p in params.trainable(model).items()}

    def weights(self) -> params.Tensors:
        return self._weights

    def hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        if not self._without_adapters:
            return super().hidden(inputs)
        off, half = params.adapters_off(self.model), passes.precision(self.device)
        with torch.no_grad(), half, off, params.evaluating(self.model):
            return params.hidden_states(self.model, inputs)


class Average(Teacher):
    """A running average of the weights along training: θ̄ ← decay · θ̄ + (1 − decay) · θ.

    It is held in full precision, in which small steps of a half-precision weight are not lost.

    Args:
        model: the model in training.
        start: where the average begins: its trainable weights, or what `average` was when a run was stopped.
        decay: what the average keeps of itself at every update.
    """

    def __init__(self, model: Any, start: params.Tensors, decay: float) -> None:
        super().__init__(model)
        learning = params.trainable(model)
        wide = {name: torch.promote_types(start[name].dtype, torch.float32) for name in learning}
        self.average = {name: start[name].to(p.device, wide[name], copy=True) for name, p in learning.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model; after every step of the optimizer."""
        for name, p in params.trainable(self.model).items():
            self.average[name].lerp_(p.to(self.average[name].dtype), 1 - self.decay)

    def weights(self) -> params.Tensors:
        learning = params.trainable(self.model)
        return {name: tensor.to(learning[name].dtype) for name, tensor in self.average.items()}


class Other(Teacher):
    """Another model, frozen."""

    def __init__(self, teacher: Any, student: Any) -> None:
        super().__init__(student)
        self.model = teacher.requires_grad_(False).eval().to(self.device)

    def weights(self) -> params.Tensors:
        return {}

    def hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), passes.precision(self.device):
            return params.hidden_states(self.model, inputs)

    @classmethod
    def load(cls, name: str, dtype: str, student: Any, tokenizer: Any, where: str) -> Other:
        """Open a folder or a hub id.

        Args:
            name: as in `model.name`.
            dtype: "auto" (as stored), "float32" or "bfloat16".
            student: the model in training.
            tokenizer: that of the student.
            where: the setting, for messages.

        Raises:
            ConfigError: no such model, another tokenizer, or a head of another size.
        """
        same_tokenizer(name, tokenizer, where)
        try:
            model, _ = load_model(ModelConfig(name=name, dtype=dtype), tokenizer=False)  # type: ignore[arg-type]
        except ModelError as error:
            raise ConfigError(f"{where}: {error}") from error
        theirs, ours = (len(params.head(m)[0]) for m in (model, student))
        if theirs != ours:
            raise ConfigError(
                f"{where}: '{name}' has {theirs} outputs, the model in training {ours}, though their tokenizers "
                "agree. Give a teacher with as many, or `teacher: start`."
            )
        return cls(model, student)


def same_tokenizer(name: str, tokenizer: Any, where: str) -> None:
    """Two models can be compared token by token only when a number means the same token to both.

    Raises:
        ConfigError: the model called `name` has no tokenizer, or another one than `tokenizer`.
    """
    try:
        other = load_tokenizer(name)
    except ModelError as error:
        raise ConfigError(f"{where}: {error}") from error
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if mine != theirs:
        token = min(mine.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))[0]
        raise ConfigError(
            f"{where}: '{name}' has another tokenizer than the model in training ({len(theirs)} and {len(mine)} "
            f"tokens; {token!r} is {theirs.get(token, 'not there')} and {mine.get(token, 'not there')}). "
            "Give a model with the same one, or `teacher: start`."
        )
