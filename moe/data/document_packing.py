"""Documents into sequences of L tokens: only one that is longer than a sequence is cut.

Best-fit packing (Ding et al., "Fewer truncations improve language modeling", arXiv 2404.10830). A document of more than
L tokens becomes pieces of L, which overlap by one token: it is a target in the first of them only, so that every token
but a document's first is a target once. The last piece and shorter documents share sequences (`moe.data.bins`, which
holds a bounded number of them).

Legend: L sequence length, N ids of a call, D documents that begin in them, T tokens of a piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe.config import DataConfig, Packing
from moe.data.bins import Bins, SequenceWriter
from moe.data.readers import DataError
from moe.data.record_encoding import EncodedRow
from moe.data.shards import StreamWriter

FORMAT = 1  # of the sequences; part of the fingerprint


def packing_identity(data: DataConfig, sequence_length: int | None) -> list[Any]:
    """What the shards of documents depend on, beside the documents and the tokenizer: nothing where they lie end to
    end. Raises DataError for a length that packed documents can't have."""
    if data.packing is Packing.concat:
        return []
    assert sequence_length is not None, "documents are packed into sequences of a stated length"
    if sequence_length < 2:
        raise DataError(
            f"train.sequence_length={sequence_length} must be ≥ 2 with data.packing={data.packing.name}: a target "
            "needs a token before it"
        )
    return [[data.packing.name, FORMAT, sequence_length]]


class DocumentPacker:
    """Takes a source's documents as a `StreamWriter` does, and writes them, packed, with `writer`. However the ids are
    shared out among the calls, the sequences are the same. `documents` counts them, `cut` those longer than L."""

    def __init__(self, writer: StreamWriter, sequence_length: int, filler: int) -> None:
        self._writer, self._length = writer, sequence_length
        self._write_sequence = SequenceWriter(writer, sequence_length, filler)
        self._bins = Bins(sequence_length, self._write_sequence)
        self._rest_T = np.zeros(0, writer.dtype)  # of the document that has begun: at most L tokens
        self._is_cut = False
        self._tokens = 0  # of all pieces
        self.documents = self.cut = self.bytes = 0

    def start_document(self) -> None:
        self._end_document()
        self.documents += 1

    def write(self, ids: list[int] | np.ndarray) -> None:
        rest_T, length = np.concatenate([self._rest_T, np.asarray(ids, self._writer.dtype)]), self._length
        starts = range(0, len(rest_T) - length, length - 1)
        for start in starts:
            self._write_sequence([self._piece(rest_T[start : start + length])])
        if starts:
            self.cut += not self._is_cut
            self._is_cut = True
            rest_T = rest_T[starts[-1] + length - 1 :].copy()  # so that the long document can go
        self._rest_T = rest_T

    def write_documents(self, ids: bytes, starts_D: np.ndarray) -> None:
        begun_T, *documents = np.split(np.frombuffer(ids, self._writer.dtype), starts_D)
        self.write(begun_T)
        for ids_T in documents:
            self.start_document()
            self.write(ids_T)

    def _piece(self, ids_T: np.ndarray) -> EncodedRow:
        self._tokens += len(ids_T)
        targets_T = np.ones(len(ids_T), bool)
        targets_T[0] = False
        return EncodedRow(ids_T, targets_T)

    def _end_document(self) -> None:
        if len(self._rest_T):
            self._bins.add(self._piece(self._rest_T))
        self._rest_T, self._is_cut = self._rest_T[:0].copy(), False

    def close(self) -> dict[str, Any]:
        """As `StreamWriter.close`."""
        self._end_document()
        self._bins.close()
        self._writer.bytes = self.bytes
        return self._writer.close()

    def describe(self) -> str:
        """One line, after `close`."""
        padding = 1 - self._tokens / max(1, self._writer.tokens)
        return (
            f"{self.cut:,} of {self.documents:,} documents are longer than train.sequence_length={self._length}: cut "
            f"into pieces; {padding:.2%} of the sequences is padding"
        )

    def abandon(self) -> None:
        self._writer.abandon()
