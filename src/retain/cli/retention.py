"""`retain retention`: what a tuned model still knows of what its base knew, domain by domain."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    base: Annotated[str, typer.Argument(help="The model before: starter, a folder, a run, or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The model after.")],
    probes: Annotated[
        list[str], typer.Option("--probes", "-p", help="A domain set, a folder of them, or any other probes.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions per domain.")] = None,
    output: Annotated[
        list[str] | None, typer.Option("--output", help="Also write the report: .md, .html or .json; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    lang: Annotated[str, typer.Option("--lang", help="Language of table and report: en or zh.")] = "en",
) -> None:
    """Ask two models the same questions and show what was retained of each domain, with intervals."""
    from pathlib import Path

    from retain.cli.common import answers, console, quiet_libraries, quietly
    from retain.report import retention
    from retain.report.language import check, speaking

    check(lang)
    files = [Path(name).expanduser() for name in output or []]
    for path in files:
        retention.check_ending(path)
    quiet_libraries()
    from retain.measuring import open_probes, require_models

    out = console()
    require_models([base, tuned])
    chosen = open_probes(probes, limit, quietly(out))
    infos = [probe.info("reference") for probe in chosen]
    texts = {
        (p.name, item.id): str(item.fields["prompt"]) for p in chosen for item in p.items if "prompt" in item.fields
    }
    before, after = (answers(model, chosen, out, (base, tuned)) for model in (base, tuned))
    report = retention.retention_report(base, tuned, before, after, infos, seed=seed, texts=texts)
    with speaking(lang):
        out.print(retention.shown(report))
        out.print(retention.explained(report), style="dim", highlight=False, markup=False)
        for path in files:
            retention.write(report, path)
            out.print(f"Report: {path}", highlight=False, markup=False, soft_wrap=True)
