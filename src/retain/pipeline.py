"""A run from its configuration to its report: baseline, then train and probe, task after task.

Every finished part is a file in the run directory, so the same command goes on where a killed run stopped and
ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain import analysis
from retain.config import RunConfig
from retain.data.chat import template_check, to_chat
from retain.data.sources import load_rows
from retain.data.tasks import Task, load_task
from retain.errors import ConfigError, DataError, RunError
from retain.methods import build
from retain.methods.base import Stack
from retain.results import (
    ProbeInfo,
    Results,
    StepSummary,
    load_items,
    load_results,
    save_items,
    save_results,
    write_text,
)
from retain.rundir import BASE, RunDirectory, stage_name

Say = Callable[[str], None]

#: Where a configuration says nothing. A short warm-up because Adam's first steps have no history.
TRAIN_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "max_length": 512,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
}
#: Full fine-tuning moves every weight: a tenth of LoRA's rate.
FULL_LEARNING_RATE = 2e-5


@dataclass
class Plan:
    """Everything that can be known before the weights are loaded."""

    config: RunConfig
    stack: Stack
    train: dict[str, Any]
    stages: list[str]


def plan(config: RunConfig) -> Plan:
    """Check a configuration without loading weights.

    Raises:
        ConfigError: methods that clash or lack what they need, unknown training settings.
        DataError: data that is not there.
    """
    stack = Stack(build(config.methods))
    stack.check_needs(frozenset({"old"} if config.old else ()))
    names = {m.name for m in stack.methods}
    if config.model.quantize != "none" and "lora" not in names:
        raise ConfigError("model.quantize: quantised weights cannot be trained. Add `lora` to the methods.")
    train = {**TRAIN_DEFAULTS, **({} if "lora" in names else {"learning_rate": FULL_LEARNING_RATE}), **config.train}
    check_train(train)
    if not _accelerator():
        train.setdefault("use_cpu", True)  # bfloat16 on a CPU has to be asked for in this way
        # TRL's default trades a third more computing for memory, which a small model on a CPU does not lack
        train.setdefault("gradient_checkpointing", False)
    if not {"bf16", "fp16"} & train.keys():
        train["bf16"] = _fast_bf16(bool(train.get("use_cpu")))
    stages = [BASE] + [stage_name(i, name) for i, name in enumerate(config.task_names, 1)]
    return Plan(config, stack, train, stages)


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _fast_bf16(use_cpu: bool) -> bool:
    import torch

    from retain.models.params import computes_bf16

    return computes_bf16("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def check_train(train: dict[str, Any]) -> None:
    """Every key must be a field of TRL's SFTConfig, and not one that the run itself owns.

    Raises:
        ConfigError: an unknown or reserved key.
    """
    from trl import SFTConfig

    known = {f.name for f in dataclasses.fields(SFTConfig)}
    reserved = {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "disable_tqdm", "logging_nan_inf_filter"}
    for key in train:
        if key in reserved:
            raise ConfigError(f"train.{key}: set by the run itself (see `seed` and `output`). Remove it.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"train: unknown '{key}'.{hint} Allowed: any field of trl.SFTConfig.")


def run(config: RunConfig, say: Say = print) -> Results:
    """Carry out a run, or go on with it.

    Args:
        config: what to do.
        say: receives one line per event.

    Returns:
        The results, which are also in `results.json`, `report.html` and `report.md` of the run directory.

    Raises:
        RetainError: anything in the input that cannot be used; nothing that was finished is lost.
    """
    return _Runner(plan(config), say).run()


class _Runner:
    """The state of one `run` call."""

    def __init__(self, planned: Plan, say: Say) -> None:
        self.plan, self.config, self.say = planned, planned.config, say
        self.place = RunDirectory(self.config.directory)
        self.ranks = _ranks(bool(planned.train.get("use_cpu")))
        if not self.ranks.is_main_process:
            self.say = lambda line: None

    def run(self) -> Results:
        config, place = self.config, self.place
        from retain.models.load import load_tokenizer

        # everything that can be wrong with the input is found before anything is written
        self.tokenizer = load_tokenizer(config.model.name, config.model.revision, config.model.trust_remote_code)
        with self.ranks.main_process_first():  # one process fills the caches
            self.tasks = self._load_tasks()
            self.old = self._load_old()
        self.model: Any = None
        # under torchrun all processes train; the main one alone writes and probes, the others wait for it
        if self.ranks.is_main_process:
            self._check_space()
            self.probes, self.infos, questions = self._load_probes()
            place.begin(config)
            for name, lines in questions.items():
                write_text(place.questions(name), lines)
            self._probe(BASE, 0)
        self.ranks.wait_for_everyone()
        for index, task in enumerate(self.tasks, 1):
            stage = self.plan.stages[index]
            finished = place.done(stage) is not None
            self.ranks.wait_for_everyone()  # all have looked before one marks it done
            if not finished:
                self._train(index, task, stage)
            if self.ranks.is_main_process:
                self._probe(stage, index)
            self.ranks.wait_for_everyone()
        if self.ranks.is_main_process:
            from retain.report.page import write_report

            save_results(self._results(), place.path)
            write_report(place.path)
        self.ranks.wait_for_everyone()
        return load_results(place.path)

    # -- input -------------------------------------------------------------------------------------------
    def _load_tasks(self) -> list[Task]:
        config, tasks = self.config, []
        for name, entry in zip(config.task_names, config.tasks):
            spec = entry.model_dump(exclude_none=True) | {"name": name}
            task = load_task(
                spec, seed=config.seed, tokenizer=self.tokenizer, max_length=self.plan.train.get("max_length")
            )
            template_check(self.tokenizer, entry.on, chat=task.form != "text")
            for note in task.notes:
                self.say(f"{name}: {note}")
            tasks.append(task)
        return tasks

    def _load_old(self) -> Any:
        if self.config.old is None:
            return None
        return to_chat(load_rows(self.config.old, "train", seed=self.config.seed), self.config.old)

    def _load_probes(self) -> tuple[list[Any], list[ProbeInfo], dict[str, str]]:
        """Probes, what they measure, and each task's test rows as the text of a probe file."""
        import json

        from retain.probes.suite import load_probes, probes_from_rows
        from retain.probes.tasks import task_items

        settings = self.config.probes
        probes, infos, questions = [], [], {}
        for source in settings.reference:
            for probe in load_probes(source, settings.limit):
                probes.append(probe)
                infos.append(probe_info(probe, "reference", None))
        for entry, task in zip(self.config.tasks, self.tasks):
            items = task_items(task.test_rows, task.name, self.tokenizer, entry.list_choices)
            if not items:
                self.say(f"{task.name}: no test rows that can be scored; what it learns is not measured.")
                continue
            questions[task.name] = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            for probe in probes_from_rows(items, task.name, settings.task_limit):
                probes.append(probe)
                infos.append(probe_info(probe, "task", task.name))
        names = [info.name for info in infos]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"probes: two probes are called '{name}'. Give the task another `name:`.")
        return probes, infos, questions

    def _check_space(self) -> None:
        from retain.models.load import resolve

        folder = Path(resolve(self.config.model.name))
        if not folder.is_dir():
            return
        weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        lora = any(m.name == "lora" for m in self.plan.stack.methods)
        # full tuning keeps two checkpoints of weights and two Adam moments, the start, and a model per task
        self.place.require_space(int(weights * (0.5 if lora else 7 + len(self.tasks))))

    # -- work --------------------------------------------------------------------------------------------
    def _model_of(self, index: int) -> Any:
        """The model after task `index` (0: the base), from memory or from the run directory."""
        if self.model is None or self.model[0] != index:
            from retain.models.load import load_stage

            folders = [self.place.task(stage) for stage in self.plan.stages[1 : index + 1]]
            model = load_stage(self.config.model, folders)
            if not getattr(model, "is_quantized", False):  # a quantised one is where it belongs already
                model.to(self._device())
            self.model = (index, model)
        return self.model[1]

    def _device(self) -> str:
        """Where the model trains, so that the baseline is probed there too."""
        import torch

        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None or self.plan.train.get("use_cpu") else found.type

    def _probe(self, stage: str, index: int) -> None:
        """Ask all probes about the model of a stage, unless that was done."""
        path = self.place.items(stage)
        known = load_items(path) if path.is_file() else []
        missing = [p for p in self.probes if p.name not in {row["probe"] for row in known}]
        if not missing:
            return
        from retain.probes.asking import ask
        from retain.probes.base import Subject
        from retain.training.watch import append, bar, forget_looks

        subject = Subject(self._model_of(index), self.tokenizer)
        with bar(transient=True) as progress:
            job = progress.add_task(f"probing {stage}", total=sum(len(p.items) for p in missing), note="")
            with self._precision():
                rows = ask(missing, subject, lambda n: progress.update(job, advance=n))
        forget_looks(self.place.metrics, stage, {p.name for p in missing})
        for info in self.infos:
            mine = [row for row in rows if row["probe"] == info.name]
            if mine:
                found = analysis.score(mine, info, self.config.probes.confidence)
                append(
                    self.place.metrics,
                    {"kind": "look", "stage": stage, "probe": info.name, "score": found.value}
                    | {"low": found.low, "high": found.high},
                )
        save_items(known + rows, path)  # last: it marks the looks as done

    def _precision(self) -> Any:
        import torch

        wanted = self.config.probes.precision
        half = wanted == "bfloat16" or (wanted == "auto" and bool(self.plan.train.get("bf16")))
        return torch.autocast(self._device(), torch.bfloat16, enabled=half)

    def _train(self, index: int, task: Task, stage: str) -> None:
        from transformers import PrinterCallback
        from trl import SFTConfig

        from retain.methods.context import Run
        from retain.models import params
        from retain.models.load import settled
        from retain.training import checkpoint
        from retain.training.trainer import ContinualTrainer
        from retain.training.watch import Bar, Record

        folder = self.place.task(stage)
        own = {"output_dir": str(folder), "seed": self.config.seed + index, "disable_tqdm": True}
        if self.config.tasks[index - 1].on == "assistant" and task.form != "text":
            own["assistant_only_loss"] = True
        args = SFTConfig(**(self.plan.train | own))
        context = Run(
            folder,
            task=task.name,
            task_index=index,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            shared=self.place.path,
            new_rows=task.rows if hasattr(task.rows, "__len__") else None,
            say=self.say,
        )
        last = checkpoint.newest(folder)
        stack = Stack(build(self.config.methods))
        bar = Bar(f"learning {task.name}")
        trainer = ContinualTrainer(
            self._model_of(index - 1),
            args,
            train_dataset=task.rows,
            processing_class=self.tokenizer,
            methods=stack.methods,
            old=self.old,
            run=context,
            callbacks=[Record(self.place.metrics, task.name), bar],
        )
        trainer.remove_callback(PrinterCallback)
        if last:
            self.say(f"{task.name}: going on from {last.name}.")
        learning, total = params.counts(trainer.model)
        start = time.monotonic()
        try:
            outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            bar.close()
        trainer.release()
        new, replayed = trainer.rows_seen()
        summary = StepSummary(
            task=task.name,
            stage=stage,
            steps=outcome.global_step,
            new_rows=new,
            replay_rows=replayed,
            seconds=round(time.monotonic() - start, 1),
            trainable=learning,
            parameters=total,
            final_loss=next((float(e["loss"]) for e in reversed(trainer.state.log_history) if "loss" in e), None),
        )
        if self.ranks.is_main_process:
            self.place.save_task(stage, trainer.model, summary.model_dump())
        self.model = (index, settled(trainer.model))

    # -- numbers -----------------------------------------------------------------------------------------
    def _results(self) -> Results:
        config, place = self.config, self.place
        tables = {stage: load_items(place.items(stage)) for stage in self.plan.stages}
        confidence = config.probes.confidence

        def score(stage: str, info: ProbeInfo) -> Any:
            return analysis.score([r for r in tables[stage] if r["probe"] == info.name], info, confidence)

        scores = {stage: {info.name: score(stage, info) for info in self.infos} for stage in self.plan.stages}
        names = [task.name for task in self.tasks]
        measured = [n for n in names if any(i.task == n for i in self.infos)]
        rows = analysis.matrix(scores, self.infos, names) if measured == names else []
        changes = analysis.changes(tables[BASE], tables[self.plan.stages[-1]], self.infos, confidence)
        summaries = [place.done(stage) or {} for stage in self.plan.stages[1:]]
        return Results(
            name=config.title,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            model=config.model.name,
            seed=config.seed,
            confidence=confidence,
            command=shlex.join(["retain", "run", str(place.config)]),
            old=self._what_stood_for_old(),
            methods={m.name: m.config.model_dump(mode="json") for m in self.plan.stack.methods},
            tasks=names,
            stages=self.plan.stages,
            probes=self.infos,
            scores=scores,
            matrix=rows,
            sequence=analysis.sequence(rows) if rows else _no_sequence(),
            changes=changes,
            verdict=analysis.verdict(
                changes, self.infos, tables[BASE], tables[self.plan.stages[-1]], confidence=confidence
            ),
            training=[StepSummary(**{k: v for k, v in s.items() if k != "kind"}) for s in summaries],
        )

    def _what_stood_for_old(self) -> str:
        if self.config.old:
            return f"rows given by the user: {self.config.old}"
        if (self.place.path / "buffer" / "self.parquet").is_file():
            return "text the model wrote itself before training"
        return "none: no method needed old data"


