"""What a run leaves behind: the shape of `results.json` and of the item tables. No torch here.

A run directory holds plain files only. `results.json` is a `Results`; `probes/<stage>.parquet` holds one row
per item (`ITEM_COLUMNS`); `metrics.jsonl` one JSON object per training step or look. Reports, comparisons,
merging and serving read these files and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retain.errors import RunError

SCHEMA_VERSION = 1

#: Columns of `probes/<stage>.parquet`; one row per item and stage.
ITEM_COLUMNS = {
    "probe": "string",  # name of the probe
    "item": "string",  # id of the item, the same at every stage
    "prompt": "string",  # what the model was shown
    "reference": "string",  # the right answer, or a JSON list of them
    "output": "string",  # the answer given or chosen ("" for perplexity)
    "score": "double",  # what is averaged: 0/1, a fraction, or for perplexity the summed −log p in nats
    "correct": "bool",  # null where an item is not right or wrong (perplexity)
    "tokens": "int64",  # weight: scored tokens for perplexity, otherwise 1
    "details": "string",  # JSON object with every other number of the item
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Record):
    """A number with its interval, at the confidence named in the results."""

    value: float
    low: float
    high: float


class ProbeInfo(_Record):
    """What a probe measures. `role` is "reference" (old abilities) or "task" (something learned here)."""

    name: str
    kind: str
    group: str
    role: Literal["reference", "task"]
    task: str | None = None  # the task whose test set this is
    metric: str  # "accuracy", "exact match", "perplexity", …
    higher_is_better: bool = True
    chance: float | None = None  # expected score of blind guessing
    items: int

    @property
    def is_perplexity(self) -> bool:
        """Whether items score nats over `tokens` (of words and bytes, too), and the probe exp of their mean."""
        return self.metric.split("_")[-1] == "perplexity"


class ClassNumbers(_Record):
    """One class of a classification probe: shares between 0 and 1, and how many items belong to it."""

    precision: float
    recall: float
    f1: float
    items: int


class Totals(_Record):
    """Other numbers of a whole probe than its score (`retain.totals`); shares between 0 and 1."""

    numbers: dict[str, float] = {}  # "macro_f1", "micro_f1", "corpus_bleu", …
    classes: dict[str, ClassNumbers] = {}  # label → its numbers


class Change(_Record):
    """One probe, before against after, on the same items.

    `difference` is after − before in the unit of the score; for perplexity it is the change of the mean
    negative log-likelihood in nats per token. `forgetting` is positive when things got worse, relative to
    before. `detectable` is the smallest true difference that this probe would have shown with 80 % power, at the level
    that the conclusion asks for: p adjusted over the probes, none of the others having changed.
    """

    probe: str
    before: Estimate
    after: Estimate
    difference: Estimate
    p: float
    p_holm: float
    lost: int
    gained: int
    kept: int  # right before and after
    items: int
    forgetting: float
    retention: float  # percent, capped at 100
    band: Literal["excellent", "good", "fair", "poor"]
    detectable: float
    conclusion: Literal["lost", "kept", "gained", "cannot tell"]
    forgetting_raw: float | None = None  # share of items 1 → 0
    forgetting_adjusted: float | None = None  # chance-adjusted
    forgetting_paired: float | None = None  # paired moment estimator
    intervals: dict[str, Estimate] = {}  # of these three, by their names


class Sequence(_Record):
    """Numbers of the task matrix; None where a sequence is too short to define them."""

    accuracy: float | None
    incremental_accuracy: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    plasticity: float | None
    stability: float | None
    intransigence: float | None = None


class Verdict(_Record):
    """The run in a few numbers, with the thresholds that were used."""

    forgetting: float  # mean relative drop over the reference probes
    improvement: float  # mean relative gain on the task probes
    improvement_score: float
    balance: float
    mean_reference: float
    stability_efficiency: float
    successful: bool
    lost_over_threshold: list[str]
    sentence: str
    difference: Estimate | None = None  # macro mean change over the reference probes, paired interval
    learned: Estimate | None = None  # macro mean gain over the task probes, paired interval; positive = better
    one_sided: Estimate | None = None  # the same at 2·confidence − 1: each end is a one-sided bound at the confidence
    intervals: dict[
        str, Estimate
    ] = {}  # of the numbers above, and of the mean shares of items lost (`forgetting_raw` …)


class Thresholds(_Record):
    """What the verdict was drawn with: the settings under `verdict` of the configuration."""

    keep_weight: float = 0.6
    learn_weight: float = 0.4
    max_forgetting: float = 0.2
    min_improvement: float = 0.1
    min_reference: float = 0.7
    alarm: float = 0.3
    margin: float = 0.02
    margin_nats: float = 0.02


class StepSummary(_Record):
    """One task's training in short."""

    task: str
    stage: str
    steps: int
    new_rows: int
    replay_rows: int
    seconds: float
    trainable: int
    parameters: int
    final_loss: float | None


class Shift(_Record):
    """A number of the answers of the base and of a later stage; `difference` is after − before, paired over items."""

    before: float
    after: float
    difference: Estimate
    items: int


class Drift(_Record):
    """How the answers of a stage differ from the base's own answers to the same old questions (`drift.drift`).

    `agreement`: share of `choices` with the same option chosen, of `answers` that are the same text, of a text that is
    the same up to the first difference (`beginning`), of the base's likeliest next `tokens` in fixed contexts.
    `shifts`: by the names of `drift.SHIFTS`. `divergence`: probe → forward KL from the base, in nats per token.
    """

    agreement: dict[str, Estimate] = {}
    shifts: dict[str, Shift] = {}
    divergence: dict[str, Estimate] = {}


