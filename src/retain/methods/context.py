"""What a method is given: the run it takes part in, and the batch it may add a loss to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retain.errors import ConfigError
from retain.functional.tiled_head import Head, log_probs
from retain.models import params
from retain.models.own_rows import self_written

_UNSET = object()


def _no_batches(rows: Any, size: int) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    raise ConfigError(
        "run.batches: not set; allowed: a function of rows and size that gives batches. Use `ContinualTrainer`, "
        "which sets it."
    )


@dataclass
class Batch:
    """One micro-batch with the student's hidden states.

    Shapes: `labels` [B, T] with −100 where nothing is learned; `hidden` [B, T, H] with gradient; `source` [B],
    0 for new rows and above 0 for replayed ones: the number of their source in `Run.replay_sources`, from 1.
    """

    inputs: dict[str, Any]  # what the model is called with, without labels
    labels: torch.Tensor
    hidden: torch.Tensor
    source: torch.Tensor
    number: torch.Tensor | None = None  # [B] which replay row each is, −1 for new rows; where they are chosen late

    @property
    def supervised(self) -> torch.Tensor:
        """Mask [B, T−1] of the positions whose *next* token is learned."""
        return self.labels[:, 1:] != -100

    def of(self, rows: str, method: str) -> torch.Tensor:
        """Mask [B] of the rows of an origin: all, new, or replay.

        Raises:
            ConfigError: the rows of this batch were made one, so that their origin is lost; names the method.
        """
        if rows == "all":
            return torch.ones_like(self.labels[:, 0], dtype=torch.bool)
        if len(self.source) != len(self.labels):
            raise ConfigError(
                f"methods.{method}.rows: rows are flattened by padding-free packing, so new and replayed ones "
                "cannot be told apart. Set `rows: all` or `padding_free: false`."
            )
        return self.source == 0 if rows == "new" else self.source > 0


def select(inputs: dict[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
    """What the model is called with, for the rows of a mask [B] alone."""
    if bool(chosen.all()):
        return inputs
    return {
        key: value[chosen] if torch.is_tensor(value) and value.shape[:1] == chosen.shape else value
        for key, value in inputs.items()
    }


class Draws(NamedTuple):
    """State of the random generators that a forward pass draws from."""

    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Draws:
        """The state at this moment."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def put_back(self, device: torch.device) -> None:
        """Let the generators draw again what they drew after this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


class StepBatch(NamedTuple):
    """A micro-batch to be run again: what the model is called with, labels [B, T], origin [B], and the state of the
    random generators when the trainer ran it."""

    inputs: dict[str, Any]
    labels: torch.Tensor
    source: torch.Tensor
    draws: Draws | None = None


@dataclass
class Tokens:
    """The supervised tokens of one micro-batch, in reading order, as the model predicts them now.

    Shapes: `labels` [N]; `hidden` [N, H], of the positions that predict them, without gradient; `rows` [N], the row
    of the micro-batch each stands in; `source` [N], 0 for new rows and above 0 for replayed ones.
    """

    batch: Batch
    labels: torch.Tensor
    hidden: torch.Tensor
    rows: torch.Tensor
    source: torch.Tensor
    head: Head

    @classmethod
    def of(cls, batch: Batch, head: Head) -> Tokens:
        """The tokens of a micro-batch."""
        mask = batch.supervised
        rows = mask.nonzero()[:, 0]
        hidden = batch.hidden[:, :-1][mask].detach()
        return cls(batch, batch.labels[:, 1:][mask], hidden, rows, batch.source[rows], head)

    @cached_property
    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability [N] of each label, entropy [N]), in nats, without gradient."""
        with torch.no_grad():
            return log_probs(self.hidden, self.head, self.labels)


