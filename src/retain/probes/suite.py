"""Load probes: the built-in suite, a file or a folder of them, or a set on the hub, in one of several forms.

A row says what it is (`probe`, `kind`, `group`, `id`) or it is told by its fields:

    prompt (or question), choices, answer      choice       good, bad          pair
    prompt, answers (or final, or response)    answer       text               perplexity
    prompt, check                              instruction  prompt, safe       refusal
    prompt, labels, label                      classification
    prompt, answerable                         hallucination

A `divergence` has the fields of other kinds and must be named. What a row does not say is derived: the probe's name
from the file, the id from the content, the group from the kind. The kinds are the modules of this package; there is no
list to keep.

Rows that name their `domain`, and domain question sets (`retain.data.domains`), become one probe per domain; a question
that a domain has already is left out and counted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import retain.probes
from retain.data.chat import choice_index
from retain.data.domains import answer_tokens
from retain.data.json_rows import open_text, suffix_of
from retain.data.sources import SUFFIXES, load_rows, locate
from retain.errors import DataError, unknown
from retain.probes.base import Item, Probe
from retain.probes.harness import harness_probes
from retain.probes.harness_tasks import PREFIX

GROUPS = ("knowledge", "capability", "behaviour")
BUILT_IN = Path(__file__).parent / "suites"
_ABOUT = {"id", "probe", "kind", "group", "domain", "made"}
_TABLES = (".json", ".csv", ".tsv", ".parquet")
Say = Callable[[str], None]


@functools.cache
def kinds() -> dict[str, type[Probe]]:
    """Every kind of probe by name: the module of that name in this package that defines it."""
    found = {}
    for module in pkgutil.iter_modules(retain.probes.__path__):
        if module.ispkg:
            continue
        loaded = importlib.import_module(f"retain.probes.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Probe) and vars(value).get("kind") == module.name:
                found[module.name] = value
    return found


def load_probes(
    source: str | Path,
    limit: int | None = None,
    name: str | None = None,
    seed: int = 0,
    say: Say = lambda line: None,
    **options: Any,
) -> list[Probe]:
    """Probes of a source, in the order of its files and rows.

    Args:
        source: the name of a built-in suite (`core`) or of a probe in it (`core/countries`), a JSONL, JSON, CSV, TSV or
            Parquet file, a folder of them, or a hub id (`owner/name`), of which the test split is read. Of a folder all
            *.jsonl are read, and the other files that hold questions with answers. Or `lm_eval:` and a task of
            lm-evaluation-harness (`harness_tasks.tasks_of`), which knows its own name, seed and options.
        limit: at most this many items per probe: a fair sample, the same at every call, in the order of the
            file; a smaller limit takes a part of what a larger one takes. Of the harness's tasks the first ones.
        name: name for rows that do not say their probe; the stem of the file by default.
        seed: of the sample.
        say: told what was left out.
        options: options of the probes, such as `score`, `normalisation`, `layout`, `max_tokens`, `window`.

    Raises:
        DataError: nothing there; a row that is malformed, incomplete, twice there, or of no known kind.
    """
    if str(source).startswith(PREFIX):
        return list(harness_probes(str(source), limit))
    rows = (
        (where, {**row, "probe": row.get("probe") or row.get("domain") or name or _stem(path)})
        for path in _files(source, say)
        for where, row in _rows(path)
    )
    return _build(rows, str(source), limit, seed, options, say)


def probes_from_rows(
    rows: Iterable[dict[str, Any]],
    name: str,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Probe]:
    """Probes of rows that are in memory, as `load_probes` makes them of files; `name` as there."""
    placed = (
        (f"{name}, row {number}", {**row, "probe": row.get("probe") or row.get("domain") or name})
        for number, row in enumerate(rows, start=1)
    )
    return _build(placed, name, limit, seed, options)


def limited(probe: Probe, limit: int | None, seed: int = 0) -> Probe:
    """A probe with at most so many items: the sample that `load_probes` would take."""
    items = _sample(probe.items, limit, seed)
    return probe if items is probe.items else type(probe)(probe.name, items, probe.group, **probe.options)


def _build(
    rows: Iterable[tuple[str, dict[str, Any]]],
    source: str,
    limit: int | None,
    seed: int,
    options: dict[str, Any],
    say: Say = lambda line: None,
) -> list[Probe]:
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit {limit} given; allowed is 1 or more.")
    probes: dict[str, tuple[type[Probe], str, list[Item], dict[str, str]]] = {}
    asked: dict[tuple[str, str], Any] = {}  # (probe, question) → its right answer, where rows name their domain
    again: dict[str, Counter[bool]] = {}  # probe → questions that were there, by whether the answer is another one
    for where, row in rows:
        label = str(row["probe"])
        cls, group, item = _item(where, row)
        if label not in probes:
            probes[label] = (cls, group, [], {})
        first, first_group, items, seen = probes[label]
        if cls is not first or group != first_group:
            raise DataError(
                f"{where}: probe '{label}' is {first.kind} ({first_group}) above and {cls.kind} ({group}) here. "
                "Give the row another `probe`."
            )
        if row.get("domain") and (question := _question(item)):
            right = _right(item)
            if (before := asked.setdefault((label, question), right)) is not right:
                again.setdefault(label, Counter())[before != right] += 1
                continue
        if item.id in seen:
            raise DataError(f"{where}: the item '{item.id}' is already at {seen[item.id]}. Remove one of them.")
        seen[item.id] = where
        items.append(item)
    if not probes:
        raise DataError(f"{source}: has no rows. Give a JSONL file with one probe item per line.")
    for label, counts in again.items():
        other = f", {counts[True]} of them with another answer" if counts[True] else ""
        some = f"{counts.total()} repeated question{'s' * (counts.total() > 1)}"
        say(f"{source}: {label}: {some} left out{other}.")
    return [
        cls(label, _sample(items, limit, seed), group, **options) for label, (cls, group, items, _) in probes.items()
    ]


def _files(source: str | Path, say: Say) -> list[Path]:
    path = Path(source)
    if isinstance(source, str) and (BUILT_IN / source).is_dir() and "/" not in source.strip("."):
        path = BUILT_IN / source
    elif isinstance(source, str) and not path.exists() and (part := _part(source)) is not None:
        path = part
    if path.is_dir():
        files = []
        for file in sorted(path.iterdir()):
            if file.suffix == ".jsonl" or (suffix_of(file) in SUFFIXES and _holds_questions(file)):
                files.append(file)
            elif suffix_of(file) in SUFFIXES:
                say(f"{file}: no questions with answers in it; left out.")
        if not files:
            raise DataError(
                f"{source}: no *.jsonl in this folder, nor another file with questions and answers. Give a folder with "
                "probe files, or one file."
            )
        return files
    if path.is_file() or ("/" in str(source) and locate(source, "test") is None):
        return [path]
    built_in = ", ".join(sorted(folder.name for folder in BUILT_IN.iterdir() if folder.is_dir()))
    raise DataError(f"{source}: no such file or folder. Give a path, lm_eval:TASK, or a built-in suite: {built_in}.")


def _part(source: str) -> Path | None:
    """The file of one probe of a built-in suite, by `suite/probe`; None where there is no such suite.

    Raises:
        DataError: the suite has no such probe.
    """
    suite, slash, name = source.partition("/")
    folder = BUILT_IN / suite
    if not slash or suite in ("", ".", "..") or not folder.is_dir():
        return None
    parts = {path.stem: path for path in folder.glob("*.jsonl")}
    if name not in parts:
        raise DataError(unknown(source, name, sorted(parts)))
    return parts[name]


def _holds_questions(path: Path) -> bool:
    """Whether a file has the columns of a domain set; a data folder also holds other tables and descriptions."""
    names = set(load_rows(path).column_names)
    asks, tells = {"prompt", "question"} & names, {"response", "answers", "answer", "final"} & names
    return bool(asks) and bool(tells or "domain" in names)


def _stem(path: Path) -> str:
    """The file's name, or its folder's where the file is only called after a split."""
    stem = Path(path.name.removesuffix(".gz")).stem
    return path.parent.name if stem in ("test", "dev", "train", "valid") else stem


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file() or suffix_of(path) in _TABLES:
        yield from _table_rows(path)
        return
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line.rstrip("\r\n"))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{where}: not JSON ({error.msg}, column {error.colno}). Write one JSON object per line."
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(f"{where}: a {type(row).__name__} given. Write one JSON object per line.")
                yield where, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table, a JSON file or the hub: cells without a value are left out, right choices become indices."""
    where = str(path)
    for number, row in enumerate(load_rows(where, "test"), start=1):
        place = f"{where}, row {number}"
        row = {key: value for key, value in row.items() if value not in (None, "", [], [""])}
        if row.get("choices") and "answer" in row:
            row["answer"] = choice_index(row["answer"], row["choices"], place)
        yield place, row


