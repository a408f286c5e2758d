"""`moe prepare`: text into token shards, once; later calls open what is there.

The cache folder is named by a fingerprint: SHA-256 over the content of every document, the held-out share and the
tokenizer's own hash. Reading a large corpus only to learn that nothing changed would be slow, so a note beside the
folders remembers which fingerprint the same files (path, size, modification time) had; a file changed less than two
seconds before it was read is never trusted to a note. Processes that ask for the same corpus at once wait for one
another; the shards are written beside, synced and renamed, so that a folder with the right name is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from moe.config import DataConfig, TokenizerConfig, TokenizerKind
from moe.data.corpora import DataError, Piece, Source, open_sources
from moe.data.shards import StreamWriter, TokenStream, token_dtype
from moe.data.tokenizer import (
    Tokenizer,
    load_saved,
    open_tokenizer,
    sample_blocks,
    tokenizer_files,
    train_sentencepiece,
)

FORMAT = 1  # of the shards; another number never opens older folders
SPLITS = ("train", "held_out")
META = "meta.json"
SETTLED_NS = 2_000_000_000  # file systems may stamp two writes within this time alike
ENCODE_BYTES = 1 << 20  # text handed to the tokenizer at once
PROGRESS_BYTES = 1 << 28


@dataclass(slots=True)
class Corpus:
    """Prepared shards and their tokenizer. `weights` are the sources' shares of samples, summing to 1."""

    tokenizer: Tokenizer
    fingerprint: str
    folder: Path
    source_names: list[str]
    descriptions: list[str]
    weights: list[float]
    train: list[TokenStream]
    held_out: list[TokenStream]

    def describe(self) -> str:
        """A few lines for a terminal: where, which, and what each source holds."""
        lines = [
            f"corpus {self.fingerprint[:16]} in {self.folder}",
            f"tokenizer {self.tokenizer.fingerprint[:16]}: {self.tokenizer.vocab_size} pieces",
            f"{'source':<14}{'split':<10}{'documents':>10}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'share':>8}",
        ]
        for index, name in enumerate(self.source_names):
            for split, stream in (("train", self.train[index]), ("held-out", self.held_out[index])):
                share = f"{self.weights[index]:>8.1%}" if split == "train" else ""
                lines.append(
                    f"{name:<14}{split:<10}{stream.documents:>10,}{stream.tokens:>14,}{stream.bytes:>14,}"
                    f"{stream.bytes / stream.tokens:>13.2f}{share}"
                )
        return "\n".join(lines)


def check_vocab(corpus: Corpus, vocab_size: int) -> None:
    """Raises DataError when the corpus has ids that a model with `vocab_size` rows doesn't."""
    pieces = corpus.tokenizer.vocab_size
    if pieces > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} must be ≥ {pieces}, the pieces of the corpus's tokenizer: a token id "
            "without an embedding can't be trained"
        )


def check_tokenizer(corpus: Corpus, tokenizer: Tokenizer, where: str) -> None:
    """Raises DataError when `tokenizer` (a run's or checkpoint's, named by `where`) isn't the one of the shards."""
    if tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"{where}: tokenizer {tokenizer.fingerprint[:16]} doesn't match the shards' "
            f"{corpus.tokenizer.fingerprint[:16]} in {corpus.folder}: the same ids would mean other text"
        )


@dataclass(slots=True)
class Survey:
    """What one reading of a source tells. `threshold`: pieces whose hash is below it are held out."""

    content: str
    pieces: int
    bytes: int
    train_bytes: int
    threshold: int


def prepare(data: DataConfig, tokenizer: TokenizerConfig, *, log: Callable[[str], None] = print) -> Corpus:
    """Open the shards of these sources and this tokenizer, building them first where they aren't there.

    Raises DataError (a ValueError) with one line for anything wrong with the text, the tokenizer or the cache folder.
    """
    cache = Path(data.cache_dir).expanduser()
    sources = open_sources(data)
    note = _Note.of(cache, data, tokenizer, sources)
    if corpus := _open_noted(note, data, log):
        return corpus
    with _writing(cache, "data.cache_dir"):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{note.key}.lock", log):
        if corpus := _open_noted(note, data, log):  # another process built it while this one waited
            return corpus
        return _build(cache, note, data, tokenizer, sources, log)


@dataclass(slots=True)
class _Note:
    """Remembers which fingerprint unchanged files had."""

    path: Path
    key: str
    modified_ns: int
    started_ns: int = field(default_factory=time.time_ns)

    @classmethod
    def of(cls, cache: Path, data: DataConfig, tokenizer: TokenizerConfig, sources: list[Source]) -> _Note:
        stats = []
        for path in tokenizer_files(tokenizer):
            if not path.is_file():
                raise DataError(f"tokenizer.path={tokenizer.path}: no such file or folder")
            stats.append((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns))
        settings = [
            *(FORMAT, sentencepiece.__version__, data.held_out, stats),
            *(tokenizer.kind.value, tokenizer.vocab_size, tokenizer.train_bytes),
            [[source.name, source.identity] for source in sources],
            list(_stated_weights(data).items()) if tokenizer.kind is TokenizerKind.sentencepiece else None,
        ]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        modified = max([source.modified_ns for source in sources] + [stat[2] for stat in stats])
        return cls(cache / f"{key}.json", key, modified)

    def read(self) -> str | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):  # no note, or a torn one: read the corpus instead
            return None

    def write(self, fingerprint: str) -> None:
        if self.modified_ns + SETTLED_NS < self.started_ns:
            beside = self.path.with_suffix(f".{os.getpid()}.tmp")
            beside.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
            beside.replace(self.path)


