"""Fine-tune a language model without forgetting: measure it, prevent it, show it.

Public names are imported when they are first used, so that `import retain` costs nothing.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ContinualTrainer": "retain.training.trainer",
    "ContinualMixin": "retain.training.trainer",
    "ContinualSDFTTrainer": "retain.training.on_policy",
    "ForgettingMonitor": "retain.training.monitor",
    "ForgettingBudget": "retain.training.budget",
    "run": "retain.pipeline",
    "load_run": "retain.pipeline",
    "read_config": "retain.config",
    "RunConfig": "retain.config",
    "load_model": "retain.models.load",
    "Method": "retain.methods.base",
    "Ensemble": "retain.experts.ensemble",
    "RetainError": "retain.errors",
}


def _methods() -> dict[str, str]:
    from retain.methods import summaries

    return {about["class"]: name for name, about in summaries().items()}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        home = importlib.import_module(_HOMES[name])
        return getattr(home, "read" if name == "read_config" else name)
    if name[:1].isupper() and name in (methods := _methods()):
        from retain.methods import load

        return load(methods[name])
    raise AttributeError(f"module 'retain' has no attribute '{name}'. Public names: {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_methods(), "__version__"])
