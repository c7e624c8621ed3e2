"""What several commands share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any


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


def chosen_probes(sources: Sequence[str], limit: int | None, screen: Any) -> list[Any]:
    """Probes of all sources; what was left out of them is said.

    Raises:
        DataError: as `load_probes`, too few items, or two probes with one name.
    """
    from retain.errors import DataError
    from retain.inputs import require_items
    from retain.probes.suite import load_probes

    chosen: dict[str, Any] = {}
    for source in sources:
        for probe in load_probes(source, limit, say=lambda line: screen.print(line, style="dim", markup=False)):
            require_items(probe, source, {"--limit": limit})
            if probe.name in chosen:
                raise DataError(
                    f"{source}: a probe '{probe.name}' is there already. Give it another name, or leave it out."
                )
            chosen[probe.name] = probe
    return list(chosen.values())


def answers(model: str, probes: Sequence[Any], screen: Any) -> list[dict[str, Any]]:
    """A model's item rows of all probes (`results.ITEM_COLUMNS`), with a progress bar; the model is then let go.

    Raises:
        ModelError, RunError: it cannot be loaded.
    """
    from pathlib import Path

    import torch

    from retain.models.load import load_model
    from retain.models.params import computes_bf16
    from retain.pipeline import load_run
    from retain.probes.asking import ask
    from retain.probes.base import Subject
    from retain.training.watch import bar

    network, tokenizer = load_run(model) if (Path(model) / "run.yaml").is_file() else load_model(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    with bar(transient=True, console=screen) as progress, torch.autocast(device, torch.bfloat16, computes_bf16(device)):
        job = progress.add_task(f"probing {model}", total=sum(len(p.items) for p in probes), note="")
        return ask(probes, Subject(network, tokenizer), lambda n: progress.update(job, advance=n))
