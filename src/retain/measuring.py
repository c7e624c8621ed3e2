"""Any models under the same probes, without training: a run's, a folder's, an adapter's, the hub's.

The first model is what the others are set against: for each other one a directory like that of a run is written, with
the answers of both and their `results.json`, so that reports, comparisons and gates read it as they read a run.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from retain.errors import ConfigError, DataError
from retain.inputs import require_items
from retain.outcome import numbers
from retain.results import (
    ProbeInfo,
    Results,
    Thresholds,
    load_items,
    save_items,
    save_results,
    write_text,
)
from retain.results import (
    Sequence as Numbers,
)
from retain.rundir import RunDirectory, stage_name

Say = Callable[[str], None]
Progress = Callable[[int], None]


def open_model(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of `starter`, a folder with a model or an adapter, a run after its last task, or a hub id.

    Raises:
        ModelError, RunError: it cannot be opened.
    """
    from retain.models.load import load_model
    from retain.pipeline import load_run

    return load_run(name) if (Path(name) / "run.yaml").is_file() else load_model(name)


def require_models(names: Sequence[str]) -> None:
    """Refuse a model that is not there before another one is asked, which takes minutes.

    Raises:
        ModelError: no such folder or hub id.
    """
    from retain.models import hub
    from retain.models.load import resolve

    for name in names:
        place = Path(name)
        if not (place / "run.yaml").is_file() and not (place / "adapter_config.json").is_file():
            hub.require(resolve(name), None)


def open_probes(sources: Sequence[str], limit: int | None = None, say: Say = print) -> list[Any]:
    """The probes of all sources, each with enough items for an interval; what was left out of them is said.

    Raises:
        DataError: a source that cannot be read, a probe with too few items, or two probes with one name.
    """
    from retain.probes.suite import load_probes

    found: list[Any] = []
    for source in sources:
        for probe in load_probes(source, limit, say=say):
            require_items(probe, source, {"--limit": limit})
            if any(probe.name == other.name for other in found):
                raise DataError(f"--probes: two probes are called '{probe.name}'. Give each its own name.")
            found.append(probe)
    return found


def origin_of(name: str) -> Any:
    """The base of a run, for probes that compare with it; None for other models."""
    from retain.pipeline import base_of_run
    from retain.probes.base import Origin

    if not (Path(name) / "run.yaml").is_file():
        return None
    return Origin(lambda: base_of_run(name, _device()), RunDirectory(name).base_outputs, keep=False)


def asked_in_half(names: Sequence[str]) -> bool:
    """Whether models are asked in bfloat16: as the first run among them was, without any where the machine computes it.

    Rounding differs between the two, and what is set against each other is asked alike.
    """
    from retain.models.params import computes_bf16

    runs = [name for name in names if (Path(name) / "run.yaml").is_file()]
    usual = computes_bf16(_device())
    if not runs:
        return usual
    config = RunDirectory(runs[0]).read_config()
    return config.probes.in_half(config.train if {"bf16", "fp16"} & config.train.keys() else {"bf16": usual})


