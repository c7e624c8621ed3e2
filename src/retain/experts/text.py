"""Text out of tokens while they come: whole characters only, and nothing that may turn out to begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What decoders put for bytes that are no character, also for one whose other bytes are still to come.
UNKNOWN = "\ufffd"
#: Tokens after which bytes that are no character are given out as they are.
LONGEST = 8


class TextStream:
    """What a row has written, piece by piece; the pieces together are the text of all its tokens.

    Args:
        tokenizer: special tokens are left out of the text.
        stop: strings that end the text; neither they nor what follows is given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(filter(None, stop))
        self.stopped = False
        self._ids: list[int] = []
        self._told = self._read = 0  # tokens: up to `read` the text is out; from `told` on they are decoded again
        self._held = ""

    def push(self, token: int) -> str:
        """The text that a token adds; "" while a character is not whole, or a stop string may have begun."""
        self._ids.append(token)
        text = self._new_text()
        if text is None:
            return ""
        return self._outside(text, last=False)

    def finish(self) -> str:
        """The text that was still held back."""
        text = self._new_text(last=True) or ""
        return self._outside(text, last=True)

    def _new_text(self, last: bool = False) -> str | None:
        """Text of the tokens that were not given out; None while its last character is not whole.

        Tokens are decoded together with those before them, as the text of a token can depend on its neighbours.
        """
        before = self._decode(self._ids[self._told : self._read])
        now = self._decode(self._ids[self._told :])
        waiting = len(self._ids) - self._read
        if now.endswith(UNKNOWN) and not last and waiting < LONGEST:
            return None
        self._told, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _outside(self, text: str, last: bool) -> str:
        """What of the text lies before a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._held) - (0 if last else self._begun())
        out, self._held = self._held[:end], "" if self.stopped else self._held[end:]
        return out

    def _begun(self) -> int:
        """Characters at the end of the held text that may begin a stop string."""
        most = max(map(len, self.stop), default=1) - 1
        for size in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self.stop):
                return size
        return 0
