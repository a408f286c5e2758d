"""Records as token ids, and which of them are targets; rows longer than a sequence.

Legend: T tokens of a row, L sequence length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, TypeVar

import numpy as np

from moe.config import DataConfig, LongRows, LossOn
from moe.data.chat_template import ChatTemplate, Segment, open_template
from moe.data.readers import Chunk, DataError
from moe.data.records import DataRecord
from moe.data.shards import token_dtype
from moe.data.tokenizer_base import Tokenizer

FORMAT = 4  # of what is made of a row, and of the mask; part of the fingerprint
BATCH_BYTES, BATCH_ROWS = 4 << 20, 4096  # encoded at once


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's tokens. `targets_T[t]`: whether token t is to be predicted from those before it."""

    ids_T: np.ndarray  # of the tokenizer's `token_dtype`
    targets_T: np.ndarray  # bool

    @property
    def learns(self) -> bool:
        return bool(self.targets_T.any())


@dataclass(frozen=True, slots=True)
class Recipe:
    """How records become sequences of `sequence_length` tokens with targets."""

    template: ChatTemplate
    tokenizer: Tokenizer
    loss_on: LossOn
    long_rows: LongRows
    sequence_length: int

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> Recipe:
        """Raises DataError where the template doesn't fit the tokenizer."""
        if sequence_length < 2:
            raise DataError(f"train.sequence_length={sequence_length} must be ≥ 2: a target needs a token before it")
        template = open_template(data.template, tokenizer)
        return cls(template, tokenizer, data.loss_on, data.long_rows, sequence_length)

    @property
    def identity(self) -> list[Any]:
        """What the shards depend on, beside the rows and the tokenizer."""
        # The tokenizer's fingerprint is the same without a BOS.
        same = self.tokenizer.has_bos and self.tokenizer.bos_id == self.tokenizer.eos_id
        stated = [FORMAT, self.template.source, self.loss_on.name, self.long_rows.name, self.sequence_length]
        return [*stated, "BOS is EOS"] if same else stated

    def encode(self, records: Sequence[DataRecord]) -> list[EncodedRow]:
        """Raises DataError naming the place of a record that the template or the tokenizer refuses."""
        encoded = []
        rows = self.encode_each([self.segments(record) for record in records])
        for record, row in zip(records, rows, strict=True):
            if isinstance(row, DataError):
                raise DataError(f"{record.place}: {row}") from row
            encoded.append(row)
        return encoded

    def segments(self, record: DataRecord) -> list[Segment]:
        """Raises as `encode` does."""
        if record.messages:
            segments = self.template.segments(record.messages, record.tools, record.place)
            return self._without_prompt(segments, record) if record.given else segments
        bos, eos = (
            Segment("", token, turn) for token, turn in ((self.tokenizer.bos_id, -1), (self.tokenizer.eos_id, 0))
        )
        return [bos, Segment(record.body, None, 0), eos]

    def _without_prompt(self, segments: list[Segment], record: DataRecord) -> list[Segment]:
        """The assistant turns of the messages that are given belong to no turn."""
        begun = self.template.segments(record.messages[: record.given], record.tools, record.place)
        turns = 1 + max(segment.turn for segment in begun)
        return [replace(one, turn=one.turn - turns if one.turn >= turns else -1) for one in segments]

    def encode_each(self, rows: list[list[Segment]]) -> list[EncodedRow | DataError]:
        """Many rows at once; instead of a row that the tokenizer has no pieces for, what it says."""
        try:
            return [self._row(ids_T, turns_T) for ids_T, turns_T in encode_segments(rows, self.tokenizer)]
        except DataError as error:
            return [error] if len(rows) == 1 else [one for row in rows for one in self.encode_each([row])]

    def _row(self, ids_T: np.ndarray, turns_T: np.ndarray) -> EncodedRow:
        match self.loss_on:
            case LossOn.everything:
                targets_T = np.ones(len(ids_T), bool)
            case LossOn.last_turn:
                targets_T = (turns_T >= 0) & (turns_T == turns_T.max(initial=0))
            case LossOn.completion:
                targets_T = turns_T >= 0
        targets_T[:1] = False  # nothing comes before it
        return EncodedRow(ids_T, targets_T)

    def fit(self, row: EncodedRow, counts: Counter[str]) -> list[EncodedRow]:
        """The row as sequences of at most L tokens that have targets; none where it is left out. `counts` gets what
        happened to rows that are too long (a name of LongRows) or end up without targets ("no_targets").

        A row is split with one token of overlap, which is a target in the first part only: no target is lost.
        """
        length, size = self.sequence_length, len(row.ids_T)
        parts = [row]
        if size > length:
            counts[self.long_rows.name] += 1
            match self.long_rows:
                case LongRows.drop:
                    return []
                case LongRows.truncate:
                    parts = [EncodedRow(row.ids_T[:length], row.targets_T[:length])]
                case LongRows.split:
                    starts = range(0, size - 1, length - 1)
                    parts = [_part(row, start, start + length) for start in starts]
        kept = [part for part in parts if part.learns]
        counts["no_targets"] += not kept
        return kept


