"""Writes a source of records: both splits as shards of packed sequences, with a mask of targets beside the tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from moe.data.bins import Bins, SequenceWriter
from moe.data.corpus import SPLITS
from moe.data.parts import Part
from moe.data.readers import Chunk, DataError
from moe.data.record_encoding import EncodedRow, Recipe, in_batches
from moe.data.records import DataRecord
from moe.data.shards import MASK, OFFSET, StreamWriter, token_dtype
from moe.data.sources import Source
from moe.data.survey import Survey, content_bytes, hash_of, require_same

DONE = {  # what happened to rows → how a line says so
    "truncate": "cut at the end (data.long_rows=truncate)",
    "split": "cut into several (data.long_rows=split)",
    "drop": "left out (data.long_rows=drop)",
}


@dataclass(slots=True)
class EncodedRows:
    """The rows of one part and split, end to end: `ids` as in a shard, `mask` as in a mask, and each row's `sizes` in
    tokens (OFFSET). `bytes` of text."""

    ids: bytes = b""
    mask: bytes = b""
    sizes: bytes = b""
    bytes: int = 0

    def rows(self, dtype: np.dtype) -> Iterator[EncodedRow]:
        ids, targets = np.frombuffer(self.ids, dtype), np.frombuffer(self.mask, bool)
        start = 0
        for size in np.frombuffer(self.sizes, OFFSET).tolist():
            yield EncodedRow(ids[start : start + size], targets[start : start + size])
            start += size


@dataclass(slots=True)
class EncodedRecords:
    """The records of one part. `content` is what it adds to the hash of the source's content, `counts` as of
    `Recipe.fit`, `count` that of the rows read."""

    content: bytes
    count: int
    counts: Counter[str]
    splits: dict[str, EncodedRows]


@dataclass(slots=True)
class _SplitRows:
    rows: list[EncodedRow] = field(default_factory=list)
    text: int = 0


def encode_records(part: Part, recipe: Recipe, threshold: int) -> EncodedRecords:
    """Records whose hash is below `threshold` are held out. Raises DataError."""
    splits = {split: _SplitRows() for split in SPLITS}
    content, counts, count = [], Counter[str](), 0
    for batch in in_batches(cast("Iterator[DataRecord]", part.chunks()), lambda record: record):
        for record, row in zip(batch, recipe.encode(batch), strict=True):
            number = hash_of(record)
            content.append(content_bytes(record, number))
            split = splits["held_out" if number < threshold else "train"]
            count += 1
            kept = recipe.fit(row, counts)
            split.text += _text_bytes(record) if kept else 0
            split.rows += kept
    encoded = {
        name: EncodedRows(
            b"".join(row.ids_T.tobytes() for row in split.rows),
            b"".join(row.targets_T.astype(MASK).tobytes() for row in split.rows),
            np.array([len(row.ids_T) for row in split.rows], OFFSET).tobytes(),
            split.text,
        )
        for name, split in splits.items()
    }
    return EncodedRecords(b"".join(content), count, counts, encoded)


def write_records(
    folder: Path,
    source: Source,
    survey: Survey,
    recipe: Recipe,
    parts: Iterable[EncodedRecords],
    log: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Writes both splits of one source; returns meta.json's entry of each. Raises DataError, OSError."""
    dtype = token_dtype(recipe.tokenizer.vocab_size)
    length, filler = recipe.sequence_length, recipe.tokenizer.eos_id
    writers = {split: StreamWriter(folder / split, dtype, packed_length=length) for split in SPLITS}
    bins = {split: Bins(length, SequenceWriter(writers[split], length, filler)) for split in SPLITS}
    content, counts, count = hashlib.sha256(), Counter[str](), 0
    try:
        for part in parts:
            content.update(part.content)
            counts += part.counts
            count += part.count
            for split, rows in part.splits.items():
                writers[split].bytes += rows.bytes
                for row in rows.rows(dtype):
                    bins[split].add(row)
        require_same(source, survey, content.hexdigest())
        for one in bins.values():
            one.close()
        for line in told(source.name, count, counts, recipe):
            log(line)
        _check_filled(source, writers, count, recipe)
        return {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


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
