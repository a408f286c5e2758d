"""Encodes text with a SentencePiece BPE model word by word, each distinct word once.

BPE joins neighbours into pieces of its vocabulary and nothing else. So where no piece has a character followed by a
space, a text can be cut before each run of spaces, and its ids are those of its words, one after the other. Text
repeats its words: most are found in a table, and only new ones are encoded, all new ones of several texts at once.
"""

from __future__ import annotations

import re
import struct

import sentencepiece

from moe.data.long_text import LongText

MOST_WORDS = 1 << 18  # of the table, and those of one group: about 50 MB
# Characters of texts whose new words are encoded in one call. SentencePiece starts a thread for each call. Where all
# cores are busy, waiting for that thread takes longer than encoding a short text's few new words.
GROUP = 1 << 18
LONGEST_WORD = 64  # characters of a word that is remembered
# What the fast path must encode as the model does before it is used.
PROBE = "def f(x):\n\tif x  ==   10:\r\n        return 'é中文😀'\n\n\n The  end\x00\x07 1.5 \ufeff\u3000\u2028don't  "


class WordEncoder:
    """`encode` gives each text's ids as `processor` does, as little-endian integers of `itemsize` bytes."""

    def __init__(self, pattern: str, prefix: str, inside: sentencepiece.SentencePieceProcessor, itemsize: int) -> None:
        self._words, self._prefix, self._inside = re.compile(pattern).findall, prefix, inside
        self._code = "H" if itemsize == 2 else "I"
        self._ids: dict[str, bytes] = {}  # by word

    @classmethod
    def of(
        cls, long_text: LongText, processor: sentencepiece.SentencePieceProcessor, itemsize: int
    ) -> WordEncoder | None:
        """None for a model whose texts can't be cut into words."""
        pairs = long_text.joined
        if not long_text.exact or any(pair[1] == " " != pair[0] for pair in pairs):
            return None
        # A line's end is a word of its own where no piece has it beside another character.
        pattern = r" *[^ ]+| +" if any("\n" in pair for pair in pairs) else r" *[^ \n]+|\n| +"
        made = cls(pattern, " " if long_text.has_prefix else "", long_text.inside, itemsize)
        expected: list[int] = processor.encode(PROBE)  # type: ignore[assignment]
        return made if made.encode([PROBE]) == [made.packed(expected)] else None

    def encode(self, texts: list[str]) -> list[bytes]:
        """`texts` must not hold long_text.SPACE, which SentencePiece takes for a space."""
        encoded: list[bytes] = []
        group: list[str] = []
        size = 0
        for text in texts:
            group.append(text)
            size += len(text)
            if size >= GROUP:
                encoded += self._encode_group(group)
                group, size = [], 0
        return encoded + self._encode_group(group)

    def _encode_group(self, texts: list[str]) -> list[bytes]:
        encoded = []
        with_new: list[tuple[int, list[str]]] = []  # place and words of texts that have new words
        for place, text in enumerate(texts):
            words = self._words(self._prefix + text) if text else []
            try:
                encoded.append(b"".join(map(self._ids.__getitem__, words)))
            except KeyError:
                encoded.append(b"")
                with_new.append((place, words))
        if with_new:
            long = self._learn({word for _, words in with_new for word in words})
            for place, words in with_new:
                encoded[place] = b"".join(map(self._ids.__getitem__, words))
            for word in long:
                del self._ids[word]
        return encoded

    def _learn(self, words: set[str]) -> list[str]:
        """Encodes the words that aren't in the table at once; afterwards it has all of `words`. Returns the long ones
        among the new."""
        new = words.difference(self._ids)
        if len(self._ids) + len(new) > MOST_WORDS:
            self._ids.clear()
            new = words
        texts = [*new]
        encoded: list[list[int]] = self._inside.encode(texts, num_threads=1)  # type: ignore[assignment]
        self._ids.update(zip(texts, map(self.packed, encoded), strict=True))
        return [text for text in texts if len(text) > LONGEST_WORD]

    def packed(self, ids: list[int]) -> bytes:
        return struct.pack(f"<{len(ids)}{self._code}", *ids)