def _ranks(use_cpu: bool) -> Any:
    """The processes of this run: one, or those that torchrun or `accelerate launch` started."""
    from accelerate import PartialState

    # a long time limit, as the others wait while one process probes; torchrun ends them when one fails
    return PartialState(cpu=use_cpu, timeout=datetime.timedelta(hours=12))


def probe_info(probe: Any, role: str, task: str | None) -> ProbeInfo:
    """What a probe measures, for the results."""
    return ProbeInfo(
        name=probe.name,
        kind=probe.kind,
        group=probe.group,
        role=role,  # type: ignore[arg-type]
        task=task,
        metric=probe.metric,
        higher_is_better=probe.higher_is_better,
        chance=probe.chance,
        items=len(probe.items),
    )


def _no_sequence() -> Any:
    from retain.results import Sequence

    return Sequence(**dict.fromkeys(f for f in Sequence.model_fields))


def load_run(directory: str | Path, stage: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a run, after its last task or after `stage`; adapters are merged.

    Raises:
        RunError: not a run directory, or a stage that is not finished.
    """
    from retain.models.load import load_stage, load_tokenizer

    place = RunDirectory(directory)
    config = place.read_config()
    stages = [BASE] + [stage_name(i, name) for i, name in enumerate(config.task_names, 1)]
    if stage is not None and stage not in stages:
        raise RunError(f"{directory}: no stage '{stage}'. Stages: {', '.join(stages)}.")
    upto = stages.index(stage) if stage else len(stages) - 1
    for name in stages[1 : upto + 1]:
        if place.done(name) is None:
            raise RunError(f"{directory}: stage '{name}' is not finished. Run the same command again to go on.")
    model = load_stage(config.model, [place.task(name) for name in stages[1 : upto + 1]])
    if hasattr(model, "merge_and_unload"):  # a quantised base, on which the adapter stays otherwise
        model = model.merge_and_unload()
    return model, load_tokenizer(config.model.name, config.model.revision)
