"""`moe prepare`: turns text into token shards once; later calls open the shards.

The shards' folder is named by a fingerprint: SHA-256 over the content of every document, the held-out share and the
tokenizer's own hash. Reading a large corpus only to learn that nothing changed would be slow, so a note beside the
folders records the fingerprint of a set of files (path, size, modification time); no note is written when a file
changed less than two seconds before it was read. Processes that need the same corpus at the same time wait for the one
that builds it. The shards are written to FOLDER.tmp, synced and renamed, so a folder without that ending is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import jinja2
import sentencepiece

from moe.config import DataConfig, TokenizerConfig, TokenizerKind
from moe.data.chat_templates import OURS
from moe.data.corpus import FORMAT, Corpus, check_tokenizer, check_vocab, open_corpus
from moe.data.corpus_writer import survey_sources, train_tokenizer, write_corpus
from moe.data.document_packing import packing_identity
from moe.data.find import expanded
from moe.data.processes import Processes, chosen_processes
from moe.data.readers import DataError
from moe.data.record_encoding import FORMAT as RECORD_FORMAT
from moe.data.record_encoding import Recipe
from moe.data.sources import Source, open_sources, stated_weights
from moe.data.tokenizer import open_tokenizer, tokenizer_files
from moe.data.tokenizer_base import Tokenizer
from moe.durable import fsync
from moe.errors import UserError
from moe.untrusted import read_object

__all__ = ["Corpus", "check_tokenizer", "check_vocab", "open_corpus", "prepare"]

SETTLED_NS = 2_000_000_000  # file systems may give two writes within this time the same modification time


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    sequence_length: int | None = None,
    log: Callable[[str], None] = print,
    warn: Callable[[str], None] | None = None,
    verify: bool = False,
    ranks: Sequence[tuple[Connection, str]] = (),
) -> Corpus:
    """Opens the shards of these sources and this tokenizer, and builds them first if they don't exist or are damaged.

    Rows for fine-tuning, and documents with `data.packing=best_fit`, are packed into sequences of `sequence_length`
    tokens, which must be stated for them.
    `verify` checks the content of all files, also if this machine did so before. `warn` (None: `log`) gets the line
    about a damaged corpus, in the one process that prepares it again. The connected `ranks` (`Processes`) work on the
    text instead of processes of this machine. Raises DataError, one line, if anything is wrong
    with the text, the tokenizer or the cache folder.
    """
    cache = expanded("data.cache_dir", data.cache_dir)
    sources = open_sources(data)
    for source in sources:
        if source.taken:
            log(source.taken)
    note = _Note.of(cache, data, tokenizer, sources, sequence_length)
    opener = _Opener(stated_weights(data), log, warn or log, verify)
    if corpus := opener.known(note):
        return corpus
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{note.key}.lock", log):
        if corpus := opener.known(note):  # another process built it while this one waited
            return corpus
        opener.tell()
        return _build(cache, note, data, tokenizer, sources, sequence_length, opener, ranks)


@dataclass(slots=True)
class _Note:
    """A file that records which fingerprint a set of files had, so that unchanged text isn't read again."""

    path: Path
    key: str
    modified_ns: int
    started_ns: int = field(default_factory=time.time_ns)

    @classmethod
    def of(
        cls, cache: Path, data: DataConfig, tokenizer: TokenizerConfig, sources: list[Source], length: int | None
    ) -> _Note:
        stats = []
        for path in tokenizer_files(tokenizer):
            if not path.is_file():
                raise DataError(f"tokenizer.path={tokenizer.path}: no such file or folder")
            stats.append((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns))
        settings = [
            *(FORMAT, sentencepiece.__version__, data.held_out, stats),
            *(tokenizer.kind.value, tokenizer.vocab_size, tokenizer.train_bytes),
            [[source.name, source.identity] for source in sources],
            list(stated_weights(data).items()) if tokenizer.kind is TokenizerKind.sentencepiece else None,
        ]
        if tokenizer.add_special_tokens:
            settings.append(tokenizer.add_special_tokens)
        if data.has_records:
            names = (data.template.name, data.loss_on.name, data.long_rows.name)
            settings += [RECORD_FORMAT, *names, length, *sorted(OURS.values()), jinja2.__version__]
        settings += packing_identity(data, length)
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        modified = max([source.modified_ns for source in sources] + [stat[2] for stat in stats])
        return cls(cache / f"{key}.json", key, modified)

    def read(self) -> str | None:
        try:
            return read_object(self.path, "remove it").text("fingerprint", "[0-9a-f]{32}")
        except (OSError, UserError):  # no note, or an incomplete one: the corpus is read instead
            return None

    def write(self, fingerprint: str) -> None:
        if self.modified_ns + SETTLED_NS < self.started_ns:
            partial = self.path.with_suffix(f".{os.getpid()}.tmp")
            partial.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
            partial.replace(self.path)


