"""Experts behind the OpenAI routes."""

from __future__ import annotations

import importlib.util

from retain.errors import ConfigError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx")


def need_extra() -> None:
    """Raises ConfigError where what a server needs is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"retain serve: needs {', '.join(missing)}. Install them: `pip install 'retain-llm[serve]'`.")