def _part(row: EncodedRow, start: int, stop: int) -> EncodedRow:
    targets_T = row.targets_T[start:stop].copy()
    targets_T[0] = False
    return EncodedRow(row.ids_T[start:stop], targets_T)


def encode_segments(rows: list[list[Segment]], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids_T, turns_T) of each row: its tokens, and the turn of each, −1 for what the model doesn't write.

    Neighbouring segments of text are encoded as one, as other tools do, and cut into turns between its tokens. Where a
    token would cross from one into the next, each is encoded alone, as a prompt and its answer are.
    """
    split = [_pieces(row) for row in rows]
    texts: dict[bool, dict[str, bytes]] = {False: {}, True: {}}  # {behind a special token: {text: its ids}}
    for row in split:
        for piece, behind in row:
            if piece[0].token is None:
                texts[behind] |= {text: b"" for text in accumulate(segment.text for segment in piece)}
    for behind, some in texts.items():
        texts[behind] = dict(zip(some, tokenizer.encode_raw([*some], behind), strict=True))
    dtype = token_dtype(tokenizer.vocab_size)
    return [_joined([_piece(piece, texts[behind], tokenizer, dtype) for piece, behind in row], dtype) for row in split]


def _pieces(row: list[Segment]) -> list[tuple[list[Segment], bool]]:
    """Neighbouring segments of one kind, and whether they stand behind a special token that the row's text has. (A BOS
    whose segment has no text isn't in it, as one that a tokenizer puts before every text.)"""
    pieces, written = list[tuple[list[Segment], bool]](), False
    for _, group in groupby(row, key=_is_token):
        piece = [*group]
        pieces.append((piece, written))
        written = written or any(segment.text for segment in piece)
    return pieces


def _is_token(segment: Segment) -> bool:
    return segment.token is not None


def _piece(
    piece: list[Segment], texts: dict[str, bytes], tokenizer: Tokenizer, dtype: np.dtype
) -> list[tuple[bytes, int]]:
    """(ids, turn) of each segment of a piece: special tokens, or text end to end."""
    if piece[0].token is not None:
        tokens = ((segment.token, segment.turn) for segment in piece if segment.token is not None)
        return [(token.to_bytes(dtype.itemsize, "little"), turn) for token, turn in tokens]
    begun = [texts[text] for text in accumulate(segment.text for segment in piece)]
    whole, ends = begun[-1], [len(ids) for ids in begun]
    if all(whole.startswith(ids) for ids in begun):
        parts = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    else:
        parts = [begun[0], *(_continued(segment.text, tokenizer) for segment in piece[1:])]
    return [(ids, segment.turn) for ids, segment in zip(parts, piece, strict=True)]


def _continued(text: str, tokenizer: Tokenizer) -> bytes:
    """Ids of a text behind another one, without the space that some tokenizers put before what they encode."""
    before, both, alone = tokenizer.encode_raw(["\n", "\n" + text, text], True)
    return both[len(before) :] if both.startswith(before) else alone


def _joined(pieces: list[list[tuple[bytes, int]]], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    parts = [part for piece in pieces for part in piece]
    ids_T = np.frombuffer(b"".join(ids for ids, _ in parts), dtype)
    turns_T = np.repeat([turn for _, turn in parts], [len(ids) // dtype.itemsize for ids, _ in parts])
    return ids_T, turns_T


T = TypeVar("T")


def in_batches(items: Iterable[T], record: Callable[[T], Chunk]) -> Iterator[list[T]]:
    """Items in groups whose records are encoded at once."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(record(item).data)
        if size >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
