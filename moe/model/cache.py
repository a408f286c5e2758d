"""The rolling key/value cache: one slot per key of the window, however long the text is.

Legend: B batch, C new tokens, L slots, K keys, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.kernels.attention.naive import sdpa
from moe.kernels.attention.pattern import visible


@dataclass(slots=True)
class OneMore:
    """Each layer's slots for one more token of every row, to be written before `keys` and `values` are read."""

    new_keys: Sequence[Tensor]  # [B, G, D]
    new_values: Sequence[Tensor]
    keys: Sequence[Tensor]  # [B, G, K, D], the new token's included
    values: Sequence[Tensor]
    seen_B11K: Tensor  # bool: a row's newest document


class KVCache:
    """Keys and values of the last `slots` positions of every layer; position p is in slot p mod slots.

    One forward pass is `begin`, then `attend` or `write` once per layer, then `commit`; or `one_more`, which leaves
    attention to the caller, then `commit`. All rows are at the same
    position: prompts of different lengths are padded on the left, with the padding as a document of its own.
    Inference only (no gradients).
    """

    def __init__(
        self, config: ModelConfig, batch: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.max_length, self.length = config, max_length, 0
        window = config.sliding_window  # the widest of all layers
        self.slots = max_length if window is None else min(window, max_length)
        # A head's keys lie side by side, as attention reads them.
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, self.slots, config.head_size)
        self._keys, self._values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self._positions_L = torch.full((self.slots,), -1, device=device)
        self._documents_BL = torch.zeros(batch, self.slots, dtype=torch.int64, device=device)
        self._masks: dict[int | None, Tensor] = {}
        self._in_pass = False  # a forward pass has begun; it stays so where it was interrupted

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def batch(self) -> int:
        return self._documents_BL.shape[0]

    def rewind(self, length: int) -> bool:
        """Forgets all positions from `length` on; False, with nothing changed, where keys that its next token would see
        have been overwritten, or the last forward pass was interrupted."""
        if self._in_pass or self.length > max(self.slots, length + 1):
            return False
        self._positions_L[self._positions_L >= length] = -1
        self.length = min(length, self.length)
        return True

    def grown(self, max_length: int) -> KVCache:
        """A cache for at least `max_length` positions, with what is in this one; twice as many as this one has where
        those aren't enough."""
        if max_length <= self.max_length:
            return self
        device, dtype = self._keys.device, self._keys.dtype
        most = max(max_length, min(2 * self.max_length, self.config.max_position_embeddings))
        larger = KVCache(self.config, self._keys.shape[1], most, device, dtype)
        larger.length, used = self.length, self.slots
        larger._keys[:, :, :used], larger._values[:, :, :used] = self._keys, self._values
        larger._positions_L[:used], larger._documents_BL[:, :used] = self._positions_L, self._documents_BL
        return larger

    def begin(self, count: int, document_ids_BC: Tensor | None) -> None:
        """Starts a forward pass over `count` new tokens. Raises ValueError past max_length."""
        end = self.length + count
        if end > self.max_length:
            raise ValueError(f"cache holds max_length={self.max_length} positions, position {end - 1} doesn't fit")
        self._in_pass = True
        device, batch = self._positions_L.device, self._documents_BL.shape[0]
        new_C = torch.arange(self.length, end, device=device)
        documents_BC = torch.zeros(batch, count, dtype=torch.int64, device=device)
        if document_ids_BC is not None:
            documents_BC = document_ids_BC.long()
        # Until the cache is full nothing is overwritten, and a single token overwrites only a key outside its window.
        # Several tokens could overwrite keys that the first of them still sees: they attend to the old slots and the
        # new keys, concatenated.
        self._in_place = end <= self.slots or count == 1
        old_positions, old_documents = self._positions_L.clone(), self._documents_BL.clone()
        self._kept = min(count, self.slots)
        self._where = new_C[-self._kept :] % self.slots
        self._positions_L[self._where] = new_C[-self._kept :]
        self._documents_BL[:, self._where] = documents_BC[:, -self._kept :]
        if self._in_place:
            keys_K, documents_BK = self._positions_L, self._documents_BL
            self._used = min(end, self.slots)
            keys_K, documents_BK = keys_K[: self._used], documents_BK[:, : self._used]
        else:
            keys_K = torch.cat((old_positions, new_C))
            documents_BK = torch.cat((old_documents, documents_BC), dim=1)
        self._new_C, self._keys_K = new_C, keys_K
        self._open_BCK = (keys_K >= 0) & (documents_BC[:, :, None] == documents_BK[:, None, :])
        self._count = count

    def write(self, layer: int, k_BCGD: Tensor, v_BCGD: Tensor) -> None:
        self._keys[layer][:, :, self._where] = k_BCGD[:, -self._kept :].transpose(1, 2)
        self._values[layer][:, :, self._where] = v_BCGD[:, -self._kept :].transpose(1, 2)

    def attend(self, layer: int, window: int | None, q_BCND: Tensor, k_BCGD: Tensor, v_BCGD: Tensor) -> Tensor:
        """The new tokens' attention to the cached tokens and themselves, [B, C, N·D]; caches their keys and values."""
        if window not in self._masks:
            self._masks[window] = (visible(self._new_C, self._keys_K, window) & self._open_BCK)[:, None]
        if self._in_place:
            self.write(layer, k_BCGD, v_BCGD)
            keys, values = self._keys[layer][:, :, : self._used], self._values[layer][:, :, : self._used]
        else:
            keys = torch.cat((self._keys[layer], k_BCGD.transpose(1, 2)), dim=2)
            values = torch.cat((self._values[layer], v_BCGD.transpose(1, 2)), dim=2)
            self.write(layer, k_BCGD, v_BCGD)
        return sdpa(q_BCND, keys.transpose(1, 2), values.transpose(1, 2), self._masks[window]).flatten(2)

    def one_more(self) -> OneMore:
        """Starts a pass over one token of each row, in the document of the row's last token. Every cached key must be
        inside its window, as it is where all layers have the same. Raises ValueError past max_length, and for an empty
        cache."""
        position = self.length
        if not 0 < position < self.max_length:
            raise ValueError(f"cache with {position} of max_length={self.max_length} positions can't take one more")
        self._in_pass = True
        slot, used = position % self.slots, min(position + 1, self.slots)
        self._positions_L[slot] = position
        newest_B1 = self._documents_BL[:, (position - 1) % self.slots, None].clone()
        self._documents_BL[:, slot, None] = newest_B1
        self._count = 1
        return OneMore(
            self._keys[:, :, :, slot].unbind(0),
            self._values[:, :, :, slot].unbind(0),
            self._keys[:, :, :, :used].unbind(0),
            self._values[:, :, :, :used].unbind(0),
            (self._documents_BL[:, :used] == newest_B1)[:, None, None],
        )

    def commit(self) -> None:
        self._in_pass = False
        self.length += self._count
        self._masks = {}
