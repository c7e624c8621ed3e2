"""A function of the user's own, named in a configuration as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retain.errors import ConfigError


def load(path: str | None, where: str) -> Callable[..., Any]:
    """The function of a dotted path; modules are looked for in the working folder too.

    Raises:
        ConfigError: no path, or nothing callable there.
    """
    module, _, name = (path or "").partition(":")
    if not module or not name:
        raise ConfigError(f"{where}: {path!r} given. Write `module:function`, such as `my_scores:worth`.")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"{where}: '{path}' cannot be loaded ({_line(error)}).") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"{where}: '{path}' is no function but {type(found).__name__}.")
    return found


def numbers(path: str | None, where: str, rows: Sequence[Any]) -> np.ndarray:
    """What the function says of rows: one finite number for each, float64 [rows].

    Raises:
        ConfigError: it fails, or gives something else.
    """
    function = load(path, where)
    try:
        found = np.asarray(function(rows), np.float64)
    except Exception as error:
        raise ConfigError(f"{where}: '{path}' failed ({_line(error)}).") from error
    if found.shape != (len(rows),) or not np.isfinite(found).all():
        raise ConfigError(
            f"{where}: '{path}' gave {'numbers that are not finite' if found.shape == (len(rows),) else found.shape} "
            f"for {len(rows)} rows. It must give one finite number for each."
        )
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
