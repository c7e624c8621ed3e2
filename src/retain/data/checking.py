"""Is an answer right? The checks by which rows that a model wrote are kept: by name, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from retain.data import own_function
from retain.data.matching import contains, exact_match, token_f1
from retain.errors import ConfigError, unknown

#: (answer, stored answer, turns of the prompt) → whether the answer is right.
Check = Callable[[str, str, Sequence[dict[str, Any]]], bool]
_NAMED = {"exact": exact_match, "contains": contains}
NAMES = (*_NAMED, "f1")


def checker(name: str, threshold: float) -> Check:
    """A check by name.

    Args:
        name: "exact" (equal after normalisation), "contains" (the stored answer is in it as whole words), "f1" (token
            F1 of at least `threshold`), or "module:function". Such a function is called with the answer, the stored
            answer and the turns of the prompt; it returns true or false, or a score that is compared with `threshold`.
            Its module is looked for in the working folder too.

    Raises:
        ConfigError: no such check, or a function that cannot be loaded; from the check itself, one that fails.
    """
    if name in _NAMED:
        same = _NAMED[name]
        return lambda answer, reference, prompt: same(answer, reference)
    if name == "f1":
        return lambda answer, reference, prompt: token_f1(answer, reference) >= threshold
    if ":" not in name:
        raise ConfigError(unknown("methods.replay.on_policy.check", name, [*NAMES, "module:function"]))
    own = own_function.load(name, "check")

    def passes(answer: str, reference: str, prompt: Sequence[dict[str, Any]]) -> bool:
        try:
            found = own(answer, reference, prompt)
            return found if isinstance(found, bool) else float(found) >= threshold
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(
                f"check: '{name}' failed ({said}). It is given (answer, stored answer, turns of the prompt) and must "
                "return true, false or a number."
            ) from error

    return passes
