"""Which query sees which key: the same pattern for all back-ends.

Legend: B batch, S sequence, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, N, D], k and v [B, S, G, D] → [B, S, N·D]


def visible(queries_Q: Tensor, keys_K: Tensor, window: int | None) -> Tensor:
    """Boolean [Q, K]: does the query at position queries_Q[q] see the key at position keys_K[k] of its document?"""
    distance_QK = queries_Q[:, None] - keys_K[None, :]
    seen_QK = distance_QK >= 0
    return seen_QK if window is None else seen_QK & (distance_QK < window)


def pattern_mask(length: int, window: int | None, document_ids_BS: Tensor | None, device: Any) -> Tensor:
    """The whole pattern, boolean [B or 1, 1, S, S]: quadratic, for the reference only."""
    positions_S = torch.arange(length, device=device)
    mask_BSS = visible(positions_S, positions_S, window)[None]
    if document_ids_BS is not None:
        mask_BSS = mask_BSS & (document_ids_BS[:, :, None] == document_ids_BS[:, None, :])
    return mask_BSS[:, None]


def document_bounds(document_ids_BS: Tensor | None, batch: int, length: int, device: Any) -> Tensor:
    """int32 [documents + 1]: where each document of the flattened batch begins, and the end. Every row begins one."""
    if document_ids_BS is None:
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
    starts_BS = torch.ones(batch, length, dtype=torch.bool, device=device)
    starts_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_full((1,), batch * length))).int()
