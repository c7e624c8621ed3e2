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
import errno
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


def disk_full(error: BaseException | None) -> str:
    """The reason in one line when the disk, or the share of it that one may use, is full; "" for other errors.

    Writers say it in their own ways: an OSError with its number, safetensors with the number in its text, and
    torch's archives without one.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        text = " ".join(str(error).split())
        numbered = type(error).__name__ == "SafetensorError" and any(f"(os error {n})" in text for n in _FULL)
        archive = isinstance(error, RuntimeError) and any(words in text for words in _TORCH_FULL)
        if numbered or archive or (isinstance(error, OSError) and error.errno in _FULL):
            return text
        error = error.__cause__ or error.__context__
    return ""


#: Of OSError: no space left, no quota left, larger than a file may be.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Of torch.save, when a part of its archive does not arrive.
_TORCH_FULL = ("PytorchStreamWriter failed", "unexpected pos", "basic_ios::clear: iostream error")


def unknown(where: str, word: str, allowed: Iterable[str]) -> str:
    """One line for a word that is not in a list, with the nearest one suggested."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{where}: unknown '{word}'.{hint} Allowed: {', '.join(allowed)}."
