"""What all layers of one forward pass share.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from moe.config import AttentionBackend
from moe.kernels.attention import Attend, make_attend
from moe.kernels.rotary import RotaryTable
from moe.model.cache import KVCache
from moe.sparse import Randomness, RealTokens

AFTER_ATTENTION, ROUTER, AFTER_MLP, ATTENTION = range(4)  # places of a block that take random numbers


@dataclass(slots=True)
class Context:
    table: RotaryTable
    backend: AttentionBackend | None  # for the tokens of this pass; None when the cache has earlier ones
    shape: tuple[int, int]
    device: torch.device
    document_ids_BS: Tensor | None
    cache: KVCache | None
    randomness: Randomness | None
    real: RealTokens | None = None  # the tokens that are routed; None: all
    document_lengths: list[int] | None = None  # of all documents, row by row; None: attention counts the ids
    _attends: dict[int | None, Attend] = field(default_factory=dict)

    def halves(self) -> list[Context]:
        """Of the first half of the sequences, rounded up, and of the others. Without a cache."""
        assert self.cache is None
        batch, length = self.shape
        middle, made = -(-batch // 2), []
        for first, stop in ((0, middle), (middle, batch)):
            documents = None if self.document_ids_BS is None else self.document_ids_BS[first:stop]
            randomness, real = self.randomness, self.real
            if randomness is not None:
                randomness = replace(randomness, sample_ids_B=randomness.sample_ids_B[first:stop])
            if real is not None:
                real = real.of_sequences(first, stop)
            lengths = self.document_lengths
            if lengths is not None:
                lengths = _within(lengths, first * length, stop * length)
            of_these = documents, None, randomness, real, lengths
            made.append(Context(self.table, self.backend, (stop - first, length), self.device, *of_these))
        return made

    def randomness_at(self, layer: int, place: int) -> Randomness | None:
        """The random numbers of a place in a layer; None outside training."""
        return None if self.randomness is None else self.randomness.fork(layer).fork(place)

    def attend(self, layer: int, window: int | None, q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
        """Attention of one layer, [B, S, N·D]. Layers with the same window share one mask."""
        if self.backend is None:
            assert self.cache is not None
            return self.cache.attend(layer, window, q_BSND, k_BSGD, v_BSGD)
        if self.cache is not None:
            self.cache.write(layer, k_BSGD, v_BSGD)
        if window not in self._attends:
            documents = self.document_ids_BS, self.device, self.document_lengths
            self._attends[window] = make_attend(self.backend, self.shape, window, *documents)
        return self._attends[window](q_BSND, k_BSGD, v_BSGD)


def _within(lengths: list[int], first: int, stop: int) -> list[int]:
    """Of the documents that end after place `first` of the batch, up to `stop`."""
    return [length for length, end in zip(lengths, accumulate(lengths), strict=True) if first < end <= stop]
