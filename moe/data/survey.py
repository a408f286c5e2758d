"""The first pass over a source: the hash of its content, and which chunks are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from moe.data.parts import Part
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
    others = hashlib.blake2b(chunk.others, digest_size=8).digest() if chunk.others else b""
    return (
        number.to_bytes(8, "little") + len(chunk.data).to_bytes(8, "little") + bytes([chunk.starts_document]) + others
    )


@dataclass(slots=True)
class SurveyedPart:
    """What the first pass found in one part: what its `content` adds to the source's hash, and its hashes' range."""

    content: bytes
    bytes: int
    train_bytes: int
    lowest: int
    highest: int


def survey_part(part: Part, wanted: int) -> SurveyedPart:
    """Reads a part; chunks whose hash is below `wanted` are to be held out. Raises DataError."""
    content = []
    size = train_bytes = 0
    lowest, highest = 2**64, -1
    for chunk in part.chunks():
        if not chunk.data:
            continue
        number = hash_of(chunk)
        content.append(content_bytes(chunk, number))
        lowest, highest = min(lowest, number), max(highest, number)
        size += len(chunk.data)
        train_bytes += len(chunk.data) * (number >= wanted)
    return SurveyedPart(b"".join(content), size, train_bytes, lowest, highest)


def wanted_threshold(held_out: float) -> int:
    """The hash below which the share `held_out` of all text lies."""
    return int(held_out * 2**64)


def survey_of(source: Source, held_out: float, parts: Iterable[SurveyedPart]) -> Survey:
    """The survey of a source by those of its parts, with a threshold that leaves neither split empty.

    `held_out` is the share of text to hold out. Raises DataError when there are fewer than two distinct chunks.
    """
    content = hashlib.sha256()
    size = train_bytes = 0
    lowest, highest = 2**64, -1
    for part in parts:
        content.update(part.content)
        lowest, highest = min(lowest, part.lowest), max(highest, part.highest)
        size += part.bytes
        train_bytes += part.train_bytes
    if lowest > highest:  # there was no chunk
        raise DataError(f"source {source.name!r} ({source.description}) is empty: it holds no text")
    if lowest == highest:
        raise DataError(
            f"source {source.name!r} ({source.description}) holds one distinct document of {size} bytes: training and "
            "held-out text need at least one each; give more text"
        )
    threshold = min(max(wanted_threshold(held_out), lowest + 1), highest)
    return Survey(content.hexdigest(), size, train_bytes, threshold)


def require_same(source: Source, survey: Survey, content: str) -> None:
    """Raises DataError when the hash of what was read now isn't that of the first pass."""
    if content != survey.content:
        raise DataError(f"source {source.name!r} ({source.description}) changed while it was being read: run it again")