def answers(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Any],
    progress: Progress = lambda n: None,
    origin: Any = None,
    half: bool | None = None,
) -> list[Any]:
    """Item rows of a model, asked where there is an accelerator.

    Args:
        origin: the base, for probes that compare with it.
        half: in bfloat16; where the machine computes that if not given.
    """
    import torch

    from retain.probes.asking import ask
    from retain.probes.base import Subject

    device = _device()
    if not getattr(model, "is_quantized", False):
        model.to(device)
    with torch.autocast(device, torch.bfloat16, asked_in_half(()) if half is None else half):
        return ask(probes, Subject(model, tokenizer, origin=origin), progress)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compare_models(
    names: Sequence[str],
    sources: Sequence[str],
    folder: Path,
    limit: int | None = None,
    say: Say = print,
    watched: Callable[[str, int], AbstractContextManager[Progress]] | None = None,
    lang: str = "en",
) -> list[Path]:
    """Ask every model the same probes and set all against the first, item by item.

    Args:
        names: two or more models as `open_model` takes them; the first is the one before.
        sources: of probes, as `load_probes` takes them.
        folder: for one directory per other model. Answers are kept there, and a model with the same weights is not
            asked twice.
        limit: at most this many items per probe.
        watched: (model, items) → context of a progress bar.
        lang: language of the reports.

    Returns:
        The directories, in the order of the models, each with `results.json` and a report that shows all.

    Raises:
        ConfigError: fewer than two models.
        RetainError: as `open_model` and `open_probes`.
    """
    from retain.probes.base import Origin
    from retain.report.page import write_report

    if len(names) < 2:
        raise ConfigError(f"compare: {len(names)} model given. Give at least two; the first is the one before.")
    require_models(names)
    probes = open_probes(sources, limit, say)
    infos = [probe.info("reference") for probe in probes]
    labels, tables = _labels(names), []
    origin = Origin(lambda: open_model(names[0])[0].to(_device()), folder / "answers" / "base")
    half = asked_in_half(names)
    base = ""  # whose weights the answers of others depend on, where a probe compares with them
    for label, name in zip(labels, names):
        path = folder / "answers" / f"{label}.parquet"
        rows, stamp = _asked(name, probes, path, say, watched, origin, base, half)
        tables.append(rows)
        if any(probe.kind == "divergence" for probe in probes):
            base = base or stamp
    command = shlex.join(["retain", "compare", *names, *(w for s in sources for w in ("--probes", s))])
    places = []
    for label, table in zip(labels[1:], tables[1:]):
        place = folder / label
        stages = [stage_name(0, labels[0]), stage_name(1, label)]
        for stage, rows in zip(stages, (tables[0], table)):
            save_items(rows, place / "probes" / f"{stage}.parquet")
        save_results(_results(label, names[0], stages, infos, (tables[0], table), command), place)
        places.append(place)
    for place in places:
        write_report(place, [other for other in places if other != place], lang)
    return places


def _asked(
    name: str, probes: Sequence[Any], path: Path, say: Say, watched: Any, origin: Any, base: str, half: bool
) -> Any:
    """(answers, what they depend on): those kept in `path` where weights, template, base and questions are the same."""
    from retain.models.own_rows import fingerprint

    model, tokenizer = open_model(name)
    template = getattr(tokenizer, "chat_template", None) or ""
    asked = json.dumps([(p.name, p.kind, p.options, [(i.id, i.fields) for i in p.items]) for p in probes], default=str)
    stamp = hashlib.blake2b(
        f"{fingerprint(model)} {template} {asked} {base} {half}".encode(), digest_size=16
    ).hexdigest()
    about = path.with_suffix(".json")
    if path.is_file() and about.is_file() and json.loads(about.read_text()) == stamp:
        say(f"{name}: answers from before, {path}.")
        return load_items(path), stamp
    if not base:  # the first one: what it said in contexts is of other weights
        shutil.rmtree(origin.folder, ignore_errors=True)
    with (
        nullcontext(lambda n: None) if watched is None else watched(name, sum(len(p.items) for p in probes)) as progress
    ):
        rows = answers(model, tokenizer, probes, progress, origin, half)
    about.unlink(missing_ok=True)
    save_items(rows, path)
    write_text(about, json.dumps(stamp) + "\n")  # last: it says that the answers are whole
    return rows, stamp


def _labels(names: Sequence[str]) -> list[str]:
    """A short name for each model that can be a folder's."""
    found: list[str] = []
    for name in names:
        own = Path(name).resolve().name if Path(name).is_dir() else name
        short = re.sub(r"[^\w.-]+", "-", own).strip("-.") or "model"
        label, number = short, 2
        while label.casefold() in {"answers", *map(str.casefold, found)}:
            label, number = f"{short}-{number}", number + 1
        found.append(label)
    return found


def _results(
    label: str, first: str, stages: list[str], infos: list[ProbeInfo], tables: tuple[Any, Any], command: str
) -> Results:
    thresholds = Thresholds()
    return Results(
        name=label,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=first,
        seed=0,
        command=command,
        old="nothing was trained here",
        methods={},
        tasks=[],
        stages=stages,
        probes=infos,
        matrix=[],
        sequence=Numbers(**dict.fromkeys(Numbers.model_fields)),
        training=[],
        thresholds=thresholds,
        **numbers(dict(zip(stages, tables)), infos, 0.95, thresholds),
    )
