"""Rows that a model writes itself: who writes them, and the file in which they are kept with what made them.

Each kind of rows is written once, by the main process, into one Parquet file; a kill in between loses nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retain.data.filters import Avoided
from retain.data.leaks import texts_of
from retain.data.memory import Memory
from retain.errors import ConfigError, DataError, RunError
from retain.models import params

if TYPE_CHECKING:
    from datasets import Dataset

    from retain.data.synthesis import Report
    from retain.models.generation import Generated

#: (what identifies a call of the model, the call) → one entry per prompt.
Recall = Callable[[list[Any], Callable[[], list[Any]]], list[Any]]
#: (prompts, most new tokens, temperature, top_p, draw) → answers: a model in this process, or an endpoint.
Engine = Callable[[list[Any], int, float, float, int], "list[Generated]"]
Say = Callable[[str], None]
#: (called with the number of rows just finished, repeats calls made before) → rows, what made them, what to say.
Write = Callable[[Callable[[int], None], Recall], "tuple[Dataset, dict[str, Any], str]"]
#: A row → the texts in it that the model wrote.
Texts = Callable[[dict[str, Any]], list[str]]

_ABOUT = b"retain"
_SAMPLE = 4096  # elements of a weight that its fingerprint looks at


def local(model: Any, tokenizer: Any) -> Engine:
    """The model in this process as an engine."""

    def ask(prompts: list[Any], limit: int, temperature: float, top_p: float, draw: int) -> list[Generated]:
        from retain.models.generation import generate

        with params.casts_kept(model):
            return generate(model, tokenizer, prompts, limit, temperature, top_p, draw)

    return ask


def asked(engine: Engine, prompts: list[Any], limit: int, temperature: float, draw: int, recall: Recall) -> list[Any]:
    """[text, whether it was finished] for every prompt; top_p is 0.9 where a temperature makes it matter."""
    identity = [draw, temperature, limit, *prompts]
    return recall(identity, lambda: [[g.text, g.finished] for g in engine(prompts, limit, temperature, 0.9, draw)])


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Tells weights from one another: a hash over names, shapes and up to 4096 elements of every parameter.

    A LoRA adapter that adds nothing yet is left out, so that a model has the same one before and after merging.
    """
    idle = not any(bool(params.local(pair.B).any()) for pair in params.lora_pairs(model).values())
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(params.causal(model).named_parameters()):
        if idle and ".lora_" in name:
            continue
        flat = params.local(parameter).detach().reshape(-1)
        some = flat[:: -(-len(flat) // _SAMPLE) or 1].contiguous().cpu()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kept(
    path: Path,
    label: str,
    total: int,
    stamp: list[Any],
    write: Write,
    say: Say = print,
    avoid: Sequence[str] = (),
    texts: Texts = texts_of,
) -> Dataset:
    """Rows of a file, written first if it is not there.

    One process writes and the others wait. What a killed process wrote is in a file beside it and is used again when
    `stamp` is the same. Rows that are there were written when there may have been fewer texts to avoid, as a run can
    go on with more tasks: those that repeat one of the others leave the file.

    Args:
        path: the Parquet file.
        label: of the progress bar, which counts to `total`.
        stamp: what the model's calls depend on.
        write: makes rows, what made them (kept in the file, see `about`), and a sentence for the user; none of the
            rows repeats one of `avoid`.
        avoid: texts that no row may repeat; the process that writes must know them, the others need not.
        texts: what of a row is compared with them.

    Raises:
        DataError: every row that is there repeats one of them.
    """
    from accelerate import PartialState
    from datasets import Dataset

    from retain.data.json_rows import quiet

    with PartialState().main_process_first(), quiet():  # one process writes, the others read what it wrote
        if not path.is_file():
            from rich.progress import Progress

            memory = Memory(path.with_suffix(".unfinished"), stamp)
            path.parent.mkdir(parents=True, exist_ok=True)
            with Progress(transient=True) as bar:
                job = bar.add_task(label, total=total)
                try:
                    rows, made, sentence = write(lambda done: bar.update(job, advance=done), memory)
                except (ConfigError, DataError):  # nothing usable: going on would end here again
                    memory.forget()
                    raise
            save(rows, path, made)
            memory.forget()
            say(sentence)
        elif avoid and PartialState().is_main_process:
            _without(path, Avoided(avoid), texts, say)
        return Dataset.from_parquet(str(path), cache_dir=str(path.parent / ".cache"))


def _without(path: Path, avoided: Avoided, texts: Texts, say: Say) -> None:
    """Take rows out of a file that repeat what is to be avoided."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(path), cache_dir=str(path.parent / ".cache"))
    clean = [place for place, row in enumerate(rows) if not any(map(avoided, texts(row)))]
    if not clean:
        raise DataError(f"{path}: every row repeats an item of the probes. Start a new run, or give rows as `old:`.")
    if count := len(rows) - len(clean):
        made = about(path)
        made["left out later"] = made.get("left out later", 0) + count
        save(rows.select(clean), path, made)
        say(f"{path.name}: {count} of {len(rows)} rows left out, as they repeat items of the probes.")


def save(rows: Dataset, path: Path, made: dict[str, Any]) -> None:
    """Write rows with what made them, whole or not at all."""
    import pyarrow.parquet as pq

    table = rows.with_format("arrow")[:]
    schema = rows.features.arrow_schema
    note = {_ABOUT: json.dumps(made, ensure_ascii=False).encode()}
    partial = path.with_name(path.name + ".part")
    pq.write_table(table.cast(schema).replace_schema_metadata({**(schema.metadata or {}), **note}), partial)
    os.replace(partial, path)


def about(path: Path) -> dict[str, Any]:
    """What made the rows of a file.

    Raises:
        RunError: it does not say.
    """
    import pyarrow.parquet as pq

    note = (pq.read_schema(path).metadata or {}).get(_ABOUT)
    if note is None:
        raise RunError(f"{path}: does not say what made it. Delete the file; its rows are then written again.")
    return json.loads(note)


def self_written(
    model: Any,
    tokenizer: Any,
    directory: Path,
    number: int,
    seed: int,
    say: Say = print,
    max_tokens: int = 64,
    engine: Engine | None = None,
    writer: str = "",
    avoid: Sequence[str] = (),
) -> Dataset:
    """Rows in which the model talks to itself, written once and kept as `self.parquet` in `directory`.

    A later caller that asks for more gets what is there, so that every task and method sees the same rows.
    """

    def write(advance: Callable[[int], None], recall: Recall) -> tuple[Dataset, dict[str, Any], str]:
        rows, report = write_own(
            model, tokenizer, number, seed, max_tokens, advance=advance, recall=recall, engine=engine, avoid=avoid
        )
        made = {"source": "self", "writer": writer or fingerprint(model), "seed": seed, "max_tokens": max_tokens}
        sentence = f"replay: the model wrote {len(rows)} rows itself ({report.sentence()})."
        return rows, made | {"tried": report.tried, "dropped": dict(report.dropped)}, sentence

    stamp = [writer or fingerprint(model), number, seed, max_tokens]
    rows = kept(directory / "self.parquet", "the model writes old rows", number, stamp, write, say, avoid)
    return rows.select(range(min(number, len(rows))))


def write_own(
    model: Any,
    tokenizer: Any,
    number: int,
    seed: int,
    max_tokens: int = 64,
    temperature: float = 1.0,
    advance: Callable[[int], None] = lambda kept: None,
    recall: Recall = lambda asked, ask: ask(),
    engine: Engine | None = None,
    latest: bool = False,
    avoid: Sequence[str] = (),
) -> tuple[Dataset, Report]:
    """Let a model write rows of its old behaviour, its adapters switched off.

    Args:
        number: rows wanted.
        max_tokens: of an answer, or of a plain text where there is no chat template.
        temperature: for instructions; answers are drawn at 0.7 at most.
        advance: called with the number of rows just kept.
        recall: given what identifies a call of the model, and the call: an interrupted job can answer the calls
            it made before from a file and goes on to the same rows.
        engine: who writes in place of the model.
        latest: with its adapters, as it is now.
        avoid: texts that no row may repeat: the items of the probes.

    Returns:
        A `datasets.Dataset` in chat form and what became of everything that was written.

    Raises:
        ConfigError, ModelError, DataError: as `write_rows` and `generate`.
    """
    from retain.data.synthesis import Filters, write_rows

    draws = itertools.count(seed * 1000)
    engine = engine or local(model, tokenizer)

    def write(prompts: list[str], temperature: float, max_new_tokens: int) -> list[str]:
        draw = next(draws)

        def ask() -> list[str]:
            answers = engine(prompts, max_new_tokens, temperature, 0.9, draw)
            return [a.text + (tokenizer.eos_token or "" if a.finished else "") for a in answers]

        return recall([draw, temperature, max_new_tokens, *prompts], ask)

    with nullcontext() if latest else params.adapters_off(model):
        return write_rows(
            write,
            tokenizer,
            number,
            seed,
            filters=Filters(prompt_tokens=32, response_tokens=max_tokens, avoid=avoid),
            temperature=temperature,
            progress=advance,
        )


def pseudo_rows(
    model: Any,
    tokenizer: Any,
    number: int,
    seed: int,
    given: Iterable[Any],
    say: Say = print,
    avoid: Sequence[str] = (),
) -> Dataset | list[Any]:
    """At most `number` rows of the model as it is now, none of which repeats something of the given rows, or a text to
    be avoided (the items of the probes).

    What is written stays in memory until it has been compared with them.
    """
    from rich.progress import Progress

    from retain.data.leaks import Leaks

    leaks = Leaks(itertools.chain.from_iterable(given), tokenizer)
    with Progress(transient=True) as bar:
        job = bar.add_task("the model writes rows of its own", total=number)
        try:
            rows, report = write_own(
                model, tokenizer, number, seed, advance=lambda done: bar.update(job, advance=done), latest=True,
                avoid=avoid,
            )  # fmt: skip
        except DataError as error:
            say(f"pseudo-samples: none ({error})")
            return []
    clean = [place for place, row in enumerate(rows) if not any(map(leaks, texts_of(row)))]
    say(
        f"pseudo-samples: {len(clean)} rows of the model's own ({report.sentence()}; {len(rows) - len(clean)} left out "
        "because they repeat something of the rows it learned)."
    )
    return rows.select(clean)


def mean_states(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Mean of the last hidden states over the tokens of each text, at length 1; [n, H]."""
    from retain.models.likelihood import encode
    from retain.models.rows import looking

    device = params.causal(model).get_input_embeddings().weight.device
    found = []
    with looking(model):
        for tokens in encode(tokenizer, texts):
            states = params.hidden_states(model, {"input_ids": torch.tensor([tokens], device=device)})
            mean = states[0].float().mean(0)
            found.append((mean / mean.norm().clamp(min=1e-12)).cpu().numpy())
    return np.stack(found)
