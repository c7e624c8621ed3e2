"""Advice before a run (`advise`, `pilot`) and between runs (`compare`, `refresh`). Nothing heavy is imported here.

from retain.advice import Request, advise
advice = advise(Request(["data/medical.jsonl"], old="data/general.jsonl"))
print(advice.text())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retain.advice.advisor import Advice, advise
    from retain.advice.facts import Request
    from retain.advice.incoming import Incoming, compare
    from retain.advice.piloting import Pilot, pilot
    from retain.advice.reading import Reader, Sample, read_sample
    from retain.advice.refreshing import Fresh, refresh
    from retain.advice.scenario import Scenario

__all__ = [
    "Advice",
    "Fresh",
    "Incoming",
    "Pilot",
    "Reader",
    "Request",
    "Sample",
    "Scenario",
    "advise",
    "compare",
    "pilot",
    "read_sample",
    "refresh",
]
_WHERE = {
    **dict.fromkeys(("Advice", "advise"), "advisor"),
    **dict.fromkeys(("Incoming", "compare"), "incoming"),
    **dict.fromkeys(("Pilot", "pilot"), "piloting"),
    **dict.fromkeys(("Reader", "Sample", "read_sample"), "reading"),
    **dict.fromkeys(("Fresh", "refresh"), "refreshing"),
    "Request": "facts",
    "Scenario": "scenario",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"retain.advice has no '{name}'. It has: {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"retain.advice.{_WHERE[name]}"), name)
