"""O-LoRA — learns each task in directions that the adapters of earlier tasks do not use.

    L = L_new + strength · Σ_i ‖A_i Aᵀ‖_F²                               (Wang et al. 2023, arXiv:2310.14152)

A = the adapter's factor [r, in] in training, A_i = that of earlier task i in the same layer; the sum also runs over
layers. At 0 the rows of A are orthogonal to those of all A_i, so this task's ΔW = s·BA reads other directions of the
input than theirs. Earlier adapters are merged into the base, which is their sum, and do not move.
Deviations from the paper: `form: squared` is the penalty of the paper, `absolute` that of its released code,
    Σ|A_i Aᵀ|. By default both are scaled so that the mean over pairs and layers is 1 for unrelated random factors, and
    one strength means the same on every model; `normalise: false` is the plain sum. The second term of the
    code, on the norm of the new factors, is left out: `l2sp` holds ΔW itself. The first task has no earlier ones
    and is plain LoRA: nothing protects what the model could do before.
Needs: nothing; acts from the second task on.
Cost: O(r² · in · tasks) per layer and step; r·in stored weights per layer and earlier task.
Combine with: replay, distill, lora (its settings; without it an adapter of default settings).
Conflicts: slao and shared_lora (which begin a task in the directions of the one before), packnet (which keeps
    single weights), blocks (which trains whole ones), ogd (with which A begins every task alike).
Tune: `strength` 0.1–10; watch `loss/olora`, which starts at about strength and should fall.
"""

from __future__ import annotations

from typing import Any

import torch

from retain.errors import ConfigError
from retain.functional.overlap import Form, chance_scale, overlap, overlap_gradient
from retain.methods.base import Method, Strength
from retain.methods.context import Run
from retain.methods.lora import check_factors, check_merged, with_adapter
from retain.models import adapters, params


class OLoRA(Method):
    """Orthogonal subspaces for the adapters of a sequence of tasks."""

    family = "isolation"
    paper = "arXiv:2310.14152"
    adds_parameters = True
    edits_gradients = True
    boosts = True
    conflicts = {"slao": "slao begins a task in the directions of the one before, which olora keeps it out of"}

    class Config(Strength):
        strength: float = 0.5
        """Weight of the penalty; 0 is off."""
        form: Form = "squared"
        """Squared products of rows (the paper), or their absolute values (its released code)."""
        normalise: bool = True
        """Scale the penalty to about 1 for unrelated factors; false is the plain sum over pairs and layers."""

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        check_merged(self.name, model)
        return with_adapter(model, run)

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        check_factors(self.name, model)
        earlier = [adapters.kept(run.shared_folder / self.name, task) for task in range(1, run.task_index)]
        names = {id(p): name for name, p in params.trainable(model).items()}
        found: list[tuple[params.LoraPair, torch.Tensor, list[torch.Tensor]]] = []
        for name, pair in params.lora_pairs(model).items():
            mine = [tensors[name].to(pair.A.device) for tensors in earlier if name in tensors]
            if any(a.shape[1] != pair.A.shape[1] for a in mine):
                raise ConfigError(f"methods.olora: '{name}' has another width than in an earlier task. Use one model.")
            if mine:
                found.append((pair, run.start[names[id(pair.A)]], mine))
        if earlier and not found:
            raise ConfigError(
                "methods.olora: no layer has an adapter now and in an earlier task. Use the same targets."
            )
        self._weight = 1 / sum(len(mine) for _, _, mine in found) if self.config.normalise and found else 1.0
        self._pairs = [(pair, torch.cat([self._scaled(a, start) for a in mine])) for pair, start, mine in found]

    def _scaled(self, earlier: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        if not self.config.normalise:
            return earlier
        sizes = (len(start), float(start.norm()), len(earlier), float(earlier.norm()))
        return earlier * chance_scale(*sizes, start.shape[1], self.config.form)

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        c = self.config
        if run.logging_now:
            value = sum(float(overlap(pair.A, others, c.form)) for pair, others in self._pairs)
            run.log(f"loss/{self.name}", self.boost * c.strength * self._weight * value)
        for pair, others in self._pairs:
            if pair.A.grad is not None:
                slope = overlap_gradient(pair.A, others, c.form)
                pair.A.grad.add_(slope.to(pair.A.grad.dtype), alpha=self.boost * c.strength * self._weight)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        factors = {name: pair.A.detach() for name, pair in params.lora_pairs(model).items()}
        adapters.keep(factors, run.shared_folder / self.name, run.task_index)
