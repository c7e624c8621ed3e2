"""Rows of several experts in one batch against rows of one: tokens per second, by the pool's way and by PEFT's own.

    python bench/mixed_batches.py            # the starter model, LoRA of rank 16 on all linear layers

The same prompts are written on with the same batch: once all rows have one expert, once the rows are shared out over
several. What is timed is the processor's time of this process, so that other programs count little: for a CPU, with
OMP_NUM_THREADS=1. Both ways are timed in turn; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from retain.experts.batch import Batch
from retain.experts.library import ExpertLibrary
from retain.experts.pool import AdapterPool
from retain.models.load import load_model

Way = Callable[[list[str | None]], AbstractContextManager[Any]]


def make_library(model: str, folder: Path, experts: int, rank: int) -> ExpertLibrary:
    """Experts with random weights: what they say does not matter here."""
    library = ExpertLibrary(folder / "experts")
    for number in range(experts):
        base, _ = load_model(model, tokenizer=False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / f"adapter{number}")
        library.add(f"expert{number}", folder / f"adapter{number}", base=model)
    return library


def by_peft(pool: AdapterPool) -> Way:
    """PEFT's own mixed batches: `adapter_names` goes to every layer."""

    @contextmanager
    def rows(names: list[str | None]) -> Any:
        keys = ["__base__" if name is None else pool._loaded[name].key for name in names]
        told = [
            layer.register_forward_pre_hook(
                lambda _, args, more: (args, more | {"adapter_names": keys}), with_kwargs=True
            )
            for layer in pool._layers
        ]
        try:
            yield
        finally:
            for handle in told:
                handle.remove()

    return rows


@torch.no_grad()
def seconds_per_step(pool: AdapterPool, way: Way, names: list[str | None], prompt: int, steps: int) -> float:
    """Of the processor, per step of writing, after the prompts have been read."""
    prompts = torch.randint(100, 300, (len(names), prompt), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Batch(pool.model)
    with way(names):
        tokens = batch.read(prompts, 0).argmax(-1).tolist()
        begun = time.process_time()
        for _ in range(steps):
            tokens = batch.step(tokens).argmax(-1).tolist()
    return (time.process_time() - begun) / steps


def measure(
    model: str = "starter",
    rows: int = 8,
    experts: int = 4,
    rank: int = 16,
    prompt: int = 32,
    steps: int = 8,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """For every way: tokens per second on one expert and on several, and their ratio (median over the rounds)."""
    with tempfile.TemporaryDirectory() as folder:
        library = make_library(model, Path(folder), experts, rank)
        base, _ = load_model(model, tokenizer=False)
        pool = AdapterPool(base.eval().requires_grad_(False), library)
        pool.ensure(library.names())
        one: list[str | None] = [library.names()[0]] * rows
        several: list[str | None] = [library.names()[row % experts] for row in range(rows)]
        ways: dict[str, Way] = {"retain": pool.rows, "PEFT adapter_names": by_peft(pool)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                pair = tuple(seconds_per_step(pool, way, names, prompt, steps) for names in (one, several))
                if number:  # the first round warms up
                    times[name].append((pair[0], pair[1]))
    return {
        name: {
            "one": rows / statistics.median(pair[0] for pair in pairs),
            "several": rows / statistics.median(pair[1] for pair in pairs),
            "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
            "lowest": min(pair[0] / pair[1] for pair in pairs),
            "highest": max(pair[0] / pair[1] for pair in pairs),
        }
        for name, pairs in times.items()
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    lines = [
        "| way | one expert, tokens/s | several, tokens/s | several / one (lowest, highest) |",
        "|---|---|---|---|",
    ]
    for name, numbers in found.items():
        ratio = f"{numbers['ratio']:.2f} ({numbers['lowest']:.2f}, {numbers['highest']:.2f})"
        lines.append(f"| {name} | {numbers['one']:.1f} | {numbers['several']:.1f} | {ratio} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Print the table; with --out also write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    for name, value in {"rows": 8, "experts": 4, "rank": 16, "prompt": 32, "steps": 8, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args(words))
    out = given.pop("out")
    found = measure(**given)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
