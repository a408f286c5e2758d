"""The order of samples as a function of one integer: nothing to save but how many were consumed.

Sample g of a run → source and its nth sample (`Mixture`) → epoch and place in the source (`shuffled`). Each step is a
closed form of (seed, g), so resuming is instant and the number of ranks doesn't matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

MIN_BLOCK = 1 << 10
MAX_BLOCK = 1 << 20
SMALLEST_QUOTA = 64  # samples per block of the rarest source, so that rounding its share is off by < 1 %
ROUNDS = 6
MASK_64 = (1 << 64) - 1


def shuffled(index: int, count: int, key: Sequence[int]) -> int:
    """Where `index` goes in a pseudo-random permutation of 0 … count − 1 that `key` chooses; O(1) memory.

    A Feistel network permutes the 4^h ≥ count numbers of 2h bits, and numbers outside the range walk on along their
    cycle until they are inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 2).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little") for part in key), digest_size=8 * ROUNDS).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < count:
            return index


def _mix(value: int) -> int:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK_64
    return value ^ value >> 31


class Mixture:
    """Interleaves sources by weight: every block of samples holds each source's quota, in an order of its own.

    The block is 1,024 samples, more where a source is rarer than 1 in 16; quotas are the weights rounded by largest
    remainder, at least 1.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, np.float64) / np.sum(weights)
        block = MIN_BLOCK
        while block < MAX_BLOCK and block * shares.min() < SMALLEST_QUOTA:
            block *= 2
        self._seed, self.block = seed, block
        self.quotas = quotas(shares, block)
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, n): sample number `sample` of the run is the nth of that source, n from 0."""
        number, place = divmod(sample, self.block)
        sources, nths = self._block(number)
        source = int(sources[place])
        return source, number * self.quotas[source] + int(nths[place])

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in a block: its source, and how many of that source came before it in the block."""
        if self._cached is None or self._cached[0] != number:
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
            np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, number]))).shuffle(sources)
            nths = np.empty_like(sources)
            for source, quota in enumerate(self.quotas):
                nths[sources == source] = np.arange(quota)
            self._cached = (number, sources, nths)
        return self._cached[1], self._cached[2]


def quotas(shares: np.ndarray, total: int) -> list[int]:
    """`total` divided by shares (which sum to 1): largest remainders, at least 1 each. Raises ValueError when total
    is less than the number of shares."""
    if total < len(shares):
        raise ValueError(f"{total} samples can't hold {len(shares)} sources")
    counts = np.maximum(1, np.floor(shares * total)).astype(int)
    while counts.sum() < total:
        counts[np.argmax(shares * total - counts)] += 1
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 1, counts - shares * total, -np.inf))] -= 1
    return counts.tolist()
