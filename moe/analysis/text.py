"""The text that is routed: held-out sequences, as many of each source, none of them padded.

Shapes: L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from moe.config import AnalyzeSettings
from moe.config.rules import require
from moe.data.corpus import Corpus
from moe.data.packing import NO_TARGET, pack

BATCH_TOKENS = 4096  # of one forward pass


@dataclass(slots=True)
class TextSequence:
    """One held-out sequence of source number `source`; labels and documents as in `moe.data.packing.Sample`."""

    source: int
    input_ids_L: np.ndarray
    labels_L: np.ndarray
    document_ids_L: np.ndarray

    @property
    def targets(self) -> int:
        return int((self.labels_L != NO_TARGET).sum())


def choose_sequences(corpus: Corpus, settings: AnalyzeSettings, length: int) -> list[TextSequence]:
    """Held-out sequences of at most `length` tokens: the first of every source, then the second of every source, ….

    Each source gives the same number where it has as many, evenly spread over its held-out text. Raises UserError when
    the settings allow less than one sequence a source, or two in all.
    """
    sources = len(corpus.source_names)
    least = max(2, sources)
    require(
        settings.sequences >= least,
        f"analyze.sequences={settings.sequences} must be ≥ {least}: one of each of the {sources} sources",
    )
    require(
        settings.tokens >= least * length,
        f"analyze.tokens={settings.tokens} must be ≥ {least * length}: {least} sequences of {length} tokens",
    )
    each = min(settings.sequences, settings.tokens // length) // sources
    chosen: list[tuple[int, TextSequence]] = []
    for source, stream in enumerate(corpus.held_out):
        available = -(-(stream.tokens - 1) // length)
        count = min(each, available)
        for place in range(count):
            index = place * available // count
            sample = pack(stream, index, length, corpus.tokenizer.eos_id)
            real = slice(sample.length)
            parts = sample.input_ids_L[real], sample.labels_L[real], sample.document_ids_L[real]
            chosen.append((place, TextSequence(source, *parts)))
    require(
        len(chosen) > 1,
        f"data: {len(chosen)} held-out sequences of {length} tokens: must be ≥ 2; give more text or a larger "
        "data.held_out",
    )
    return [sequence for _, sequence in sorted(chosen, key=lambda pair: pair[0])]


def batches(sequences: list[TextSequence]) -> Iterator[list[int]]:
    """Indices of `sequences` that go through the model together: of one length, at most `BATCH_TOKENS` tokens."""
    lengths = [len(sequence.input_ids_L) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda index: lengths[index])  # stable
    for length, group in groupby(order, key=lambda index: lengths[index]):
        members, size = list(group), max(1, BATCH_TOKENS // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def stacked(sequences: list[TextSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """(input ids, labels, document ids), each [B, S], of sequences of one length."""
    rows = [(one.input_ids_L, one.labels_L, one.document_ids_L) for one in sequences]
    ids_BS, labels_BS, documents_BS = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return ids_BS, labels_BS, documents_BS
