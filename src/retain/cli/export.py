"""`retain export`: the model of a run as an ordinary model folder."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    to: Annotated[str, typer.Option("--to", help="Folder to write; must not exist yet.")],
    stage: Annotated[str | None, typer.Option(help="Stage, such as 01-medical; the last by default.")] = None,
    task: Annotated[str | None, typer.Option(help="Take this task's model out of it, after `packnet`.")] = None,
) -> None:
    """Write a run's model, adapters merged, for transformers, vLLM and others."""
    import os
    import shutil
    from pathlib import Path

    from retain.cli.common import quiet_libraries
    from retain.errors import RunError

    if Path(to).exists():
        raise RunError(f"{to}: exists already. Choose a new folder.")
    quiet_libraries()
    from retain.models import bottleneck
    from retain.models.load import save_base
    from retain.pipeline import load_run

    model, tokenizer = load_run(run, stage, task)
    partial = Path(to).with_name(Path(to).name + ".part")  # a full disk leaves nothing that looks like a model
    shutil.rmtree(partial, ignore_errors=True)
    save_base(model, partial)
    tokenizer.save_pretrained(partial)
    if bottleneck.count(model):
        bottleneck.save(model, partial / bottleneck.NAME)
    os.replace(partial, to)
    typer.echo(f"Model: {to}")
    if bottleneck.count(model):
        typer.echo(
            f"Bottleneck adapters cannot be merged; they are in {to}/{bottleneck.NAME}, and only retain puts them on. "
            "For transformers and vLLM this is the base without them."
        )
