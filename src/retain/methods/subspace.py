"""Subspace — every step stays outside the directions that carry what the model knew.

    θ ← θ* + 𝒫(θ − θ*),  𝒫(Δ) = (I − UUᵀ) Δ (I − VVᵀ)  after every step     (Nayak et al. 2025, arXiv:2504.07097, eq. 4)

θ* = weight at the start of the task, U and V its singular directions with the largest singular values (OSF). With
`energy`, V also holds the directions of old inputs (GPM, arXiv:2103.09762), so that ΔW x = 0 for what they span; a
streamed task adds none, as its rows are not read again.
With LoRA, UᵀB = 0 and AV = 0, hence the product s·BA stays outside; A begins there.
Deviations from the paper: the realised step is projected as well as the gradients: of these alone Adam's division and
    weight decay lead back into the subspace. (Both of Adam's moments must see the same gradients. Projecting the first
    alone gives weights of a small second moment steps many times the learning rate.) U and V are closed off each for
    itself, not only their outer product, and every layer has the same share. Embeddings, head and norms are not held;
    see freeze.
Needs: nothing; with `energy` old rows once.
Cost: one SVD per matrix and task, two pairs of thin products per matrix and step, with `energy` a pass over old rows; a
    copy of the trained matrices, and the directions held.
Combine with: lora, freeze, replay, distill; list it after mofo and unfreeze, so that its projection comes last.
Conflicts: slao, shared_lora (whose adapters do not begin at zero), blocks and bottleneck (which move no old weight),
    shield and packnet (which hold single weights: no step obeys both), ogd (which holds other directions).
Tune: `share` 0.5–0.9, more keeps more; `energy` 0.9–0.99. In bfloat16 weights, rounding lets a little through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import Field
from safetensors.torch import load_file, save_file

from retain.errors import ConfigError
from retain.functional import projection
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run
from retain.models import params, passes
from retain.models.params import Tensors


class Subspace(Method):
    """Orthogonal subspace fine-tuning with the realised step projected."""

    family = "gradients"
    paper = "arXiv:2504.07097"
    conflicts = {
        "slao": "subspace needs adapters that begin at zero; those of slao do not",
        "shield": "subspace holds directions and shield single columns: no step obeys both",
        "packnet": "subspace holds directions and packnet single weights: no step obeys both",
    }
    edits_gradients = True
    turn = Turn.PROJECT
    restrains_steps = True
    off = {"share": 0.0, "energy": 0.0}

    class Config(MethodConfig):
        share: float = Field(0.5, ge=0, le=1)
        """Share of each weight's singular directions that is kept fixed, largest first; 0 keeps none."""
        energy: float = Field(0.0, ge=0, lt=1)
        """Share of the energy of old inputs whose directions are kept out of each weight's input; 0 is off."""
        samples: int = Field(128, ge=1)
        """Rows that the directions of inputs are taken from, at most."""
        batch_size: int = Field(8, ge=1)
        """Rows per pass over them; the directions do not depend on it."""

    def on_model_ready(self, model: torch.nn.Module, run: Run) -> None:
        """Find the directions, and take an adapter's A out of them."""
        layers = passes.linear_layers(model)
        self._check(model, layers)
        if self.config.energy:
            run.say_unread(self.name, "the directions of its inputs are not held in later tasks")
        self._known = self._old_directions(model, run, layers) if self.config.energy else {}
        self._sides: list[tuple[torch.nn.Parameter, bool, Any, Any]] = []  # (θ, whether from 0, U, V)
        free = []
        for layer in layers:
            left, right = self._bases(layer, layer.weight.detach())
            free.append(1 - right.shape[1] / len(right))
            if layer.pair:
                a, b = layer.pair.A, layer.pair.B
                self._sides += [(b, True, left.to(_dtype(b)), None), (a, True, None, right.to(_dtype(a)))]
                with torch.no_grad():  # B is 0, so this changes nothing but where A may go from here
                    a.copy_(self._inside(a, None, None, self._sides[-1][-1]))
            else:
                left, right = (side.to(_dtype(layer.weight)) for side in (left, right))
                self._sides.append((layer.weight, False, *((right, left) if layer.transposed else (left, right))))
        run.say(f"subspace: {len(layers)} weights are held; {sum(free) / len(free):.0%} of input directions stay free.")

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        names = {id(p): name for name, p in params.trainable(model).items()}
        self._held: list[tuple[torch.nn.Parameter, torch.Tensor | None, Any, Any]] = []  # (θ, θ*, U, V)
        for parameter, zero, left, right in self._sides:
            start = None if zero else run.start[names[id(parameter)]].to(parameter.device)
            self._held.append((parameter, start, left, right))

    def _check(self, model: torch.nn.Module, layers: list[passes.Linear]) -> None:
        if not layers:
            raise ConfigError("methods.subspace: no linear layer learns. Remove subspace, or freeze less.")
        if any("magnitude" in name for name in params.outside_lora(model)):
            raise ConfigError("methods.subspace: DoRA scales whole rows, which nothing can hold. Set `dora: false`.")
        if not passes.new_adapters(model, params.trainable(model)):
            raise ConfigError("methods.subspace: an adapter has learned before. Merge it, and begin with a new one.")
        if self.config.share and not all(layer.weight.is_floating_point() for layer in layers):
            raise ConfigError("methods.subspace.share: a quantised weight has no SVD. Set `share: 0, energy: 0.95`.")

    def _bases(self, layer: passes.Linear, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(U [out, k], V [in, l]) in float64; the directions of old inputs are in V."""
        if self.config.share:
            left, right = projection.large_directions(layer.oriented(weight), self.config.share)
        else:
            left, right = (torch.zeros(n, 0, dtype=torch.float64, device=weight.device) for n in layer.shape)
        if layer.name in self._known:
            right = projection.joined(right, self._known[layer.name].to(right))
        return left, right

    def _old_directions(self, model: torch.nn.Module, run: Run, layers: list[passes.Linear]) -> Tensors:
        saved = self._path(run, run.task_index)
        there = saved.is_file() and (run.restored or run.task_index > 1)
        PartialState().wait_for_everyone()  # all have looked before one writes
        if there:
            return load_file(saved)
        found = self._directions(model, run, layers, run.old_rows(model, self.config.samples), {})
        _save(found, saved)
        return found

    def _directions(self, model: Any, run: Run, layers: list[passes.Linear], rows: Any, known: Tensors) -> Tensors:
        rows = rows.select(range(min(len(rows), self.config.samples)))
        sums = passes.input_sums(model, layers, run.batches(rows, self.config.batch_size), True, skip_first=True)
        return {n: projection.input_directions(s, self.config.energy, known.get(n)).float() for n, s in sums.items()}

    def _path(self, run: Run, index: int) -> Path:
        return run.shared_folder / "subspace" / f"{index:02d}.safetensors"

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        for parameter, _, left, right in self._held:
            if parameter.grad is not None:
                slope = parameter.grad.to(_dtype(parameter.grad))
                parameter.grad.copy_(projection.off_subspace(slope, left, right))

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        slopes, undone = [], []
        for parameter, start, left, right in self._held:
            if parameter.grad is None:
                continue
            inside = self._inside(parameter, start, left, right)
            if run.logging_now:
                slopes.append(parameter.grad)
                undone.append(inside - parameter)
            parameter.copy_(inside)
        if run.logging_now:  # what the projection costs the new task in this step, to first order, in nats
            run.log(f"loss/{self.name}", projection.dot(slopes, undone))

    def _inside(self, parameter: Any, start: Any, left: Any, right: Any) -> torch.Tensor:
        """θ* + 𝒫(θ − θ*): from the start, so that rounding does not add up."""
        wide = parameter.detach().to(_dtype(parameter))
        if start is None:
            return projection.off_subspace(wide, left, right)
        return start + projection.off_subspace(wide - start, left, right)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if not self.config.energy or run.shared is None or run.new_rows is None:
            return
        with params.evaluating(model):
            found = self._directions(model, run, passes.linear_layers(model), run.new_rows, self._known)
        _save(self._known | found, self._path(run, run.task_index + 1))


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _save(tensors: Tensors, path: Path) -> None:
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial)
        partial.replace(path)
