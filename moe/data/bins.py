"""Rows into sequences of L tokens: no row is cut, and what a sequence has left is filled up.

Best fit, decreasing: of every `WINDOW` rows the longest come first, and each goes into the fullest open sequence that
has room for it. Only so many sequences stay open between windows, the emptiest, so memory doesn't grow with the data.
The result depends on the rows and their order alone. Legend: L sequence length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np

from moe.data.record_encoding import EncodedRow
from moe.data.shards import MASK, OFFSET, PADDING, TARGET, StreamWriter

WINDOW = 1024  # rows
MOST_OPEN = 512  # sequences between two windows
OPEN_TOKENS = 1 << 22  # of all that is held, unless it is one window of the shortest rows or eight sequences


class Bins:
    """`write` gets the rows of each sequence that is complete."""

    def __init__(self, sequence_length: int, write: Callable[[list[EncodedRow]], None]) -> None:
        self._length, self._write = sequence_length, write
        self._most_open = max(8, min(MOST_OPEN, OPEN_TOKENS // sequence_length))
        self._waiting: list[EncodedRow] = []
        self._waiting_tokens = 0
        self._rows: dict[int, list[EncodedRow]] = {}
        self._open: list[tuple[int, int]] = []  # (room, number), sorted
        self._begun = 0

    def add(self, row: EncodedRow) -> None:
        """The row must have at most L tokens."""
        self._waiting.append(row)
        self._waiting_tokens += len(row.ids_T)
        if len(self._waiting) == WINDOW or self._waiting_tokens >= OPEN_TOKENS:
            self._end_window()
            while len(self._open) > self._most_open:
                self._end(self._open.pop(0)[1])

    def close(self) -> None:
        """Writes the sequences that are still open, the oldest first."""
        self._end_window()
        for number in sorted(number for _, number in self._open):
            self._end(number)
        self._open = []

    def _end_window(self) -> None:
        for row in sorted(self._waiting, key=lambda row: -len(row.ids_T)):
            self._place(row)
        self._waiting, self._waiting_tokens = [], 0

    def _place(self, row: EncodedRow) -> None:
        size = len(row.ids_T)
        at = bisect_left(self._open, (size, 0))
        if at < len(self._open):
            room, number = self._open.pop(at)
        else:
            room, number = self._length, self._begun
            self._begun, self._rows[number] = number + 1, []
        self._rows[number].append(row)
        if room == size:
            self._end(number)
        else:
            insort(self._open, (room - size, number))

    def _end(self, number: int) -> None:
        self._write(self._rows.pop(number))


class SequenceWriter:
    """Writes the rows of one sequence, and fills it up with `filler`: the mask says from where."""

    def __init__(self, writer: StreamWriter, sequence_length: int, filler: int) -> None:
        self._writer, self._length, self._filler = writer, sequence_length, filler

    def __call__(self, rows: list[EncodedRow]) -> None:
        sizes = [len(row.ids_T) for row in rows]
        room = self._length - sum(sizes)
        starts_R = np.cumsum([0, *sizes[:-1]], dtype=OFFSET)
        ids_L = np.concatenate([*(row.ids_T for row in rows), np.full(room, self._filler, rows[0].ids_T.dtype)])
        masks = (row.targets_T.astype(MASK) * TARGET for row in rows)
        mask_L = np.concatenate([*masks, np.full(room, PADDING, MASK)])
        self._writer.write_documents(ids_L, starts_R, mask_L)
