"""A part of a source as the tokens of its documents, as they are written into shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moe.data.parts import Part
from moe.data.readers import Chunk
from moe.data.shards import OFFSET, token_dtype
from moe.data.survey import content_bytes, hash_of
from moe.data.tokenizer_base import Tokenizer

ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at once
LONG_BYTES = 2 << 20  # a longer text is encoded in pieces; chunks of text files are shorter


@dataclass(slots=True)
class EncodedSplit:
    """Tokens of one split: `ids` as in a shard, `starts` where in them documents begin (OFFSET), `bytes` of text."""

    ids: bytes = b""
    starts: bytes = b""
    bytes: int = 0


@dataclass(slots=True)
class EncodedDocuments:
    """The documents of one part. The first one's BOS and the last one's EOS are left out: the first may go on from the
    part before (`continues`), if that ended in the same split, and the last may go on in the next part."""

    content: bytes  # what the part adds to the hash of the source's content
    size: int  # bytes of text
    first: str | None  # split of the first document; None: the part holds no text
    last: str | None
    continues: bool
    splits: dict[str, EncodedSplit]


@dataclass(slots=True)
class _Split:
    ids: list[bytes] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    size: int = 0  # bytes of ids
    text: int = 0

    def add(self, ids: bytes) -> None:
        self.ids.append(ids)
        self.size += len(ids)


def encode_documents(part: Part, tokenizer: Tokenizer, threshold: int) -> EncodedDocuments:
    """Chunks whose hash is below `threshold` are held out. Neighbouring chunks of a text file that fall into the same
    split stay one document. Raises DataError."""
    dtype = token_dtype(tokenizer.vocab_size)
    bos, eos = (np.array([token], dtype).tobytes() for token in (tokenizer.bos_id, tokenizer.eos_id))
    splits: dict[str, _Split] = {}
    content = []
    first = last = None
    continues = False
    for chunk, ids in _encoded(part.chunks(), tokenizer, dtype):
        number = hash_of(chunk)
        content.append(content_bytes(chunk, number))
        name = "held_out" if number < threshold else "train"
        if name not in splits:
            splits[name] = _Split()
        split = splits[name]
        if first is None:
            first, continues = name, not chunk.starts_document
        elif chunk.starts_document or name != last:
            assert last is not None
            splits[last].add(eos)
            split.starts.append(split.size // dtype.itemsize)
            split.add(bos)
        split.add(ids)
        split.text += len(chunk.data)
        last = name
    encoded = {
        name: EncodedSplit(b"".join(one.ids), np.array(one.starts, OFFSET).tobytes(), one.text)
        for name, one in splits.items()
    }
    return EncodedDocuments(
        b"".join(content), sum(one.text for one in splits.values()), first, last, continues, encoded
    )


def _encoded(chunks: Iterator[Chunk], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[tuple[Chunk, bytes]]:
    """Each chunk with its token ids, encoded ENCODE_BYTES at a time."""
    batch: list[Chunk] = []

    def encoded() -> Iterator[tuple[Chunk, bytes]]:
        yield from zip(batch, tokenizer.encode_raw([chunk.text for chunk in batch]), strict=True)
        batch.clear()

    size = 0
    for chunk in chunks:
        if not chunk.data:
            continue
        long = len(chunk.data) > LONG_BYTES
        if long or size >= ENCODE_BYTES:
            yield from encoded()
            size = 0
        if long:
            pieces = tokenizer.encode_long(chunk.text)
            yield chunk, b"".join(np.array(ids, dtype).tobytes() for ids in pieces)
        else:
            batch.append(chunk)
            size += len(chunk.data)
    yield from encoded()
