"""What several commands share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path


def console() -> Any:
    """The terminal; 100 columns where the width cannot be told (a pipe, CI)."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=100)


def quiet_libraries() -> None:
    """Leave the terminal to our own lines: no nested progress bars, no notices about other people's plans."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line per layer and step
    import datasets
    from transformers.utils import logging as hf_logging

    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def loss_option(name: str, meaning: str) -> Any:
    """A Typer option for what may be lost, typed as 0.01, 1% or 1pt (one point), or 0.

    Args:
        name: such as --lose-at-most.
        meaning: the help text; how a loss is typed is added.
    """
    return typer.Option(name, parser=_loss, metavar="<loss>", help=f"{meaning} Typed as 1%, 1pt or 0.01: one point.")


def _loss(text: str) -> float:
    from retain.settings import share

    if text.strip() in ("0", "0.0", "0%"):
        return 0.0
    try:
        return share(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}.") from None


def language_of(directory: Path) -> str:
    """What a run was told to write in."""
    import yaml

    path = directory / "run.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return str(found.get("language", "en")) if isinstance(found, dict) else "en"


def quietly(screen: Any) -> Callable[[str], None]:
    """Says a line in a dim colour, as it is."""
    return lambda line: screen.print(line, style="dim", highlight=False, markup=False)


@contextmanager
def probing(screen: Any, name: str, items: int) -> Iterator[Callable[[int], None]]:
    """A progress bar while a model is asked."""
    from retain.training.watch import bar

    with bar(transient=True, console=screen) as progress:
        job = progress.add_task(f"probing {name}", total=items, note="")
        yield lambda n: progress.update(job, advance=n)


def answers(model: str, probes: Sequence[Any], screen: Any, beside: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A model's item rows of all probes (`results.ITEM_COLUMNS`), with a progress bar; the model is then let go.

    Args:
        beside: the models that it is compared with: all are asked in the same arithmetic.

    Raises:
        ModelError, RunError: it cannot be loaded.
    """
    from retain import measuring

    opened = measuring.open_model(model)
    with probing(screen, model, sum(len(p.items) for p in probes)) as progress:
        return measuring.answers(
            *opened, probes, progress, measuring.origin_of(model), measuring.asked_in_half(beside or [model])
        )
