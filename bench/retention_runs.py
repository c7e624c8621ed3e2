"""What bench/retention.py runs: the rows, the recipes, and one run that leaves a small file of scores per item."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from retain.config import DEFAULT_METHODS, RunConfig, parse
from retain.report.wording import is_share
from retain.results import load_items, load_results
from retain.rundir import BASE, RunDirectory, share_baseline

PRESETS = Path(__file__).parent.parent / "src" / "retain" / "presets"
#: Families of short rows that plain training learns, as found by bench/learnable.py on training rows.
FAMILIES = (
    *("calendar_arithmetic", "color_cube_rotation", "count_bits", "family_relationships", "gcd"),
    *("letter_counting", "number_sequence", "sentence_reordering", "syllogism", "word_sequence_reversal"),
)
TASK, EPOCHS = "reasoning", 3
KEPT = ("arc_easy", "piqa", "blimp", "facts_countries", "facts_elements")
ALPHAS = (0.3, 0.5, 0.7, 0.85)
_TRAIN: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": EPOCHS,
    "max_length": 192,
    "save_strategy": "no",
}
FULL, ADAPTER = 5e-5, 5e-4  # learning rates of full fine-tuning and of LoRA


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Args:
        methods: as in a configuration.
        train: over the bench's own training settings.
        old: a data set whose training rows are given as old rows; None lets the model write its own.
        alpha: not trained: the weights between the base and those of `after`, at this share of the way.
    """

    name: str
    methods: list[Any]
    train: dict[str, Any] = field(default_factory=dict)
    old: str | None = None
    alpha: float | None = None
    after: str | None = None

    @property
    def carrier(self) -> str:
        """What moves: all weights, or an adapter."""
        names = {entry if isinstance(entry, str) else next(iter(entry)) for entry in self.methods}
        return "LoRA" if "lora" in names else "full"


def preset(name: str) -> Recipe:
    """A preset of the package. How long and on how many rows at once is trained is the bench's business, for all
    recipes alike."""
    found = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    train = {key: value for key, value in (found.get("train") or {}).items() if key not in _TRAIN}
    return Recipe(name, list(found["methods"]), train)


def recipes() -> list[Recipe]:
    """Baselines first, then methods, the default recipe and presets; the order is that of the runs."""
    naive, lora, pull = ["none"], {"lora": {"r": 16}}, {"strength": 250, "form": "proximal"}
    own = {"fraction": 0.25, "rows": 96, "max_tokens": 48}
    found = [
        Recipe("naive", naive),
        Recipe("naive-slow", naive, {"learning_rate": 2e-5}),
        Recipe("naive-fast", naive, {"learning_rate": 1e-4}),
        Recipe("naive-early", naive, {"num_train_epochs": EPOCHS / 2}),
        *(Recipe(f"naive-alpha-{a:g}", naive, alpha=a, after="naive") for a in ALPHAS),
        Recipe("dolly-5", [{"replay": {"fraction": 0.05, "source": "old"}}], old="dolly"),
        Recipe("lora", [lora]),
        Recipe("replay", [{"replay": own}]),
        Recipe("distill", [lora, {"distill": {"strength": 1.0}}]),
        Recipe("distill-replay", [lora, {"replay": own}, {"distill": {"strength": 1.0}}]),
        Recipe("ewc", [{"ewc": {"strength": 1.0, "samples": 96}}]),
        Recipe("ewc-proximal", [{"ewc": pull | {"samples": 96}}]),
        Recipe("l2sp", [{"l2sp": pull}]),
        Recipe("freeze", [{"freeze": {"share": 0.5}}]),
        Recipe("interpolate", [lora, {"interpolate": {"strength": 0.33}}]),
        Recipe("eaft", ["eaft"]),
        Recipe("subspace", [lora, {"subspace": {"share": 0.5, "energy": 0.95, "samples": 64}}]),
        Recipe("der", [{"der": {"strength": 0.5, "labels": 0.5, "old": 96}}]),
        Recipe("default", DEFAULT_METHODS),
        *map(preset, ("basic", "advanced", "medical")),
    ]
    assert len({r.name for r in found}) == len(found)
    return found


