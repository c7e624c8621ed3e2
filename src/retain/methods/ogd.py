"""OGD — steps stay orthogonal to the directions in which right answers of old rows would change.

    g̃ = g − Σ_j ⟨g, v_j⟩ v_j,   θ ← θ* + 𝒫(θ − θ*) after the step     (Farajtabar et al. 2019, arXiv:1910.07104, alg. 1)

v_j = orthonormal directions of ∇f, with f = logit of the right token of an old row (OGD-GTL in the paper), over all
trained weights together; g = gradient of the step, θ* = weights at the task's start, 𝒫 = the same projection. Old
rows are those the user gives as `old`, otherwise rows the model writes itself, and after each task some of its rows;
each gives the logit of one of its learned tokens, drawn at random. Only directions are kept, no row.
Deviations from the paper: the realised step is projected too, as Adam's division and weight decay lead back. Of an
    answer one token is held, not all. As adapters are merged between tasks, directions are those of a factor B that
    begins at zero beside an A that begins every task as it began the first; A itself then has none.
Needs: old rows once: the user's, or written by the model; it acts from the first task on.
Cost: directions so far · trained weights (with LoRA those of B) · 4 bytes in memory and on disk, read four times per
    step, so for LoRA or few trained weights; refused where they would not fit into free memory. A pass per direction.
Combine with: lora, freeze, replay, distill, ewc, interpolate, ilora.
Conflicts: subspace, shield, packnet, mofo, unfreeze (which also say what a step may move); olora, slao, shared_lora
    (whose adapters begin elsewhere in each task); blocks, bottleneck, hft (with which other weights learn in each
    task).
Tune: `directions` 50–200 per task. In bfloat16 weights, rounding lets a little through.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field

from retain.errors import ConfigError
from retain.functional import projection
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run
from retain.models import adapters, machine, params, passes
from retain.models.row_scores import right_logits


class OGD(Method):
    """Orthogonal gradient descent with the realised step projected."""

    family = "gradients"
    paper = "arXiv:1910.07104, alg. 1"
    conflicts = {
        **dict.fromkeys(("subspace", "shield", "packnet", "mofo", "unfreeze"), "both say what a step may move"),
        **dict.fromkeys(("olora", "slao", "shared_lora"), "with it adapters begin elsewhere in each task"),
        **dict.fromkeys(("blocks", "bottleneck", "hft"), "with it other weights learn in each task"),
    }
    edits_gradients = True
    turn = Turn.PROJECT
    restrains_steps = True
    off = {"directions": 0}

    class Config(MethodConfig):
        directions: int = Field(100, ge=0)
        """Directions that each task adds, and old rows before the first task, at most; 0 is off."""

    @torch.no_grad()
    def on_model_ready(self, model: torch.nn.Module, run: Run) -> None:
        """Begin the adapter with the A of the first task: then a direction of B is the same change in each task."""
        folder = run.shared_folder / self.name
        if run.task_index == 1 or not (folder / "00.safetensors").is_file():
            return
        starts = adapters.kept(folder, 0)
        for name, a in _anew(model).items():
            a.copy_(_same(name, starts, a.shape))

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        folder = run.shared_folder / self.name
        held = self._check(model, run)
        there = (folder / f"{run.task_index:02d}.safetensors").is_file() and (run.restored or run.task_index > 1)
        PartialState().wait_for_everyone()  # all have looked before one writes
        if not there:
            self._check_memory(held, 2 * self.config.directions, run)
            rows = run.old_rows(model, self.config.directions)
            none = [p.new_zeros(0, *p.shape, dtype=_wide(p)) for p in held.values()]
            found = self._extended(none, model, held, rows, run, "directions of old rows")
            if not len(found[0]):
                raise ConfigError("methods.ogd: no old row has a direction. Give `old:` rows, or other ones.")
            adapters.keep({name: run.start[name] for name in _anew(model)}, folder, 0)
            adapters.keep(dict(zip(held, found)), folder, run.task_index)
            del found
            PartialState().wait_for_everyone()
        # from the file also where they were just found: every process, and a resumed one, has the same bits
        known = adapters.kept(folder, run.task_index)
        kept = [_same(name, known, p.shape, 1).to(p.device) for name, p in held.items()]
        if len(kept) < len(known):  # a part of each direction: no longer orthonormal
            kept = projection.more_directions([k[:0] for k in kept], zip(*kept), len(kept[0]))
        if there:
            self._check_memory(held, len(kept[0]), run)
        self._directions = kept
        self._held = [(p, run.start[name].to(p.device, _wide(p))) for name, p in held.items()]
        size = sum(p.numel() for p in held.values())
        run.say(f"ogd: {len(kept[0])} directions of {size:,} weights are held.")

    def _check(self, model: Any, run: Run) -> dict[str, torch.nn.Parameter]:
        """What has directions: all that is trained, of an adapter that is merged after the task B alone."""
        anew = _anew(model)
        if hasattr(model, "peft_config") and not params.lora_pairs(model):
            raise ConfigError("methods.ogd: no LoRA factor is trained. Set `lora: {kind: lora}`, and freeze less.")
        if any(".lora_" in name for name in params.outside_lora(model)):
            raise ConfigError("methods.ogd: DoRA's sizes begin anew in each task. Set `lora: {dora: false}`.")
        if anew and not passes.new_adapters(model, run.start):
            raise ConfigError("methods.ogd: an adapter has learned before. Merge it, and begin with a new one.")
        return {name: p for name, p in params.trainable(model).items() if name not in anew}

    def _check_memory(self, held: dict[str, torch.nn.Parameter], known: int, run: Run) -> None:
        """Refuse what would not fit: so many directions more in memory, and those of this task, made at its end."""
        first, size = next(iter(held.values())), sum(p.numel() for p in held.values())
        total = known + (self.config.directions if run.new_rows is not None else 0)
        needed, free = total * size * _wide(first).itemsize, machine.spare_bytes(first.device.type)
        if needed > free:
            raise ConfigError(
                f"methods.ogd.directions: {total} times {size:,} weights take {needed / 1e9:.3g} GB more, and "
                f"{free / 1e9:.3g} GB are free. Lower it, use `lora` with a smaller `r`, or freeze more."
            )

    def _extended(
        self, known: list[torch.Tensor], model: Any, held: dict[str, Any], rows: Any, run: Run, label: str
    ) -> list[torch.Tensor]:
        """Known directions and those of rows."""
        most, starts = self.config.directions, {name: run.start[name] for name in _anew(model)}
        rows = rows.select(np.random.default_rng([run.seed, run.task_index]).permutation(len(rows))[:most])
        with params.evaluating(model), adapters.beginning(model, starts) as begun:
            learning = [begun.get(name, p) for name, p in held.items()]
            batches = run.track(itertools.islice(self._tokens(rows, run), most), label, most)
            gradients = (passes.gradients(model, learning, [one], right_logits)[0] for one in batches)
            return projection.more_directions(known, gradients, most)

    def _tokens(self, rows: Any, run: Run) -> Iterator[passes.Batch]:
        """Rows one by one with a single learned token each; further ones of the same rows where there are few rows."""
        random, alone = np.random.default_rng([run.seed, run.task_index, 1]), list(run.batches(rows, 1))
        places = [1 + random.permutation((y[0, 1:] != -100).nonzero()[:, 0].cpu().numpy()) for _, y in alone]
        for turn in range(max(map(len, places), default=0)):
            for (inputs, labels), drawn in zip(alone, places):
                if turn < len(drawn):
                    only = torch.full_like(labels, -100)
                    only[0, drawn[turn]] = labels[0, drawn[turn]]
                    yield inputs, only

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        reached = [(p.grad, part) for (p, _), part in zip(self._held, self._directions) if p.grad is not None]
        slopes = [slope for slope, _ in reached]
        before = projection.dot(slopes, slopes) if run.logging_now else 0.0
        inside = projection.take_out(slopes, [part for _, part in reached])
        if run.logging_now:  # what gradient descent would have gained there in this step, to first order, in nats
            square = float(inside.square().sum())
            run.log(f"loss/{self.name}", run.learning_rate * square)
            run.log(f"{self.name}/share", square / before if before else 0.0)

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        if not len(self._directions[0]):
            return
        changes = [p.to(start.dtype) - start for p, start in self._held]  # from the start: rounding does not add up
        projection.take_out(changes, self._directions)
        for (parameter, start), change in zip(self._held, changes):
            parameter.copy_(start + change)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if run.new_rows is None:
            return
        held = {name: p for name, p in params.trainable(model).items() if name not in _anew(model)}
        found = self._extended(self._directions, model, held, run.new_rows, run, "directions of this task")
        adapters.keep(dict(zip(held, found)), run.shared_folder / self.name, run.task_index + 1)


def _anew(model: Any) -> dict[str, torch.nn.Parameter]:
    """Factors A by name where each task gets a fresh adapter; on a quantised base one goes on learning."""
    if getattr(params.causal(model), "is_quantized", False):
        return {}
    factors = {id(pair.A) for pair in params.lora_pairs(model).values()}
    return {name: p for name, p in params.trainable(model).items() if id(p) in factors}


def _same(name: str, tensors: params.Tensors, shape: torch.Size, first: int = 0) -> torch.Tensor:
    """A tensor of earlier tasks whose shape, without its first axes, is that of a parameter of this one."""
    if name not in tensors or tensors[name].shape[first:] != shape:
        raise ConfigError(
            f"methods.ogd: earlier tasks left no directions for '{name}', or of another shape. Use the same model, "
            "`lora` and `freeze` settings for all tasks."
        )
    return tensors[name]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
