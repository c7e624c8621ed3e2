"""PackNet — each task keeps the weights that it changed most; later tasks leave those alone and learn with the rest.

    θ_i = θ⁰_i + Δ_i  for i in M_t,    M_t = the i with the largest |Δ_i| among those that are free
    θ_i = θ⁰_i  for the other free i                       (after Mallya & Lazebnik 2018, arXiv:1711.05769, §3)

θ⁰ = weights before the first task, Δ = change by task t, M_t = what task t owns from then on. A task learns with all
free weights, gives most of them back, and trains those that it kept for the last steps alone. What is owned stays bit
for bit: its gradient is taken away, and it is put back after each step, as momentum and weight decay move it too.
Later tasks use what earlier ones own. `load_run(run, task="a")`, or `retain export RUN --task a`, takes the model as it
was right after task a out of the last stage, bit for bit, from `owners/` in the run directory; so one model serves all
tasks where it is known which task a question is about. Without `task` it is the model after all tasks, in which
weights of later tasks act on earlier ones; the report shows that one.
Deviations from the paper: it prunes θ to 0, which costs a pretrained model abilities; here Δ is pruned, back to the
    pretrained weights. Pretraining counts as the first task of the paper: embeddings, head, norms and biases never
    learn. Retraining goes on in the learning-rate schedule and with the optimizer of the task. What did not change at
    all is given back.
Needs: the task's name when it is asked later.
Cost: gradients of all matrices of the layers are computed; a byte per weight in memory, and per task on disk.
Combine with: replay, distill, freeze, ewc, interpolate.
Conflicts: lora, olora, ilora, slao, shared_lora (an adapter changes all weights of a layer together, so that no part
    can be kept), blocks, bottleneck (what learns is new in every task), subspace and ogd (no step
    obeys both).
Tune: `keep` 0.25–0.5 (the paper's), about 1 / number of tasks; task t gets keep · (1 − keep)^(t−1) of all.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.ownership import MOST_TASKS, largest_changes
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run, withhold
from retain.models import ownership, params


class PackNet(Method):
    """Train, prune and freeze: every task owns weights of its own."""

    family = "isolation"
    paper = "arXiv:1711.05769"
    conflicts = {
        **dict.fromkeys(
            ("lora", "olora", "ilora", "slao"),
            "packnet keeps single weights, and an adapter changes all weights of a layer together",
        ),
        **dict.fromkeys(
            ("blocks", "bottleneck"), "what learns is new in every task, and packnet keeps parts of the old"
        ),
    }
    edits_gradients = True
    turn = Turn.HOLD
    restrains_steps = True
    off = {"keep": 0.0}

    class Config(MethodConfig):
        keep: float = Field(0.25, ge=0, le=1)
        """Share of the free weights of each matrix that a task keeps; 0 is off."""
        retrain: float = Field(0.3, ge=0, lt=1)
        """Share of the task's steps, at its end, in which only what is kept moves (the paper: a third); 0 is none."""

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        shared = _matrices(model)
        for name, parameter in params.trainable(model).items():
            if name not in shared:
                parameter.requires_grad_(False)
        return model

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if run.task_index > MOST_TASKS:
            raise ConfigError(f"methods.packnet: {MOST_TASKS} tasks at most. Begin a new run from the model so far.")
        if _matrices(model).keys() != params.trainable(model).keys():
            raise ConfigError(
                "methods.packnet: more learns than the matrices of layers, so that later tasks would change earlier "
                "ones. List packnet after what unfreezes it."
            )
        self._owners = ownership.kept(run.shared_folder, run.task_index - 1)
        self._pruned = run.restored and bool(self._restored)
        self._moves: params.Tensors = {}  # masks by parameter name; everything outside is held where it started
        for name, parameter in params.trainable(model).items():
            owner = self._owners.get(name, torch.zeros(parameter.shape, dtype=torch.uint8))
            moves = self._restored[name].bool() if self._pruned else owner == 0
            self._moves[name] = moves.to(parameter.device)
        free, total = self._count(), sum(mask.numel() for mask in self._moves.values())
        if not self._pruned and not free:
            raise ConfigError(
                "methods.packnet.keep: earlier tasks own every weight that learns. Begin again with a lower `keep`."
            )
        kind = "kept by this task" if self._pruned else "free"
        run.say(f"packnet: {free:,} of {total:,} weights of the layers are {kind}; all others stay.")

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        withhold(run, self.name, ((p, ~self._moves[name]) for name, p in params.trainable(model).items()))

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        left = min(round(self.config.retrain * run.max_steps), run.max_steps - 1)
        if not self._pruned and run.step + 1 >= run.max_steps - left:
            self._prune(model, run, left)
        self._put_back(model, run)

    def _prune(self, model: torch.nn.Module, run: Run, left: int) -> None:
        """Choose what this task keeps; from here on nothing else moves."""
        free = self._count()
        for name, parameter in params.trainable(model).items():
            start = run.start[name].to(parameter.device)
            self._moves[name] = largest_changes(parameter - start, self._moves[name], self.config.keep)
        self._pruned = True
        what = f"the last {left} steps train them alone" if left else "no step is left to train them alone"
        run.say(f"packnet: {self._count():,} of {free:,} free weights are kept at step {run.step + 1}; {what}.")

    def _put_back(self, model: torch.nn.Module, run: Run) -> None:
        for name, parameter in params.trainable(model).items():
            parameter.copy_(torch.where(self._moves[name], parameter, run.start[name].to(parameter)))

    def _count(self) -> int:
        return sum(int(mask.sum()) for mask in self._moves.values())

    @torch.no_grad()
    def finish_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        if not self._pruned:  # training was stopped before its planned end
            self._prune(model, run, 0)
        self._put_back(model, run)
        for name, mask in self._moves.items():
            owner = self._owners.get(name, torch.zeros(mask.shape, dtype=torch.uint8))
            self._owners[name] = owner.masked_fill(mask.cpu(), run.task_index)
        ownership.keep(self._owners, run.shared_folder, run.task_index)
        return model

    _restored: params.Tensors = {}

    def state_dict(self) -> params.Tensors:
        return {name: mask.to(torch.uint8) for name, mask in self._moves.items()} if self._pruned else {}

    def load_state_dict(self, state: params.Tensors) -> None:
        self._restored = dict(state)


def _matrices(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that tasks share among them: trainable matrices of the decoder layers.

    Raises:
        ConfigError: the model has adapters, or no such matrix learns.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("methods.packnet: an adapter's change cannot be kept in part. Train without adapters.")
    inside = {id(p) for layer in params.decoder_layers(model) for p in layer.parameters() if p.dim() > 1}
    found = {name: p for name, p in params.trainable(model).items() if id(p) in inside}
    if not found:
        raise ConfigError("methods.packnet: no matrix of a layer learns. Freeze less, or remove packnet.")
    return found
