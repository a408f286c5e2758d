"""The plain reference for all attention back-ends, with all scores in memory; and torch's SDPA in this layout.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension, C queries of a block, K keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe.kernels.attention.pattern import Attend, pattern_mask
from moe.kernels.policy import widen


def naive_attend(length: int, window: int | None, document_ids_BS: Tensor | None, device: Any) -> Attend:
    """softmax(q kᵀ / √D) v in float32 or float64, on any device."""
    return partial(_naive, mask=pattern_mask(length, window, document_ids_BS, device))


def _naive(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, mask: Tensor) -> Tensor:
    groups = q_BSND.shape[2] // k_BSGD.shape[2]
    q, k, v = (widen(tensor).transpose(1, 2) for tensor in (q_BSND, k_BSGD, v_BSGD))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores_BNSS = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    probs_BNSS = scores_BNSS.masked_fill(~mask, float("-inf")).softmax(-1)
    return (probs_BNSS @ v).transpose(1, 2).flatten(2).to(q_BSND.dtype)


def sdpa(q_BCND: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Tensor | None) -> Tensor:
    """Attention's output [B, C, N, D]. Without a mask it is causal, with as many keys as queries."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BCND, k_BKGD, v_BKGD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)
