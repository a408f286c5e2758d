"""Packing: documents end to end, cut into samples of L tokens. A target is always in the same document as its input.

Legend: L sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe.data.readers import DataError
from moe.data.shards import PADDING, TARGET, TokenStream

NO_TARGET = -100  # what cross-entropy ignores


@dataclass(slots=True)
class Sample:
    """One packed sequence: `labels_L[t]` is the token after position t; NO_TARGET where that token opens a document or
    is masked. What follows the first `length` positions only fills the sequence up: a document of its own."""

    input_ids_L: np.ndarray  # int64
    labels_L: np.ndarray  # int64
    document_ids_L: np.ndarray  # int32, from 0, non-decreasing
    length: int


def full_samples(stream: TokenStream, sequence_length: int, name: str) -> int:
    """How many samples of L tokens a stream holds: with the target after the last, except in a stream that is packed
    for this length, whose samples end with a document. Raises DataError when none."""
    _check_length(stream, sequence_length)
    count = (stream.tokens - (stream.packed_length is None)) // sequence_length
    if count < 1:
        raise DataError(
            f"train.sequence_length={sequence_length} must be < {stream.tokens}, the tokens that the shards of source "
            f"{name!r} hold: give more text or a shorter sequence"
        )
    return count


def held_out_samples(stream: TokenStream, sequence_length: int) -> int:
    """As `full_samples`, with the last one, which the stream may not fill."""
    _check_length(stream, sequence_length)
    return -(-(stream.tokens - 1) // sequence_length)


def pack(stream: TokenStream, index: int, sequence_length: int, pad_id: int) -> Sample:
    """Sample `index`: tokens [index·L, index·L + L], the last one only as a target.

    Where the stream ends earlier (held-out text), the rest is filled with `pad_id`. The samples of a packed stream are
    those it was written with, with targets where its mask says so.
    """
    start = index * sequence_length
    if stream.packed_length is not None:
        return _packed(stream, start, start + sequence_length)
    stop = min(start + sequence_length + 1, stream.tokens)
    ids, documents = stream.read(start, stop), stream.document_ids(start, stop)
    labels = np.where(documents[1:] == documents[:-1], ids[1:], NO_TARGET)
    missing = sequence_length - len(labels)
    if missing:
        ids = np.concatenate([ids[:-1], np.full(missing + 1, pad_id, np.int64)])
        documents = np.concatenate([documents[:-1], np.full(missing + 1, documents[-1] + 1, np.int32)])
        labels = np.concatenate([labels, np.full(missing, NO_TARGET, np.int64)])
    return Sample(ids[:-1], labels, documents[:-1], sequence_length - missing)


def _packed(stream: TokenStream, start: int, stop: int) -> Sample:
    ids, documents, mask = stream.read(start, stop), stream.document_ids(start, stop), stream.mask(start, stop)
    labels = np.full(stop - start, NO_TARGET, np.int64)
    follows = (documents[1:] == documents[:-1]) & (mask[1:] == TARGET)
    labels[:-1][follows] = ids[1:][follows]
    (filled,) = np.nonzero(mask != PADDING)
    length = int(filled[-1]) + 1 if len(filled) else 0
    documents[length:] += 1
    return Sample(ids, labels, documents, length)


def _check_length(stream: TokenStream, sequence_length: int) -> None:
    if stream.packed_length not in (None, sequence_length):
        raise DataError(
            f"train.sequence_length={sequence_length}: the shards in {stream.folder} are packed for "
            f"{stream.packed_length}: prepare them again"
        )


def empty_sample(sequence_length: int, pad_id: int) -> Sample:
    """A sequence without targets: it fills up a batch and adds nothing to the loss."""
    return Sample(
        np.full(sequence_length, pad_id, np.int64),
        np.full(sequence_length, NO_TARGET, np.int64),
        np.zeros(sequence_length, np.int32),
        0,
    )