def _item(where: str, row: dict[str, Any]) -> tuple[type[Probe], str, Item]:
    """Kind, group and item of a row in any of the forms."""
    fields = {key: value for key, value in row.items() if key not in _ABOUT and value is not None}
    if "prompt" not in fields and "question" in fields:
        fields["prompt"] = fields["question"]
        if "choices" in fields:
            fields.setdefault("layout", "question")
    if "safe" not in fields and fields.get("label") in ("safe", "unsafe"):
        fields["safe"] = fields["label"] == "safe"
    if "answers" not in fields and (one := fields.get("final", fields.get("response"))) is not None:
        fields["answers"] = [str(one)]
    if row.get("domain") and "answers" not in fields and "choices" not in fields and "answer" in fields:
        fields["answers"] = [str(fields["answer"])]
    known = kinds()
    kind = row.get("kind")
    if kind is None:
        kind = next((k for k in _most_fields_first() if known[k].fields <= fields.keys()), None)
        if kind is None:
            needs = "; ".join(f"{k}: {', '.join(sorted(known[k].fields))}" for k in sorted(known) if known[k].fields)
            raise DataError(f"{where}: {', '.join(sorted(fields)) or 'no fields'} given. Each kind needs: {needs}.")
    if kind not in known:
        raise DataError(unknown(f"{where}, kind", str(kind), known))
    cls = known[kind]
    if missing := sorted(cls.fields - cls.shared - fields.keys()):
        raise DataError(f"{where}: {', '.join(missing)} missing. Kind '{kind}' needs {', '.join(sorted(cls.fields))}.")
    for key in sorted(cls.fields & {"prompt", "good", "bad", "text"}):
        if not isinstance(fields[key], str) or not fields[key].strip():
            raise DataError(f"{where}: {key} {fields[key]!r} given; allowed is a text that is not empty.")
    group = row.get("group") or cls.group
    if group not in GROUPS:
        raise DataError(unknown(f"{where}, group", str(group), GROUPS))
    name = str(row.get("id") or _digest(fields))
    if row.get("domain") and kind == "answer" and "max_tokens" not in fields:
        fields["max_tokens"] = max(getattr(cls, "max_tokens", 0), answer_tokens(map(str, _listed(fields["answers"]))))
    return cls, group, Item(name, fields)