def _stated_weights(data: DataConfig) -> dict[str, float]:
    return {name: source.weight for name, source in data.all_sources().items() if source.weight is not None}


def _open_noted(note: _Note, data: DataConfig, log: Callable[[str], None]) -> Corpus | None:
    fingerprint = note.read()
    return _open_folder(note.path.parent / fingerprint, data, log) if fingerprint else None


def _open_folder(folder: Path, data: DataConfig, log: Callable[[str], None]) -> Corpus | None:
    """The corpus in `folder`; None when there is none, or (logged) a damaged one."""
    if not folder.is_dir():
        return None
    try:
        return open_corpus(folder, _stated_weights(data))
    except DataError as error:
        log(f"{error}; preparing again")
        return None


def open_corpus(folder: Path, weights: dict[str, float] | None = None) -> Corpus:
    """A prepared folder, its files checked against meta.json. Raises DataError when something is missing, cut short,
    or the tokenizer there isn't the one that wrote the shards."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        names = list(meta["sources"])
        vocab_size, stated = int(meta["tokenizer"]["vocab_size"]), meta["tokenizer"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / META}: unreadable ({error}): the cache is damaged") from error
    tokenizer = load_saved(folder / "tokenizer")
    if tokenizer.fingerprint != stated:
        raise DataError(f"{folder}: tokenizer {tokenizer.fingerprint[:16]} doesn't match the shards' {stated[:16]}")
    dtype = token_dtype(vocab_size)
    train, held_out = (
        [TokenStream(folder / name / split, meta["sources"][name][split], dtype, vocab_size) for name in names]
        for split in SPLITS
    )
    sizes = [(weights or {}).get(name, float(stream.tokens)) for name, stream in zip(names, train, strict=True)]
    return Corpus(
        tokenizer=tokenizer,
        fingerprint=meta["fingerprint"],
        folder=folder,
        source_names=names,
        descriptions=[meta["sources"][name]["description"] for name in names],
        weights=[size / sum(sizes) for size in sizes],
        train=train,
        held_out=held_out,
    )


def _build(
    cache: Path,
    note: _Note,
    data: DataConfig,
    config: TokenizerConfig,
    sources: list[Source],
    log: Callable[[str], None],
) -> Corpus:
    started = time.monotonic()
    surveys = [_survey(source, data.held_out) for source in sources]
    total = sum(survey.bytes for survey in surveys)
    if config.kind is TokenizerKind.sentencepiece:
        tokenizer: Tokenizer = _train_tokenizer(data, config, sources, surveys, log)
    else:
        tokenizer = open_tokenizer(config)
    identity = [FORMAT, tokenizer.fingerprint, data.held_out]
    identity += [[source.name, survey.content] for source, survey in zip(sources, surveys, strict=True)]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = cache / fingerprint[:32]
    with _locked(cache / f"{folder.name}.lock", log):
        corpus = _open_folder(folder, data, log)
        if corpus is None:
            beside = cache / f"{folder.name}.tmp"
            with _writing(cache, "data.cache_dir"):
                for leftover in (beside, folder):  # of a process that was killed; damaged
                    if leftover.exists():
                        shutil.rmtree(leftover)
            try:
                with _writing(cache, "data.cache_dir"):
                    _write(beside, fingerprint, data, tokenizer, sources, surveys, log)
                    beside.rename(folder)
                    _sync_folder(cache)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            corpus = open_corpus(folder, _stated_weights(data))
            log(f"prepared {total / 1e6:.1f} MB of text in {time.monotonic() - started:.1f} s")
    with _writing(cache, "data.cache_dir"):
        note.write(folder.name)
    return corpus


def _hash(piece: Piece) -> int:
    """A number in [0, 2^64) that depends on the text alone, so the split doesn't depend on the order of documents."""
    return int.from_bytes(hashlib.blake2b(piece.data, digest_size=8).digest(), "little")


def _survey(source: Source, held_out: float) -> Survey:
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


def _train_tokenizer(
    data: DataConfig,
    config: TokenizerConfig,
    sources: list[Source],
    surveys: list[Survey],
    log: Callable[[str], None],
) -> Tokenizer:
    """Train on a sample of the training split, shared between the sources by weight, else by bytes."""
    weights = _stated_weights(data) or {s.name: float(survey.bytes) for s, survey in zip(sources, surveys, strict=True)}
    assert config.vocab_size is not None
    samples: list[Iterator[str]] = []
    for source, survey in zip(sources, surveys, strict=True):
        wanted = config.train_bytes * weights[source.name] / sum(weights.values())
        texts = (piece.text for piece in source.pieces() if _hash(piece) >= survey.threshold)
        samples.append(sample_blocks(texts, min(1.0, wanted / max(1, survey.train_bytes))))
    return train_sentencepiece(list(chain.from_iterable(samples)), config.vocab_size, log)


def _write(
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
        _sync_folder(path)


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
    """Pieces with their ids, encoded about a mebibyte at a time on all of this process's cores."""
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


@contextmanager
def _writing(path: Path, key: str) -> Iterator[None]:
    """An OSError becomes one line naming the folder: a full disk, no permission."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{key}={path}: can't write {error.filename or 'there'}: {error.strerror}") from error


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """One process of the machine at a time (and of all that share the file system, where it has locks)."""
    with _writing(path.parent, "data.cache_dir"):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another process is preparing this corpus: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(path: Path) -> None:
    """A rename and new names last only once the folder itself is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
