"""What this machine has: free memory, and how fast it multiplies, moves and starts (measured in half a second)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from retain.models.weightless import Cost, kind_of

_LIMIT, _USED = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))


def free_bytes(device: str) -> int:
    """Memory that a process could use on a device once this one has ended."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return spare_bytes(device) + psutil.Process().memory_info().rss


def spare_bytes(device: str) -> int:
    """Memory that this process could still take on a device."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by PyTorch, for its next tensors
        return torch.cuda.mem_get_info()[0] + kept
    free = psutil.virtual_memory().available
    if _LIMIT.is_file() and (limit := _LIMIT.read_text().strip()) != "max":  # of a container
        free = min(free, int(limit) - int(_USED.read_text()))
    return free


@dataclass(frozen=True)
class Speed:
    """Floating-point operations a second by kind, bytes moved and mapped a second, seconds to start an operation."""

    flops: dict[str, float]
    bytes: float
    mapped: float
    start: float
    waits: bool  # the next operation starts when this one has ended (CPU), not while it runs (GPU)

    def seconds(self, cost: Cost) -> float:
        """Seconds of a pass if every operation ran at the measured speeds.

        An operation takes as long as its arithmetic or its memory traffic, whichever is longer (the roofline of
        Williams et al. 2009, doi:10.1145/1498765.1498785).
        """
        slowest = min(self.flops.values())
        work = sum(
            count * max(flops / self.flops.get(kind, slowest), moved / self.bytes)
            for (kind, flops, moved), count in cost.operations.items()
        )
        starts = self.start * cost.operations.total()
        return work + starts + cost.mapped / self.mapped if self.waits else max(work, starts)


def measure(device: str, half: torch.dtype | None = None, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """The speed of a device in float32 and in the type of autocast."""
    side = 1024 if device == "cpu" else 4096
    flops = {}
    for dtype in {torch.float32, half or torch.float32}:
        square = torch.rand(side, side, device=device, dtype=dtype)
        flops[kind_of(dtype)] = 2 * side**3 / _best(functools.partial(torch.mm, square, square), device, clock)
    heads = torch.rand(2 if device == "cpu" else 64, 8, 256, 64, device=device, requires_grad=True)

    def attend() -> None:
        with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            attention(heads, heads, heads, is_causal=True).sum().backward()

    # 4 · rows · heads · length² · width forward, five products instead of two backward
    flops["attention"] = 3.5 * 4 * len(heads) * 8 * 256**2 * 64 / _best(attend, device, clock)
    left, right = (torch.rand(2**21 if device == "cpu" else 2**26, device=device) for _ in range(2))
    moved = 3 * left.nbytes / _best(lambda: left * right, device, clock)
    new = 2**24  # elements: mapped anew by every call
    mapped = 4 * new / _best(lambda: torch.zeros(new, device=device).fill_(1), device, clock)
    layer, small = torch.nn.Linear(16, 16, device=device), torch.rand(4, 16, device=device)

    def thousand() -> None:
        for _ in range(1000):
            layer(small)

    return Speed(flops, moved, mapped, _best(thousand, device, clock) / 1000, waits=device == "cpu")


def _best(work: Callable[[], Any], device: str, clock: Callable[[], float], limit: float = 0.07) -> float:
    """Seconds of the fastest of the calls that fit into the limit, after two that warm up."""
    times: list[float] = []
    for _ in range(2):
        work()
    end = time.perf_counter() + limit
    while not times or time.perf_counter() < end:
        start = clock()
        work()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(clock() - start)
    return min(times)
