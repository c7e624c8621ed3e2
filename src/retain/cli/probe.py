"""`retain probe`: measure a model, without training anything."""

from __future__ import annotations

from typing import Annotated

import typer

CORE = ["core"]


def command(
    model: Annotated[str, typer.Argument(help="starter, a folder with a model or adapter, a run, or a hub id.")],
    probes: Annotated[
        list[str], typer.Option("--probes", "-p", help="A built-in suite, a file, a folder, or lm_eval:TASK.")
    ] = CORE,
    limit: Annotated[int | None, typer.Option(help="At most this many items per probe.")] = None,
    items: Annotated[str | None, typer.Option(help="Write every item to this Parquet file.")] = None,
) -> None:
    """Ask a model the probes and print its scores with 95 % intervals."""
    from pathlib import Path

    from retain.cli.common import console, quiet_libraries

    quiet_libraries()
    import torch
    from rich.table import Table

    from retain import analysis
    from retain.inputs import probe_info, require_items
    from retain.models.load import load_model
    from retain.models.params import computes_bf16
    from retain.pipeline import load_run
    from retain.probes.asking import ask
    from retain.probes.base import Subject
    from retain.probes.suite import load_probes
    from retain.results import save_items
    from retain.training.watch import bar

    chosen = []
    for source in probes:
        for probe in load_probes(source, limit):
            require_items(probe, source, {"--limit": limit})
            chosen.append(probe)
    network, tokenizer = load_run(model) if (Path(model) / "run.yaml").is_file() else load_model(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    out = console()
    with bar(transient=True, console=out) as progress, torch.autocast(device, torch.bfloat16, computes_bf16(device)):
        job = progress.add_task(f"probing {model}", total=sum(len(p.items) for p in chosen), note="")
        rows = ask(chosen, Subject(network, tokenizer), lambda n: progress.update(job, advance=n))
    if items:
        save_items(rows, Path(items))
    table = Table("probe", "group", "metric", "items", "score", "95 %", "chance", title=f"{model}")
    for probe in chosen:
        info = probe_info(probe, "reference", None)
        found = analysis.score([r for r in rows if r["probe"] == probe.name], info)
        chance = "" if info.chance is None else f"{info.chance:.2f}"
        table.add_row(
            probe.name, probe.group, info.metric, str(info.items), f"{found.value:.3f}",
            f"{found.low:.3f} – {found.high:.3f}", chance,
        )  # fmt: skip
    out.print(table)
    if items:
        out.print(f"Items: {items}")
