"""Whether two tokenizers mean the same by a token id: what has to hold before distributions or embeddings are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retain.errors import ModelError


def difference(first: Any, second: Any) -> str:
    """In what two tokenizers differ, in a few words, such as the id of a token; "" where in nothing.

    Templates and padding are not compared: they say how a prompt is written, not what its ids mean.
    """
    if first is second:
        return ""
    one, other = first.get_vocab(), second.get_vocab()
    if one != other:
        token = min(one.items() ^ other.items(), key=lambda entry: (entry[1], entry[0]))[0]
        return f"'{token}' is token {one.get(token, 'none')} in one and {other.get(token, 'none')} in the other"
    for name in ("bos_token", "eos_token", "unk_token"):
        if getattr(first, name, None) != getattr(second, name, None):
            return f"{name} is {getattr(first, name, None)!r} in one and {getattr(second, name, None)!r} in the other"
    odd = ({*first.all_special_tokens} ^ {*second.all_special_tokens}) - {first.pad_token, second.pad_token}
    return f"'{min(odd)}' is a special token in one only" if odd else ""


def require_same(tokenizers: Mapping[str, Any], what: str) -> None:
    """Refuse tokenizers that differ from the first.

    Args:
        tokenizers: by the label of their model.
        what: that cannot be done otherwise, such as "merging".

    Raises:
        ModelError: naming both models and what differs.
    """
    labels = list(tokenizers)
    for label in labels[1:]:
        if found := difference(tokenizers[labels[0]], tokenizers[label]):
            raise ModelError(
                f"{labels[0]} and {label}: different vocabularies ({found}); {what} needs the same ids for the same "
                "tokens. Give models that were trained from one base."
            )
