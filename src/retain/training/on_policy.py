"""Training on answers that the model writes itself: TRL's `SDFTTrainer` with methods.

Prompts, sampling and the loss are TRL's. The teacher is the method's (`retain.methods.sdft`), because TRL opens the
model's name again for it, which after the first task is another model, and does not keep it with a checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer, sdft_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import RepeatSampler

from retain.errors import ConfigError, DataError
from retain.methods.base import Method, Stack
from retain.training.arguments import METHODS_OWN
from retain.training.trainer import ContinualMixin


class ContinualSDFTTrainer(ContinualMixin, SDFTTrainer):
    """TRL's `SDFTTrainer` with methods, one of which is `SDFT`, whose settings are the loss.

    Args:
        args: an `SDFTConfig`; fields that the method sets are left as they are there.
        train_dataset: rows of `prompt` and `completion`, of `messages`, or of `prompt` and `privileged_context`.

    Raises:
        ConfigError: no `SDFT` among the methods, methods that work on given answers, or fields set in two places.
        DataError: rows without an answer to show the teacher.

    Example:
        >>> trainer = ContinualSDFTTrainer(model, args, train_dataset=rows, methods=[SDFT(), EWC()])
        >>> trainer.train()
    """

    on_policy = True

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        methods: Sequence[Method] = (),
        **kwargs: Any,
    ) -> None:
        self.sdft = Stack(methods).writer
        if self.sdft is None:
            raise ConfigError("methods: this trainer carries out `sdft`, which is not among them. Add `SDFT()`.")
        if not isinstance(args, SDFTConfig):
            raise ConfigError(f"args: {type(args).__name__} given; needed: trl.experimental.sdft.SDFTConfig.")
        settle(args, self.sdft.fields())
        with _adapters_are_fine():
            super().__init__(model, args, demonstrations(train_dataset), *rest, methods=methods, **kwargs)

    # -- the teacher -------------------------------------------------------------------------------------
    def _setup_teacher_model(self) -> None:
        self.teacher_model = self.model  # the method's takes its place when the task begins

    def _get_teacher_context_for_self_distillation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _compute_teacher_student_logits(self, model: Any, teacher_model: Any, inputs: Any) -> Any:
        return super()._compute_teacher_student_logits(model, self.sdft.teacher.answer, inputs)

    # -- rows --------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        usual: Any = SDFTTrainer._get_train_sampler(self, train_dataset)
        return _Repeating(
            usual.data_source,
            usual.mini_repeat_count,
            usual.batch_size,
            usual.repeat_count,
            usual.shuffle,
            usual.seed or 0,
        )

    def _tokenised(self, rows: Any, whole: bool = True) -> Any:
        """Rows with their given answers, for methods that weigh what the model knows about them."""
        if "input_ids" in (rows.column_names or []):
            return rows
        usual = {f.name: f.default for f in dataclasses.fields(SFTConfig)}  # made anew it would reset the accelerator
        settings: Any = SimpleNamespace(**usual | {"max_length": self.args.max_prompt_length})
        host: Any = SimpleNamespace(_tokenizer=self._tokenizer, chat_template=None, completion_only_loss=True)
        tokenizer: Any = self.processing_class
        return SFTTrainer._prepare_dataset(host, rows, tokenizer, settings, False, None, "other")

    def _collated(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        collate = DataCollatorForLanguageModeling(pad_token_id=self._tokenizer.pad_token_id)
        return Trainer._prepare_inputs(self, collate(examples))

    def rows_seen(self) -> tuple[int, int]:
        """(new, 0) prompts that the finished training was shown, over all ranks, each once per time it came."""
        window = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self.state.global_step * window // self.args.num_generations, 0


class _Repeating(RepeatSampler):
    """TRL's sampler, whose order is a function of (seed, epoch), so that a run which is continued goes on in it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + 1_000_003 * self.epoch)
        return super().__iter__()


@contextmanager
def _adapters_are_fine() -> Iterator[None]:
    """Without TRL's warning that its own teacher may go wrong on a model with adapters; here it is another."""
    logger = logging.getLogger(sdft_trainer.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def settle(args: Any, fields: dict[str, Any]) -> None:
    """Put the method's settings into TRL's.

    Raises:
        ConfigError: a field that was set in `args` to something else, or answers per prompt that do not fit a step.
    """
    usual = {f.name: f.default for f in dataclasses.fields(SDFTConfig)}
    for name in [name for name in usual if name.startswith(METHODS_OWN)]:
        value = getattr(args, name)
        if value not in (usual[name], fields.get(name, usual[name])):
            raise ConfigError(f"args.{name}: {value!r} given, but it is a setting of the method. Set it in `SDFT(…)`.")
    for name, value in fields.items():
        setattr(args, name, value)
    if args.generation_batch_size % args.num_generations:
        raise ConfigError(
            f"methods.sdft.generations: {args.num_generations} answers per prompt do not divide the "
            f"{args.generation_batch_size} rows of a step. Change `train.per_device_train_batch_size`."
        )


def sdft_arguments(train: dict[str, Any], fields: dict[str, Any]) -> SDFTConfig:
    """TRL's settings from those of a run (`retain.training.arguments`) and those of the method.

    A row of `max_length` tokens, and the words around it, must fit the teacher's prompt, which TRL cuts at its left.

    Raises:
        ConfigError: TRL refuses them.
    """
    own = {name: value for name, value in train.items() if name != "max_length"}
    longest = train.get("max_length")
    around = len(fields["teacher_prompt_template"].encode())  # no token is shorter than a byte
    own.setdefault("max_prompt_length", None if longest is None else longest + around)
    try:
        return SDFTConfig(**own, **fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train: trl.experimental.sdft.SDFTConfig says: {str(error).splitlines()[0]}") from None


def demonstrations(rows: Any) -> Any:
    """Rows of `prompt` and `privileged_context`, the answer that the teacher is shown.

    Raises:
        ConfigError: a stream.
        DataError: rows without an answer, or whose prompt does not end with the user.
    """
    if not hasattr(rows, "__len__"):
        raise ConfigError("methods.sdft: a stream of rows cannot be drawn from. Set `streaming: false`.")
    columns = rows.column_names
    if {"prompt", "privileged_context"} <= set(columns):
        return rows
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise DataError(
            f"methods.sdft: rows of {', '.join(columns)} have no question and answer. Give rows with 'prompt' and "
            "'response', or 'messages'."
        )

    def split(row: dict[str, Any], number: int) -> dict[str, Any]:
        turns = row["messages"] if "messages" in row else row["prompt"]
        if "messages" in row:
            turns, answer = turns[:-1], turns[-1:]
        else:
            answer = row["completion"]
        spoken = answer if isinstance(answer, str) else "\n".join(turn["content"] or "" for turn in answer)
        if not isinstance(turns, str) and (not turns or turns[-1]["role"] != "user"):
            raise DataError(
                f"methods.sdft: row {number + 1} has no turn of the user before the last answer. Leave it out."
            )
        return {"prompt": turns, "privileged_context": spoken}

    return rows.map(split, with_indices=True, remove_columns=columns)