@dataclass(slots=True)
class _Opener:
    """Opens folders of the cache, and remembers why one could not be opened."""

    weights: dict[str, float]
    log: Callable[[str], None]
    warn: Callable[[str], None]
    verify: bool
    _damage: str = ""
    _told: str = ""

    def known(self, note: _Note) -> Corpus | None:
        """The corpus of this note; None as for `open`, or when there is no note."""
        fingerprint = note.read()
        return self.open(note.path.parent / fingerprint) if fingerprint else None

    def open(self, folder: Path) -> Corpus | None:
        """The corpus in `folder`; None when there is none, or it is damaged."""
        if not folder.is_dir():
            return None
        try:
            return open_corpus(folder, self.weights, self.log, verify_again=self.verify)
        except DataError as error:
            self._damage = str(error)
            return None

    def tell(self) -> None:
        """One line about the damaged corpus, if there was one; for the process that prepares it again."""
        if self._damage != self._told:
            self.warn(f"{self._damage}; preparing again")
            self._told = self._damage


def _build(
    cache: Path,
    note: _Note,
    data: DataConfig,
    config: TokenizerConfig,
    sources: list[Source],
    sequence_length: int | None,
    opener: _Opener,
    ranks: Sequence[tuple[Connection, str]],
) -> Corpus:
    started, log = time.monotonic(), opener.log
    trained = config.kind is TokenizerKind.sentencepiece
    tokenizer = None if trained else open_tokenizer(config)
    recipe = _recipe(data, tokenizer, sequence_length) if tokenizer else None  # what is wrong with it is said first
    count = chosen_processes(data.processes, sum(source.bytes for source in sources))
    with Processes(count, ranks) as processes:
        surveys = survey_sources(data, sources, processes)
        if tokenizer is None:
            tokenizer = train_tokenizer(data, config, sources, surveys, log)
            recipe = _recipe(data, tokenizer, sequence_length)
        identity = [FORMAT, tokenizer.fingerprint, data.held_out]
        identity += [recipe.identity] if recipe else []
        identity += packing_identity(data, sequence_length)
        identity += [[source.name, survey.content] for source, survey in zip(sources, surveys, strict=True)]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        folder = cache / fingerprint[:32]
        with _locked(cache / f"{folder.name}.lock", log):
            corpus = opener.open(folder)
            if corpus is None:
                opener.tell()

                def write(partial: Path) -> None:
                    write_corpus(
                        partial, fingerprint, data, tokenizer, sources, surveys, recipe, sequence_length, processes, log
                    )

                _write(folder, write)
                corpus = open_corpus(folder, opener.weights, log)
                size, seconds = sum(survey.bytes for survey in surveys), time.monotonic() - started
                several = f" in {processes.count} processes" if processes.count > 1 else ""
                log(f"prepared {size / 1e6:.1f} MB of text{several} in {seconds:.1f} s")
    with _cache_errors(cache):
        note.write(folder.name)
    return corpus


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a partial folder, which becomes `folder` when it is complete."""
    partial = folder.with_name(f"{folder.name}.tmp")
    with _cache_errors(folder.parent):
        for leftover in (partial, folder):  # left by a killed process; damaged
            if leftover.exists():
                shutil.rmtree(leftover)
    try:
        with _cache_errors(folder.parent):
            write(partial)
            partial.rename(folder)
            fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _recipe(data: DataConfig, tokenizer: Tokenizer, sequence_length: int | None) -> Recipe | None:
    """How rows become sequences; None where no source has rows. Raises DataError."""
    if not data.has_records:
        return None
    assert sequence_length is not None, "rows are packed into sequences of a stated length"
    return Recipe.of(data, tokenizer, sequence_length)


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """Turns an OSError (full disk, no permission) into a DataError that names the cache folder."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data.cache_dir={cache}: can't write {error.filename or 'there'}: {error.strerror}") from error


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """One process at a time, of this machine or, if the file system has shared locks, of all machines."""
    with _cache_errors(path.parent):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another process is preparing this corpus: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
