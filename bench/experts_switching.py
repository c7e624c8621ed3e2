"""What it takes to switch experts on a loaded base, against loading the model again. Prints a table.

    python bench/experts_switching.py                    # on the starter model, three experts of rank 16
    python bench/experts_switching.py --model FOLDER     # another base

Switching must take at most 5 ms and be at least 500 times faster than reloading; exit code 1 when it is not.
Results: bench/out/experts_switching.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import Company, now

MOST_SECONDS, LEAST_RATIO = 0.005, 500.0


def adapters(model: str, folder: Path, count: int, rank: int) -> list[Path]:
    """PEFT folders with random factors on all linear layers of the blocks."""
    import torch
    from peft import LoraConfig, get_peft_model

    from retain.models.load import load_model
    from retain.models.targets import target_modules

    base, _ = load_model(model, tokenizer=False)
    config = LoraConfig(
        r=rank, target_modules=target_modules(base, "all"), task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)
    adapted = get_peft_model(base, config)
    found = []
    for number in range(count):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.01)
        adapted.save_pretrained(folder / str(number))
        found.append(folder / str(number))
    return found


def seconds(call: Callable[[int], Any], repeats: int) -> list[float]:
    """Of `call(i)`, one after the other; the first is not counted."""
    times = []
    for i in range(repeats + 1):
        start = now()
        call(i)
        times.append(now() - start)
    return times[1:]


def measure(model: str, repeats: int, rank: int, count: int = 3) -> dict[str, Any]:
    """Seconds of each kind of change, the bytes of an idle expert, and what they come to."""
    import torch

    from retain.experts.library import ExpertLibrary
    from retain.experts.pool import AdapterPool
    from retain.models.load import load_model

    with tempfile.TemporaryDirectory() as place, Company() as others:
        library = ExpertLibrary(Path(place) / "experts")
        for number, folder in enumerate(adapters(model, Path(place) / "made", count, rank)):
            library.add(f"expert-{number}", folder, base=model)
        names = library.names()
        base, _ = load_model(model, tokenizer=False)
        pool = AdapterPool(base.eval().requires_grad_(False), library)
        pool.ensure(names)
        switched = seconds(lambda i: pool.activate(names[i % count]), repeats)
        assert pool._peft is not None
        keys = [one.key for one in pool._loaded.values()]
        by_peft = seconds(lambda i: pool._peft.set_adapter(keys[i % count]), max(repeats // 10, 2))
        pool._collect()  # PEFT made the layers look elsewhere
        size = library.card(names[0]).bytes
        assert pool.bytes == count * size
        pool.activate(None)
        pool.limit = size  # one at a time: every call loads

        loaded = seconds(lambda i: pool.ensure([names[i % count]]), 6)
        again = seconds(lambda i: load_model(model, tokenizer=False), 3)
    found = {
        "model": model,
        "rank": rank,
        "bytes": size,
        "threads": torch.get_num_threads(),
        "switch": statistics.median(switched),
        "switch_most": max(switched),
        "peft_set_adapter": statistics.median(by_peft),
        "load_expert": statistics.median(loaded),
        "reload_model": statistics.median(again),
        "others": others.share,
    }
    return found | {"ratio": found["reload_model"] / found["switch"]}


def table(found: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    rows = [
        ("switch to a loaded expert (`AdapterPool.activate`)", f"{1000 * found['switch']:.2f} ms"),
        ("the same with PEFT's `set_adapter`", f"{1000 * found['peft_set_adapter']:.1f} ms"),
        ("load an expert from disk, another one leaving", f"{1000 * found['load_expert']:.0f} ms"),
        ("load the model again", f"{1000 * found['reload_model']:.0f} ms"),
        ("memory of an idle expert", f"{found['bytes'] / 2**20:.1f} MiB"),
    ]
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {what} | {value} |" for what, value in rows)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter", help="starter, or a folder")
    parser.add_argument("--repeats", type=int, default=300, help="switches")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("bench/out/experts_switching.json"))
    given = parser.parse_args(arguments)

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    found = measure(given.model, given.repeats, given.rank)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print(
        f"\nReloading takes {found['ratio']:,.0f} times as long as switching. "
        f"Other programs used {found['others']:.0%} of the machine."
    )
    return 0 if found["switch"] <= MOST_SECONDS and found["ratio"] >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
