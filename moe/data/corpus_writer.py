"""The three passes over the sources: survey them, train the tokenizer, write the shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from moe.config import DataConfig, TokenizerConfig
from moe.data.corpus import FORMAT, META, SPLITS
from moe.data.readers import Chunk, DataError
from moe.data.record_encoding import Recipe, threads
from moe.data.record_writer import encode_records
from moe.data.shards import StreamWriter, token_dtype
from moe.data.sources import Source, stated_weights
from moe.data.survey import Survey, content_bytes, hash_of
from moe.data.tokenizer_base import Tokenizer
from moe.data.tokenizer_training import sample_blocks, train_sentencepiece
from moe.durable import fsync

ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at once: enough to keep every core busy
LONG_BYTES = 2 << 20  # a longer text is encoded in parts; chunks of text files are shorter
PROGRESS_BYTES = 1 << 28  # bytes of text between two progress lines


def train_tokenizer(
    data: DataConfig,
    config: TokenizerConfig,
    sources: list[Source],
    surveys: list[Survey],
    log: Callable[[str], None],
) -> Tokenizer:
    """Trains on a sample of the training split, to which each source gives a share: by weight, or else by bytes."""
    weights = stated_weights(data) or {s.name: float(survey.bytes) for s, survey in zip(sources, surveys, strict=True)}
    assert config.vocab_size is not None
    samples: list[Iterator[str]] = []
    for source, survey in zip(sources, surveys, strict=True):
        wanted = config.train_bytes * weights[source.name] / sum(weights.values())
        texts = (chunk.text for chunk in source.chunks() if hash_of(chunk) >= survey.threshold)
        samples.append(sample_blocks(texts, min(1.0, wanted / max(1, survey.train_bytes))))
    return train_sentencepiece(list(chain.from_iterable(samples)), config.vocab_size, log)


def write_corpus(
    folder: Path,
    fingerprint: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    sources: list[Source],
    surveys: list[Survey],
    recipe: Recipe | None,
    log: Callable[[str], None],
) -> None:
    """Writes shards, tokenizer and meta.json into the new `folder` and syncs them to disk.

    `recipe` is that of the sources that have records; the tokenizer is saved with its template. Raises OSError when the
    folder can't be written; a source that can't be read raises DataError.
    """
    folder.mkdir(parents=True)
    if recipe is not None:
        tokenizer.chat_template = recipe.template.source
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
        if source.has_records:
            assert recipe is not None
            streams = encode_records(folder / source.name, source, survey, recipe, log)
        else:
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
) -> dict[str, dict[str, Any]]:
    """Writes both splits of one source; returns meta.json's entry of each.

    Neighbouring chunks of a text file that fall into the same split stay one document.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: StreamWriter(folder / split, dtype) for split in SPLITS}
    content = hashlib.sha256()
    current: StreamWriter | None = None
    done = 0
    try:
        for chunk, ids in _encoded(source.chunks(), tokenizer):
            if chunk is not None:
                number, size = hash_of(chunk), len(chunk.data)
                content.update(content_bytes(chunk, number))
                writer = writers["held_out" if number < survey.threshold else "train"]
                if chunk.starts_document or writer is not current:
                    if current is not None:
                        current.write([tokenizer.eos_id])
                    writer.start_document()
                    writer.write([tokenizer.bos_id])
                    current = writer
                writer.bytes += size
                if (done + size) // PROGRESS_BYTES > done // PROGRESS_BYTES:
                    log(f"{source.name}: {(done + size) / 1e6:,.0f} of {survey.bytes / 1e6:,.0f} MB")
                done += size
            assert current is not None  # no part of a chunk comes before the chunk
            current.write(ids)
        if current is not None:
            current.write([tokenizer.eos_id])
        if content.hexdigest() != survey.content:
            raise DataError(
                f"source {source.name!r} ({source.description}) changed while it was being read: run it again"
            )
        return {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _encoded(chunks: Iterator[Chunk], tokenizer: Tokenizer) -> Iterator[tuple[Chunk | None, list[int]]]:
    """Each chunk with its token ids, encoded ENCODE_BYTES at a time on all of this process's cores.

    A chunk longer than LONG_BYTES comes with its first ids; None comes with the others.
    """
    batch: list[Chunk] = []

    def encoded() -> Iterator[tuple[Chunk, list[int]]]:
        yield from zip(batch, tokenizer.encode_many([chunk.text for chunk in batch], threads()), strict=True)
        batch.clear()

    size = 0
    for chunk in chunks:
        long = len(chunk.data) > LONG_BYTES
        if long or size >= ENCODE_BYTES:
            yield from encoded()
            size = 0
        if long:
            for number, ids in enumerate(tokenizer.encode_long(chunk.text, threads())):
                yield chunk if number == 0 else None, ids
        else:
            batch.append(chunk)
            size += len(chunk.data)
    yield from encoded()
