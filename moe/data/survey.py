"""The first pass over a source: the hash of its content, and which chunks are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from moe.data.readers import Chunk, DataError
from moe.data.sources import Source


@dataclass(slots=True)
class Survey:
    """What the first pass over a source found. Chunks whose hash is below `threshold` are held out."""

    content: str  # SHA-256 over every chunk's hash, length and `starts_document`
    bytes: int
    train_bytes: int
    threshold: int


def hash_of(chunk: Chunk) -> int:
    """The chunk's 64-bit hash. It depends on the text alone, so the split doesn't depend on the order of documents."""
    return int.from_bytes(hashlib.blake2b(chunk.data, digest_size=8).digest(), "little")


def content_bytes(chunk: Chunk, number: int) -> bytes:
    """What a source's content hash covers of a chunk whose hash is `number`."""
    return number.to_bytes(8, "little") + len(chunk.data).to_bytes(8, "little") + bytes([chunk.starts_document])


def survey_source(source: Source, held_out: float) -> Survey:
    """Reads a source once: the hash of its content, and a threshold that leaves neither split empty.

    `held_out` is the share of text to hold out. Raises DataError when there are fewer than two distinct chunks.
    """
    content = hashlib.sha256()
    wanted = int(held_out * 2**64)
    size = train_bytes = 0
    lowest, highest = 2**64, -1
    for chunk in source.chunks():
        number = hash_of(chunk)
        content.update(content_bytes(chunk, number))
        lowest, highest = min(lowest, number), max(highest, number)
        size += len(chunk.data)
        train_bytes += len(chunk.data) * (number >= wanted)
    if lowest > highest:  # there was no chunk
        raise DataError(f"source {source.name!r} ({source.description}) is empty: it holds no text")
    if lowest == highest:
        raise DataError(
            f"source {source.name!r} ({source.description}) holds one distinct document of {size} bytes: training and "
            "held-out text need at least one each; give more text"
        )
    threshold = min(max(wanted, lowest + 1), highest)
    return Survey(content.hexdigest(), size, train_bytes, threshold)
