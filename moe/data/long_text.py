"""Cuts a long text into parts whose token ids, one after the other, are those of the whole text.

A SentencePiece encoder takes about 50 bytes of memory for each byte of a text, so a text of 50 MB is encoded in parts.
BPE only ever joins characters into pieces of its vocabulary. Where two neighbouring characters are neighbours in no
piece, nothing is joined across, and what is on one side doesn't change what happens on the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import sentencepiece

SPACE = "▁"  # stands for a space in SentencePiece's vocabulary
PART = 1 << 16  # characters; a part ends at the first place after so many where a text may be cut
NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec {add_dummy_prefix: false} (protobuf merges it)


class LongText:
    """How texts may be cut for one SentencePiece model. `inside` encodes text that doesn't begin a document."""

    def __init__(self, model: bytes, processor: sentencepiece.SentencePieceProcessor) -> None:
        from sentencepiece import sentencepiece_model_pb2  # loads protobuf

        messages: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
        about = messages.ModelProto.FromString(model)
        normalizer, trainer = about.normalizer_spec, about.trainer_spec
        # A model that rewrites text (NFKC, doubled spaces) may look across any place, and a unigram model rounds the
        # sum of its scores from the text's beginning.
        self._exact = not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces) and (
            trainer.model_type == trainer.BPE and not trainer.treat_whitespace_as_suffix
        )
        pieces = [piece.piece.replace(SPACE, " ") for piece in about.pieces]
        self._joined = frozenset(a + b for piece in pieces for a, b in pairwise(piece))
        self.inside = processor
        if normalizer.add_dummy_prefix:
            self.inside = sentencepiece.SentencePieceProcessor()
            self.inside.LoadFromSerializedProto(model + NO_PREFIX)

    def parts(self, text: str) -> Iterator[str]:
        """Parts of about PART characters, longer where a text may not be cut; the whole text if it never may."""
        start = 0
        while start < len(text):
            end = start + PART if self._exact else len(text)
            while end < len(text) and (text[end - 1] == SPACE or text[end - 1 : end + 1] in self._joined):
                end += 1
            yield text[start:end]
            start = end
