"""Rows of the table about training: EWC, its Fisher information, and distillation under LoRA."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from side_by_side import DEVICE, WARM_UP, Line, Settings, in_turn, peak_bytes, ratio, steps_in_turn
from transformers import PrinterCallback
from trl import SFTConfig

from retain import EWC, Distill, LoRA
from retain.data import demo_tasks
from retain.functional.penalties import add_quadratic_gradient, quadratic_value
from retain.methods.base import Method, Stack
from retain.methods.context import Batch, Run
from retain.models import params
from retain.models.load import load_model
from retain.training import arguments
from retain.training.trainer import ContinualTrainer

_STRENGTH = 1.0
_ORDERS = 3  # per row, so that a batch is some hundred tokens


class AutogradEWC(EWC):
    """The same penalty, the way it is usually written: a term of the loss, differentiated by autograd."""

    name = "autograd_ewc"

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        """Nothing: the loss has it."""

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor:
        value = quadratic_value(self.pull.dense, *self.pull._local(), self.config.strength)
        return value * batch.supervised.sum()  # the trainer divides a batch loss by the supervised tokens


def training_rows(settings: Settings, count: int, orders: int = _ORDERS) -> Dataset:
    """Rows in chat form: the user's, or orders of the demo, several to a row."""
    if settings.data:
        from retain.data.tasks import load_task

        rows = load_task(settings.data).rows
        return rows.select(range(min(count, len(rows))))
    single, _ = demo_tasks.rows("orders", count * orders, 1)
    parts = [single[i : i + orders] for i in range(0, len(single), orders)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": " ".join(one["prompt"] for one in part)}],
                "completion": [{"role": "assistant", "content": "\n".join(one["response"] for one in part)}],
            }
            for part in parts
        ]
    )


def trainer(settings: Settings, methods: Sequence[Method], steps: int, orders: int = _ORDERS) -> ContinualTrainer:
    """A trainer as `retain run` makes it, on a model of its own, with so many orders to a row.

    Its folder is temporary and goes with it.
    """
    model, tokenizer = load_model(settings.model)
    given = {
        "per_device_train_batch_size": settings.batch,
        "max_steps": steps,
        "save_strategy": "no",
        "use_cpu": DEVICE == "cpu",
        "gradient_checkpointing": False,
        "bf16": settings.half,
    }
    lora = any(isinstance(method, LoRA) for method in methods)
    folder = tempfile.mkdtemp()
    own = {"output_dir": folder, "disable_tqdm": True, "seed": 1}
    writer = Stack(methods).writer
    host: Any = ContinualTrainer
    if writer is None:
        args: Any = SFTConfig(**arguments.complete(given, lora=lora), **own)
    else:  # the model writes the answers that it learns from
        from retain.training.on_policy import ContinualSDFTTrainer, sdft_arguments

        whole = arguments.complete(given, lora=lora, on_policy=writer.name)
        host, args = ContinualSDFTTrainer, sdft_arguments(whole | own, writer.fields())
    rows = training_rows(settings, settings.batch * (steps + 1), orders)
    made = host(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        methods=methods,
        old=training_rows(settings, settings.batch, orders),
        run=Run(Path(folder), tokenizer=tokenizer, new_rows=rows, say=lambda line: None),
    )
    made.remove_callback(PrinterCallback)
    weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)  # start weights, half a gigabyte of a small model
    return made


def _size(made: ContinualTrainer) -> str:
    rows = made._tokenised(made.train_dataset)
    tokens = sum(map(len, rows["input_ids"])) / len(rows)
    return f"{made.args.per_device_train_batch_size} rows of {tokens:.0f} tokens on average a step"


def _steps(settings: Settings, work: str, against: str, methods: list[Sequence[Method]], bound: float) -> list[Line]:
    trainers = [trainer(settings, one, settings.repeats + WARM_UP) for one in methods]
    detail = f"{_size(trainers[0])}, {settings.repeats} pairs"
    return [ratio(work, against, steps_in_turn(trainers), bound, detail)]


def ewc(settings: Settings) -> list[Line]:
    """A step with EWC against a plain one; three times as many pairs, as the difference is small beside the noise."""
    more = replace(settings, repeats=3 * settings.repeats)
    return _steps(more, "step with EWC", "plain step", [[EWC(strength=_STRENGTH)], []], 1.05)


