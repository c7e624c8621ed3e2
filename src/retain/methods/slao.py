"""SLAO — keeps one adapter for all tasks: each begins where the last one ended, and is then averaged into what remains.

    A⁰ = Qᵀ with Q R = A_lastᵀ,  B⁰ = B_last;  afterwards  A_m ← A,  B_m ← B_m + (B − B_m) / √i

A, B = factors that task i trained, A_last, B_last those of task i − 1, A_m, B_m = the merged ones, ΔW = s·B_m A_m,
which is what the model is after the task ("Merge before Forget", Qiao & Mahdavi 2026, arXiv:2512.23017). The rows of A
begin orthonormal. The first task is plain LoRA.
Deviations from the paper: the previous s·B_m A_m is in the base by then, as adapters are merged between tasks. It is
    taken out by r more rows and columns of the adapter, [B | −B_m] and [A ; A_m], that stay as they are; a kept
    adapter has rank 2r from the second task on. R is chosen with a positive diagonal. As in the paper R is
    dropped, so a task does not begin at the model that was kept: what holds to the start of a task (`ewc`,
    `l2sp`, `distill`) holds to A⁰ and B⁰.
Needs: nothing; acts from the second task on.
Cost: 2r instead of r in the forward pass, and one QR per layer and task; three factors per layer on disk.
Combine with: replay, lora (its settings; without it an adapter of default settings), freeze.
Conflicts: olora (which keeps tasks out of each other's directions), shared_lora (which has a part for each task),
    ilora (which also says what the adapter is at the end of a task), interpolate, subspace and shield (which need
    adapters that begin at zero), packnet (which keeps single weights), blocks (which trains whole ones), ogd (for
    which adapters begin every task alike).
Tune: nothing; `weight: mean` keeps more of early tasks, `weight: last` nothing but the last.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from retain.errors import ConfigError
from retain.functional.single_adapter import merge, merging_weight, orthonormal_rows
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run
from retain.methods.lora import check_factors, check_merged, with_adapter
from retain.models import adapters, params


class SLAO(Method):
    """Single LoRA with orthogonal starts and continual merging."""

    family = "isolation"
    paper = "arXiv:2512.23017"
    adds_parameters = True
    edits_gradients = True
    turn = Turn.HOLD
    restrains_steps = True
    conflicts = {
        "olora": "slao begins a task in the directions of the one before, which olora keeps it out of",
        "ilora": "both say what the adapter is at the end of a task",
        "interpolate": "interpolate needs adapters that begin at zero; those of slao do not",
    }
    off = {"weight": "none"}

    class Config(MethodConfig):
        weight: Literal["sqrt", "mean", "last", "none"] = "sqrt"
        """How much of task i goes into what remains: 1/√i (the paper), 1/i, or 1; none turns the method off."""

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        check_merged(self.name, model)
        return with_adapter(model, run)

    @torch.no_grad()
    def on_model_ready(self, model: Any, run: Run) -> None:
        """Put the last task's factors into the fresh adapter, and what remained of it, negative, beside them."""
        if any("lora_magnitude_vector" in name for name in params.trainable(model)):
            raise ConfigError("methods.slao: with DoRA the change is not a product. Set `lora: {dora: false}`.")
        check_factors(self.name, model)
        pairs = params.lora_pairs(model)
        self._rank = {name: len(pair.A) for name, pair in pairs.items()}
        self._merged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # A_m and B_m of the task before
        if run.task_index == 1:
            return
        last = adapters.kept(run.shared_folder / self.name, run.task_index - 1)
        if _sizes(last) != _sizes(_kept(pairs, {name: pair.B for name, pair in pairs.items()}, self._rank)):
            raise ConfigError(
                "methods.slao: the adapter has other layers, rank or scale than in the task before. "
                "Use the same `lora` and `freeze` settings for all tasks."
            )
        for name, pair in pairs.items():
            a, b, merged = (last[f"{name}.{part}"].to(pair.A) for part in ("A", "B", "merged"))
            self._merged[name] = a, merged
            adapters.widen(model, name, torch.cat([orthonormal_rows(a), a]), torch.cat([b, -merged], dim=1))

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        for name, pair in params.lora_pairs(model).items():
            rank = self._rank[name]
            for gradient in (pair.A.grad, None if pair.B.grad is None else pair.B.grad.T):
                if gradient is not None:
                    gradient[rank:] = 0
        if run.logging_now:
            run.log(f"loss/{self.name}", 0.0)  # it adds no term

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        # weight decay moves weights without a gradient
        for name, pair in params.lora_pairs(model).items():
            if name in self._merged:
                a, merged = self._merged[name]
                pair.A[self._rank[name] :] = a.to(pair.A)
                pair.B[:, self._rank[name] :] = -merged.to(pair.B)

    @torch.no_grad()
    def finish_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        pairs = params.lora_pairs(model)
        share = merging_weight(run.task_index, self.config.weight)
        tuned = {name: pair.B[:, : self._rank[name]].clone() for name, pair in pairs.items()}
        for name, (_, merged) in self._merged.items():
            pairs[name].B[:, : self._rank[name]] = merge(merged, tuned[name], share)
        adapters.keep(_kept(pairs, tuned, self._rank), run.shared_folder / self.name, run.task_index)
        return model


def _kept(pairs: dict[str, params.LoraPair], tuned: params.Tensors, rank: dict[str, int]) -> params.Tensors:
    """What the next task needs of each layer: A (tuned and merged are the same), B as tuned and as merged, and s."""
    found: params.Tensors = {}
    for name, pair in pairs.items():
        found[f"{name}.A"] = pair.A.detach()[: rank[name]]
        found[f"{name}.B"] = tuned[name]
        found[f"{name}.merged"] = pair.B.detach()[:, : rank[name]]
        found[f"{name}.scaling"] = torch.tensor(pair.scaling)
    return found


def _sizes(tensors: params.Tensors) -> dict[str, Any]:
    return {name: tensor.shape if tensor.dim() else float(tensor) for name, tensor in tensors.items()}
