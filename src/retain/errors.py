"""What can go wrong, in the user's words.

    RetainError
    ├── ConfigError        a setting: unknown key, wrong value, methods that clash or lack what they need
    ├── DataError          a file or a row: unreadable, malformed, empty
    ├── ModelError         a model or tokenizer that cannot be used as asked
    ├── RunError           a run directory: other config, damaged checkpoint, no disk space
    └── TrainingDiverged   a loss that is no longer a number

Every message is one line: where, what was given, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RetainError(ValueError):
    """Base of everything that the command line prints as one line instead of a traceback."""

    exit_code = 2


class ConfigError(RetainError):
    """A setting that is unknown, impossible, or would have no effect."""


class DataError(RetainError):
    """A data file or a row that cannot be used."""


class ModelError(RetainError):
    """A model or tokenizer that cannot be used as asked."""


class RunError(RetainError):
    """A run directory that cannot be written, read or continued."""


class TrainingDiverged(RetainError):
    """A loss term became NaN or infinite; the last good checkpoint is kept."""


def unknown(where: str, word: str, allowed: Iterable[str]) -> str:
    """One line for a word that is not in a list, with the nearest one suggested."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{where}: unknown '{word}'.{hint} Allowed: {', '.join(allowed)}."
