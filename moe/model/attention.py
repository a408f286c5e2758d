"""Causal attention over packed documents, with grouped queries and a sliding window.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension, W window.
Query i sees key j when both are in one document and 0 ≤ i − j < W: the window counts the query's own key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.rope import rotate


def visible(rows_Q: Tensor, columns_K: Tensor, window: int | None) -> Tensor:
    """Boolean [Q, K]: does the query at position rows_Q[q] see the key at columns_K[k]?"""
    distance_QK = rows_Q[:, None] - columns_K[None, :]
    seen_QK = distance_QK >= 0
    return seen_QK if window is None else seen_QK & (distance_QK < window)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor, mask: Tensor | None) -> Tensor:
        heads = (*x_BSH.shape[:2], -1, self.head_dim)
        q_BNSD = rotate(self.q_proj(x_BSH).view(heads), cos_SD, sin_SD).transpose(1, 2)
        k_BGSD = rotate(self.k_proj(x_BSH).view(heads), cos_SD, sin_SD).transpose(1, 2)
        v_BGSD = self.v_proj(x_BSH).view(heads).transpose(1, 2)
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(out_BNSD.transpose(1, 2).flatten(2))


def build_mask(length: int, window: int | None, document_ids_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Boolean [B or 1, 1, S, S], or None where plain causal attention is meant."""
    if document_ids_BS is None and (window is None or window >= length):
        return None
    positions_S = torch.arange(length, device=device)
    mask_BSS = visible(positions_S, positions_S, window)[None]
    if document_ids_BS is not None:
        mask_BSS = mask_BSS & (document_ids_BS[:, :, None] == document_ids_BS[:, None, :])
    return mask_BSS[:, None]
