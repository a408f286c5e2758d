"""Tokens that hold text, among others that only fill up their sequence: only the former are routed.

Shapes: B sequences, S positions, P = B·S places (row-major), T real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealTokens:
    """`places_T`, int64 and ascending: which of a batch's P places hold real tokens. If all of a loader's batch do,
    None takes this object's place. The number T is known to the host, so nothing waits for a GPU, but for
    `of_sequences`."""

    places_T: Tensor
    num_sequences: int
    length: int  # S

    def select(self, x_P: Tensor) -> Tensor:
        """x [P, …] → [T, …]."""
        return x_P.index_select(0, self.places_T)

    def spread(self, x_T: Tensor) -> Tensor:
        """x [T, …] → [P, …], zero elsewhere."""
        zeros_P = x_T.new_zeros(self.num_sequences * self.length, *x_T.shape[1:])
        return zeros_P.index_copy(0, self.places_T, x_T)

    def of_sequences(self, first: int, stop: int) -> RealTokens:
        """Those of sequences `first` to `stop` - 1. On a GPU it waits for the device."""
        start, end = torch.searchsorted(self.places_T, self.places_T.new_tensor([first, stop]) * self.length).tolist()
        return RealTokens(self.places_T[start:end] - first * self.length, stop - first, self.length)

    @cached_property
    def sequences_T(self) -> Tensor:
        """int64: the sequence of each token."""
        return self.places_T // self.length

    @cached_property
    def lengths_B(self) -> Tensor:
        """int64: how many each sequence has."""
        zeros_B = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.places_T.device)
        return zeros_B.scatter_add_(0, self.sequences_T, torch.ones_like(self.sequences_T))


def token_mean(x_T: Tensor) -> Tensor:
    """Mean over the first dim; zeros of no tokens, whose weight is 0."""
    return x_T.mean(0) if len(x_T) else x_T.sum(0)
