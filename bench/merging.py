"""What merging costs: time against copying the bytes that it writes, and the memory it takes. Prints a table.

    python bench/merging.py             # on two copies of the starter model, one of them with noise, in bfloat16
    python bench/merging.py --write     # also puts the table into docs/merging.md

Copying and merging take turns (A B A B …), both until the bytes are on the disk, so that whatever else the machine does
hits both; the ratio is the median over pairs. Memory is the largest resident size during the merge minus that before
it, in a process of its own. Ends with exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "merging.md"
MARKS = ("<!-- numbers, by bench/merging.py -->", "<!-- end of numbers -->")
SHARD = 100_000_000
METHODS = ("linear", "slerp", "task", "ties", "dare", "stock")
MOST_TIME, MOST_SHARDS = 1.5, 2.0  # linear against copying; all methods, in shards


def write_models(folder: Path, kind: str) -> None:
    """Three copies of the starter model in several shards; two with noise of their own."""
    import torch
    from transformers import AutoModelForCausalLM

    from retain.models.starter import starter_directory

    source = starter_directory()
    for seed, name in enumerate(("base", "one", "two")):
        if (folder / name / "tokenizer.json").is_file():
            continue
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, kind))
        torch.manual_seed(seed)
        if seed:
            for weight in model.parameters():
                weight.data += 1e-3 * torch.randn_like(weight)
        model.save_pretrained(folder / name, max_shard_size=SHARD)
        for file in source.glob("*token*"):
            shutil.copy(file, folder / name)


def flushed(folder: Path) -> None:
    """Wait until a folder's files are on the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def timed(work: Callable[[], object], to: Path) -> tuple[float, float]:
    """Seconds of writing a folder, until it is on the disk, and of the processor in them; it is removed again."""
    shutil.rmtree(to, ignore_errors=True)
    os.sync()
    start, begun = time.perf_counter(), time.process_time()
    work()
    flushed(to)
    taken = time.perf_counter() - start, time.process_time() - begun
    shutil.rmtree(to)
    return taken


def pair(folder: Path, method: str) -> tuple[float, float, float]:
    """Seconds of copying a model's files, of merging two into as many bytes, and of the processor in the latter."""
    from retain.models.merge import merge

    names, to = [str(folder / "one"), str(folder / "two")], folder / "out"
    copying, _ = timed(lambda: shutil.copytree(folder / "one", to), to)
    merging = timed(lambda: merge(names, to, method, base=str(folder / "base"), shard_size=SHARD), to)
    return copying, *merging


def peak(folder: Path, method: str) -> int:
    """Bytes that a merge takes beyond what the process had before it."""
    from retain.models.merge import merge
    from retain.models.merge_sources import open_model

    def status(key: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024

    assert open_model(str(folder / "one")).checkpoint.stored  # what is imported on the way counts for nothing
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    merge(
        [str(folder / "one"), str(folder / "two")], folder / "out", method, base=str(folder / "base"), shard_size=SHARD
    )
    shutil.rmtree(folder / "out")
    return status("VmHWM") - before


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "out" / "merging")
    parser.add_argument("--write", action="store_true", help="put the table into docs/merging.md")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.folder / asked.dtype
    if asked.peak:
        print(json.dumps(peak(folder, asked.peak)))
        return 0
    import torch

    lines, missed = [], False
    try:
        write_models(folder, asked.dtype)
        size = sum(file.stat().st_size for file in (folder / "one").glob("*.safetensors"))
        shards = len(list((folder / "one").glob("*.safetensors")))
        pair(folder, "linear")  # once for what is loaded on the way
        for method in asked.methods:
            pairs = [pair(folder, method) for _ in range(asked.pairs)]
            words = [sys.executable, __file__, "--peak", method, "--dtype", asked.dtype, "--folder", str(asked.folder)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            memory = int(done.stdout.splitlines()[-1]) / SHARD
            ratios = [merging / copying for copying, merging, _ in pairs]
            ratio, seconds = statistics.median(ratios), statistics.median(each[1] for each in pairs)
            missed |= memory > MOST_SHARDS or (method == "linear" and ratio > MOST_TIME)
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
            computing = statistics.median(each[2] for each in pairs)
            lines.append(f"| {method} | {seconds:.2f} | {computing:.2f} | {ratio:.2f} | {spread} | {memory:.2f} |")
            print(lines[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    head = (
        f"Two copies of the starter model with noise, {size / 1e6:.0f} MB in {asked.dtype}, {shards} shards of at most "
        f"{SHARD / 1e6:.0f} MB (or one tensor), {asked.pairs} pairs; "
        f"{platform.machine()}, torch {torch.__version__}, {date.today().isoformat()}.\n\n"
        "| method | seconds | of them computing | against copying | range | peak memory, in shards |\n"
        "|---|---|---|---|---|---|\n"
    )
    table = head + "\n".join(lines) + "\n"
    print(f"\n{table}")
    if asked.write:
        text = PAGE.read_text(encoding="utf-8")
        between = re.compile(f"(?<={re.escape(MARKS[0])}\n).*(?={re.escape(MARKS[1])})", re.DOTALL)
        PAGE.write_text(between.sub(lambda _: f"\n{table}\n", text), encoding="utf-8")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
