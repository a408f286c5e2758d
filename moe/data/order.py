"""The order of samples, computed from the seed and the sample's number: a resume needs only how many were consumed.

Sample g of a run → source and n, its number among that source's samples (`Mixture`) → epoch and place in the source
(`shuffled`). Each of these is computed directly from (seed, g), so resuming is instant and the number of ranks doesn't
matter.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

MIN_BLOCK = 1 << 10
MAX_BLOCK = 1 << 20
SMALLEST_QUOTA = 64  # samples per block of the rarest source, so that rounding changes its share by < 1 %
ROUNDS = 6  # of the Feistel network
MASK_64 = (1 << 64) - 1


def shuffled(index: int, count: int, key: Sequence[int]) -> int:
    """The value at `index` of the pseudo-random permutation of 0 … count − 1 that `key` selects; O(1) memory.

    A Feistel network permutes the 4^h ≥ count numbers of 2h bits; a result outside the range is permuted again until
    it is inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 2).
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
    """splitmix64's finaliser: every input bit affects every output bit."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK_64
    return value ^ value >> 31


class Mixture:
    """Interleaves sources by weight: each block of samples holds every source's quota, in another order.

    The block is 1,024 samples, more where a source is rarer than 1 in 16; quotas are the weights rounded by largest
    remainder, at least 1. With `whole_epochs` a source's samples come in their order, so that all of an epoch come
    before any of the next; without, only block by block.
    """

    def __init__(self, weights: Sequence[float], seed: int, *, whole_epochs: bool = False) -> None:
        total = sum(weights)
        shares = [weight / total for weight in weights]
        block = MIN_BLOCK
        while block < MAX_BLOCK and block * min(shares) < SMALLEST_QUOTA:
            block *= 2
        self._seed, self.block, self._whole_epochs = seed, block, whole_epochs
        self._counted = lru_cache(2)(self._count)
        self.quotas = quotas(shares, block)
        self._ends = list(accumulate(self.quotas))

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, n): sample `sample` of the run is sample n of that source. Every n of a source comes once."""
        number, place = divmod(sample, self.block)
        slot = shuffled(place, self.block, (self._seed, number))
        source = bisect_right(self._ends, slot)
        within = slot - (self._ends[source] - self.quotas[source])
        if self._whole_epochs:
            within = self._counted(number)[place] if len(self.quotas) > 1 else place
        return source, number * self.quotas[source] + within

    def _count(self, number: int) -> list[int]:
        """For each place of a block, how many places before it are of the same source."""
        counts, found = [0] * len(self.quotas), []
        for place in range(self.block):
            source = bisect_right(self._ends, shuffled(place, self.block, (self._seed, number)))
            found.append(counts[source])
            counts[source] += 1
        return found


def quotas(shares: Sequence[float], total: int) -> list[int]:
    """Divides `total` by `shares` (which sum to 1) into whole numbers: largest remainders, at least 1 each.

    Raises ValueError when `total` is less than the number of shares.
    """
    if total < len(shares):
        raise ValueError(f"{total} samples can't hold {len(shares)} sources")
    counts = [max(1, int(share * total)) for share in shares]
    missing = [share * total - count for share, count in zip(shares, counts, strict=True)]
    for _ in range(total - sum(counts)):
        index = max(range(len(counts)), key=missing.__getitem__)
        counts[index], missing[index] = counts[index] + 1, missing[index] - 1
    for _ in range(sum(counts) - total):  # the minimum of 1 made the sum too large
        index = min((i for i, count in enumerate(counts) if count > 1), key=missing.__getitem__)
        counts[index], missing[index] = counts[index] - 1, missing[index] + 1
    return counts
