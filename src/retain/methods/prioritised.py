"""What replay by priority is made of: which rows are drawn, when they are measured again, and which are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from pydantic import Field

from retain.data import own_function
from retain.data.buffer import Buffer
from retain.data.judged import JudgedBuffer
from retain.data.mixture import Mixture
from retain.data.priorities import Priorities
from retain.data.references import References
from retain.data.replay_sources import shared_folder
from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run, Tokens
from retain.methods.worth import COMPARED, MEASURED, Worth
from retain.models.row_scores import row_keys


class Prioritised(Method):
    """A method whose replay rows are drawn, and kept, by what they are worth."""

    class Config(MethodConfig):
        policy: Literal["reservoir", "balanced", "priority", "diversity"] = "reservoir"
        """Which rows of earlier tasks a full buffer keeps: a uniform sample of all, one of each task, those of the
        highest priority, or as many of each cluster of their text (k-means over TF-IDF)."""
        clusters: int = Field(20, ge=1)
        """Clusters for `diversity`."""
        priority: Literal["none", "forgetting", "loss", "gradient", "length", "terms", "custom"] = "none"
        """What a row is worth. `forgetting`: how much its loss rose since it was stored (recommended); `loss`: its
        loss now; `gradient`: norm of the exact gradient of its mean loss; `length`: of its answer; `terms`: key terms
        or rare words in it; `none`: all rows are replayed in turn."""
        terms: list[str] = []
        """Key terms for `terms`; without them, words that few rows have."""
        function: str | None = None
        """For `custom`: `module:function`, which is given a list of rows (`text`, `answer`, `loss`, `reference`) and
        gives a number for each."""
        exponent: float = Field(0.6, ge=0)
        """How much priorities count in the draw; 0 draws uniformly."""
        floor: float = Field(0.01, gt=0)
        """Added to every priority, so that no row is left out; in its unit (for losses, nats per token)."""
        correction: float | None = Field(None, ge=0, le=1)
        """Against the bias of the draw: replayed rows weigh (1 / (N·P))^b, over the largest; b starts here and rises
        to 1. Without it they all weigh 1."""
        measure_every: int = Field(10, ge=1)
        """Steps from one measurement to the next; what one finds decides from the next one on."""
        measure_rows: int = Field(32, ge=1)
        """Rows measured each time: half of them just replayed, the others those measured longest ago."""

    priorities: Priorities | None = None

    @property
    def weighs_tokens(self) -> bool:
        return self.config.correction is not None and self.config.priority != "none"

    @property
    def worth(self) -> Worth:
        """What rows are worth, by the settings."""
        return Worth(self.config.priority, tuple(self.config.terms), self.config.function)

    # -- once per task -----------------------------------------------------------------------------------
    def check(self, tasks: Sequence[str] = ()) -> None:
        c, given, refuse = self.config, self.config.model_fields_set, self._refuse
        works = dict.fromkeys(("exponent", "floor", "correction"), c.priority != "none")
        works |= dict.fromkeys(("measure_every", "measure_rows"), c.priority in MEASURED)
        for name in (name for name, does in works.items() if name in given and not does):
            refuse(name, f"it does nothing with `priority: {c.priority}`. Set another `priority`, or remove it")
        for name, kind in (("terms", "terms"), ("function", "custom")):
            if getattr(c, name) and c.priority != kind:
                refuse(name, f"it goes with `priority: {kind}`, not `{c.priority}`. Remove it")
        if "clusters" in given and c.policy != "diversity":
            refuse("clusters", f"it goes with `policy: diversity`, not `{c.policy}`. Remove it")
        if c.policy == "priority" and c.priority == "none":
            refuse("policy", "no `priority` is set. Set one, such as `priority: forgetting`")
        if c.priority == "none":
            return
        if c.priority == "custom":
            own_function.load(c.function, f"methods.{self.name}.function")
        if c.by == "tokens":
            refuse("by", "rows are chosen late, so that only rows can be counted. Set `by: rows`, or `priority: none`")

    def check_data(self, data: Mixture) -> None:
        """Refuse a priority that these rows, or this way of training, cannot have.

        Raises:
            ConfigError: it is one of them.
        """
        if self.config.priority == "none":
            return
        if not hasattr(data.new, "__len__"):
            self._refuse("priority", "the new rows are a stream. Set `priority: none`")
        if self.config.priority in MEASURED and AcceleratorState._shared_state:
            kind = AcceleratorState().distributed_type
            if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                self._refuse("priority", f"rows cannot be measured between steps under {kind.value}. Use DDP")

    def _refuse(self, name: str, why: str) -> None:
        raise ConfigError(f"methods.{self.name}.{name}: {getattr(self.config, name)!r} given, but {why}.")

    def prioritised(self, data: Mixture, run: Run) -> Mixture:
        """The mixture with its replay rows chosen by priority, where that is asked for."""
        c = self.config
        if c.priority == "none":
            return data
        self._rows: Any = _whole_rows(data.replay)
        steps = c.measure_every if c.priority in MEASURED else 0
        self.priorities = Priorities(len(self._rows), (run.seed, run.task_index), steps, c.exponent, c.floor)
        data.choose = self.priorities.rows
        if steps:
            number = min(c.measure_rows, len(self._rows))
            run.say(f"replay: rows by {c.priority}; {number} of {len(self._rows)} are measured every {steps} steps.")
        return data

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if self.priorities is None or run.restored:
            return
        self._reference, losses = np.zeros(len(self._rows)), None
        if self.config.priority in COMPARED:
            losses, known = self.worth.losses(self._rows, run), References(run.buffer).load()
            self._reference = np.array([known.get(key, now) for key, now in zip(row_keys(self._rows), losses)])
        self.priorities.begin(self.worth.of(self._rows, run, self._reference, losses))

    # -- inside the step ---------------------------------------------------------------------------------
    def token_weights(self, tokens: Tokens, run: Run) -> torch.Tensor | None:
        number = tokens.batch.number
        if not self.weighs_tokens or self.priorities is None or number is None:
            return None
        if len(number) != len(tokens.batch.labels):
            raise ConfigError(
                "methods.replay.correction: rows are flattened by padding-free packing and cannot be weighed. "
                "Set `padding_free: false`, or remove it."
            )
        progress = run.step / max(1, run.max_steps - 1)
        weights = torch.from_numpy(self.priorities.weights(run.step, self.config.correction, progress))
        mine, wide = number[tokens.rows], torch.promote_types(tokens.hidden.dtype, torch.float32)
        own = weights.to(wide).to(mine.device)[mine.clamp(min=0)]
        return torch.where(mine >= 0, own, torch.ones_like(own))

    def see_step(self, model: torch.nn.Module, run: Run) -> None:
        if self.priorities is None or not self.priorities.step_done(run.step):
            return
        chosen = self.priorities.to_measure(self.config.measure_rows)
        found = self.worth.of(self._rows.select(chosen), run, self._reference[chosen])
        self.priorities.renew(run.step, chosen, found)
        run.log("replay/priority", float(np.maximum(self.priorities.next, 0).mean()))

    # -- the buffer --------------------------------------------------------------------------------------
    def buffer_of(self, run: Run) -> Buffer:
        """The buffer of the whole run; each policy has its own folder, since others draw from the reservoir's."""
        c = self.config
        folder = run.buffer / f"tasks-{c.policy}" if c.policy != "reservoir" else shared_folder(run.buffer, c.buffer)
        if c.policy in JudgedBuffer.policies:
            return JudgedBuffer(folder, c.buffer, c.policy, run.seed, c.clusters)
        return Buffer(folder, c.buffer, c.policy, run.seed)

    def store(self, run: Run) -> None:
        """Put the task's rows into the buffer, with what is known of their worth; on every rank."""
        buffer = self.buffer_of(run)
        fresh = run.task not in buffer.counts("source")
        old, new = self._values(buffer, run) if fresh and self.config.policy == "priority" else (None, None)
        PartialState().wait_for_everyone()  # all have read before one writes
        if fresh and PartialState().is_main_process:
            if isinstance(buffer, JudgedBuffer):
                if old is not None:
                    buffer.refresh(old)
                buffer.add(run.new_rows, run.task, values=new)
            else:
                buffer.add(run.new_rows, run.task)
        PartialState().wait_for_everyone()
        if self.config.priority in COMPARED:
            self._store_references(run)

    def _values(self, buffer: Buffer, run: Run) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of the rows in the buffer and of the task's; None where nothing new is known of them."""
        text, parts = self.config.priority not in MEASURED, []
        stored = buffer.rows() if len(buffer) else None
        if stored is not None:
            parts.append(_numbered(stored, run))
        if self.config.priority != "forgetting":  # of rows just learned nothing is forgotten yet
            parts.append(_numbered(run.new_rows, run))
        old = new = None
        if text:  # read off all texts together, so that they can be compared
            from datasets import concatenate_datasets

            both = concatenate_datasets([part.select_columns(["input_ids", "labels"]) for part in parts])
            found = np.split(self.worth.of(both, run, np.zeros(0)), [len(both) - len(parts[-1])])
            old = None if stored is None else _placed(np.full(len(stored), -np.inf), parts[0], found[0])
            new = _placed(np.full(len(run.new_rows), -np.inf), parts[-1], found[1])
            return old, new
        if stored is not None and self.priorities is not None:
            old, now = np.array(stored["value"], np.float64), dict(zip(row_keys(self._rows), self.priorities.next))
            for place, key in zip(parts[0]["place"], row_keys(parts[0])):
                old[place] = now.get(key, old[place])
        if self.config.priority != "forgetting":
            losses = None if self.config.priority == "gradient" else self.worth.losses(parts[-1], run)
            found_now = self.worth.of(parts[-1], run, np.zeros(0) if losses is None else losses, losses)
            new = _placed(np.full(len(run.new_rows), -np.inf), parts[-1], found_now)
        return old, new

    def _store_references(self, run: Run) -> None:
        """Keep the losses that rows had when they were stored: of the buffer, and of what is replayed beside it."""
        buffer, file, kept = self.buffer_of(run), References(run.buffer), {}
        known = file.load()
        if self.priorities is not None:
            kept = dict(zip(row_keys(self._rows), self._reference.tolist()))
        if len(buffer):
            rows = _whole_rows(run.tokenise(buffer.rows()))
            keys = row_keys(rows)
            kept |= {key: known[key] for key in keys if key in known}
            new = [i for i, (key, task) in enumerate(zip(keys, rows["source"])) if task == run.task and key not in kept]
            if new:
                losses = self.worth.losses(rows.select(new), run)
                kept |= dict(zip([keys[i] for i in new], losses.tolist()))
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            file.save(kept)

    # -- resume ------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, torch.Tensor]:
        if self.priorities is None:
            return {}
        return self.priorities.state_dict() | {"reference": torch.from_numpy(self._reference.copy())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if self.priorities is not None:
            self.priorities.load_state_dict(state)
            self._reference = state["reference"].numpy().copy()


def _numbered(rows: Any, run: Run) -> Any:
    """Tokenised rows that know their `place`: tokenising leaves out rows that teach nothing, and may shuffle."""
    return _whole_rows(run.tokenise(rows.add_column("place", list(range(len(rows))))))


def _whole_rows(tokenised: Any) -> Any:
    if "seq_lengths" in tokenised.column_names:
        raise ConfigError("methods.replay.priority: packed rows have no priority. Set `train: {packing: false}`.")
    return tokenised


def _placed(values: np.ndarray, rows: Any, found: np.ndarray) -> np.ndarray:
    values[np.asarray(rows["place"], np.int64)] = found
    return values
