"""Text from tokens as they come, in time linear in their number.

A tokenizer decodes a sequence, not single tokens: a character may take several, and the space that opens a sequence may
be dropped. So each call decodes the newest tokens behind a few of those before, whose text is known, and takes what
follows that text.
"""

from __future__ import annotations

from moe.data.tokenizer import Tokenizer

MOST_UNSETTLED = 16  # tokens that wait for the rest of a character; bytes that never make one are then shown
MOST_BEFORE = 64  # tokens without visible text that are decoded again
BROKEN = "\ufffd"


class IncrementalDecoder:
    """The text of the tokens added after `before`. A character that isn't complete is held back, since the next token
    may change it."""

    def __init__(self, tokenizer: Tokenizer, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = self._visible(list(before))  # decoded again: a window that begins with text already returned
        self._out = len(self._ids)  # how many of these ids have had their text returned

    def add(self, token: int) -> str:
        """The text that is final with this token."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(BROKEN) and len(self._ids) - self._out < MOST_UNSETTLED:
            return ""
        self._ids = self._visible(self._ids)
        self._out = len(self._ids)
        return text

    def end(self) -> str:
        """The text that is still held back."""
        text = self._new_text()
        self._out = len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._ids[: self._out])
        return self._tokenizer.decode(self._ids)[len(known) :]

    def _visible(self, ids: list[int]) -> list[int]:
        """A short end of `ids` that begins with visible text, or its last `MOST_BEFORE` tokens."""
        count = 1
        while count < min(MOST_BEFORE, len(ids)):
            text = self._tokenizer.decode(ids[-count:])
            if text.strip() and not text.startswith(BROKEN):
                break
            count *= 2
        return ids[-count:]
