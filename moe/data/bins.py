"""Rows into sequences of L tokens: no row is cut, and what a sequence has left is filled up.

Best fit: a row goes into the fullest open sequence that has room for it. Only so many are open at once, so memory
doesn't grow with the data; the fullest is written when another is needed. The result depends on the rows and their
order alone. Legend: L sequence length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from moe.data.record_encoding import EncodedRow

MOST_OPEN = 512
OPEN_TOKENS = 1 << 22  # of all open sequences together


class Bins:
    """`write` gets the rows of each sequence that is complete, in the order they were added."""

    def __init__(self, sequence_length: int, write: Callable[[list[EncodedRow]], None]) -> None:
        self._length, self._write = sequence_length, write
        self._most_open = max(8, min(MOST_OPEN, OPEN_TOKENS // sequence_length))
        self._rows: dict[int, list[EncodedRow]] = {}
        self._open: list[tuple[int, int]] = []  # (room, number), sorted
        self._begun = 0

    def add(self, row: EncodedRow) -> None:
        """The row must have at most L tokens."""
        size = len(row.ids_T)
        at = bisect_left(self._open, (size, 0))
        if at < len(self._open):
            room, number = self._open.pop(at)
        else:
            room, number = self._length, self._begun
            self._begun, self._rows[number] = number + 1, []
        self._rows[number].append(row)
        if room == size:
            self._write(self._rows.pop(number))
            return
        insort(self._open, (room - size, number))
        if len(self._open) > self._most_open:
            self._end(self._open.pop(0)[1])

    def close(self) -> None:
        """Writes the sequences that are still open, the oldest first."""
        for number in sorted(number for _, number in self._open):
            self._end(number)
        self._open = []

    def _end(self, number: int) -> None:
        self._write(self._rows.pop(number))