@dataclass(frozen=True)
class Bench:
    """Where everything is.

    Args:
        data: the folder with the data sets, each with train.jsonl or test.jsonl.
        work: run directories, which may be deleted.
        results: the small files, one per run.
        model: the model to train.
        items: per probe.
        task_items: new questions of the families that are learned.
        train: over `_TRAIN`, for quick tests.
    """

    data: Path
    work: Path
    results: Path
    model: str = "starter"
    items: int = 16
    task_items: int = 64
    train: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def path(self, recipe: str, seed: int) -> Path:
        """The result of a run."""
        return self.results / f"{recipe}-seed{seed}.json"

    def folder(self, recipe: str, seed: int) -> Path:
        """Its run directory."""
        return self.work / f"{recipe}-seed{seed}"

    def config(self, recipe: Recipe, seed: int) -> RunConfig:
        """The configuration of a run."""
        rate = ADAPTER if recipe.carrier == "LoRA" else FULL
        values: dict[str, Any] = {
            "name": recipe.name,
            "model": self.model,
            "tasks": [{"name": TASK, "data": str(self._rows())}],
            "methods": recipe.methods,
            "probes": {
                "reference": ["core", *(str(self.data / n / "test.jsonl") for n in KEPT)],
                "limit": self.items,
                "task_limit": self.task_items,
            },
            "train": _TRAIN | {"learning_rate": rate} | self.train | recipe.train,
            "seed": seed,
            "output": str(self.folder(recipe.name, seed)),
        }
        if recipe.old:
            values["old"] = str(self.data / recipe.old / "train.jsonl")
        return parse(values, recipe.name)

    def _rows(self) -> Path:
        """The chosen families of reasoning_gym, as a folder with train and test rows."""
        folder = self.work / "reasoning"
        for split in ("train", "test"):
            path = folder / f"{split}.jsonl"
            if path.is_file():
                continue
            lines = (self.data / "reasoning_gym" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            chosen = [line for line in lines if json.loads(line)["task"] in FAMILIES]
            write(path, "".join(line + "\n" for line in chosen))
        return folder

    def jobs(self, seeds: list[int], only: list[str] | None = None) -> Iterator[tuple[Recipe, int]]:
        """Runs that are not done, seed after seed, so that every recipe is compared on the same seeds early."""
        for seed in seeds:
            for recipe in recipes():
                if (only is None or recipe.name in only) and not self.path(recipe.name, seed).is_file():
                    yield recipe, seed


def carry_out(bench: Bench, recipe: Recipe, seed: int) -> None:
    """One run, or one interpolation, and its file; the run's weights are dropped when nothing needs them any more."""
    start = time.monotonic()
    named = {r.name: r for r in recipes()}
    if recipe.alpha is None:
        last = _trained(bench, recipe, seed)
        _save(bench, recipe, seed, load_items(last), time.monotonic() - start)
    else:
        source = named[str(recipe.after)]
        last = _trained(bench, source, seed)  # not trained again where it is still there
        if not bench.path(source.name, seed).is_file():
            _save(bench, source, seed, load_items(last), time.monotonic() - start)
        _save(bench, recipe, seed, _between(bench, source, seed, recipe.alpha), time.monotonic() - start)
    for name in {recipe.name, recipe.after or recipe.name}:
        later = [r for r in recipes() if r.after == name]
        if all(bench.path(r.name, seed).is_file() for r in later):
            shutil.rmtree(bench.folder(name, seed), ignore_errors=True)


def _trained(bench: Bench, recipe: Recipe, seed: int) -> Path:
    """Item table after training."""
    from retain.pipeline import run

    config, first = bench.config(recipe, seed), bench.work / "base"
    if (RunDirectory(first).items(BASE)).is_file():
        share_baseline(RunDirectory(first), config)
    results = run(config, bench.say)
    place = RunDirectory(config.directory)
    if not RunDirectory(first).items(BASE).is_file():
        write(RunDirectory(first).items(BASE), place.items(BASE).read_bytes())
    base = bench.results / "base.json"
    if not base.is_file():
        about = {p.name: {"role": p.role, "share": is_share(p), "up": p.higher_is_better} for p in results.probes}
        found = scores(load_items(place.items(BASE)))
        write(base, _compact({"machine": _machine(config), "probes": about, "scores": found}))
    return place.items(results.stages[-1])


def _machine(config: RunConfig) -> str:
    import torch

    from retain.pipeline import plan

    half = "bfloat16 autocast" if plan(config).train.get("bf16") else "float32"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}, {half}"


def _between(bench: Bench, recipe: Recipe, seed: int, alpha: float) -> list[dict[str, Any]]:
    """Items answered by θ = θ⁰ + α (θ − θ⁰)."""
    import torch

    from retain.functional.merging import interpolate
    from retain.inputs import load_probes, load_tasks
    from retain.models import params
    from retain.models.load import load_tokenizer
    from retain.pipeline import load_run, plan
    from retain.probes.asking import ask
    from retain.probes.base import Subject

    config = bench.config(recipe, seed)
    tokenizer = load_tokenizer(config.model.name)
    tasks = load_tasks(config, tokenizer, config.train["max_length"], lambda line: None)
    probes, _, _ = load_probes(config, tasks, tokenizer, lambda line: None)
    (start, _), (model, _) = load_run(config.directory, BASE), load_run(config.directory)
    with torch.no_grad():
        interpolate(params.trainable(start), params.trainable(model), alpha, in_place=True)
    half = bool(plan(config).train.get("bf16"))  # probed where, and in the arithmetic in which, the other runs are
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=half):
        return ask(probes, Subject(model.to(device).eval(), tokenizer))


def scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Probe → scores in the order of the items: a text of 0 and 1 where they are all one of these, else numbers. Of the
    task only the exact answer counts: its questions ask for that alone, and a chat model that talks hits many."""
    found: dict[str, list[float]] = {}
    for row in rows:
        score = json.loads(row["details"])["exact_match"] if row["probe"] == TASK else row["score"]
        found.setdefault(row["probe"], []).append(round(float(score), 5))
    return {
        probe: "".join("01"[int(s)] for s in values) if set(values) <= {0.0, 1.0} else values
        for probe, values in found.items()
    }


def _save(bench: Bench, recipe: Recipe, seed: int, rows: list[dict[str, Any]], seconds: float) -> None:
    folder = bench.folder(recipe.name, seed)
    summary: dict[str, Any] = {}
    if recipe.alpha is None:
        step = load_results(folder).training[-1]
        summary = {"steps": step.steps, "new_rows": step.new_rows, "replay_rows": step.replay_rows,
                   "train_seconds": step.seconds}  # fmt: skip
    about = {"recipe": recipe.name, "seed": seed, "methods": recipe.methods, "carrier": recipe.carrier,
             "train": recipe.train, "old": recipe.old, "alpha": recipe.alpha}  # fmt: skip
    write(bench.path(recipe.name, seed), _compact(about | summary | {"seconds": round(seconds, 1),
                                                                     "scores": scores(rows)}))  # fmt: skip


def _compact(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def write(path: Path, content: str | bytes) -> None:
    """A file that is whole or not there, also where several processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
