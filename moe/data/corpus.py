"""A prepared corpus: the shards of every source and their tokenizer; checks that they fit a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from moe.data.readers import DataError
from moe.data.shards import TokenStream, stream_entry, token_dtype
from moe.data.tokenizer import load_saved
from moe.data.tokenizer_base import Tokenizer
from moe.data.verify import verify
from moe.durable import write_durably
from moe.errors import UserError
from moe.untrusted import read_object

FORMAT = 1  # of the shards; part of the fingerprint, so a new number never opens older folders
SPLITS = ("train", "held_out")
META = "meta.json"
DAMAGED = "the cache is damaged"
OPENING_CHARACTERS, OPENING_TOKENS = 40, 160  # a character is at most four byte pieces


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

    def opening(self) -> str:
        """The beginning of the first held-out document that isn't blank, at most `OPENING_CHARACTERS` of it, cut at a
        space if there is one, or the whole prompt of a row: the same on every rank. Empty where every document is
        blank. Raises DataError."""
        for stream in self.held_out:
            for index in range(stream.documents):
                if prompt := self._text(stream.prompt(index, OPENING_TOKENS)):
                    return prompt
                text = self._text(stream.document(index, OPENING_TOKENS))
                if len(text) > OPENING_CHARACTERS:
                    cut = text[: OPENING_CHARACTERS + 1]
                    text = cut.rpartition(" ")[0].rstrip() or cut[:-1]
                if text:
                    return text
        return ""

    def _text(self, ids_N: np.ndarray) -> str:
        special = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        text = self.tokenizer.decode([int(token) for token in ids_N if token not in special])
        return text.rstrip("\ufffd").strip()  # the last token may be part of a character

    def describe(self) -> str:
        """A table for the terminal: folder, fingerprints, and what each source and split holds."""
        lines = [
            f"corpus {self.fingerprint[:16]} in {self.folder}",
            f"tokenizer {self.tokenizer.fingerprint[:16]}: {self.tokenizer.vocab_size} token ids",
            f"{'source':<14}{'split':<10}{'documents':>10}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'share':>8}",
        ]
        for index, name in enumerate(self.source_names):
            for split, stream in (("train", self.train[index]), ("held-out", self.held_out[index])):
                share = f"{self.weights[index]:>8.1%}" if split == "train" else ""
                lines.append(
                    f"{name:<14}{split:<10}{stream.documents:>10,}{stream.tokens:>14,}{stream.bytes:>14,}"
                    f"{stream.bytes / stream.tokens:>13.2f}{share}"
                )
                if stream.packed_length is not None:
                    lines.append(
                        f"{'':<14}{'':<10}{stream.tokens // stream.packed_length:,} sequences of "
                        f"{stream.packed_length} tokens, {stream.targets:,} targets"
                    )
        return "\n".join(lines)


def check_vocab(corpus: Corpus, vocab_size: int) -> None:
    """Raises DataError when the corpus has token ids ≥ `vocab_size`, for which the model has no embedding."""
    needed = corpus.tokenizer.vocab_size
    if needed > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} must be ≥ {needed}, the vocabulary of the corpus's tokenizer: a token id "
            "without an embedding can't be trained"
        )


def check_tokenizer(corpus: Corpus, tokenizer: Tokenizer, where: str) -> None:
    """Raises DataError when `tokenizer` (of the run or checkpoint `where`) isn't the one that wrote the shards."""
    if tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"{where}: tokenizer {tokenizer.fingerprint[:16]} doesn't match the shards' "
            f"{corpus.tokenizer.fingerprint[:16]} in {corpus.folder}: the same ids would stand for other text"
        )


def open_corpus(
    folder: Path, weights: dict[str, float], log: Callable[[str], None], *, verify_again: bool = False
) -> Corpus:
    """Opens a prepared folder and checks its files against meta.json; `weights` override the shares by tokens.

    The files' content is checked when this machine opens the folder for the first time, and with `verify_again`.
    Raises DataError when a file is missing, cut short or changed, or when the tokenizer there isn't the one that wrote
    the shards.
    """
    try:
        meta = read_object(folder / META, DAMAGED)
        sources, card = meta.object("sources"), meta.object("tokenizer")
        names = list(sources.values)
        vocab_size, stated = card.count("vocab_size", 1), card.text("fingerprint")
        fingerprint = meta.text("fingerprint")
        descriptions = [sources.object(name).text("description") for name in names]
        entries = {split: [stream_entry(sources.object(name).object(split)) for name in names] for split in SPLITS}
    except OSError as error:
        raise DataError(f"{folder / META}: unreadable ({error}): {DAMAGED}") from error
    except UserError as error:
        raise DataError(str(error)) from error
    if not names or not all(PurePath(name).name == name for name in names):
        raise DataError(f"{folder / META}: sources={', '.join(names)[:80]} must be names of folders there: {DAMAGED}")
    tokenizer = load_saved(folder / "tokenizer")
    if tokenizer.fingerprint != stated:
        raise DataError(f"{folder}: tokenizer {tokenizer.fingerprint[:16]} doesn't match the shards' {stated[:16]}")
    dtype = token_dtype(vocab_size)
    train, held_out = (
        [
            TokenStream(folder / name / split, entry, dtype, vocab_size)
            for name, entry in zip(names, entries[split], strict=True)
        ]
        for split in SPLITS
    )
    streams = [*train, *held_out]
    found = verify(folder, streams, again=verify_again, log=log)
    if any(path.name not in stream.sha256 for stream in streams for path in stream.files if path in found):
        _adopt(folder, meta.values, streams, found, log)
    sizes = [weights.get(name, float(stream.tokens)) for name, stream in zip(names, train, strict=True)]
    return Corpus(
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        folder=folder,
        source_names=names,
        descriptions=descriptions,
        weights=[size / sum(sizes) for size in sizes],
        train=train,
        held_out=held_out,
    )


def _adopt(
    folder: Path, meta: dict[str, Any], streams: list[TokenStream], found: dict[Path, str], log: Callable[[str], None]
) -> None:
    """Adds the hashes `found` to a corpus of an earlier version, which recorded none."""
    for stream in streams:
        entry = meta["sources"][stream.folder.parent.name][stream.folder.name]
        entry["sha256"] = {path.name: found[path] for path in stream.files}
    try:
        write_durably(folder / META, json.dumps(meta, indent=1))
        log(f"{folder / META}: written by an earlier version; added the SHA-256 of {len(found)} files")
    except OSError as error:
        log(f"{folder / META}: written by an earlier version; the SHA-256 of its files can't be added: {error}")
