"""`retain synth`: rows that the model writes itself, in a file that stands for old data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    out: Annotated[str, typer.Option("--out", help="File to write, ending in .jsonl.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="starter, a folder with a model or adapter, a run, or a hub id.")
    ] = "starter",
    number: Annotated[int, typer.Option(min=1, help="Rows wanted.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer in a row.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    avoid: Annotated[
        list[str] | None,
        typer.Option(
            "--avoid", help="Suite, file or folder of probes whose items no row may repeat; core if not given."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.1, help="Of instructions; low values repeat topics.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Let a model write rows of what it can do, to replay them where the old data is gone.

    Run the same command again to go on after a stop.
    """
    path = _target(out, force)
    from retain.cli.common import console, quiet_libraries

    quiet_libraries()
    import torch

    from retain.data.memory import Memory
    from retain.errors import ConfigError, DataError
    from retain.models.likelihood import context_length
    from retain.models.load import load_model
    from retain.models.own_rows import write_own
    from retain.models.params import computes_bf16
    from retain.pipeline import load_run
    from retain.probes.base import texts_of_items
    from retain.probes.suite import load_probes
    from retain.results import write_text
    from retain.training.watch import bar

    items = [text for source in avoid or ["core"] for text in texts_of_items(load_probes(source))]
    network, tokenizer = load_run(model) if (Path(model) / "run.yaml").is_file() else load_model(model)
    room = context_length(network, tokenizer)
    if max_tokens >= room:
        raise ConfigError(f"--max-tokens: {max_tokens} given. Allowed: 8 to {room - 1} with this model.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    screen = console()
    memory = Memory(path.with_name(path.name + ".unfinished"), _stamp(model))
    if memory.texts:
        screen.print(f"{memory.path}: going on with what is there.", style="dim", markup=False, soft_wrap=True)
    with bar(transient=True, console=screen) as progress, torch.autocast(device, torch.bfloat16, computes_bf16(device)):
        job = progress.add_task(f"{model} writes rows", total=number, note="")
        try:
            rows, report = write_own(
                network, tokenizer, number, seed, max_tokens, temperature,
                lambda kept: progress.update(job, advance=kept), memory, avoid=items,
            )  # fmt: skip
        except DataError:  # not one row: going on would end here again
            memory.forget()
            raise
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(rows)))
    memory.forget()
    few = "" if report.kept == number else f" {number} were wanted: try another --seed or a larger --max-tokens."
    screen.print(f"{report.sentence()}.{few}", highlight=False, markup=False, soft_wrap=True)
    use = f"Rows: {out}. To replay them: `old: {out}` in the YAML file, or `retain run … -o old={out}`."
    screen.print(use, highlight=False, markup=False, soft_wrap=True)


def _target(out: str, force: bool) -> Path:
    from retain.errors import DataError

    path = Path(out).expanduser()
    if path.suffix != ".jsonl":
        raise DataError(f"--out: '{out}' given. Rows are written as JSON Lines; give a name that ends in .jsonl.")
    if path.is_dir():
        raise DataError(f"--out: {out} is a folder. Give a file in it, such as {path / 'old.jsonl'}.")
    if path.exists() and not force:
        raise DataError(f"--out: {out} exists already. Give another name, or --force to replace it.")
    return path


def _lines(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, str]]:
    """Rows in a form that every reader of data takes: prompt and response, or text."""
    for row in rows:
        if "text" in row:
            yield {"text": row["text"]}
        else:
            yield {"prompt": row["prompt"][0]["content"], "response": row["completion"][0]["content"]}


def _stamp(model: str) -> list[Any]:
    """What tells a model from another one, and from itself after more training."""
    from retain.models.load import resolve

    weights = Path(resolve(model)).rglob("*.safetensors")
    return [model, *sorted(f"{file.name} {file.stat().st_mtime_ns}" for file in weights)]
