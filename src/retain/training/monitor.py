"""A callback that watches old abilities while a model trains, under any trainer of Hugging Face's.

Every `every` optimizer steps the main process takes a look, and the others wait: loss and divergence from the base on
fixed texts; at every few looks, and where these numbers moved, the probes. Each look is a line of a JSON Lines file and
goes to the trackers of `report_to`. A training ends with the same bits with and without a monitor that only warns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from retain.config import MonitorConfig
from retain.data.sources import load_texts
from retain.errors import ConfigError
from retain.functional.forgetting import verdict_numbers
from retain.methods.base import validated
from retain.probes.base import Probe
from retain.probes.suite import limited, load_probes
from retain.results import append, load_records
from retain.training import best_weights, hosts, raising
from retain.training.looks import Baseline, Looker, Proxies, anchor_texts, undisturbed
from retain.training.reactions import Decision, Standing, decide, loss_gain, numbers_of
from retain.training.watch import forget

logger = logging.getLogger(__name__)
Source = str | Path | Probe


class ForgettingMonitor(TrainerCallback):
    """Looks at old abilities while training, writes down what it sees, and acts on it when asked.

    Args:
        probes: old abilities, instead of the setting `probes`: suites, files, folders, or `Probe` objects.
        tasks: what is being learned, in the same forms: the new-task score. Without it the evaluation loss stands for
            it, and without an evaluation the training loss.
        anchors: texts, or a file of them as in the setting `anchors`.
        folder: for the baseline and the best weights; `<output_dir>/monitor` when not given.
        log: the JSON Lines file; `<output_dir>/monitor.jsonl` when not given.
        task: name that its records carry, where several trainings share a log.
        follow: a baseline in `folder` holds for this training too: it is a later task of one run.
        tokenizer: when the trainer has none.
        say: receives one line per event; the log of this module when not given.
        looked: receives the record of every look at the probes.
        settings: fields of `MonitorConfig`.

    Raises:
        ConfigError: an unknown setting, or one that cannot be used; when training begins, a trainer or a model that
            cannot be watched.
        DataError: anchors or probes that cannot be used.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[ForgettingMonitor(every=100)])
        >>> trainer.train()
    """

    folder: Path
    log: Path

    def __init__(
        self,
        *,
        probes: Sequence[Source] | None = None,
        tasks: Sequence[Source] = (),
        anchors: Sequence[str] | str | None = None,
        folder: str | Path | None = None,
        log: str | Path | None = None,
        task: str = "",
        follow: bool = False,
        tokenizer: Any = None,
        say: Callable[[str], None] | None = None,
        looked: Callable[[dict[str, Any]], None] = lambda record: None,
        **settings: Any,
    ) -> None:
        given: list[Source] = [probes] if isinstance(probes, str | Path | Probe) else list(probes or ())
        if probes is not None:  # validated by their number alone: whether there are any to go by
            settings["probes"] = [one.name if isinstance(one, Probe) else str(one) for one in given]
        if isinstance(anchors, str):
            settings["anchors"] = anchors
        self.settings: MonitorConfig = validated(MonitorConfig, settings, "monitor")
        c = self.settings
        self.old = _loaded(given if probes is not None else list(c.probes), c.limit)
        self.new = _loaded([tasks] if isinstance(tasks, str | Path | Probe) else tasks, c.limit)
        if anchors is None or isinstance(anchors, str):
            found = load_texts(c.anchors)["text"] if c.anchors else anchor_texts(c.anchor_count)
            anchors = list(found)
        self.texts = list(anchors)[: c.anchor_count]
        self._places = (folder, log)
        self.task, self.follow, self.tokenizer = task, follow, tokenizer
        self.say, self.looked = say or logger.warning, looked
        self.trainer: Any = None
        self.standing = Standing()
        self._looked = -1  # the step of the last look
        self._ended = False

    def attach(self, trainer: Any) -> ForgettingMonitor:
        """Take part in a trainer that was made already; the same as giving it among `callbacks`."""
        trainer.add_callback(self)
        self.trainer = trainer
        return self

    def with_tokenizer(self, tokenizer: Any) -> Looker:
        """The anchors and probes as they will be put to the model.

        Raises:
            DataError: too few of them for an interval, or two probes with one name.
        """
        c = self.settings
        return Looker(self.texts, self.old, self.new, tokenizer, c.anchor_tokens, c.confidence)

    # -- events --------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trainer = hosts.calling_trainer() or self.trainer
        folder, log = self._places
        self.folder = Path(folder or Path(args.output_dir) / "monitor")
        self.log = Path(log or Path(args.output_dir) / "monitor.jsonl")
        hosts.refuse_shards()
        if self.settings.raised is not None:
            raising.check(self.trainer, self.settings.raised)
        self._looked = state.global_step
        first: dict[str, Any] | None = None
        if PartialState().is_main_process:
            tokenizer = self.tokenizer or kwargs.get("processing_class")
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of texts and images
            if tokenizer is None:
                raise ConfigError("monitor: the trainer has no tokenizer. Give it `processing_class`, or `tokenizer=`.")
            self.looker = self.with_tokenizer(tokenizer)
            first = self._begin(hosts.unwrapped(model), args.device, state.global_step)
        raises = [(r["step"], r["standing"]["factor"]) for r in self._records() if "raise" in r["did"]]
        self.standing, first, raises = hosts.from_main((self.standing, first, raises))
        for step, factor in raises:
            raising.put(self.trainer, str(self.settings.raised), step, factor)
        self._ended = self.standing.stopped
        if first is not None:
            self._report(first)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        step, c = state.global_step, self.settings
        if self._ended:  # goes on from a checkpoint that was written when the monitor had ended the training
            if c.action == "restore":
                self._put_back(model)
            control.should_training_stop = True
            return control
        if step == self._looked or (step % c.every and step < state.max_steps):
            return control
        record: dict[str, Any] = {}
        made = Decision()
        if PartialState().is_main_process:
            record, made = self._look(hosts.unwrapped(model), args, state)
        record, made, self.standing = hosts.from_main((record, made, self.standing))
        self._report(record)
        self._looked = step
        if made.factor is not None:
            raising.put(self.trainer, str(c.raised), step, made.factor)
        if made.restore:
            self._put_back(model)
        for line in made.say if PartialState().is_main_process else ():
            self.say(f"monitor, {line}")
        if record.get("why"):
            self.looked(record)
        control.should_training_stop |= made.stop
        control.should_save |= c.checkpoint
        if made.keep and args.save_strategy == "no" and not c.checkpoint:
            self.on_save(args, state, control)  # no checkpoint, so nothing goes back to an earlier best
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if PartialState().is_main_process:
            best_weights.drop(self.folder, self.standing.best_step)

    def _put_back(self, model: Any) -> None:
        if self.standing.best_step is not None:
            best_weights.put_back(self.folder, hosts.unwrapped(model), self.standing.best_step)

    # -- looks ---------------------------------------------------------------------------------------------
    def _begin(self, model: Any, device: torch.device, step: int) -> dict[str, Any] | None:
        """The baseline: made, or taken from where it is kept; its record where it is new."""
        forget(self.log, lambda r: r.get("kind") == "monitor" and r.get("task") == self.task and r["step"] > step)
        kept = Baseline.load(self.folder) if step or self.follow else None
        if kept is not None and kept.digest != self.looker.digest:
            raise ConfigError(
                f"monitor: the baseline in {self.folder} was made with other anchors or probes. Give the same ones, or "
                "another `folder`."
            )
        self.standing = Standing()
        if step == 0:
            forget(self.log, lambda r: r.get("kind") == "monitor" and r.get("task") == self.task)
            best_weights.drop(self.folder, None)
        records = self._records()
        self.last = next((r for r in reversed(records) if r.get("anchors")), None)
        if kept is None and step:
            self.say(f"monitor: no baseline in {self.folder}; forgetting is counted from step {step} on.")
        with undisturbed(model, device):
            self.base = kept or self.looker.baseline(model, step)
            if self.looker.complete(self.base, model) or kept is None:
                self.base.save(self.folder)
        if records:
            self.standing = Standing.of(records[-1])
            return None
        zero = Proxies(np.zeros(len(self.looker.lengths)), self.looker.means(self.base.loss))
        if kept is not None:  # the base of an earlier task: this one begins elsewhere
            with undisturbed(model, device):
                zero = self.looker.proxies(model, self.base)
        record = self._record(step, zero, "baseline" if kept is None else "start", time.monotonic())
        self.last = record | {"anchors": {"kl": zero.kl.tolist(), "loss": zero.loss.tolist()}}
        return self._written(self.last)

    def _look(self, model: Any, args: Any, state: Any) -> tuple[dict[str, Any], Decision]:
        c, begin = self.settings, time.monotonic()
        with undisturbed(model, args.device):
            now = self.looker.proxies(model, self.base)
            why = self._why(now, state)
            record = self._record(state.global_step, now, why, begin)
            made = Decision()
            if why:
                shown, verdict = self.looker.answers(model, self.base)
                record |= {"probes": shown, "anchors": {"kl": now.kl.tolist(), "loss": now.loss.tolist()}}
                self.last = record
        if why and verdict is not None:
            gain = verdict.improvement if self.new else loss_gain(state.log_history, self._looked)
            numbers = verdict_numbers([verdict.forgetting], [gain], [verdict.mean_reference])
            score = numbers.stability_efficiency if c.score == "efficiency" else numbers.balance
            forgotten = verdict.intervals.get("forgetting")
            record["forgetting"] = {"value": verdict.forgetting} | (
                {"low": forgotten.low, "high": forgotten.high} if forgotten else {}
            )
            record |= {"difference": verdict.difference.model_dump() if verdict.difference else None}
            record |= {"learned": verdict.learned.model_dump() if verdict.learned else None}
            record |= {"improvement": numbers.improvement, "score": score}
            drops = {name: one["forgetting"] for name, one in shown.items() if one["role"] == "reference"}
            made = decide(c, self.standing, state.global_step, verdict.forgetting, score, drops)
            if made.keep:
                best_weights.keep(self.folder, model, state.global_step)
        record["did"] = [*made.did, *(["checkpoint"] if c.checkpoint else [])]
        record["standing"] = vars(self.standing).copy()
        record["seconds"] = round(time.monotonic() - begin, 3)
        return self._written(record), made

    def _why(self, now: Proxies, state: Any) -> str:
        """Why the probes are asked at this look; "" when they are not."""
        if not self.looker.probes:
            return ""
        c, number = self.settings, -(-state.global_step // self.settings.every)
        if state.global_step >= state.max_steps:
            return "last"
        if number % c.probes_every == 0:
            return "turn"
        if self.standing.above:
            return "alarm near"
        before = Proxies(*(np.array(self.last["anchors"][key]) for key in ("kl", "loss"))) if self.last else None
        least = max(c.move, 3 * self.base.noise)
        return "moved" if before is None or self.looker.moved(before, now, least) else ""

    def _record(self, step: int, now: Proxies, why: str, begin: float) -> dict[str, Any]:
        return {
            "kind": "monitor",
            "task": self.task,
            "step": step,
            **self.looker.summary(now, self.base),
            "why": why,
            "did": [],
            "standing": vars(self.standing).copy(),
            "seconds": round(time.monotonic() - begin, 3),
        }

    def _written(self, record: dict[str, Any]) -> dict[str, Any]:
        append(self.log, record)
        return record

    def _records(self) -> list[dict[str, Any]]:
        """This training's records, oldest first; none on other processes than the main one."""
        if not PartialState().is_main_process:
            return []
        return [r for r in load_records(self.log) if r.get("kind") == "monitor" and r.get("task") == self.task]

    def _report(self, record: dict[str, Any]) -> None:
        """Hand the numbers of a look to the trackers, as the trainer hands them its own."""
        if self.trainer is not None and record:
            hosts.log(self.trainer, numbers_of(record))


def _loaded(sources: Sequence[Source], limit: int | None) -> list[Probe]:
    found: list[Probe] = []
    for source in sources:
        found += [limited(source, limit)] if isinstance(source, Probe) else load_probes(source, limit)
    for probe in found:
        if probe.kind == "divergence":  # has a base of its own, which only a run keeps
            raise ConfigError(
                f"monitor.probes: '{probe.name}' is of kind divergence. Leave it out: the anchors measure the KL from "
                "the base at every look; give its texts as `anchors`."
            )
    return found