@dataclass
class Run:
    """One task of one run, as methods see it: read-mostly; `log` is the only thing they write.

    The trainer fills in the services (`batches`, `log`, …) before `on_task_start`.
    """

    directory: Path  # of this task; methods keep files here
    task: str = "task"
    task_index: int = 1  # 1 for the first task
    seed: int = 0
    tokenizer: Any = None
    shared: Path | None = None  # of the whole run: buffers that outlive a task
    model: Any = None  # the model in training, unwrapped
    old: Any = None  # rows that stand for old data, as the user gave them
    restored: bool = False  # a checkpoint was loaded; costly statistics need not be made again
    step: int = 0
    max_steps: int = 0
    learning_rate: float = 0.0
    has_replay: bool = False  # replay rows are in the mixture
    replay: Any = None  # those rows, tokenised
    replay_sources: tuple[str, ...] = ()  # names of where they are from; `batch.source` counts these from 1
    start: params.Tensors = field(default_factory=dict)  # trainable weights when the task began
    log: Callable[[str, float], None] = lambda name, value: None
    logging_now: bool = True  # whether this step's values are written
    # (rows, size) → (inputs, labels): padded, one row of a batch for each row, unless the rows given are packed
    batches: Callable[[Any, int], Iterator[tuple[dict[str, Any], torch.Tensor]]] = _no_batches
    tokenise: Callable[[Any], Any] = lambda rows: rows  # chat rows → rows as the trainer takes them, maybe packed
    whole_rows: Callable[[Any], Any] = lambda rows: rows  # the same, one for each row, never packed
    new_rows: Any = None  # the task's rows in chat form (for buffers and importances); None for a stream
    step_batches: list[StepBatch] = field(default_factory=list)  # of this step, for methods with `repeats_batches`
    step_tokens: float = 0.0  # supervised tokens of this step over all micro-batches and ranks: divides a sum of losses
    plain_gradient: bool = False  # `.grad` is that of the mean cross-entropy of the step's rows and of nothing else
    moments: Callable[[torch.nn.Parameter], dict[str, torch.Tensor]] = lambda parameter: {}  # optimizer state
    adam_beta2: float = 0.999  # by which Adam's second moment forgets
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # sum over all ranks
    optimizer: str = "adamw"
    private: bool = False  # no text of a given row may reach the run directory
    avoid: Sequence[str] = ()  # texts that written rows must not repeat: the probes' items; known to the main process
    say: Callable[[str], None] = print  # one line for the person at the terminal

    @property
    def shared_folder(self) -> Path:
        """Folder of the whole run, for what outlives a task."""
        return self.shared or self.directory

    @property
    def buffer(self) -> Path:
        """Folder for replay rows, shared by all tasks of the run."""
        return self.shared_folder / "buffer"

    def track(self, steps: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Iterate with a progress bar."""
        from rich.progress import track

        return iter(track(steps, label, total=total, transient=True))

    def old_rows(self, model: Any, number: int, given: Any = _UNSET, max_tokens: int = 64) -> Any:
        """Rows that stand for old abilities: the user's, else text the model writes itself (once per run).

        Returns:
            A `datasets.Dataset` in chat form, at most `number` rows.
        """
        rows = self.old if given is _UNSET else given
        if rows is not None:
            return rows.select(range(min(number, len(rows))))
        return self_written(
            model, self.tokenizer, self.buffer, number, self.seed, self.say, max_tokens, avoid=self.avoid
        )

    def say_unread(self, name: str, what: str) -> None:
        """Say, before training, what a method will not have of this task in later ones: its rows are not kept."""
        if self.new_rows is None and self.shared is not None:
            self.say(f"{name}: '{self.task}' is a stream, whose rows are not read again: {what}.")

    def check_stiffness(self, name: str, value: float) -> None:
        """Refuse a pull that plain gradient descent cannot follow; warn where Adam may hide it."""
        if value >= 2 and "sgd" in self.optimizer.lower():  # the host says OptimizerNames.SGD
            raise ConfigError(
                f"methods.{name}.strength: learning rate · strength · largest importance is {value:.3g}; gradient "
                "descent diverges from 2 on. Lower the strength, or set `form: proximal`."
            )
        if value >= 2:
            self.say(f"{name}: stiff (learning rate · strength · F up to {value:.3g}); consider form: proximal.")


def repeated(batches: Iterable[StepBatch], device: torch.device) -> Iterator[StepBatch]:
    """The micro-batches of a step, to be run again one by one with the random draws that they had before."""
    for batch in batches:
        if batch.draws is not None:
            batch.draws.put_back(device)
        yield batch


def withhold(run: Run, name: str, held: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Take the gradient of entries that stay away; log what gradient descent would have gained there in this step, to
    first order, in nats.

    Args:
        held: parameters, each with a mask that is true where it stays.
    """
    squares = 0.0
    for parameter, mask in held:
        if parameter.grad is not None:
            if run.logging_now:
                squares += float((parameter.grad * mask).float().square().sum())
            parameter.grad.masked_fill_(mask, 0)
    if run.logging_now:
        run.log(f"loss/{name}", run.learning_rate * squares)


def answer_loss(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Σ −log p of the supervised tokens, in nats, with gradient; `labels` [B, T] with −100 where nothing is learned."""
    mask = labels[:, 1:] != -100
    hidden = params.hidden_states(model, inputs)[:, :-1][mask]
    return -log_probs(hidden, Head(*params.head(model), *params.logit_rules(model)), labels[:, 1:][mask])[0].sum()
