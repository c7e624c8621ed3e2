"""`retain synth`: rows that the model writes itself, in a file that stands for old data; `retain synth questions`: a
question set for a domain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(invoke_without_command=True)


@app.callback()
def command(
    context: typer.Context,
    out: Annotated[str | None, typer.Option("--out", help="File to write, ending in .jsonl.  [required]")] = None,
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

    Run the same command again to go on after a stop. `retain synth questions` writes a question set for a domain.
    """
    if context.invoked_subcommand is not None:
        if out is not None:
            raise typer.BadParameter(f"give it behind '{context.invoked_subcommand}'", param_hint="--out")
        return
    if out is None:
        raise typer.BadParameter("missing; give the file to write, ending in .jsonl", param_hint="--out")
    path = _target(out, force, (".jsonl",))
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


@app.command()
def questions(
    domain: Annotated[str, typer.Argument(help="Name of the domain, as the model understands it.")],
    out: Annotated[str, typer.Option("--out", help="File to write: .json (a domain set) or .jsonl (rows).")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="As in `retain synth`; with --endpoint its name on the server.")
    ] = "starter",
    endpoint: Annotated[
        str | None, typer.Option(help="Base of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")
    ] = None,
    key: Annotated[str, typer.Option(help="Environment variable with the key of the endpoint.")] = "OPENAI_API_KEY",
    description: Annotated[str, typer.Option(help="What belongs to the domain, in a sentence.")] = "",
    material: Annotated[
        list[str] | None, typer.Option("--material", help="Texts of the domain to ask about: .txt, or rows.")
    ] = None,
    number: Annotated[int, typer.Option(min=1, help="Questions wanted, evenly from basic to hard.")] = 60,
    each: Annotated[int, typer.Option(min=1, help="Questions asked for in one request.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=32, help="Longest reply to a request.")] = 400,
    temperature: Annotated[float, typer.Option(min=0.0, help="Low values repeat topics.")] = 0.8,
    similarity: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Share of word pairs that makes two questions one.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    avoid: Annotated[
        list[str] | None, typer.Option("--avoid", help="Suite, file or folder of questions not to be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Let a model write a question set for a domain: questions from basic to hard, with their answers.

    Run the same command again to go on after a stop. Read the set before you trust it: the answers are the model's.
    """
    path = _target(out, force, (".json", ".jsonl"))
    from retain.cli.common import console, quiet_libraries
    from retain.errors import ConfigError, DataError

    if endpoint is not None and model == "starter":
        raise ConfigError("--model: missing. With --endpoint give the name of the model on the server.")
    quiet_libraries()
    from retain.data.memory import Memory
    from retain.data.questions import cut, write_questions
    from retain.models.own_rows import asked
    from retain.probes.base import texts_of_items
    from retain.probes.suite import load_probes
    from retain.results import write_text
    from retain.training.watch import bar

    texts = cut([text for where in material or [] for text in _material(where)])
    items = [text for source in avoid or [] for text in texts_of_items(load_probes(source))]
    settings = {
        "domain": domain, "description": description, "number": number, "each": each, "max_tokens": max_tokens,
        "temperature": temperature, "similarity": similarity, "seed": seed,
    }  # fmt: skip
    engine, chat, specials, stamp = _writer(model, endpoint, key, max_tokens)
    screen = console()
    memory = Memory(path.with_name(path.name + ".unfinished"), [*stamp, settings, texts, items])
    if memory.texts:
        screen.print(f"{memory.path}: going on with what is there.", style="dim", markup=False, soft_wrap=True)
    with bar(transient=True, console=screen) as progress:
        job = progress.add_task(f"{model} writes questions", total=number, note="")
        try:
            found, report = write_questions(
                lambda prompts, limit, warmth, draw: asked(engine, prompts, limit, warmth, seed * 1000 + draw, memory),
                domain, number, seed, description=description, material=texts, chat=chat, each=each,
                max_tokens=max_tokens, temperature=temperature, similarity=similarity, specials=specials, avoid=items,
                progress=lambda kept: progress.update(job, advance=kept),
            )  # fmt: skip
        except DataError:  # not one question: going on would end here again
            memory.forget()
            raise
    counts = {name: getattr(report, name) for name in ("kept", "tried", "replies")}
    counts |= {name: dict(getattr(report, name)) for name in ("levels", "dropped", "repaired")}
    sources = {"material": material or [], "avoid": avoid or []}
    made = {"model": model, **({"endpoint": endpoint} if endpoint else {}), **settings, **sources, **counts}
    write_text(path, _question_text(path, domain, found, made))
    memory.forget()
    few = "" if report.kept == number else f" {number} were wanted: try another --seed, or a larger model."
    screen.print(f"{report.sentence()}.{few}", highlight=False, markup=False, soft_wrap=True)
    use = f"Questions: {out}. To ask them: `retain probe MODEL -p {out}`, or name it in `probes.reference` of the YAML."
    screen.print(use, highlight=False, markup=False, soft_wrap=True)


def _writer(model: str, endpoint: str | None, key: str, max_tokens: int) -> tuple[Any, bool, list[str], list[Any]]:
    """Engine, whether it is asked in turns, the tokens that no text may hold, and what tells it from another."""
    if endpoint is not None:
        from retain.models.endpoint import Endpoint

        return Endpoint(endpoint, model, key), True, [], [endpoint, model]
    import torch

    from retain.data.synthesis import special_tokens
    from retain.errors import ConfigError
    from retain.models.generation import has_chat_template
    from retain.models.likelihood import context_length
    from retain.models.load import load_model
    from retain.models.own_rows import local
    from retain.models.params import computes_bf16
    from retain.pipeline import load_run

    network, tokenizer = load_run(model) if (Path(model) / "run.yaml").is_file() else load_model(model)
    room = context_length(network, tokenizer)
    if max_tokens >= room:
        raise ConfigError(f"--max-tokens: {max_tokens} given. Allowed: 32 to {room - 1} with this model.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write = local(network.to(device), tokenizer)

    def engine(*asked: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, computes_bf16(device)):
            return write(*asked)

    return engine, has_chat_template(tokenizer), special_tokens(tokenizer), _stamp(model)


def _material(where: str) -> list[str]:
    """Texts of a file: as they are, or of rows in another form what is said in them."""
    from retain.data.chat import to_chat
    from retain.data.sources import load_rows, load_texts

    if Path(where).suffix == ".txt":
        return list(load_texts(where)["text"])
    rows = load_rows(where)
    if "text" in rows.column_names:
        return list(load_texts(where)["text"])
    chats = ((row.get("prompt") or []) + (row.get("completion") or []) for row in to_chat(rows, where))
    return ["\n".join(turn["content"] for turn in turns) for turns in chats if turns]


def _question_text(path: Path, domain: str, found: Sequence[Any], made: dict[str, Any]) -> str:
    """The file: a domain set, or rows of which the first one says what made them."""
    if path.suffix == ".json":
        columns = {
            "questions": [one.question for one in found],
            "ground_truths": [one.answer for one in found],
            "levels": [one.level for one in found],
        }
        return json.dumps({"domain_name": domain, **columns, "made": made}, ensure_ascii=False, indent=1) + "\n"
    rows = [{"domain": domain, "level": one.level, "prompt": one.question, "response": one.answer} for one in found]
    return "".join(
        json.dumps(row | ({} if n else {"made": made}), ensure_ascii=False) + "\n" for n, row in enumerate(rows)
    )


def _target(out: str, force: bool, endings: tuple[str, ...]) -> Path:
    from retain.errors import DataError

    path = Path(out).expanduser()
    if path.suffix not in endings:
        raise DataError(
            f"--out: '{out}' given. What is written is {'JSON or ' if len(endings) > 1 else ''}JSON Lines; give a name "
            f"that ends in {' or '.join(endings)}."
        )
    if path.is_dir():
        raise DataError(f"--out: {out} is a folder. Give a file in it, such as {path / ('old' + endings[0])}.")
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
