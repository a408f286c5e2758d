"""One text's cache, kept from one call to the next: the tokens that two texts begin with are computed once."""

from __future__ import annotations

from itertools import takewhile

from moe.model.cache import KVCache
from moe.model.transformer import Transformer


class KeptCache:
    """`ids` are the tokens whose keys and values are in the cache. For one text at a time, of one model."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._cache: KVCache | None = None

    def begin(self, model: Transformer, ids: list[int], positions: int) -> KVCache:
        """A cache for a text of up to `positions` tokens that begins with `ids`; its `length` says how many of them it
        holds, at most all but the last, whose logits are wanted. Until `end`, this object holds nothing."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False))
        common, cache = min(sum(1 for _ in same), len(ids) - 1), self._cache
        self.ids, self._cache = [], None
        if cache is None or not common or not cache.rewind(common):
            return KVCache(model.config, 1, positions, model.device, model.dtype)
        return cache.grown(positions)

    def end(self, cache: KVCache, ids: list[int]) -> None:
        """Keeps `cache`, into which `ids` were fed."""
        self.ids, self._cache = ids[: cache.length], cache
