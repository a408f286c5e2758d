"""The three passes over the sources: survey them, train the tokenizer, write the shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import sentencepiece

from moe.config import DataConfig, Packing, TokenizerConfig
from moe.data.corpus import FORMAT, META, SPLITS
from moe.data.document_encoding import EncodedDocuments, encode_documents
from moe.data.document_packing import DocumentPacker
from moe.data.parts import Part
from moe.data.processes import Processes
from moe.data.record_encoding import Recipe
from moe.data.record_writer import EncodedRecords, encode_records, write_records
from moe.data.shards import OFFSET, StreamWriter, token_dtype
from moe.data.sources import Source, stated_weights
from moe.data.survey import Survey, SurveyedPart, hash_of, require_same, survey_of, survey_part, wanted_threshold
from moe.data.tokenizer_base import Tokenizer
from moe.data.tokenizer_training import sample_blocks, train_sentencepiece
from moe.durable import fsync

PROGRESS_BYTES = 1 << 28  # bytes of text between two progress lines


@dataclass(frozen=True, slots=True)
class SurveyJob:
    """Surveys a part of a source."""

    wanted: int

    def __call__(self, part: Part) -> SurveyedPart:
        return survey_part(part, self.wanted)


def survey_sources(data: DataConfig, sources: list[Source], processes: Processes) -> list[Survey]:
    """Reads every source once. Raises DataError."""
    job = SurveyJob(wanted_threshold(data.held_out))
    return [survey_of(source, data.held_out, processes.run(job, source.parts())) for source in sources]


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
    sequence_length: int | None,
    processes: Processes,
    log: Callable[[str], None],
) -> None:
    """Writes shards, tokenizer and meta.json into the new `folder` and syncs them to disk.

    `recipe` is that of the sources that have records; the tokenizer is saved with its template. `sequence_length` is
    that of packed documents. Raises OSError when the folder can't be written; a source that can't be read raises
    DataError.
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
    packed_length = None if data.packing is Packing.concat else sequence_length
    encode_text, encode_rows = EncodeJob(tokenizer, None), EncodeJob(tokenizer, recipe)
    for source, survey in zip(sources, surveys, strict=True):
        path, items = folder / source.name, ((part, survey.threshold) for part in source.parts())
        if source.has_records:
            assert recipe is not None
            rows = cast("Iterator[EncodedRecords]", processes.run(encode_rows, items))
            streams = write_records(path, source, survey, recipe, rows, log)
        else:
            documents = cast("Iterator[EncodedDocuments]", processes.run(encode_text, items))
            streams = _write_documents(path, source, survey, tokenizer, packed_length, documents, log)
        about = {"description": source.description, "content": survey.content}
        meta["sources"][source.name] = {**about, **streams}
    with (folder / META).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(path)


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Encodes a part of a source with a threshold: rows where there is a recipe, or else documents."""

    tokenizer: Tokenizer
    recipe: Recipe | None

    def __call__(self, item: tuple[Part, int]) -> EncodedDocuments | EncodedRecords:
        part, threshold = item
        if self.recipe is None:
            return encode_documents(part, self.tokenizer, threshold)
        return encode_records(part, self.recipe, threshold)


def _write_documents(
    folder: Path,
    source: Source,
    survey: Survey,
    tokenizer: Tokenizer,
    packed_length: int | None,
    parts: Iterable[EncodedDocuments],
    log: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Writes both splits of one source, the one to train on packed if there is a `packed_length`; returns meta.json's
    entry of each."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers: dict[str, StreamWriter | DocumentPacker] = {}
    for split in SPLITS:
        length = packed_length if split == "train" else None
        writer = StreamWriter(folder / split, dtype, packed_length=length)
        writers[split] = writer if length is None else DocumentPacker(writer, length, tokenizer.eos_id)
    content = hashlib.sha256()
    current: StreamWriter | DocumentPacker | None = None
    done = 0
    try:
        for part in parts:
            content.update(part.content)
            if part.first is None:
                continue
            assert part.last is not None
            first = writers[part.first]
            if not (part.continues and first is current):
                if current is not None:
                    current.write([tokenizer.eos_id])
                first.start_document()
                first.write([tokenizer.bos_id])
            for name, split in part.splits.items():
                writers[name].write_documents(split.ids, np.frombuffer(split.starts, OFFSET))
                writers[name].bytes += split.bytes
            current = writers[part.last]
            if (done + part.size) // PROGRESS_BYTES > done // PROGRESS_BYTES:
                log(f"{source.name}: {(done + part.size) / 1e6:,.0f} of {survey.bytes / 1e6:,.0f} MB")
            done += part.size
        if current is not None:
            current.write([tokenizer.eos_id])
        require_same(source, survey, content.hexdigest())
        entries = {split: writer.close() for split, writer in writers.items()}
        for packer in (writer for writer in writers.values() if isinstance(writer, DocumentPacker)):
            log(f"source {source.name!r}: {packer.describe()}")
        return entries
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
