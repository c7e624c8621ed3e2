"""I-LoRA — a fast adapter learns, a slow one follows it, steadies it, and is what remains.

    θ_slow ← decay · θ_slow + (1 − decay) · θ_fast,   L = L_new + consistency · ‖h_fast − h_slow‖² / H

after every step, and on replayed rows (Ren et al. 2024, arXiv:2402.18865). θ = factors A and B of the adapter, h =
last hidden states [H] where a supervised token is predicted; L_new holds the cross-entropy of the replayed rows too.
Both begin at the same weights. At the end of the task the slow adapter takes the place of the fast one.
Deviations from the paper: the states of the last layer only, where the paper's code takes all layers. That code
    averages the fast adapter with itself, so its slow one never moves, and pulls to the larger of the two states; this
    follows the equations. As adapters are merged between tasks, the next fast adapter starts at the slow one. Other
    trained weights are averaged in the same way. Means of A and of B are not the mean of BA.
Needs: nothing but the task's rows; better with `replay`.
Cost: one copy of the trainable weights; one more forward pass over the rows that the consistency applies to.
Combine with: replay (as in the paper; without it the consistency applies to the new rows), label_smoothing, lora
    (its settings; without it an adapter of default settings).
Conflicts: slao (which also says what the adapter is at the end of a task), packnet (which keeps single
    weights), blocks (which trains whole ones), ogd (whose directions are those of the fast adapter's end).
Tune: `decay` about 1 − 10 / steps, so that the slow adapter arrives; `consistency` 0.1–10.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Batch, Run
from retain.methods.lora import with_adapter
from retain.models import params


class ILoRA(Method):
    """Interpolation-based LoRA: two memories of different speed."""

    family = "isolation"
    paper = "arXiv:2402.18865"
    adds_parameters = True
    swaps_weights = True
    conflicts = frozenset({"slao"})
    off = {"decay": 0.0, "consistency": 0.0}

    class Config(MethodConfig):
        decay: float = Field(0.99, ge=0, lt=1)
        """What the slow adapter keeps of itself at every step; 0 makes it the fast one."""
        consistency: float = Field(1.0, ge=0)
        """Weight of the distance between the hidden states of the two."""
        rows: Literal["auto", "replay", "all"] = "auto"
        """Where the consistency applies; auto is the replayed rows when there are any, otherwise all."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.slow: params.Tensors = {}

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        return with_adapter(model, run)

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        rows = self.config.rows
        if rows == "replay" and not run.has_replay:
            raise ConfigError("methods.ilora.rows: 'replay' without replayed rows. Add `replay`, or use 'all'.")
        self._replay_only = run.has_replay and rows != "all"
        learning = params.trainable(model)
        if run.restored and self.slow.keys() == learning.keys():
            self.slow = {name: self.slow[name].to(p.device) for name, p in learning.items()}
        else:
            self.slow = params.snapshot(learning)

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        chosen = batch.source > 0 if self._replay_only else torch.ones_like(batch.labels[:, 0], dtype=torch.bool)
        if len(chosen) != len(batch.labels):
            raise ConfigError(
                "methods.ilora.rows: rows are flattened by padding-free packing, so new and replayed ones "
                "cannot be told apart. Set `rows: all` or `padding_free: false`."
            )
        mask = batch.supervised & chosen[:, None]
        if self.config.consistency == 0 or not bool(mask.any()):
            return None
        learning = params.trainable(run.model)
        slow = {name: tensor.to(learning[name].dtype) for name, tensor in self.slow.items()}
        inputs = {
            key: value[chosen] if torch.is_tensor(value) and value.shape[:1] == chosen.shape else value
            for key, value in batch.inputs.items()
        }
        with torch.no_grad(), params.evaluating(run.model):
            target = params.hidden_states(run.model, inputs, slow)[:, :-1][mask[chosen]]
        fast = batch.hidden[:, :-1][mask]
        wide = torch.promote_types(fast.dtype, torch.float32)
        return self.config.consistency * (fast.to(wide) - target.to(wide)).square().mean(-1).sum()

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        arrived = 1 - self.config.decay**run.max_steps
        if run.step == 0 and arrived < 0.8:
            run.say(
                f"ilora: in {run.max_steps} steps the slow adapter, which remains, goes {arrived:.0%} of the way; "
                f"`decay: {max(0.0, 1 - 10 / run.max_steps):.3g}` would take it there."
            )
        for name, p in params.trainable(model).items():
            self.slow[name].lerp_(p.to(self.slow[name].dtype), 1 - self.config.decay)

    @torch.no_grad()
    def finish_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        for name, p in params.trainable(model).items():
            p.copy_(self.slow[name])
        return model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.slow)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.slow = state
