"""DER — replays old rows with the outputs that the model had for them when they were stored.

    L = L_new + strength · KL(p⁰ ‖ p)(x_b) + labels · CE(x_b′, y_b′)

(Dark Experience Replay, Buzzega et al. 2020, arXiv:2004.07211.) p⁰ = the stored output of a row, p = that of the model
in training; x_b and x_b′ are two independent draws of `batch_size` rows per step from one buffer, each term a mean
over their supervised tokens. `labels: 0` is DER, else it is DER++. The buffer is a uniform sample of the rows trained
on so far, each stored with the output of the very step that saw it, and, for what the model could do before, `old`
rows with its outputs at the start: the user's, else written by the model itself. Where no text of any row may be kept
(`private: true` of a run), set `buffer: 0, source: self`: then rows are pseudo-samples of the model with its own
outputs; `own` adds such rows after each task, without those that repeat something of the rows it learned.
Deviations from the paper: of an output the `top_k` likeliest tokens and one bucket for all others are kept, and a
    divergence takes the place of the squared distance of all logits (equal to the full KL for k = vocabulary).
    Rows enter after the step that saw them, and at every epoch again. Old rows are never pushed out by task rows.
Needs: nothing but the task's rows; with `source: self` rows written by the model.
Cost: a forward and backward pass over twice `batch_size` rows per step; 6 · `top_k` bytes per supervised token.
Combine with: distill, lora, ewc, freeze, interpolate; with `replay` old rows come twice.   Conflicts: none.
Tune: `strength` 0.1–0.5, `labels` 0.5–1.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import Field

from retain.data.outputs import ALWAYS, Stored, StoredOutputs
from retain.errors import ConfigError
from retain.functional.divergence import tail_kl
from retain.functional.outputs import top_k
from retain.functional.tiled_head import Head, log_probs
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Batch, Run, answer_loss
from retain.models import params, passes
from retain.models.own_rows import pseudo_rows


class DER(Method):
    """Dark experience replay."""

    family = "replay"
    paper = "arXiv:2004.07211"
    repeats_batches = True  # to know where a step begins and how many tokens it has; no batch is run again
    off = {"strength": 0.0, "labels": 0.0}

    class Config(MethodConfig):
        strength: float = Field(0.5, ge=0)
        """Weight of the divergence from stored outputs (α of the paper)."""
        labels: float = Field(0.5, ge=0)
        """Weight of the cross-entropy on stored rows (β); 0 is DER, above 0 DER++."""
        batch_size: int = Field(4, ge=1)
        """Rows of each of the two draws per step, over all processes."""
        buffer: int = Field(256, ge=0)
        """Rows of tasks that are kept; 0 keeps none."""
        old: int = Field(256, ge=0)
        """Rows that stand for what the model could do before the first task, at most; 0 takes none."""
        source: Literal["auto", "self"] = "auto"
        """Those rows: the user's if there are any, or always written by the model."""
        own: int = Field(0, ge=0)
        """Rows that the model writes when it has learned a task, in place of the task's; they are never pushed out."""
        top_k: int = Field(64, ge=1)
        """Tokens of each stored output; all others share one bucket."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if not (self.config.buffer or self.config.old or self.config.own):
            raise ConfigError("methods.der: buffer 0 and old 0 leave nothing to replay. Raise one of them.")
        if self.config.own and run.new_rows is None:
            raise ConfigError("methods.der.own: nothing can be compared with rows that are not there. Set it to 0.")
        self._offered: list[Stored] = []
        if run.restored:
            return
        path = run.shared_folder / "der" / f"{run.task_index:02d}.parquet"
        known = run.task_index > 1 and path.is_file()
        self._kept = StoredOutputs.load(path, self.config.buffer) if known else StoredOutputs(self.config.buffer)
        if not known and self.config.old:
            given = run.old if self.config.source == "auto" else None
            self._kept.offer(self._with_outputs(run.old_rows(model, self.config.old, given), 0, model, run))

    def keeps_text(self, old: bool) -> str | None:
        if self.config.buffer:
            return "keeps rows of tasks; set `buffer: 0` (and `own` for rows in their place)"
        given = old and self.config.old and self.config.source == "auto"
        return "keeps old rows; set `source: self`" if given else None

    def _with_outputs(self, rows: Any, task: int, model: Any, run: Run) -> list[Stored]:
        """Rows with the outputs of the model as it is."""
        rows = run.tokenise(rows)
        if "seq_lengths" in rows.column_names:
            raise ConfigError("methods.der: packed rows cannot be told apart. Set `train: {packing: false}`.")
        found, size = [], self.config.batch_size
        batches = run.track(run.batches(rows, size), "outputs of old rows", -(-len(rows) // size))
        for number, (inputs, labels) in enumerate(batches):
            with torch.no_grad():
                hidden = params.hidden_states(model, inputs)[:, :-1][labels[:, 1:] != -100]
            entries = rows.select(range(number * size, min(len(rows), (number + 1) * size)))
            counts = [sum(label != -100 for label in labels[1:]) for labels in entries["labels"]]
            for entry, part in zip(entries, hidden.split(counts)):
                if len(part):
                    found.append(self._stored(ALWAYS, task, entry["input_ids"], entry["labels"], part, run))
        return found

    def _stored(self, key: float, task: int, ids: Any, labels: Any, hidden: torch.Tensor, run: Run) -> Stored:
        head = Head(*params.head(run.model), *params.logit_rules(run.model))
        top_ids, values = (t.cpu().numpy() for t in top_k(hidden, head, self.config.top_k))
        arrays = (np.asarray(ids, np.int32), np.asarray(labels, np.int32), top_ids.astype(np.int32))
        return Stored(key, task, *arrays, values.astype(np.float16))

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        first = len(run.step_batches) == 1
        if first:
            self._offered.clear()
        loss = self._replayed(run) if first and len(self._kept) else None
        if self.config.buffer:
            self._take(batch, run)
        return loss

    def _replayed(self, run: Run) -> torch.Tensor | None:
        """Both terms on rows drawn for this step, times the tokens of the step, by which the trainer divides."""
        state, random = PartialState(), np.random.default_rng([run.seed, run.task_index, run.step, 1])
        number = min(self.config.batch_size, len(self._kept))
        terms = []
        for weight, term in ((self.config.strength, self._outputs), (self.config.labels, self._labels)):
            drawn = [self._kept.rows[i] for i in random.choice(len(self._kept), number, replace=False)]
            mine = drawn[state.process_index :: state.num_processes]
            if weight and mine:
                terms.append(weight / sum(len(row) for row in drawn) * term(mine, run))
        return torch.stack(terms).sum() * run.step_tokens if terms else None

    def _outputs(self, rows: list[Stored], run: Run) -> torch.Tensor:
        """Σ over supervised tokens of KL(stored ‖ now), over the stored tokens and one bucket for the rest."""
        inputs, labels = _batch(rows, run)
        with passes.precision(labels.device):  # as the stored outputs were made
            hidden = params.hidden_states(run.model, inputs)[:, :-1][labels[:, 1:] != -100]
        stored = zip(*((row.top_ids, row.log_probs) for row in rows))
        ids, past = (torch.from_numpy(np.concatenate(part)).to(hidden.device) for part in stored)
        head = Head(*params.head(run.model), *params.logit_rules(run.model))
        now, _ = log_probs(hidden, head, ids.long())
        return tail_kl(past.to(now.dtype), now).sum()

    def _labels(self, rows: list[Stored], run: Run) -> torch.Tensor:
        """Σ −log p of the stored rows' supervised tokens."""
        inputs, labels = _batch(rows, run)
        with passes.precision(labels.device):
            return answer_loss(run.model, inputs, labels)

    def _take(self, batch: Batch, run: Run) -> None:
        """Keep new rows of this micro-batch, with the outputs they have just got, until the step is done."""
        mask = batch.inputs.get("attention_mask")
        if mask is None or mask.shape != batch.labels.shape:
            raise ConfigError(
                "methods.der.buffer: rows are packed or flattened and cannot be told apart. "
                "Set `train: {packing: false, padding_free: false}`, or `buffer: 0`."
            )
        real, learned = mask.bool(), batch.supervised & mask.bool()[:, :-1]
        ids, labels, there = (t.cpu() for t in (batch.inputs["input_ids"], batch.labels, real))
        for row in (batch.source == 0).nonzero()[:, 0].tolist():
            words = ids[row][there[row]].numpy().astype(np.int32)
            if self._kept.keeps(key := _key(words, run)) and bool(learned[row].any()):
                hidden = batch.hidden[row, :-1][learned[row]].detach()
                self._offered.append(self._stored(key, run.task_index, words, labels[row][there[row]], hidden, run))

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        self._kept.offer(gather_object(self._offered))
        self._offered = []

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if PartialState().is_main_process:
            if self.config.own:
                given = [rows for rows in (run.new_rows, run.old) if rows is not None]
                number, seed = self.config.own, run.seed + run.task_index
                rows = pseudo_rows(model, run.tokenizer, number, seed, given, run.say, run.avoid)
                with params.evaluating(model):
                    self._kept.offer(self._with_outputs(rows, run.task_index, model, run) if len(rows) else [])
            self._kept.save(run.shared_folder / "der" / f"{run.task_index + 1:02d}.parquet")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._kept.tensors()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._kept = StoredOutputs.from_tensors(state, self.config.buffer)


def _key(ids: np.ndarray, run: Run) -> float:
    """A number in [0, 1) from the row and the step that saw it: the same however the step is split, on any process."""
    place = np.array([run.seed, run.task_index, run.step], np.int64)
    return int.from_bytes(hashlib.blake2b(place.tobytes() + ids.tobytes(), digest_size=8).digest(), "big") / 2**64


def _batch(rows: list[Stored], run: Run) -> tuple[dict[str, Any], torch.Tensor]:
    """Stored rows as one batch, as the trainer makes batches."""
    from datasets import Dataset

    entries = [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows]
    ((inputs, labels),) = run.batches(Dataset.from_list(entries), len(rows))
    return inputs, labels