class BudgetPoint(_Record):
    """The model at a share of the way from where a task began to where it ended: 0 is the start, 1 the end."""

    share: float
    loss: Estimate | None  # mean over the probes that score between 0 and 1, against the base; positive = worse
    upper: float | None  # one-sided bound of it, at the confidence of the budget
    nats: float | None  # the same for perplexity, in nats per token
    upper_nats: float | None
    inside: bool


class Budget(_Record):
    """What the budget of a task came to (`training.budget`). `feasible`: some of what was learned is inside it."""

    task: str
    lose_at_most: float
    lose_at_most_nats: float
    confidence: float
    probes: list[str]  # names of those it is on
    items: int
    feasible: bool
    share: float  # of the way to what was learned, that was gone
    points: list[BudgetPoint]  # all that was asked about, by share; the chosen one among them
    learned: float | None = None  # gain of the task's own probes at the chosen share …
    learned_without: float | None = None  # … and at 1, without a budget's last step
    factor: float = 1.0  # on the strengths, at the end of training
    drift: float | None = None  # nats per token at the last look, and the limit it was held to
    drift_limit: float | None = None
    taken_back: int = 0  # jumps that were taken back in part
    items_needed: int | None = None  # to certify the whole step, where it was not
    advice: list[str] = []  # what would help


class Results(_Record):
    """Everything a report needs apart from the item tables."""

    schema_version: int = Field(SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    name: str
    created: str
    model: str
    seed: int
    confidence: float = 0.95
    command: str
    old: str  # what stood for old data: "true old rows from …", "text the model wrote itself", "none"
    methods: dict[str, dict[str, Any]]
    tasks: list[str]
    stages: list[str]  # "00-base", "01-<task>", …
    probes: list[ProbeInfo]
    scores: dict[str, dict[str, Estimate]]  # stage → probe → score
    totals: dict[str, dict[str, Totals]] = {}  # stage → probe → its other numbers, where it has any
    matrix: list[list[float | None]]  # row 0 = base; matrix[i][j] = score on task j after task i
    sequence: Sequence
    group_deltas: dict[str, list[Estimate | None]] = {}  # group of old probes → change since the base, per later stage
    changes: list[Change]  # base against the last stage, every probe but divergences
    verdict: Verdict | None
    training: list[StepSummary]
    notes: list[str] = []  # what was done to the rows: held out, dropped, cut
    thresholds: Thresholds = Thresholds()
    drift: dict[str, Drift] = {}  # later stage → how its answers differ from those of the base
    budgets: list[Budget] = []  # one per task, where the run has a budget
    ahead: list[str] = []  # tasks that the run has still to learn; everything above is about those it has learned

    @property
    def finished(self) -> bool:
        """Whether every task of the run was learned and measured."""
        return not self.ahead


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_results(results: Results, directory: Path) -> None:
    """Write `results.json`."""
    write_text(directory / "results.json", results.model_dump_json(indent=1) + "\n")


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `results.json`: what a reader in another language may rely on."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:retain:results:{SCHEMA_VERSION}",
        **Results.model_json_schema(),
    }


def load_results(directory: Path) -> Results:
    """Read `results.json` of a run directory, or any such file by its own path.

    Raises:
        RunError: there is none, or it is of a later version.
    """
    path = Path(directory)
    path = path if path.is_file() else path / "results.json"
    if not path.is_file():
        raise RunError(f"{directory}: no results.json here. Give the directory of a finished run (runs/<name>).")
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else None
        first = f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found else str(error).splitlines()[0]
        raise RunError(
            f"{path}: not a results file of version {SCHEMA_VERSION} ({first}). A later version needs a later retain."
        ) from error


def save_items(rows: list[dict[str, Any]], path: Path) -> None:
    """Write item rows (`ITEM_COLUMNS`) as Parquet, under a temporary name first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"string": pa.string(), "double": pa.float64(), "bool": pa.bool_(), "int64": pa.int64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in ITEM_COLUMNS.items()])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    os.replace(temporary, path)


def without_text(row: dict[str, Any]) -> dict[str, Any]:
    """An item row with its numbers alone: no prompt, reference or output, and no text in the details."""

    def numbers(value: Any) -> Any:
        if isinstance(value, list):
            return [numbers(entry) for entry in value if not isinstance(entry, str | dict)]
        return value

    details = {
        key: numbers(v) for key, v in json.loads(row["details"] or "{}").items() if not isinstance(v, str | dict)
    }
    return row | {"prompt": "", "reference": "", "output": "", "details": json.dumps(details, sort_keys=True)}


def load_items(path: Path) -> list[dict[str, Any]]:
    """Read item rows written by `save_items`."""
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise RunError(f"{path}: no such item table. Run the probes of this stage again.")
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path}: damaged item table ({first}). Delete it and run again to probe this stage.") from error


def load_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a half-written last line (a run that was killed) is left out."""
    return load_records(Path(directory) / "metrics.jsonl")


def load_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; none when it is not there. Half a line (a run that was killed) is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one record to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        line = json.dumps({"time": round(time.time(), 3), **record}) + "\n"
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a line of a run that was killed: it must not swallow this one
                line = "\n" + line
        file.write(line.encode())
