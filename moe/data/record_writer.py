"""Writes a source of records: both splits as shards of packed sequences, with a mask of targets beside the tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from moe.data.bins import Bins
from moe.data.corpus import SPLITS
from moe.data.readers import Chunk, DataError
from moe.data.record_encoding import EncodedRow, Recipe, in_batches
from moe.data.records import DataRecord
from moe.data.shards import StreamWriter, token_dtype
from moe.data.sources import Source
from moe.data.survey import Survey, content_bytes, hash_of

DONE = {  # what happened to rows → how a line says so
    "truncate": "cut at the end (data.long_rows=truncate)",
    "split": "cut into several (data.long_rows=split)",
    "drop": "left out (data.long_rows=drop)",
}


def encode_records(
    folder: Path, source: Source, survey: Survey, recipe: Recipe, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Writes both splits of one source; returns meta.json's entry of each. Raises DataError, OSError."""
    dtype = token_dtype(recipe.tokenizer.vocab_size)
    writers = {split: StreamWriter(folder / split, dtype, packed_length=recipe.sequence_length) for split in SPLITS}
    bins = {split: Bins(recipe.sequence_length, _Sequences(writers[split], recipe)) for split in SPLITS}
    content, counts, rows = hashlib.sha256(), Counter[str](), 0
    try:
        for batch in in_batches(cast("Iterator[DataRecord]", source.chunks()), lambda record: record):
            for record, row in zip(batch, recipe.encode(batch), strict=True):
                number = hash_of(record)
                content.update(content_bytes(record, number))
                split = "held_out" if number < survey.threshold else "train"
                rows += 1
                kept = recipe.fit(row, counts)
                writers[split].bytes += _text_bytes(record) if kept else 0
                for part in kept:
                    bins[split].add(part)
        if content.hexdigest() != survey.content:
            raise DataError(
                f"source {source.name!r} ({source.description}) changed while it was being read: run it again"
            )
        for one in bins.values():
            one.close()
        for line in told(source.name, rows, counts, recipe):
            log(line)
        _check_filled(source, writers, rows, recipe)
        return {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


class _Sequences:
    """Writes the rows of one sequence, and fills it up: the rest belongs to the last row, which sees nothing of it."""

    def __init__(self, writer: StreamWriter, recipe: Recipe) -> None:
        self._writer, self._length, self._filler = writer, recipe.sequence_length, recipe.tokenizer.eos_id

    def __call__(self, rows: list[EncodedRow]) -> None:
        room = self._length
        for row in rows:
            self._writer.start_document()
            self._writer.write(row.ids_T, row.targets_T)
            room -= len(row.ids_T)
        self._writer.write(np.full(room, self._filler), np.zeros(room, bool))


def _text_bytes(record: Chunk) -> int:
    return len(cast(DataRecord, record).text.encode())


def told(name: str, rows: int, counts: Counter[str], recipe: Recipe) -> list[str]:
    """Lines about rows that were not taken as they are."""
    length = f"train.sequence_length={recipe.sequence_length}"
    lines = [
        f"source {name!r}: {counts[what]:,} of {rows:,} rows are longer than {length}: {done}"
        for what, done in DONE.items()
        if counts[what]
    ]
    if lost := counts["no_targets"]:
        lines.append(f"source {name!r}: {lost:,} of {rows:,} rows left out: cut at {length}, they have no target left")
    return lines


def _check_filled(source: Source, writers: dict[str, StreamWriter], rows: int, recipe: Recipe) -> None:
    for split, writer in writers.items():
        if not writer.documents:
            raise DataError(
                f"source {source.name!r} ({source.description}): none of its {rows:,} rows is left for the {split} "
                f"split at train.sequence_length={recipe.sequence_length}: give longer sequences or more rows"
            )
