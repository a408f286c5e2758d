"""Packing: documents end to end, cut into samples of L tokens. A target is always in the same document as its input.

Legend: L sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe.data.readers import DataError
from moe.data.shards import TokenStream

NO_TARGET = -100  # what cross-entropy ignores


@dataclass(slots=True)
class Sample:
    """One packed sequence: `labels_L[t]` is the token after position t; NO_TARGET where that token opens a document."""

    input_ids_L: np.ndarray  # int64
    labels_L: np.ndarray  # int64
    document_ids_L: np.ndarray  # int32, from 0, non-decreasing


def full_samples(stream: TokenStream, sequence_length: int, name: str) -> int:
    """How many samples of L tokens, each with the target after its last, a stream holds. Raises DataError when none."""
    count = (stream.tokens - 1) // sequence_length
    if count < 1:
        raise DataError(
            f"train.sequence_length={sequence_length} must be < {stream.tokens}, the tokens that the shards of source "
            f"{name!r} hold: give more text or a shorter sequence"
        )
    return count


def pack(stream: TokenStream, index: int, sequence_length: int, pad_id: int) -> Sample:
    """Sample `index`: tokens [index·L, index·L + L], the last one only as a target.

    Where the stream ends earlier (held-out text), the rest is filled with `pad_id`, as a document without targets.
    """
    start = index * sequence_length
    stop = min(start + sequence_length + 1, stream.tokens)
    ids, documents = stream.read(start, stop), stream.document_ids(start, stop)
    labels = np.where(documents[1:] == documents[:-1], ids[1:], NO_TARGET)
    missing = sequence_length - len(labels)
    if missing:
        ids = np.concatenate([ids[:-1], np.full(missing + 1, pad_id, np.int64)])
        documents = np.concatenate([documents[:-1], np.full(missing + 1, documents[-1] + 1, np.int32)])
        labels = np.concatenate([labels, np.full(missing, NO_TARGET, np.int64)])
    return Sample(ids[:-1], labels, documents[:-1])


def empty_sample(sequence_length: int, pad_id: int) -> Sample:
    """A sequence without targets: it fills up a batch and adds nothing to the loss."""
    return Sample(
        np.full(sequence_length, pad_id, np.int64),
        np.full(sequence_length, NO_TARGET, np.int64),
        np.zeros(sequence_length, np.int32),
    )
