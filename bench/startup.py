"""Rows of the table about starting: what it takes until something can be typed."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from side_by_side import Line, Settings

_IMPORT = "import time; start = time.perf_counter(); import retain; print(time.perf_counter() - start)"


def startup(settings: Settings) -> list[Line]:
    """Seconds of `import retain` (the import alone) and of `retain --help` (the whole process)."""
    imports, helps = [], []
    for _ in range(settings.repeats + 1):
        found = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        imports.append(float(found.stdout))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "retain", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - start)
    return [
        _line("import retain", imports[1:], 0.1, "the import in a fresh process"),
        _line("retain --help", helps[1:], 0.5, "from start to end of the process"),
    ]


def _line(work: str, seconds: list[float], bound: float, detail: str) -> Line:
    shown = f"{detail}, median of {len(seconds)} after one that is not counted."
    return Line(f"`{work}`", "–", statistics.median(seconds), bound, min(seconds), max(seconds), "s", shown)
