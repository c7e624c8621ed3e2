"""`retain plan`: check a configuration without loading weights, and say what would happen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from retain.config import RunConfig


def command(
    config: Annotated[str | None, typer.Argument(help="A YAML file. Without one, give --task.")] = None,
    task: Annotated[list[str], typer.Option("--task", "-t", help="Data to learn.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option("--model", "-m", help="starter, a folder, or a hub id.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Run directory.")] = None,
    set_: Annotated[list[str], typer.Option("--set", "-o", help="Override a setting.")] = [],  # noqa: B006
) -> None:
    """Check a configuration and its data, and show every setting that would be used."""
    from retain.cli.common import console, quiet_libraries
    from retain.config import dump

    settings = configuration(config, task, model, output, set_)
    quiet_libraries()
    from retain.data.tasks import load_task
    from retain.pipeline import plan

    planned = plan(settings)
    out = console()
    for name, entry in zip(settings.task_names, settings.tasks):
        found = load_task(entry.model_dump(exclude_none=True) | {"name": name}, seed=settings.seed)
        size = f"{len(found.rows)} rows" if hasattr(found.rows, "__len__") else "a stream"
        out.print(f"{name}: {size} to learn, {len(found.test_rows)} to test; {'; '.join(found.notes)}", markup=False)
    out.print(f"methods: {planned.stack.methods or 'none (plain fine-tuning)'}", markup=False)
    out.print(f"stages: {' → '.join(planned.stages)}", markup=False)
    out.print(f"directory: {settings.directory}\n", markup=False)
    print(dump(settings))


def configuration(
    config: str | None, tasks: list[str], model: str | None, output: str | None, overrides: list[str]
) -> RunConfig:
    """The configuration of a file, or of options alone, with overrides.

    Raises:
        ConfigError: neither a file nor a task, or a bad setting.
    """
    from retain.config import override, parse, read
    from retain.errors import ConfigError

    extra = [f"output={output}"] if output else []
    extra += [f"model.name={model}"] if model else []
    if config is not None:
        if tasks:
            raise ConfigError("--task: tasks stand in the YAML file. Give one or the other.")
        return read(config, [*overrides, *extra])
    if not tasks:
        raise ConfigError("nothing to learn: give a YAML file, or --task with a file, a folder or a hub id.")
    return parse(override({"tasks": [{"data": t} for t in tasks], "model": {}}, [*overrides, *extra]), "options")
