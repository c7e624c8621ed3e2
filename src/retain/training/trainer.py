"""Training with methods. With `mixing.py`, its part about rows, the only file that knows the inside of the Hugging Face
trainer.

`ContinualMixin` goes over any `transformers.Trainer`; `ContinualTrainer` is the mixin over TRL's `SFTTrainer`.
The trainer owns every scale factor: a batch loss is divided by the same global token count as the main loss,
gradient edits happen once per optimizer step, after the last reduction and before clipping.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from retain.errors import ConfigError, ModelError, TrainingDiverged
from retain.functional.tiled_head import Head, log_probs
from retain.methods.base import Method, Stack
from retain.methods.context import Batch, Draws, Run, StepBatch, Tokens
from retain.models import params
from retain.models.load import load_model
from retain.training import checkpoint, guards
from retain.training.budget import ForgettingBudget
from retain.training.mixing import Mixing
from retain.training.rows import realised
from retain.training.terms import Terms

logger = logging.getLogger(__name__)


class ContinualMixin(Mixing):
    """Adds methods to a `transformers.Trainer` subclass: `class Mine(ContinualMixin, MyTrainer)`.

    Args:
        model: a causal language model, or a name for `load_model`.
        args: `TrainingArguments` (or the trainer's own subclass).
        methods: method objects, applied together in this order.
        old: rows that stand for old data (a `datasets.Dataset` in chat form); without them, methods that
            need old data let the model write its own.
        run: the context methods see; made from `args` when not given.
        budget: how much may be forgotten: 0.01 for a point, a `BudgetConfig`, or a `ForgettingBudget`. Without it,
            methods with `strength="auto"` follow the usual one while training.

    Raises:
        ConfigError: methods that clash, lack what they need, or cannot work under these arguments.
    """

    model: Any  # the host's own, which it declares as possibly None
    on_policy = False  # whether the host learns from answers that the model writes

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        methods: Sequence[Method] = (),
        old: Any = None,
        run: Run | None = None,
        budget: Any = None,
        **kwargs: Any,
    ) -> None:
        self.stack = Stack(methods)
        self.terms = Terms()
        if isinstance(model, str):
            model, tokenizer = load_model(model)
            kwargs.setdefault("processing_class", tokenizer)
        if run is None:
            run = Run(Path(getattr(args, "output_dir", "retain-run")), seed=getattr(args, "seed", 0))
        self.run = run
        run.old = old if old is not None else run.old
        if args is not None:
            # the host replaces NaN losses by the running average; a diverged run must not look healthy
            args.logging_nan_inf_filter = False
        model = self.stack.prepare_model(model, run)
        super().__init__(model, args, *rest, **kwargs)
        run.tokenizer = run.tokenizer or getattr(self, "processing_class", None)
        if run.shared is None:  # a pipeline asks before it begins
            self.stack.check_inputs(run.tokenizer)
        run.log, run.batches, run.tokenise = self.terms.note, self._batches, self._tokenised
        run.whole_rows = partial(self._tokenised, whole=True)
        run.moments = self._moments
        run.adam_beta2 = float(getattr(self.args, "adam_beta2", 0.999))
        run.reduce = lambda tensor: self.accelerator.reduce(tensor, "sum")
        run.model = self.model
        run.optimizer = str(getattr(self.args, "optim", "adamw"))
        self._with_loss = [m.name for m in self.stack.methods if type(m).batch_loss is not Method.batch_loss]
        self._weighed = any(m.weighs_tokens for m in self.stack.methods)
        self._repeated = any(m.repeats_batches for m in self.stack.methods)
        self._step_begins = True  # the next micro-batch is the first of its step
        self._first_factor = 1.0  # of the optimizer's first group, on the learning rate
        self._coverage_checked = False
        self._held: params.Tensors = {}
        if not self.accelerator.is_main_process:
            run.say = lambda line: None
        guards.check_host(self, self.stack)
        self.stack.check_needs(guards.available(run))
        if run.private:
            self.stack.check_private(run.old is not None)
        self.add_callback(_AfterStep(self))
        self.budget: ForgettingBudget | None = None
        if budget is not None or any(m.auto for m in self.stack.methods):
            given = ForgettingBudget(settle=False) if budget is None else ForgettingBudget.of(budget)
            self.budget = given.attach(self)

    # -- the loop ----------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Train one task: methods start, the host's loop runs, methods finish. Takes what the host takes.

        Raises:
            RunError: the checkpoint to continue from is damaged.
            TrainingDiverged: a loss term is no longer a number; the last checkpoint is kept.
        """
        found = checkpoint.resolve(resume_from_checkpoint, Path(self.args.output_dir))
        self.run.restored = found is not None
        with params.evaluating(self.model), self.accelerator.autocast():
            self.stack.on_model_ready(self.model, self.run)
        self._mix()
        self.run.max_steps = self.args.max_steps
        self.run.learning_rate = self.args.learning_rate
        self.run.start = checkpoint.start_weights(
            Path(self.args.output_dir), self.model, keep=self.args.should_save, resumed=found is not None
        )
        if found is not None:
            state = checkpoint.load_state(found)
            self.stack.load_state_dict(state)
            if self.budget is not None:
                self.budget.load_state_dict(state)
        self.run.model = self.model
        self._held = dict(params.trainable(self.model))
        with params.evaluating(self.model), self.accelerator.autocast():
            self.stack.on_task_start(self.model, self.run)
        if found is not None:
            self._continue_counts(found)
        # what was drawn before (an adapter, self-written rows) must not change dropout in a run that is continued
        set_seed(self.args.seed)
        result = super().train(str(found) if found else None, *rest, **kwargs)
        if self._mixture is not None:
            self.run.say(f"replay: {realised(self.replayed(), sum(self.rows_seen()))}.")
        self.model = self.stack.finish_model(self.model, self.run)
        if self.budget is not None:
            self.budget.settle(self.model, self.run)
        # what is remembered belongs to the weights that remain: the next task starts, and is anchored, there
        with self.accelerator.autocast():
            self.stack.on_task_end(self.model, self.run)
        self.accelerator.wait_for_everyone()
        return result

    def _continue_counts(self, found: Path) -> None:
        """TRL counts tokens from zero again after a resume; go on from what was logged."""
        history = TrainerState.load_from_json(str(found / TRAINER_STATE_NAME)).log_history
        counts = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
        if counts and hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = counts[-1]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        source, number = inputs.pop("source", None), inputs.pop("number", None)
        if source is not None and self.model.training and self.is_in_train:
            for origin, name in enumerate(self.run.replay_sources, 1):
                share = (source == origin).float().mean()
                self.terms.add(f"replay/{name}", share / self.current_gradient_accumulation_steps)
        own = self._with_loss or self._weighed or self._repeated
        if not (own and self.model.training and self.is_in_train):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        labels = inputs["labels"]
        draws = Draws.now(labels.device) if self._repeated else None
        with params.captured_hidden(model) as seen:
            loss: Any = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        kept = {k: v for k, v in inputs.items() if k not in ("labels", "use_cache", "output_router_logits")}
        if source is None:
            source = torch.zeros(labels.shape[0], dtype=torch.long, device=labels.device)
        batch = Batch(kept, labels, seen[0], source, number)
        if self._repeated:
            self._keep(batch, num_items_in_batch, draws)
        if self._weighed:
            loss = self._weighted(loss, batch, num_items_in_batch)
        # without a global token count the host divides by the number of micro-batches afterwards
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is None else 1
        self.terms.add("loss/main", loss.detach() / parts)
        terms = self.stack.batch_losses(batch, self.run)
        for name in self._with_loss:
            scaled = self._per_token(terms[name], batch, num_items_in_batch) if name in terms else loss.new_zeros(())
            loss = loss + scaled
            self.terms.add(f"loss/{name}", scaled.detach() / parts)
        return loss

    def _weighted(self, loss: torch.Tensor, batch: Batch, num_items: Any) -> torch.Tensor:
        """The main loss with the methods' token weights in place of ones; the host's own where no method has any."""
        head = Head(*params.head(self.model), *params.logit_rules(self.model))
        tokens = Tokens.of(batch, head)
        weights = self.stack.token_weights(tokens, self.run)
        if weights is None or not len(weights):
            return loss
        hidden = batch.hidden[:, :-1][batch.supervised]
        return self._per_token(-(weights * log_probs(hidden, head, tokens.labels)[0]).sum(), batch, num_items)

    def _keep(self, batch: Batch, num_items: Any, draws: Draws | None) -> None:
        """Keep the micro-batches of a step for methods that run them again."""
        if self._step_begins:
            self.run.step_batches.clear()
            self.run.step_tokens = 0.0
            self._step_begins = False
        self.run.step_batches.append(StepBatch(batch.inputs, batch.labels, batch.source, draws))
        if num_items is None:
            raise ConfigError(
                "train: the host gives no token count for a step, which methods that repeat a step need. "
                "Use `ContinualTrainer`, or a trainer that passes `num_items_in_batch`."
            )
        ranks = 1 if self.args.average_tokens_across_devices else self.accelerator.num_processes
        self.run.step_tokens = float(num_items) * ranks

    def _per_token(self, term: torch.Tensor, batch: Batch, num_items: Any) -> torch.Tensor:
        """A sum over supervised tokens, scaled exactly as the host scales the cross-entropy."""
        if num_items is None:
            return term / batch.supervised.sum().clamp(min=1)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return term / num_items * ranks

    def _moments(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return dict(self.optimizer.state.get(parameter, {})) if self.optimizer is not None else {}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        factors = self.stack.learning_rates(self.model, self.run)
        if factors:
            factor_of = {p: factors.get(name, 1.0) for name, p in params.trainable(self.model).items()}
            groups = [
                {**group, "params": chosen, "lr": group["lr"] * factor, "factor": factor}
                for group in optimizer.param_groups
                for factor in dict.fromkeys(factor_of.get(p, 1.0) for p in group["params"])
                if (chosen := [p for p in group["params"] if factor_of.get(p, 1.0) == factor])
            ]
            groups.sort(key=lambda group: -group["factor"])  # the host takes the rate of the first for the run's
            self._first_factor = groups[0]["factor"] or 1.0
            optimizer.param_groups[:] = groups
        return optimizer

    def _get_learning_rate(self) -> float:
        """The rate without the factors of methods."""
        return super()._get_learning_rate() / self._first_factor

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.run.step = self.state.global_step
        self.run.learning_rate = self._get_learning_rate()
        every = self.args.logging_steps
        self.run.logging_now = (self.state.global_step + 1) % max(1, int(every)) == 0
        self.run.max_steps = self.state.max_steps
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingDiverged(self._diverged(loss, self.state.global_step + 1, "the loss"))
        if self.accelerator.sync_gradients:
            if not self._coverage_checked:
                guards.check_gradients(self.model)
                guards.check_held(self.stack, self._held, self.model)
                self._coverage_checked = True
            self.run.plain_gradient = not (self._with_loss or self._weighed) and self._plain_loss()
            self.stack.edit_gradients(model, self.run)
            self.terms.steps += 1
            self._step_begins = True
        return loss

    def _plain_loss(self) -> bool:
        """Whether the host's own loss is the mean cross-entropy of a step's tokens; False where it cannot be known."""
        return False

    def _diverged(self, loss: torch.Tensor, step: int, what: str) -> str:
        return self.terms.diverged(float(loss), step, what, checkpoint.newest(Path(self.args.output_dir)))

    def release(self) -> None:
        """Take the host's wrappers off the model: autocast around `forward`, and TRL's fused head."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        for module in (self.model, params.causal(self.model)):
            if getattr(module, "is_activation_checkpointing", False):
                module.activation_checkpointing_disable()
            if getattr(module, "_require_grads_hook", None) is not None:
                module.disable_input_require_grads()
            vars(module).pop("forward", None)
            vars(module).pop("_original_forward", None)
        # the hook can have been added twice, by TRL and by PEFT; the model remembers only one
        hooks = params.causal(self.model).get_input_embeddings()._forward_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "__name__", "") == "make_inputs_require_grads"]:
            del hooks[key]

    # -- logging and state -------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.terms.take(lambda sums: self.accelerator.reduce(sums, "mean")))
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not guards.weights_finite(self.model):
            raise TrainingDiverged(self._diverged(torch.tensor(float("nan")), self.state.global_step, "the weights"))
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            beside = self.budget.state_dict() if self.budget is not None else {}
            checkpoint.complete(folder, self.stack.state_dict() | beside, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint.put_back(Path(resume_from_checkpoint), self.model)


class _AfterStep(TrainerCallback):
    """Calls `on_step_end` of the methods after the optimizer moved the weights, and says which epoch begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not trainer.accelerator.optimizer_step_was_skipped:
            trainer.stack.on_step_end(trainer.model, trainer.run)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # in the epoch in which several processes resume, the host's loader does not reach down to the sampler
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class ContinualTrainer(ContinualMixin, SFTTrainer):
    """TRL's `SFTTrainer` with methods: chat templates, packing, completion-only loss, PEFT and accelerate.

    Example:
        >>> trainer = ContinualTrainer(model, args, train_dataset=rows, methods=[Replay(fraction=0.1)])
        >>> trainer.train()
    """

    #: A subclass whose `compute_loss` gives the same loss may say so; it spares `sam` a pass.
    keeps_loss = False

    def __init__(self, model: Any = None, *rest: Any, **kwargs: Any) -> None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        if kwargs.get("processing_class") is None and len(rest) < 5 and name == "":
            raise ModelError(
                "model: it was not loaded from a name or a folder, so its tokenizer is not known. "
                "Give `processing_class=tokenizer`."
            )
        super().__init__(model, *rest, **kwargs)

    def _plain_loss(self) -> bool:
        kinds = type(self).mro()
        other = any("compute_loss" in vars(kind) for kind in kinds[: kinds.index(ContinualTrainer)])
        args, routed = self.args, getattr(params.causal(self.model).config, "output_router_logits", False)
        usual = args.loss_type == "nll" and not args.label_smoothing_factor and self.compute_loss_func is None
        together = args.world_size == 1 or args.average_tokens_across_devices
        return usual and together and not routed and (self.keeps_loss or not other)

    def compute_loss(self, model: Any, *rest: Any, **kwargs: Any) -> Any:
        with _supervised_scored_only(self.args):
            return super().compute_loss(model, *rest, **kwargs)


@contextmanager
def _supervised_scored_only(args: Any) -> Iterator[None]:
    """On a CPU, let TRL score the supervised positions only, as it does on a GPU.

    It scores all of them where there is no Triton, to spare compilers a new shape per batch. An uncompiled CPU
    would spend a third of a LoRA step on positions that count nothing.
    """
    chosen = getattr(trl_utils, "_use_triton", None)
    if chosen is None or args.torch_compile or args.device.type != "cpu":
        yield
        return
    trl_utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl_utils._use_triton = chosen
