"""`retain repair`: the best recoverable point between a base and a fine-tune of it that has forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retain.cli.common import loss_option

if TYPE_CHECKING:
    from retain.advice.repair import Repair

CORE = ["core"]


def command(
    base: Annotated[str, typer.Option("--base", help="The model it began as: starter, a folder, or a hub id.")],
    tuned: Annotated[str, typer.Option("--tuned", help="A fine-tune of it: a folder, a LoRA adapter, or a run.")],
    learned: Annotated[str, typer.Option("--learned", help="Rows of what it learned that it was not trained on.")],
    keep: Annotated[
        list[str], typer.Option("--keep", "-k", help="What it must not lose: a suite, a file, or a folder.")
    ] = CORE,
    lose_at_most: Annotated[
        float | None, loss_option("--lose-at-most", "Largest upper bound of the loss; else the best balance.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items of each probe of --keep.")] = None,
    learned_limit: Annotated[int | None, typer.Option(min=4, help="At most this many of --learned.")] = None,
    train_steps: Annotated[
        int | None, typer.Option(help="Steps of self-distillation; by default 16 for a small model, 0 for others.")
    ] = None,
    search: Annotated[int, typer.Option(help="Most points of the search over groups of layers; 0 for none.")] = 10,
    confidence: Annotated[float, typer.Option(help="Of all intervals and bounds.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of what is drawn: by DARE, and rows that the base writes.")] = 0,
    output: Annotated[str | None, typer.Option("--output", help="Folder; runs/<tuned>-repair by default.")] = None,
) -> None:
    """Try ways back from a fine-tune to its base, and write the point that keeps most of both.

    The point is chosen on one half of the items and reported on the other. Run the same command again to go on.

        retain repair --base starter --tuned ./tuned --learned new.jsonl --keep core

        retain repair --base starter --tuned runs/medical --learned test.jsonl --lose-at-most 0.02
    """
    from functools import partial

    from retain.advice import repair_page
    from retain.cli.common import console, probing, quiet_libraries, quietly

    out = console()
    quiet_libraries()
    folder = Path(output or f"runs/{Path(tuned).resolve().name}-repair")
    settings = {"lose_at_most": lose_at_most, "train_steps": train_steps, "search": search}
    settings |= {"confidence": confidence, "seed": seed}
    watched, say = partial(probing, out), quietly(out)
    found, page = carry_out(base, tuned, learned, keep, folder, limit, learned_limit, say, watched, **settings)
    out.print(repair_page.sentence(found), style="bold", highlight=False, markup=False)
    if len(found.points) > 1:
        out.print(repair_page.table(found))
        out.print(repair_page.rule(found), style="dim", highlight=False, markup=False)
    if found.form:
        out.print(f"{found.form.capitalize()}: {found.folder}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)
    if found.chosen is None and len(found.points) > 1:
        raise typer.Exit(1)


def carry_out(
    base: str,
    tuned: str,
    learned: str,
    keep: Sequence[str],
    folder: Path,
    limit: int | None = None,
    learned_limit: int | None = None,
    say: Callable[[str], None] = print,
    watched: Any = None,
    **settings: Any,
) -> tuple[Repair, Path]:
    """A repair with its pages: what was found, and the page to open.

    Args:
        settings: of `retain.advice.repair.Settings`.

    Raises:
        RetainError: bad input, before any model is asked.
    """
    from contextlib import nullcontext

    import torch

    from retain import measuring
    from retain.advice import repair_page
    from retain.advice.repair import Repairing, Settings, check
    from retain.advice.repair_models import tokenizer_of

    chosen = Settings(**settings)
    check(chosen)
    measuring.require_models([base, tuned])
    kept = measuring.open_probes(keep, limit, say)
    new = _learned(learned, tokenizer_of(tuned), learned_limit, say)
    work = Repairing(
        base, tuned, kept, new, folder, measuring.answers, watched or (lambda what, total: nullcontext(lambda n: None)),
        chosen, say, "cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    found = work.run()
    return found, repair_page.write(found, work)


def _learned(source: str, tokenizer: Any, limit: int | None, say: Callable[[str], None]) -> list[Any]:
    """Probes of what was learned: probe items as they are, training rows asked as a run asks its test rows."""
    from retain.data.sources import load_rows
    from retain.errors import DataError
    from retain.measuring import open_probes
    from retain.probes.suite import probes_from_rows
    from retain.probes.tasks import task_items

    place = Path(source)
    if place.is_file() and not place.read_text(encoding="utf-8", errors="replace").strip():
        raise DataError(f"--learned: {source} is empty. Give rows of what was learned.")
    rows = load_rows(source, "test").to_list() if place.exists() else []
    if not rows or any(row.get("kind") or row.get("probe") or row.get("check") for row in rows):
        return open_probes([source], limit, say)
    name = place.name.split(".")[0]
    items = task_items([{k: v for k, v in row.items() if v is not None} for row in rows], name, tokenizer)
    if not items:
        raise DataError(
            f"--learned: {source}: no row can be scored. Give prompt and response, or question and choices."
        )
    return list(probes_from_rows(items, name, limit))