def ewc_autograd(settings: Settings) -> list[Line]:
    """EWC against the same penalty in the loss: as a part of a step, and the two penalties alone.

    They take the same time whatever the batch is, so beside a long step both look alike. Steps are compared where it
    is felt most, at one row; there, too, the optimizer's own sweeps over the weights are most of it.
    """
    small = replace(settings, batch=1, repeats=3 * settings.repeats)
    methods = [[EWC(strength=_STRENGTH)], [AutogradEWC(strength=_STRENGTH)]]
    against = "the same penalty through autograd"
    return [*_steps(small, "step with EWC, one row", against, methods, 0.65), _penalty(small, against)]


def _penalty(settings: Settings, against: str) -> Line:
    model = load_model(settings.model, tokenizer=False)[0].to(DEVICE)
    weights = list(params.trainable(model).values())
    held = [w.detach() for w in weights]
    anchors, importance = [w + 1e-3 for w in held], [torch.rand_like(w) for w in held]
    gradients = [torch.randn_like(w) for w in held]
    for w, gradient in zip(weights, gradients):
        w.grad = gradient

    def ours(i: int) -> None:
        add_quadratic_gradient(gradients, held, anchors, importance, _STRENGTH, True)

    def usual(i: int) -> None:
        quadratic_value(weights, anchors, importance, _STRENGTH).backward()

    for warm_up in (ours, usual):
        warm_up(0)
    detail = f"value and gradient for {sum(w.numel() for w in held):,} weights, {settings.repeats} pairs"
    return ratio("the penalty of EWC alone", against, in_turn(ours, usual, settings.repeats), 0.65, detail)


def ewc_memory(settings: Settings) -> list[Line]:
    """What EWC holds more than a plain step, as a multiple of anchor and Fisher information."""
    plain = peak_bytes(lambda: trainer(settings, [], 2))
    with_ewc = peak_bytes(lambda: trainer(settings, [EWC(strength=_STRENGTH)], 2))
    model, _ = load_model(settings.model, tokenizer=False)
    copy = sum(p.numel() * p.element_size() for p in params.trainable(model).values())
    # the trainer keeps the start weights without methods, too; they are EWC's anchor, so EWC has to answer for them
    extra = with_ewc - (plain - copy)
    detail = (
        f"peak {_mib(with_ewc)} against {_mib(plain - copy)} without a copy of the weights; "
        f"anchor and Fisher information are {_mib(2 * copy)}."
    )
    return [Line("memory of EWC", "its anchor and Fisher information", extra / (2 * copy), 1.0, detail=detail)]


def fisher(settings: Settings) -> list[Line]:
    """The sampled Fisher information of rows against a plain forward and backward pass over them."""
    method = EWC(strength=_STRENGTH, batch_size=settings.batch)
    made = trainer(settings, [], 1)  # its collator makes the batches
    rows = training_rows(settings, 4 * settings.batch)
    plain_model = load_model(settings.model)[0].to(DEVICE)
    made.run.track = lambda steps, label, total: iter(steps)

    def importance(i: int) -> None:
        with params.evaluating(made.model), torch.autocast(DEVICE, torch.bfloat16, enabled=settings.half):
            method.importance(made.model, made.run, rows)

    def plain(i: int) -> None:
        with params.evaluating(plain_model):
            for inputs, labels in made._batches(rows, settings.batch):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=settings.half):
                    loss = plain_model(**inputs, labels=labels, use_cache=False).loss
                loss.backward()
                plain_model.zero_grad()

    for warm_up in (importance, plain):
        warm_up(0)
    tokens = sum(map(len, made._tokenised(rows)["input_ids"]))
    detail = f"{len(rows)} rows, {tokens} tokens, {settings.batch} rows a batch"
    times = in_turn(importance, plain, settings.repeats)
    return [ratio("sampled Fisher information", "forward + backward over the same rows", times, 1.15, detail)]


def distill(settings: Settings) -> list[Line]:
    """A LoRA step with distillation, its teacher the model without the adapters, against a plain LoRA step."""
    methods = [[LoRA(), Distill()], [LoRA()]]
    return _steps(settings, "step with distillation under LoRA", "plain LoRA step", methods, 1.45)


def distill_memory(settings: Settings) -> list[Line]:
    """Peak memory of the same two."""
    plain = peak_bytes(lambda: trainer(settings, [LoRA()], 2))
    with_teacher = peak_bytes(lambda: trainer(settings, [LoRA(), Distill()], 2))
    detail = f"peak {_mib(with_teacher)} against {_mib(plain)}."
    return [
        Line("memory of distillation under LoRA", "plain LoRA step", with_teacher / plain, 1.15, detail=detail),
    ]


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
