"""Random numbers as a function of (seed, step, layer, place in the layer, sample), never of a rank's generator.

They are the same for any number of ranks, after a resume, when activations are recomputed, and on any device, because
they are computed by integer arithmetic alone (splitmix64's finalizer, doi 10.1145/2714064.2660195, on a counter).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: int) -> int:
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)


def _mix_tensor(values: Tensor) -> Tensor:
    """`_mix` of every int64. Products wrap around as unsigned ones do; `>>` copies the sign bit, so it is masked."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return values ^ ((values >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True, slots=True)
class Randomness:
    """A source of random numbers for the samples of one micro-batch. `fork(number)` returns an independent one: one per
    layer, and in it one per place that needs numbers (dropout after attention, jitter, …)."""

    key: int
    sample_ids_B: Tensor  # int64, positions in the global order of samples

    @classmethod
    def of(cls, seed: int, step: int, sample_ids_B: Tensor) -> Randomness:
        return cls(_mix(seed & _MASK), sample_ids_B).fork(step)

    def fork(self, number: int) -> Randomness:
        return Randomness(_mix((self.key ^ ((number + 1) * _GOLDEN)) & _MASK), self.sample_ids_B)

    def uniform(self, *shape: int) -> Tensor:
        """float32 [B, *shape] in [0, 1), multiples of 2⁻²⁴."""
        ids_B = self.sample_ids_B
        keys_B = _mix_tensor(ids_B * _signed(_GOLDEN) ^ _signed(self.key))
        counter_N = torch.arange(1, math.prod(shape) + 1, device=ids_B.device) * _signed(_GOLDEN)
        bits_BN = _mix_tensor(keys_B[:, None] + counter_N) >> 40 & ((1 << 24) - 1)
        return (bits_BN.float() * 2.0**-24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """float32 [B, *shape] of N(0, 1), by the inverse of its distribution function."""
        return torch.special.ndtri(self._inside(*shape)).float()

    def gumbel(self, *shape: int) -> Tensor:
        """float32 [B, *shape] of the standard Gumbel distribution, −ln(−ln u)."""
        return -(-self._inside(*shape).log()).log().float()

    def _inside(self, *shape: int) -> Tensor:
        """float64 [B, *shape] in (0, 1), without its ends."""
        return self.uniform(*shape).double() + 2.0**-25

    def dropout(self, x_BSH: Tensor, rate: float) -> Tensor:
        """Zero a share `rate` of x's elements and scale the rest by 1 / (1 − rate) (Srivastava et al., JMLR 2014)."""
        keep_BSH = self.uniform(*x_BSH.shape[1:]) >= rate
        return x_BSH * (keep_BSH.to(x_BSH.dtype) / (1 - rate))

    def jitter(self, x_BSH: Tensor, epsilon: float) -> Tensor:
        """x times uniform noise in [1 − ε, 1 + ε) (Switch Transformer, arXiv 2101.03961, §2.2)."""
        return x_BSH * (1 + epsilon * (2 * self.uniform(*x_BSH.shape[1:]) - 1))
