"""Trains a SentencePiece tokenizer on a sample of the corpus's training split."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator

import sentencepiece

from moe.data.long_text import SPACE
from moe.data.readers import DataError
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer

RESERVED = 256 + 3  # pieces that aren't learnt: bytes; unknown, BOS, EOS
COVERAGE = 0.9995  # share of the text's characters that get a piece; the rest are encoded as bytes
SAMPLE_BLOCK = 4096  # characters: blocks of this size are taken into the sample or left out as a whole
LONG_LINE = 1 << 20  # characters; a longer line is cut: SentencePiece skips lines above 16 MiB


def sample_blocks(texts: Iterator[str], share: float) -> Iterator[str]:
    """A sample of `share` of the text in blocks of whole lines (but LONG_LINE), spread evenly over the corpus."""
    seen = taken = 0
    for text in texts:
        block: list[str] = []
        size = 0
        for line in _lines(text):
            block.append(line)
            size += len(line)
            if size >= SAMPLE_BLOCK:
                seen += size
                if taken < share * seen:
                    taken += size
                    yield "".join(block)
                block, size = [], 0
        seen += size
        if size and taken < share * seen:
            taken += size
            yield "".join(block)


def _lines(text: str) -> Iterator[str]:
    """As `splitlines(keepends=True)`, but without a list of all lines, and lines longer than LONG_LINE are cut."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + SAMPLE_BLOCK) + 1 or len(text)
        for line in text[start:end].splitlines(keepends=True):
            step = SAMPLE_BLOCK if len(line) > LONG_LINE else len(line)
            yield from (line[at : at + step] for at in range(0, len(line), step))
        start = end


def train_sentencepiece(blocks: list[str], vocab_size: int, log: Callable[[str], None]) -> SentencePieceTokenizer:
    """BPE with byte fallback over `blocks` of text; the same text gives the same model.

    A text too short for `vocab_size` pieces gives a smaller vocabulary, which is logged. Raises DataError when the text
    is empty.
    """
    counts = Counter(character for block in blocks for character in block if character not in ("\n", SPACE))
    if not counts:
        raise DataError("tokenizer.kind=sentencepiece: the training split holds no text to train on")
    rare = _rare_characters(counts, (vocab_size - RESERVED) // 2)
    lines = [line for block in blocks for line in block.translate(rare).split("\n") if line]
    try:
        model = _train(lines, vocab_size)
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if not limit:
            raise DataError(f"tokenizer.vocab_size={vocab_size}: {str(error).splitlines()[0]}") from error
        log(f"tokenizer: the text is enough for {limit[1]} pieces, not tokenizer.vocab_size={vocab_size}")
        model = _train(lines, int(limit[1]))
    return SentencePieceTokenizer(model, "trained tokenizer")


def _rare_characters(counts: Counter[str], room: int) -> dict[int, str]:
    """Characters that get no piece of their own and are encoded as bytes, mapped to a line end for the trainer.

    At most `room` characters get a piece, half of the learnt pieces: so a small vocabulary can be trained on text with
    thousands of characters, and pieces are left for merges.
    """
    limit = COVERAGE * sum(counts.values())
    rare, covered = {ord(SPACE): "\n"}, 0
    for kept, (character, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
        if kept >= max(1, room) or covered > limit:
            rare[ord(character)] = "\n"
        covered += count
    return rare


def _train(lines: list[str], vocab_size: int) -> bytes:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=writer,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,  # `lines` hold only the characters that get a piece
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()
