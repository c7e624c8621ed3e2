"""What an expert may be called: its name is a folder on every system, a model in a request, and a word of a command."""

from __future__ import annotations

import unicodedata

from retain.errors import ConfigError

LONGEST = 64
#: Words that mean something else wherever an expert's name may stand.
RESERVED = frozenset({"auto", "base", "none", "__base__"})
#: What Windows takes for a device, with any ending.
_DEVICES = frozenset({"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)})


def check_name(name: str) -> str:
    """The name itself when it can be an expert's: letters and digits of any script, "-", "_" and ".".

    Raises:
        ConfigError: it cannot.
    """
    reason = _reason(name)
    if reason:
        raise ConfigError(
            f"expert name: '{name}' given, which {reason}. Allowed: up to {LONGEST} letters, digits, '-', '_' and '.', "
            f"beginning with a letter or a digit; not {', '.join(sorted(RESERVED))}."
        )
    return name


def can_be(name: str) -> bool:
    """Whether an expert may be called so; "poems/../medicine" may not, though it leads to a folder."""
    return not _reason(name)


def _reason(name: str) -> str:
    if not name:
        return "is empty"
    if len(name.encode()) > 4 * LONGEST or len(name) > LONGEST:
        return f"has {len(name)} characters"
    if name.casefold() in RESERVED:
        return "is a word with a meaning of its own"
    for character in name:
        kind = unicodedata.category(character)
        if character not in "-_." and kind[0] not in "LM" and kind != "Nd":
            return f"holds {character!r}"
    if not name[0].isalnum():
        return f"begins with '{name[0]}'"
    if name.endswith("."):
        return "ends with '.', which Windows drops"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's composed form (NFC), so that systems would spell it differently"
    if name.split(".")[0].casefold() in _DEVICES:
        return "is a device on Windows"
    return ""
