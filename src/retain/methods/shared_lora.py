"""Shared-LoRA — one part of the adapter goes on learning over all tasks, beside a fresh part for each.

    ΔW_i = s (B_i A_i + B A − B⁰ A⁰)                         (two adapters, each as in Hu et al. 2021, arXiv:2106.09685)

A_i, B_i = the part of task i alone, as `lora` sets it, with its own rank and layers where `domains` says so; A, B =
the shared part, which begins at A⁰, B⁰, where the task before left it (B⁰ = 0 in the first). What is common to the
tasks has one place of rank r to gather in, however many there are.
Deviations from the paper: two adapters in one, as their product is one of rows and columns side by side; it has one
    scale s and one dropout, those of `lora`. As adapters are merged between tasks, B⁰A⁰ is in the base by then: it is
    taken out by r more rows and columns that stay as they are, so that every task begins at the model that was kept.
Needs: nothing.
Cost: r more rows and columns, 2r from the second task on; two factors per layer and task on disk.
Combine with: lora (without it a part of default settings), replay, distill, freeze, ewc, ilora.
Conflicts: olora (which keeps tasks out of each other's directions), slao (which has one adapter for all tasks),
    interpolate, subspace and shield (which need adapters that begin at zero), packnet (which keeps single weights),
    blocks (which trains whole ones), ogd (for which adapters begin every task alike).
Tune: `r` as for one task or smaller; `learns: first` learns the shared part in the first task and leaves it.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run
from retain.methods.lora import LoRA, check_factors, check_merged, with_adapter
from retain.models import adapters, params


class SharedLoRA(Method):
    """A part of the adapter for all tasks, and one for each."""

    family = "isolation"
    paper = "arXiv:2106.09685, eq. 3"
    adds_parameters = True
    adds_on_top = 1
    edits_gradients = True
    turn = Turn.HOLD
    restrains_steps = True
    conflicts = {
        "olora": "olora keeps tasks out of each other's directions, shared_lora learns those that they share",
        "slao": "slao has one adapter for all tasks, shared_lora a part for each",
        "interpolate": "interpolate needs adapters that begin at zero; those of shared_lora do not",
        "subspace": "subspace needs adapters that begin at zero; those of shared_lora do not",
        "shield": "shield needs adapters that begin at zero; those of shared_lora do not",
        "packnet": "packnet keeps single weights, and an adapter changes all weights of a layer together",
        "blocks": "both bring weights of their own and hold the rest",
    }
    off = {"r": 0}

    class Config(MethodConfig):
        r: int = Field(8, ge=0)
        """Rank of the shared part; 0 turns it off."""
        targets: Literal["qv", "attention", "all"] | list[str] = "all"
        """Its layers: q and v, all of attention, all linear layers, or module names."""
        learns: Literal["always", "first"] = "always"
        """Whether it learns in every task, or in the first alone."""

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        check_merged(self.name, model)
        model = with_adapter(model, run)
        self._own = _ranks(model)  # of the task's part, by layer
        self._learning = self.config.learns == "always" or run.task_index == 1
        if not self._learning:
            run.say("shared_lora: learned in the first task, and stays as it is in this one.")
            return model
        name, config = next(iter(model.peft_config.items()))
        if config.peft_type != "LORA" or config.use_dora or config.use_rslora:
            raise ConfigError(
                "methods.shared_lora: needs plain factors to stand beside, no DoRA, rsLoRA or other kind of adapter. "
                "Set `lora: {kind: lora, dora: false}`."
            )
        base: Any = model.unload()  # nothing is lost: the task's part is fresh
        shared: Any = LoRA(r=self.config.r, targets=self.config.targets).prepare_model(base, run)
        layers = set(_ranks(shared))
        base = shared.unload()
        joint = copy.deepcopy(config)
        ranks = {
            layer: self._own.get(layer, 0) + self.config.r * (layer in layers) for layer in layers | set(self._own)
        }
        joint.target_modules = set(ranks)
        joint.rank_pattern = ranks
        joint.alpha_pattern = {layer: config.lora_alpha / config.r * rank for layer, rank in ranks.items()}
        from peft import get_peft_model

        torch.manual_seed(run.seed + run.task_index)
        self._shared = layers
        return get_peft_model(base, joint, adapter_name=name)

    def on_model_ready(self, model: torch.nn.Module, run: Run) -> None:
        self._parts: dict[str, tuple[params.LoraPair, slice]] = {}
        self._kept: params.Tensors = {}
        self._still: dict[str, params.Tensors] = {}
        if run.task_index > 1:
            self._kept = adapters.kept(run.shared_folder / self.name, run.task_index - 1)
        if self._learning:
            self._begin(model)

    @torch.no_grad()
    def _begin(self, model: Any) -> None:
        """Put what the last task left into the shared part, and the same, negative, beside it."""
        check_factors(self.name, model)
        for name, pair in params.lora_pairs(model).items():
            own, rank = self._own.get(name, 0), self.config.r
            if name in self._shared and f"{name}.A" in self._kept:
                a, b = self._kept[f"{name}.A"].to(pair.A), self._kept[f"{name}.B"].to(pair.B)
                if len(a) != rank or a.shape[1] != pair.A.shape[1] or len(b) != len(pair.B):
                    raise ConfigError(
                        f"methods.shared_lora: '{name}' had another rank or size in the task before. "
                        "Use the same model and `r` for all tasks."
                    )
                b = b * (float(self._kept[f"{name}.scaling"]) / pair.scaling)
                adapters.widen(model, name, torch.cat([pair.A[:own], a, a]), torch.cat([pair.B[:, :own], b, -b], dim=1))
                self._still[name] = {"A": a, "B": -b}
        self._parts = {
            name: (pair, slice(self._own.get(name, 0), self._own.get(name, 0) + self.config.r))
            for name, pair in params.lora_pairs(model).items()
            if name in self._shared
        }

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        for name in self._still:
            pair, part = self._parts[name]
            for gradient in (pair.A.grad, None if pair.B.grad is None else pair.B.grad.T):
                if gradient is not None:
                    gradient[part.stop :] = 0
        if run.logging_now:
            run.log(f"loss/{self.name}", 0.0)  # it adds no term

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        # weight decay moves weights without a gradient
        for name, still in self._still.items():
            pair, part = self._parts[name]
            pair.A[part.stop :] = still["A"].to(pair.A)
            pair.B[:, part.stop :] = still["B"].to(pair.B)

    @torch.no_grad()
    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        left = dict(self._kept)
        for name, (pair, part) in self._parts.items():
            left[f"{name}.A"], left[f"{name}.B"] = pair.A[part], pair.B[:, part]
            left[f"{name}.scaling"] = torch.tensor(pair.scaling)
        adapters.keep(left, run.shared_folder / self.name, run.task_index)


def _ranks(model: Any) -> dict[str, int]:
    """Rank of the adapter in each layer that has one."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, m) for name, m in params.causal(model).named_modules() if isinstance(m, LoraLayer)]
    return {name: int(next(iter(layer.r.values()))) for name, layer in layers}
