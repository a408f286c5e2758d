"""Batches for training and for held-out evaluation.

Micro-batch j of a step holds samples [j·m, (j+1)·m) of the step's range of the global order (m: micro-batch size).
Rank r of W computes micro-batches j = r, W + r, 2·W + r, … So the tokens of a step, and the samples of each
micro-batch's loss, are the same at any number of ranks. A loader's whole state is `consumed`.

Legend: B sequences of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.data.corpus import Corpus
from moe.data.order import Mixture, quotas, shuffled
from moe.data.packing import NO_TARGET, Sample, empty_sample, full_samples, held_out_samples, pack
from moe.data.readers import DataError


@dataclass(slots=True)
class Batch:
    """One micro-batch. `labels_BS[b, t]` is the target of position t, −100 if the next token opens a document or is
    none that is learnt from.

    `sample_ids_B` is the sample's number in the run's global order (−1: padding of a held-out batch); `source_ids_B`
    indexes `Corpus.source_names`. `real_T` are the places b·S + s of the T tokens that don't only fill up a sequence or
    the batch, ascending; None where none does. `document_lengths` are those of all documents, row by row: the host
    knows them, so attention on a GPU needn't read them back.
    """

    input_ids_BS: Tensor  # int64
    labels_BS: Tensor  # int64
    document_ids_BS: Tensor  # int32, from 0 in each sequence, non-decreasing
    sample_ids_B: Tensor  # int64
    source_ids_B: Tensor  # int64
    real_T: Tensor | None = None  # int64
    document_lengths: list[int] | None = None  # Σ = B·S; None: they weren't counted

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of a model's forward pass, beside token ids and labels."""
        names = ("document_ids_BS", "document_lengths", "real_T")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens(self) -> int:
        """T: without those that only fill up."""
        return self.input_ids_BS.numel() if self.real_T is None else len(self.real_T)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; to CUDA through pinned memory, so that the host goes on while it travels."""
        if device.type == "cpu":
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        there: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return Batch(**there)


class Loader:
    """Endless training batches from weighted sources; each epoch of a source is a new permutation of its samples.

    `consumed` counts the samples of all ranks together; setting it resumes exactly there. Raises DataError when
    `global_batch_size` isn't a multiple of `micro_batch_size × world_size`, or a source holds less than one sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"train.global_batch_size={global_batch_size} must be divisible by train.micro_batch_size="
                f"{micro_batch_size} × {world_size} ranks"
            )
        self._corpus, self._streams = corpus, corpus.train
        self._samples = [
            full_samples(stream, sequence_length, name)
            for stream, name in zip(corpus.train, corpus.source_names, strict=True)
        ]
        self._sequence_length, self._micro, self._global = sequence_length, micro_batch_size, global_batch_size
        self._rank, self._world_size, self._seed = rank, world_size, seed
        packed = any(stream.packed_length is not None for stream in self._streams)
        # A packed row or document is seen once an epoch; text end to end is seen once or less.
        self._mixture = Mixture(corpus.weights, seed, whole_epochs=packed)
        self.consumed = 0

    @property
    def epoch_samples(self) -> int:
        """Samples of all sources together: one pass, if they are mixed in proportion to their tokens."""
        return sum(self._samples)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step; advances `consumed` by the global batch."""
        first = self.consumed
        stride = self._micro * self._world_size
        starts = range(first + self._rank * self._micro, first + self._global, stride)
        batches = [self._batch(range(start, start + self._micro)) for start in starts]
        self.consumed = first + self._global
        return batches

    def _batch(self, sample_ids: range) -> Batch:
        located = [self._mixture.locate(sample) for sample in sample_ids]
        samples = [self._sample(source, nth) for source, nth in located]
        return _collate(samples, list(sample_ids), [source for source, _ in located])

    def _sample(self, source: int, nth: int) -> Sample:
        epoch, place = divmod(nth, self._samples[source])
        index = shuffled(place, self._samples[source], (self._seed, source, epoch))
        return pack(self._streams[source], index, self._sequence_length, self._corpus.tokenizer.eos_id)


def held_out_batches(
    corpus: Corpus,
    *,
    sequence_length: int,
    micro_batch_size: int,
    max_sequences: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """This rank's share of at most `max_sequences` held-out sequences, the same set at any number of ranks.

    Each source gets a share by its weight (at least one) and gives sequences evenly spread over its held-out text; a
    source with fewer sequences than its share gives all it has, and no other source gives more. Every rank gets the
    same number of batches; the last ones are padded with sequences without targets. Raises DataError when
    `max_sequences` is less than the number of sources.
    """
    if max_sequences < len(corpus.source_names):
        raise DataError(
            f"train.eval_sequences={max_sequences} must be ≥ {len(corpus.source_names)}, the number of sources"
        )
    chosen: list[tuple[int, int]] = []
    for source, quota in enumerate(quotas(corpus.weights, max_sequences)):
        available = held_out_samples(corpus.held_out[source], sequence_length)
        count = min(quota, available)
        chosen += [(source, i * available // count) for i in range(count)]
    pad_id = corpus.tokenizer.eos_id
    per_round = micro_batch_size * world_size
    rounds = -(-len(chosen) // per_round)
    batches = []
    for number in range(rounds):
        start = number * per_round + rank * micro_batch_size
        own = chosen[start : start + micro_batch_size]
        samples = [pack(corpus.held_out[source], i, sequence_length, pad_id) for source, i in own]
        missing = micro_batch_size - len(own)
        samples += [empty_sample(sequence_length, pad_id)] * missing
        sample_ids = [*range(start, start + len(own)), *[-1] * missing]
        batches.append(_collate(samples, sample_ids, [source for source, _ in own] + [0] * missing))
    return batches


def _collate(samples: list[Sample], sample_ids: list[int], source_ids: list[int]) -> Batch:
    sequence_length, real_T = len(samples[0].input_ids_L), None
    if any(sample.length < sequence_length for sample in samples):
        starts = range(0, len(samples) * sequence_length, sequence_length)
        parts = [np.arange(start, start + sample.length) for start, sample in zip(starts, samples, strict=True)]
        real_T = torch.from_numpy(np.concatenate(parts))
    documents_BS = np.stack([sample.document_ids_L for sample in samples])
    return Batch(
        input_ids_BS=torch.from_numpy(np.stack([sample.input_ids_L for sample in samples])),
        labels_BS=torch.from_numpy(np.stack([sample.labels_L for sample in samples])),
        document_ids_BS=torch.from_numpy(documents_BS),
        sample_ids_B=torch.tensor(sample_ids, dtype=torch.int64),
        source_ids_B=torch.tensor(source_ids, dtype=torch.int64),
        real_T=real_T,
        document_lengths=_document_lengths(documents_BS),
    )


def _document_lengths(documents_BS: np.ndarray) -> list[int]:
    starts = np.flatnonzero(np.diff(documents_BS, axis=1, prepend=-1))  # ids are ≥ 0, so every row begins a document
    lengths: list[int] = np.diff(starts, append=documents_BS.size).tolist()
    return lengths


def token_counts(batches: Iterable[Batch], vocab_size: int) -> Tensor:
    """[V] int64: how often each id is a target.

    Summed over ranks and normalised, the entropy of these counts is the unigram entropy: the loss of a model that knows
    only how frequent each token is.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches:
        targets = batch.labels_BS[batch.labels_BS != NO_TARGET]
        counts_V += torch.bincount(targets, minlength=vocab_size)
    return counts_V
