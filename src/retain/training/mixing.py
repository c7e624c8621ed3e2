"""What a training is shown: new rows and replayed ones in one data set, and the order in which they come.

The part of `ContinualMixin` that deals with rows; like the rest of it, it goes over any `transformers.Trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retain.data.mixture import Mixture, MixtureSampler
from retain.errors import ConfigError
from retain.functional.sources import Sources
from retain.methods.base import Stack
from retain.methods.context import Run
from retain.training.rows import SourceCollator, interleaved, length, supervised

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object


class Mixing(_Host):
    """New rows, replayed rows, and the sampler that mixes them."""

    # The host's own, which it declares as possibly None or as its base class.
    args: Any
    _signature_columns: Any
    stack: Stack
    run: Run
    _mixture: Mixture | None = None
    _sampler: MixtureSampler | None = None

    def _tokenised(self, rows: Any, whole: bool = False) -> Any:
        """Rows in the form of the training set, or each by itself where that one is packed; tokenised rows pass."""
        columns = rows.column_names or []
        if "input_ids" in columns or not hasattr(self, "_prepare_dataset"):
            return rows
        masked: Any = getattr(self, "completion_only_loss", None)
        if self.args.completion_only_loss is None:
            # TRL decides by the form of the new rows; replayed answers must not become prompts that are learned
            self.completion_only_loss = True
        try:
            packing = getattr(self.args, "packing", False) and not whole
            return self._prepare_dataset(rows, self.processing_class, self.args, packing, None, "replay")
        finally:
            self.completion_only_loss = masked

    def _mix(self) -> None:
        """Let methods add rows, then make one data set of new rows followed by replay rows."""
        with self.accelerator.autocast():
            mixture = self.stack.prepare_data(Mixture(new=self.train_dataset), self.run)
        if mixture.replay is None:
            return
        replay = self._tokenised(mixture.replay)
        if len(replay) == 0:
            raise ConfigError("methods.replay: no replay row is left after tokenising. Raise `train.max_length`.")
        sources = mixture.sources or Sources(("old",), np.zeros(len(replay), np.int64), (1.0,))
        assert len(sources.origin) == len(replay), "rows of several sources must come tokenised"
        fraction = mixture.fraction or (lambda progress: 0.0)
        mixture = replace(mixture, replay=replay, fraction=fraction, sources=sources)
        self.run.replay_sources = sources.names
        if not hasattr(mixture.new, "__len__"):
            self.train_dataset = interleaved(mixture, self.run.seed)
        else:
            from datasets import concatenate_datasets

            ours = ("source", "number")
            keep = [c for c in mixture.new.column_names if c in replay.column_names and c not in ours]
            numbers = ([0] * len(mixture.new), (sources.origin + 1).tolist())
            parts = [
                part.select_columns(keep).add_column("source", column)
                for part, column in zip((mixture.new, replay), numbers, strict=True)
            ]
            if mixture.choose is not None:
                if self.args.dataloader_drop_last:
                    raise ConfigError("train.dataloader_drop_last: not with `replay.priority`. Remove one of them.")
                places = ([-1] * len(parts[0]), list(range(len(parts[1]))))
                parts = [part.add_column("number", place) for part, place in zip(parts, places)]
            self._mixture = replace(mixture, new=parts[0], replay=parts[1])
            self.train_dataset = concatenate_datasets(parts)
        self.data_collator = SourceCollator(self.data_collator)
        self.run.has_replay, self.run.replay = True, replay

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in ("source", "number"):
            if column not in self._signature_columns:
                self._signature_columns = [*self._signature_columns, column]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, mixture = self.args, self._mixture
        if mixture is None or mixture.fraction is None:
            return super()._get_train_sampler(train_dataset)
        window = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._sampler = MixtureSampler(
            supervised(mixture.new, mixture.by),
            supervised(mixture.replay, mixture.by),
            mixture.fraction,
            mixture.by,
            window,
            epochs=args.num_train_epochs,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            choose=mixture.choose,
            steps=args.max_steps,
            sources=mixture.sources,
            every=mixture.every,
            spread=mixture.spread,
        )
        return self._sampler

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """The host's plan of a training; it counts all epochs as long as the first, which a mixture's need not be."""
        *others, steps = super().set_initial_training_values(args, dataloader)
        if self._sampler is not None and args.max_steps <= 0:
            steps = self._sampler.steps(args.gradient_accumulation_steps) or steps
        return (*others, steps)

    def _batches(self, rows: Any, size: int) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Tokenised, collated batches of rows on the training device: (inputs, labels).

        One row of a batch is one row of the data, however the training is fed: what a method finds out about rows
        must not depend on which others they came with. Only rows that come packed stay packed.
        """
        tokenised = self._tokenised(rows, whole=True)
        wanted = [c for c in ("input_ids", "labels", "seq_lengths") if c in tokenised.column_names]
        tokenised = tokenised.select_columns(wanted)
        for first in range(0, len(tokenised), size):
            examples = [tokenised[i] for i in range(first, min(first + size, len(tokenised)))]
            inputs = self._collated(examples)
            yield inputs, inputs.pop("labels")

    def _collated(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenised rows as one batch on the training device."""
        collate: Any = getattr(self.data_collator, "inner", self.data_collator)
        if getattr(collate, "padding_free", False) and "seq_lengths" not in examples[0]:
            collate = copy(collate)
            collate.padding_free = False
        return self._prepare_inputs(collate(examples))

    def rows_seen(self) -> tuple[int, int]:
        """(new, replayed) rows that the finished training was shown, over all ranks."""
        window = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps = self.state.global_step
        if self._mixture is None:
            return min(
                steps * window, int(np.ceil(self.state.epoch or 0)) * length(self.train_dataset, steps * window)
            ), 0
        replayed = sum(self.replayed().values())
        return len(self._shown()) - replayed, replayed

    def replayed(self) -> dict[str, int]:
        """Rows that were replayed, by source, over all ranks; none for a stream, whose log has the shares."""
        if self._mixture is None or self._mixture.sources is None:
            return {}
        shown, sources = self._shown() - len(self._mixture.new), self._mixture.sources
        if self._mixture.choose is not None:  # chosen late: the log has the shares of the sources
            return {"replay": int((shown >= 0).sum())}
        counts = np.bincount(sources.origin[shown[shown >= 0]], minlength=len(sources.names))
        return dict(zip(sources.names, counts.tolist()))

    def _shown(self) -> np.ndarray:
        """Row numbers of the mixture, in the order in which they were shown."""
        return (self._sampler or self._get_train_sampler()).shown(self.state.global_step)
