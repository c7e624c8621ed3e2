"""SDFT — learns from the model's own answers, corrected by itself with the right answer in view.

    L = Σ_t KL(π(· | x, y_<t) ‖ π̄(· | x, c, y_<t)),  y ∼ π(· | x),  π̄ ← (1 − rate) π̄ + rate · π

(Self-Distillation Fine-Tuning, Shenfeld et al. 2026, arXiv:2601.19897.) x = prompt, c = the row's answer, shown to
the teacher as an example, y = an answer that the model in training writes, π = the model in training, π̄ = the
teacher, whose weights are the running average. It takes the place of the cross-entropy: no token of a row is copied.
Prompts, sampling (also with vLLM: `train: {use_vllm: true}`) and loss are those of TRL's `SDFTTrainer`. `preset:
paper` has the settings of the paper; `trl` those of TRL, which are others: JSD, the 100 likeliest tokens without the
rest, the start as teacher, 8 answers per prompt, no token skipped. Every other setting overrides the preset.
Deviations from the paper: the teacher's weights are kept with a checkpoint, and begin at the start of each task; TRL
    opens the model's name again, or begins an adapter's average at 0. One answer per prompt.
Needs: rows with answers to learn from; a model that can follow an example.
Cost: an answer is written for every row, and one more forward pass; one copy of the trainable weights. With `logits:
    full` two tensors of answer tokens × vocabulary; `top_k` keeps few of the second.
Combine with: lora, ewc, l2sp, freeze, interpolate, and others that work on weights.
Conflicts: every method that works on the supervised tokens of rows, or adds rows.
Tune: the learning rate, 1e-5–5e-5 (the paper: 2e-5), with 32 prompts per step; `max_new_tokens` as long as answers are.
    Needs a model that learns from an example in its prompt; small ones do that badly.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import params
from retain.models.teachers import Average, Live, Start, Teacher

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that TRL may change this part is our concern, not the user's

#: The example in the teacher's prompt, as in the paper's code (github.com/idanshen/Self-Distillation, main.py).
TEMPLATE = (
    "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
#: Fields of TRL's SDFTConfig in which the paper differs from TRL.
PAPER: dict[str, Any] = {
    "distillation_alpha": 1.0,
    "distillation_mode": "full_logits",
    "distillation_add_tail": True,
    "num_loss_tokens_to_skip": 3,
    "teacher_model_kind": "ema",
    "teacher_update_rate": 0.01,
    "teacher_prompt_template": TEMPLATE,
    "num_generations": 1,
}
KINDS = {"start": "base", "ema": "ema", "live": "live"}
MODES = {"full": "full_logits", "top_k": "topk_logits", "sampled": "sampled_token"}


class SDFT(Method):
    """On-policy self-distillation by TRL's trainer."""

    name = "sdft"
    family = "functions"
    paper = "arXiv:2601.19897"
    on_policy = "It learns from answers that the model writes, so rows have no supervised tokens."
    swaps_weights = True
    off = {"enabled": False}

    class Config(MethodConfig):
        enabled: bool = True
        """False learns from the given answers, as without this method."""
        preset: Literal["paper", "trl"] = "paper"
        """What holds where nothing else is given: the settings of the paper, or TRL's defaults."""
        alpha: float | None = Field(None, ge=0, le=1)
        """1 is KL(now‖teacher), 0 KL(teacher‖now), between them a Jensen-Shannon divergence; 1, or 0.5 with `trl`."""
        teacher: Literal["start", "ema", "live"] | None = None
        """Its weights: of the start of the task, running average, or current ones; `ema`, or `start` with `trl`."""
        rate: float | None = Field(None, gt=0, le=1)
        """How fast the average follows, per step; 0.01, or 0.05 with `trl`."""
        skip: int | None = Field(None, ge=0)
        """First tokens of an answer that do not count: teachers begin "Based on the example"; 3, or 0 with `trl`."""
        logits: Literal["full", "top_k", "sampled"] | None = None
        """Tokens that are compared: all, the likeliest, or the one written; `full`, or `top_k` with `trl`."""
        top_k: int | None = Field(None, ge=1)
        """Number of the likeliest tokens; 100. Only with `logits: top_k`."""
        tail: bool | None = None
        """One more outcome for all tokens but the likeliest; true, or false with `trl`. Only with `logits: top_k`."""
        generations: int | None = Field(None, ge=1)
        """Answers per prompt; 1, or 8 with `trl`. Rows of a step must be a multiple."""
        max_new_tokens: int = Field(256, ge=1)
        """Longest answer."""
        temperature: float = Field(1.0, gt=0)
        """Of the drawing of answers; both sides of the divergence are divided by it as well."""
        template: str | None = None
        """The teacher's prompt, with {prompt} and {privileged_context} (the row's answer)."""
        write: Literal["student", "teacher"] = "student"
        """Who writes the answers; with `teacher` they are not on-policy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._average: params.Tensors = {}
        found, c = self.fields(), self.config
        if c.rate is not None and found["teacher_model_kind"] != "ema":
            raise ConfigError("methods.sdft.rate: has no effect unless `teacher: ema`. Set that, or remove it.")
        for setting in ("top_k", "tail"):
            if getattr(c, setting) is not None and found["distillation_mode"] != "topk_logits":
                raise ConfigError(
                    f"methods.sdft.{setting}: has no effect unless `logits: top_k`. Set that, or remove it."
                )
        if found["distillation_mode"] == "sampled_token" and found["distillation_alpha"] != 1:
            raise ConfigError("methods.sdft.logits: 'sampled' goes with `alpha: 1` only. Set that, or take 'full'.")
        for part in ("{prompt}", "{privileged_context}"):
            if part not in found["teacher_prompt_template"]:
                raise ConfigError(
                    f"methods.sdft.template: {part} is missing, which stands for a part of the row. Add it."
                )

    def fields(self) -> dict[str, Any]:
        """All fields of TRL's SDFTConfig that this method sets."""
        from trl.experimental.sdft import SDFTConfig

        c = self.config
        given = {
            "distillation_alpha": c.alpha,
            "distillation_mode": c.logits and MODES[c.logits],
            "distillation_topk": c.top_k,
            "distillation_add_tail": c.tail,
            "num_loss_tokens_to_skip": c.skip,
            "teacher_model_kind": c.teacher and KINDS[c.teacher],
            "teacher_update_rate": c.rate,
            "teacher_prompt_template": c.template,
            "num_generations": c.generations,
            "max_completion_length": c.max_new_tokens,
            "temperature": c.temperature,
            "generate_from_teacher": c.write == "teacher",
        }
        preset = PAPER if c.preset == "paper" else {}
        usual = {f.name: f.default for f in dataclasses.fields(SDFTConfig) if f.name in given}
        return usual | preset | {name: value for name, value in given.items() if value is not None}

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self.teacher = self._made(model, run)

    def _made(self, model: Any, run: Run) -> Teacher:
        found = self.fields()
        if found["teacher_model_kind"] == "live":
            return Live(model)
        if found["teacher_model_kind"] == "base":
            return Start(model, run.start)
        start = self._average if run.restored else run.start
        return Average(model, start, 1 - found["teacher_update_rate"])

    def see_step(self, model: torch.nn.Module, run: Run) -> None:
        if isinstance(self.teacher, Average):
            self.teacher.update()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.teacher.average) if isinstance(self.teacher, Average) else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._average = state
