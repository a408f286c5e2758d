"""Reading sources through: the survey, the tokenizer's training, and writing the shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from moe.config import DataConfig, TokenizerConfig
from moe.data.corpus import FORMAT, META, SPLITS
from moe.data.readers import DataError, Piece
from moe.data.shards import StreamWriter, token_dtype
from moe.data.sources import Source, stated_weights
from moe.data.tokenizer import Tokenizer
from moe.data.tokenizer_training import sample_blocks, train_sentencepiece
from moe.durable import fsync

ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at once, so that every core gets some
PROGRESS_BYTES = 1 << 28


@dataclass(slots=True)
class Survey:
    """What one reading of a source tells. `threshold`: pieces whose hash is below it are held out."""

    content: str
    pieces: int
    bytes: int
    train_bytes: int
    threshold: int


def _hash(piece: Piece) -> int:
    """A number in [0, 2^64) that depends on the text alone, so the split doesn't depend on the order of documents."""
    return int.from_bytes(hashlib.blake2b(piece.data, digest_size=8).digest(), "little")


def survey_source(source: Source, held_out: float) -> Survey:
    """Read a source through: its content's hash, and which hashes are held out so that both splits get something."""
    content = hashlib.sha256()
    wanted = int(held_out * 2**64)
    pieces = size = train_bytes = 0
    lowest, highest = 2**64, -1
    for piece in source.pieces():
        number = _hash(piece)
        content.update(number.to_bytes(8, "little") + len(piece.data).to_bytes(8, "little") + bytes([piece.starts]))
        lowest, highest = min(lowest, number), max(highest, number)
        pieces, size = pieces + 1, size + len(piece.data)
        train_bytes += len(piece.data) * (number >= wanted)
    if not pieces:
        raise DataError(f"source {source.name!r} ({source.description}) is empty: it holds no text")
    if lowest == highest:
        raise DataError(
            f"source {source.name!r} ({source.description}) holds one distinct document of {size} bytes: training and "
            "held-out text need at least one each; give more text"
        )
    threshold = min(max(wanted, lowest + 1), highest)
    return Survey(content.hexdigest(), pieces, size, train_bytes, threshold)


def train_tokenizer(
    data: DataConfig,
    config: TokenizerConfig,
    sources: list[Source],
    surveys: list[Survey],
    log: Callable[[str], None],
) -> Tokenizer:
    """Train on a sample of the training split, shared between the sources by weight, else by bytes."""
    weights = stated_weights(data) or {s.name: float(survey.bytes) for s, survey in zip(sources, surveys, strict=True)}
    assert config.vocab_size is not None
    samples: list[Iterator[str]] = []
    for source, survey in zip(sources, surveys, strict=True):
        wanted = config.train_bytes * weights[source.name] / sum(weights.values())
        texts = (piece.text for piece in source.pieces() if _hash(piece) >= survey.threshold)
        samples.append(sample_blocks(texts, min(1.0, wanted / max(1, survey.train_bytes))))
    return train_sentencepiece(list(chain.from_iterable(samples)), config.vocab_size, log)


def write_corpus(
    folder: Path,
    fingerprint: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    sources: list[Source],
    surveys: list[Survey],
    log: Callable[[str], None],
) -> None:
    """Everything into `folder`, synced. An OSError here is the cache's: the sources turn their own into DataError."""
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "held_out": data.held_out,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "versions": {"numpy": np.__version__, "sentencepiece": sentencepiece.__version__},
        "sources": {},
    }
    for source, survey in zip(sources, surveys, strict=True):
        streams = _encode_source(folder / source.name, source, survey, tokenizer, log)
        about = {"description": source.description, "content": survey.content}
        meta["sources"][source.name] = {**about, **streams}
    with (folder / META).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(path)


def _encode_source(
    folder: Path, source: Source, survey: Survey, tokenizer: Tokenizer, log: Callable[[str], None]
) -> dict[str, dict[str, int]]:
    """Both splits of one source. Neighbouring pieces of a text file that fall into one split stay one document."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: StreamWriter(folder / split, dtype) for split in SPLITS}
    content = hashlib.sha256()
    current: StreamWriter | None = None
    done = 0
    try:
        for piece, ids in _encoded(source.pieces(), tokenizer):
            number = _hash(piece)
            size = len(piece.data)
            content.update(number.to_bytes(8, "little") + size.to_bytes(8, "little") + bytes([piece.starts]))
            writer = writers["held_out" if number < survey.threshold else "train"]
            if piece.starts or writer is not current:
                if current is not None:
                    current.write([tokenizer.eos_id])
                writer.start_document()
                writer.write([tokenizer.bos_id])
                current = writer
            writer.write(ids)
            writer.bytes += size
            if (done + size) // PROGRESS_BYTES > done // PROGRESS_BYTES:
                log(f"{source.name}: {(done + size) / 1e6:,.0f} of {survey.bytes / 1e6:,.0f} MB")
            done += size
        if current is not None:
            current.write([tokenizer.eos_id])
        if content.hexdigest() != survey.content:
            raise DataError(f"source {source.name!r} ({source.description}) changed while it was read: try again")
        return {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _encoded(pieces: Iterator[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
    """Pieces with their ids, encoded a few mebibytes at a time on all of this process's cores."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= ENCODE_BYTES:
            yield from zip(batch, tokenizer.encode_many([p.text for p in batch], threads), strict=True)
            batch, size = [], 0
    yield from zip(batch, tokenizer.encode_many([p.text for p in batch], threads), strict=True)
