"""What a run will need: memory at its fullest moment, and time; before any weights are loaded.

Parameters, gradients and optimizer states are counted on the model as its methods prepare it; activations are those
of a rehearsed step of the longest batch (`retain.training.rehearsal`). Time is the work of that rehearsal at the
speed of this machine, which is measured. Parts of the memory are added up although not all are at their most at the
same moment, so the sum is rather too high than too low.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retain.data.replay_sources import OWN, read
from retain.data.tasks import Task
from retain.errors import ConfigError
from retain.functional import strengths
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import machine, params
from retain.models.weightless import Cost, Weightless
from retain.probes.base import Probe
from retain.timing import READ, Asked, asked, asking, learning
from retain.training.rehearsal import Batch, Rehearsal
from retain.workload import (
    WRITTEN_BATCH,
    Lengths,
    TaskWork,
    calls_to_write,
    measured,
    rows_to_write,
    task_work,
    written_lengths,
)

if TYPE_CHECKING:
    from retain.pipeline import Plan
    from retain.results import ProbeInfo

#: Share of the measured speed that a real pass reaches. `bench/estimates.py` on two cores of an AMD EPYC 9005.
EFFICIENCY = 0.9
#: Methods whose cost is known here; what others keep and compute is not counted.
KNOWN = {"none", "lora", "freeze", "replay", "distill", "ewc", "l2sp", "interpolate"}
#: Resident size of a run of a model with hardly any weights: Python, its libraries and their buffers (same source).
LIBRARIES = 720 * 2**20


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Args:
        parameters, trainable: of the model in the first task, adapters included.
        tasks: rows, tokens and steps of every task.
        memory: bytes of every part at the fullest moment.
        free: bytes that are free on the device now.
        device: where the run trains: "cpu", "cuda", ….
        time: seconds of every part; empty when the model's passes cannot be rehearsed.
        notes: what is not counted, one sentence each.
        advice: what to change so that it fits, the best first; empty when it fits.
    """

    parameters: int
    trainable: int
    tasks: list[TaskWork]
    memory: dict[str, int]
    free: int
    device: str
    time: dict[str, float]
    notes: list[str]
    advice: list[str]

    @property
    def bytes(self) -> int:
        """Memory in all."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Time in all."""
        return sum(self.time.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.bytes <= self.free


def estimate(
    planned: Plan,
    tasks: Sequence[Task],
    tokenizer: Any,
    probes: Sequence[Probe] = (),
    old: Any = None,
    infos: Sequence[ProbeInfo] = (),
) -> Estimate:
    """Estimate the memory and the time of a run on this machine, for one process.

    Args:
        planned: of `retain.pipeline.plan`.
        tasks: its tasks in order.
        tokenizer: of its model.
        probes: asked before the first task and after every task, as `probes.between` says.
        old: the user's rows that stand for old data, in chat form, or None.
        infos: of the probes; by them those of the tasks are known.

    Raises:
        ConfigError: training settings that cannot be used here, or nothing that is left to train.
        ModelError: the model's configuration is not there.
    """
    with torch.random.fork_rng([]):  # methods draw their first weights
        return _Estimator(planned, tokenizer, old).run(tasks, probes, infos)


class _Estimator:
    """The settings of a run as the estimates need them."""

    def __init__(self, planned: Plan, tokenizer: Any, old: Any) -> None:
        self.config, self.train, self.stack = planned.config, planned.train, planned.stack
        self.tokenizer, self.old = tokenizer, old
        self.methods = {method.name: method.config for method in planned.stack.methods}
        self.quantised = planned.config.model.quantize != "none"
        self.args = _arguments(self.train, str(planned.config.directory))
        self.half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = "cpu" if found is None or self.args.use_cpu else found.type
        self.notes = [
            f"{name}: what it keeps and computes is not counted" for name in self.methods if name not in KNOWN
        ]
        distill = self.methods.get("distill")
        if distill is not None and (distill.rows == "text" or distill.teacher != "start"):
            self.notes.append("distill: its texts, and a teacher other than the start, are not counted")

    def run(self, tasks: Sequence[Task], probes: Sequence[Probe], infos: Sequence[ProbeInfo]) -> Estimate:
        work = self._work(tasks)
        rehearsal, passes = self._rehearsed(work)
        self._recommend(rehearsal.parameters)
        found = Estimate(
            rehearsal.parameters,
            rehearsal.trainable,
            work,
            self._memory(rehearsal, passes),
            machine.free_bytes(self.device),
            self.device,
            self._time(passes, work, asked(self.config, work, probes, infos, self.tokenizer, self.notes))
            if passes
            else {},
            self.notes,
            [],
        )
        return found if found.fits else replace(found, advice=self._advice())

    def _recommend(self, parameters: int) -> None:
        """Note what strengths a model of this size usually takes, where a method is used in those units."""
        usual = strengths.recommended(parameters)._asdict()
        for name, config in self.methods.items():
            if name in usual and getattr(config, "units", "raw") == "raw":
                low, high = usual[name]
                self.notes.append(
                    f"{name}: usual strengths at this size are {low:g} to {high:g} in raw units; yours is "
                    f"{config.strength:g}"
                )

    # -- work --------------------------------------------------------------------------------------------
    def _work(self, tasks: Sequence[Task]) -> list[TaskWork]:
        replay, most = self.methods.get("replay"), self.train.get("max_length")
        base = self.old_lengths
        earlier: list[Lengths] = []
        found = []
        for task, entry in zip(tasks, self.config.tasks):
            new = measured(task.rows, self.tokenizer, most, entry.on)
            rows = len(task.rows) if hasattr(task.rows, "__len__") else None
            if rows is None and self.args.max_steps <= 0:
                raise ConfigError("train.max_steps: not given, and a stream has no end. Set it to a number of steps.")
            parts = [*([base] * 3 if base else []), *earlier[-1:]]  # three quarters stand for abilities from before
            old = Lengths.joined(parts) if replay is not None and parts else None
            found.append(self._taught(task_work(task.name, rows, new, self.train, replay, old)))
            if replay is not None and replay.buffer and "tasks" in replay.asked:
                earlier.append(Lengths.joined([new, *earlier]))
        return found

    def _taught(self, work: TaskWork) -> TaskWork:
        """The same with the rows that a teacher reads."""
        if "distill" not in self.methods or self.methods["distill"].rows == "text":
            return work
        share = work.replayed / (work.steps * work.batches * work.usual.rows)
        part = {"all": 1.0, "new": 1 - share, "replay": share, "auto": share or 1.0}[self.methods["distill"].rows]
        usual, largest = (replace(b, taught=max(1, round(b.rows * part))) for b in (work.usual, work.largest))
        return replace(work, usual=usual, largest=largest)

    @cached_property
    def old_lengths(self) -> Lengths | None:
        """Lengths of the rows that stand for abilities from before the run."""
        replay, most = self.methods.get("replay"), self.train.get("max_length")
        asked = {"auto"} if replay is None else replay.asked
        files = [] if replay is None else [s for s in replay.sources if s.data not in OWN]
        parts = [measured(read(source, self.config.seed), self.tokenizer, most) for source in files]
        if self.old is not None and asked & {"auto", "old", "on_policy"}:
            parts.append(measured(self.old, self.tokenizer, most))
        if asked & {"self", "demonstrations"} or ("auto" in asked and self.old is None):
            parts.append(written_lengths(self.tokenizer, replay.max_tokens if replay is not None else 64))
        return Lengths.joined(parts) if parts else None

    # -- the model and its passes ------------------------------------------------------------------------
    def _rehearsed(self, work: Sequence[TaskWork]) -> tuple[Rehearsal, dict[str, Cost]]:
        """The prepared model and its passes; none where an operation cannot be done without values."""
        try:
            rehearsal = self._rehearsal(self.half, torch.bfloat16 if self.quantised else None)
            return rehearsal, self._passes(rehearsal, work)
        except RuntimeError:
            rehearsal = self._rehearsal(None, torch.bfloat16)  # products grouped by expert can be rehearsed in it only
        try:
            return rehearsal, self._passes(rehearsal, work)
        except RuntimeError as error:
            self.notes.append(
                f"activations and time are not in it: this model cannot be rehearsed without weights ({_first(error)})"
            )
            return rehearsal, {}

    def _rehearsal(self, half: torch.dtype | None, dtype: torch.dtype | None) -> Rehearsal:
        model = Weightless(self.config.model, dtype)
        self.weights = model.bytes(self.config.model.quantize)
        before = _bytes(model.model.parameters())
        first = self.config.task_names[0]
        run = Run(Path(self.config.directory), task=first, seed=self.config.seed, say=lambda line: None)
        triton = self.device != "cpu" and importlib.util.find_spec("triton") is not None
        made = Rehearsal(model, self.stack, run, half, self.args.gradient_checkpointing, triton)
        self.weights += _bytes(made.weightless.model.parameters()) - before  # of adapters
        return made

    def _passes(self, rehearsal: Rehearsal, work: Sequence[TaskWork]) -> dict[str, Cost]:
        self.usual = max((one.usual for one in work), key=lambda batch: batch.width)
        self.largest = max((one.largest for one in work), key=lambda batch: (batch.width, batch.learned))
        passes = {
            "usual": rehearsal.micro_batch(self.usual),
            "largest": rehearsal.micro_batch(self.largest),
            "update": rehearsal.update(self.args, self.notes),
            "read": rehearsal.look(*READ),
            "write": rehearsal.look(WRITTEN_BATCH, 1),
        }
        old = self.old_lengths or written_lengths(self.tokenizer, 64)
        if "ewc" in self.methods:
            rows = self.methods["ewc"].batch_size
            passes["importance"] = rehearsal.importance(Batch(rows, *old.batch(rows)), self.quantised)
        return passes

    # -- sums --------------------------------------------------------------------------------------------
    def _memory(self, rehearsal: Rehearsal, passes: dict[str, Cost]) -> dict[str, int]:
        """Bytes by part: what is always there, and the larger of a training step and an estimate of importances."""
        learning = list(params.trainable(rehearsal.weightless.model).values())
        gradients = _bytes(learning)
        held = {name: cost.held for name, cost in passes.items()}
        always = {
            "weights": self.weights,
            "weights at the start": sum(p.numel() * max(4, p.element_size()) for p in learning),  # params.snapshot
            "optimizer states": held["update"]["states"] if passes else 2 * gradients,
        }
        moments = [{"gradients": gradients}]
        if passes:
            moments[0] |= {
                "half-precision copies": held["largest"]["weights_cast"],
                "activations": held["largest"]["activations"],
                "logits, a tile": held["largest"]["head"],
            }
        if "importance" in held:
            size = sum(4 * p.numel() for p in params.outside_lora(rehearsal.weightless.model).values())
            always["importances (ewc)"] = size
            # at the end of a task there are those from before, those of this task, and their sum
            estimating = held["importance"]["activations"] + 2 * size
            copies = held["importance"]["weights_cast"]
            moments.append({"half-precision copies": copies, "estimating importances": estimating})
        found = always | max(moments, key=lambda parts: sum(parts.values()))
        if self.device == "cpu":
            found["Python and libraries"] = LIBRARIES
        return {name: size for name, size in found.items() if size}

    def _time(self, passes: dict[str, Cost], work: Sequence[TaskWork], asked: Asked) -> dict[str, float]:
        """Seconds by part."""
        speed = machine.measure(self.device, self.half)
        takes = {name: speed.seconds(cost) / EFFICIENCY for name, cost in passes.items()}
        rows, longest = rows_to_write(self.methods, self.old is not None, work[0].rows)
        found = {f"writing {rows} old rows": calls_to_write(rows, longest) * takes["write"]} if rows else {}
        found |= learning(work, takes, self.usual, self.largest)
        if "importance" in passes:
            ewc = self.methods["ewc"]
            counts = [ewc.samples if self.old is None else min(ewc.samples, len(self.old))]
            counts = counts if ewc.importance is None else []
            if ewc.estimator != "adam":
                counts += [min(ewc.samples, one.rows) for one in work if one.rows]
            if counts:
                found["importance of weights"] = sum(-(-n // ewc.batch_size) for n in counts) * takes["importance"]
        return found | asking(asked, takes)

    def _advice(self) -> list[str]:
        """What makes it smaller, in the order in which it costs least of what is learned."""
        batch = self.train["per_device_train_batch_size"]
        found = []
        if not self.args.gradient_checkpointing:
            found.append("train.gradient_checkpointing=true (a third slower)")
        if batch > 1:
            found.append(
                f"train.per_device_train_batch_size={max(1, batch // 4)} with "
                f"train.gradient_accumulation_steps={4 * self.args.gradient_accumulation_steps}"
            )
        clashes = any(m.clash(LoRA) or LoRA.clash(type(m)) for m in self.stack.methods)
        if "lora" not in self.methods and not clashes:
            found.append("`lora` among the methods: no gradients and states for the base model")
        elif "lora" in self.methods and self.config.model.quantize == "none":
            found.append("model.quantize=4bit")
        found.append("a shorter train.max_length, or a smaller model")
        return found


def _arguments(train: dict[str, Any], folder: str) -> Any:
    from trl import SFTConfig

    known = {f.name for f in fields(SFTConfig)}  # a method that writes its own answers has others, too
    try:
        return SFTConfig(**{name: value for name, value in train.items() if name in known}, output_dir=folder)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train: trl.SFTConfig says: {_first(error)}. Change that setting.") from None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