def _listed(answers: Any) -> list[Any]:
    return answers if isinstance(answers, list) and answers else [answers]


def _question(item: Item) -> str:
    """What an item asks, in one spelling: case-folded, white space as one space, with its choices in any order."""
    fields = item.fields
    parts = [str(fields.get("prompt") or fields.get("good") or fields.get("text") or "")]
    return " ".join("\n".join([*parts, *sorted(map(str, fields.get("choices") or []))]).casefold().split())


def _right(item: Item) -> list[str]:
    fields = item.fields
    if "choices" in fields and isinstance(fields.get("answer"), int):
        return [str(choice) for choice in fields["choices"][fields["answer"] : fields["answer"] + 1]]
    return [" ".join(str(one).casefold().split()) for one in _listed(fields.get("answers"))]


@functools.cache
def _most_fields_first() -> tuple[str, ...]:
    """A row with choices, a check or a safety label is not only a question with an answer."""
    told = [kind for kind, cls in kinds().items() if cls.fields]
    return tuple(sorted(told, key=lambda kind: (kind == "answer", -len(kinds()[kind].fields), kind)))


def _digest(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def _sample(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """Items with the smallest hash of seed and id: fair, and the same whatever else is in the file."""
    if limit is None or limit >= len(items):
        return items
    ranked = sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{item.id}".encode()).digest())
    chosen = {item.id for item in ranked[:limit]}
    return [item for item in items if item.id in chosen]
