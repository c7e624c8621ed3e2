"""What a person says, and what rows, model and machine say: the facts that advice goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retain.advice.scenario import Scenario, Serve
from retain.advice.similarity import ROWS, Similarity
from retain.config import STARTER, ModelConfig
from retain.errors import DataError

#: Similarity that is assumed where none is measured: the middle band.
ASSUMED = 0.65
#: Parameters up to which weights are loaded to measure, on a CPU and on a GPU.
MEASURABLE = {"cpu": 5e8, "cuda": 1e10}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a person says.

    Args:
        data: what is to be learned, in order: files, folders or hub ids.
        model: `starter`, a folder, or a hub id.
        memory: GB for training; what is free here when None.
        old: rows that stand for old data, or None.
        private: no text of the rows may be kept.
        later: tasks that will come after these.
        serve: how the result will be used.
        lose_at_most: share of the old abilities' scores that may be lost, or None.
        similarity: of the new rows to what the model knows, if it shall not be measured.
        trial: make a few real steps, where the model is small enough.
        price: of an hour of this machine, in any currency, or None.
        output: run directory of the advised run, or None for the usual one.
        seed: of samples.
    """

    data: Sequence[str]
    model: str = STARTER
    memory: float | None = None
    old: str | None = None
    private: bool = False
    later: int = 0
    serve: Serve = "any"
    lose_at_most: float | None = None
    similarity: float | None = None
    trial: bool = True
    price: float | None = None
    output: str | None = None
    seed: int = 0


@dataclass
class Facts:
    """What the data, the model and the machine say; `model` is as `ModelConfig(name)` loads it, where it was read."""

    scenario: Scenario
    tasks: list[dict[str, Any]]
    notes: list[str]
    similarity: Similarity | None
    measurable: bool
    model: Any = None


def gathered(request: Request, say: Say) -> Facts:
    """Look at the rows, the model and the machine.

    Raises:
        RetainError: data or a model that cannot be used.
    """
    import torch

    from retain.advice.reading import Reader, built_in, read_sample, sample_of
    from retain.data.chat import row_lengths, template_check
    from retain.data.tasks import load_task
    from retain.models import machine
    from retain.models.load import load_model, load_settings, load_tokenizer
    from retain.models.weightless import Weightless

    named = ModelConfig(name=request.model)
    load_settings(named)  # a model that is not there is said first
    tokenizer = load_tokenizer(request.model)
    loaded = []
    for where in request.data:
        task = load_task(where, seed=request.seed)
        template_check(tokenizer, chat=task.form != "text")
        loaded.append(task)
    lengths = [row_lengths(task.rows, tokenizer) for task in loaded]
    general = None if request.old is None else read_sample(request.old, ROWS, request.seed, "your old rows")
    parameters = Weightless(named).model.num_parameters()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = machine.free_bytes(device) / 1e9
    memory = request.memory or free
    where = "given" if request.memory else f"what is free on {device} here"
    notes = [f"{task.name}: {len(task.rows)} rows to learn, {len(task.test_rows)} to test, tokens of a row "
             f"{np.median(n):.0f} in the middle, {np.quantile(n, 0.99):.0f} in 99 of 100" for task, n in
             zip(loaded, lengths)]  # fmt: skip
    notes.append(f"{request.model}: {parameters / 1e9:.3g} billion parameters; memory {memory:.3g} GB ({where})")
    if request.private and request.old is not None:
        notes.append("old rows are read to measure and not replayed: a private run writes none of their text")
    measurable = parameters <= MEASURABLE.get(device, 0) and 5 * parameters / 1e9 < free
    found, model = None, None
    if request.similarity is None and measurable:
        say("reading rows with the base")
        model, _ = load_model(named)
        model = model.to(device)
        reader = Reader(model, tokenizer)
        if general is None:
            general = built_in(ROWS, request.seed)
        each = max(2, ROWS // len(loaded))
        parts = [sample_of(task.rows, task.name, each, request.seed) for task in loaded]
        if sum(map(len, parts)) < 2 or len(general) < 3:
            raise DataError("advise: too few rows to measure. Give two to learn and three old ones, or --similarity.")
        found = _farthest(reader, parts, general)
        notes.append(found.sentence())
    elif request.similarity is None:
        notes.append(f"similarity {ASSUMED}: assumed, as the weights are too large to be read here")
    else:
        notes.append(f"similarity {request.similarity:g}: as given")
    scenario = Scenario(
        parameters=float(parameters),
        similarity=request.similarity if request.similarity is not None else found.value if found else ASSUMED,
        old=request.old is not None and not request.private,
        private=request.private,
        memory=memory,
        tasks=len(loaded) + request.later,
        serve=request.serve,
        lose_at_most=request.lose_at_most,
        rows=min(len(task.rows) for task in loaded),
        longest=min(int(max(np.quantile(n, 0.99) for n in lengths)), _context(model, tokenizer, named)),
    )
    tasks = [{"data": where} for where in request.data]
    return Facts(scenario, tasks, notes, found, measurable, model)


def _farthest(reader: Any, parts: Sequence[Any], general: Any) -> Similarity:
    """Of several tasks the one least like what is known decides."""
    from retain.advice.similarity import measure

    return min((measure(reader, part, general) for part in parts if len(part) >= 2), key=lambda one: one.value)


def _context(model: Any, tokenizer: Any, named: ModelConfig) -> int:
    from retain.models.load import known_context, load_settings

    settings = load_settings(named)
    return known_context(settings.get_text_config(), tokenizer) or 2048
