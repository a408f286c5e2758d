"""Cuts a long text into parts whose token ids, one after the other, are those of the whole text.

An encoder takes about 50 (SentencePiece) or 150 bytes (`tokenizers`) of memory for each byte of a text. BPE only ever
joins neighbours into pieces of its vocabulary, so a text may be cut where nothing can be joined: with SentencePiece
between two characters that are neighbours in no piece, with `tokenizers` where its regular expression splits the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import sentencepiece

SPACE = "▁"  # stands for a space in SentencePiece's vocabulary
PART = 1 << 16  # characters; a part ends at the first place after so many where a text may be cut
NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec {add_dummy_prefix: false} (protobuf merges it)


WINDOW = 64  # characters on each side of a place, in which its split is compared
# Between a letter and a space with a letter, or after a line's end with a letter behind it: a look-ahead of one
# character, as in all common expressions, sees the same on both sides of such a place.
BREAK = re.compile(r"[^\W\d_](?= [^\W\d_])|\S\n(?=[^\W\d_])")


class LongText:
    """How texts may be cut for one SentencePiece model. `inside` encodes text that doesn't begin a document; `exact`:
    whether texts may be cut at all, between two characters that are no pair in `joined`; `has_prefix`: whether the
    model puts a space before a text."""

    def __init__(self, model: bytes, processor: sentencepiece.SentencePieceProcessor) -> None:
        from sentencepiece import sentencepiece_model_pb2  # loads protobuf

        messages: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
        about = messages.ModelProto.FromString(model)
        normalizer, trainer = about.normalizer_spec, about.trainer_spec
        # A model that rewrites text (NFKC, doubled spaces) may look across any place, and a unigram model rounds the
        # sum of its scores from the text's beginning.
        self.exact = not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces) and (
            trainer.model_type == trainer.BPE and not trainer.treat_whitespace_as_suffix
        )
        self.exact = self.exact and normalizer.escape_whitespaces
        self.has_prefix = bool(normalizer.add_dummy_prefix)
        pieces = [piece.piece.replace(SPACE, " ") for piece in about.pieces]
        self.joined = frozenset(a + b for piece in pieces for a, b in pairwise(piece))
        self.inside = processor
        if self.has_prefix:
            self.inside = sentencepiece.SentencePieceProcessor()
            self.inside.LoadFromSerializedProto(model + NO_PREFIX)

    def parts(self, text: str) -> Iterator[str]:
        """Parts of about PART characters, longer where a text may not be cut; the whole text if it never may."""
        start = 0
        while start < len(text):
            end = start + PART if self.exact else len(text)
            while end < len(text) and (text[end - 1] == SPACE or text[end - 1 : end + 1] in self.joined):
                end += 1
            yield text[start:end]
            start = end


def byte_level_parts(text: str, backend: Any, about: dict[str, Any]) -> Iterator[str]:
    """Parts of about PART characters for a tokenizer of `tokenizers` and the content of its tokenizer.json.

    The whole text, if it isn't byte-level BPE that splits text by an expression without look-behind.
    """
    cuts = _splits_anywhere(about)
    start = 0
    while start < len(text):
        places = (found.end() for found in BREAK.finditer(text, start + PART) if cuts)
        end = next((place for place in places if _is_split(text, place, backend.pre_tokenizer)), len(text))
        yield text[start:end]
        start = end


def _splits_anywhere(about: dict[str, Any]) -> bool:
    """Whether a text from a split on is split as it is within the whole text."""
    steps = about.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    known = all(
        (step.get("type") == "ByteLevel" and not step.get("add_prefix_space"))
        or (step.get("type") == "Split" and "(?<" not in str(step.get("pattern")))
        for step in steps
    )
    normalizer = (about.get("normalizer") or {"type": "NFC"}).get("type")
    added = (token for token in about.get("added_tokens", []) if not token["special"])
    crosses = any(token["lstrip"] or token["rstrip"] or re.search(r"\S\s|\s\S", token["content"]) for token in added)
    return known and normalizer == "NFC" and about["model"].get("type") == "BPE" and not crosses


def _is_split(text: str, place: int, splitter: Any) -> bool:
    """Whether the tokenizer's own expression splits `text` at `place`, whatever is on the other side."""
    left, right = text[max(0, place - WINDOW) : place], text[place : place + WINDOW]
    whole, *sides = ([piece for piece, _ in splitter.pre_tokenize_str(part)] for part in (left + right, left, right))
    return whole == sides[0] + sides[1]
