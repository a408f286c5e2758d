"""NEFTune: noise on the embeddings while fine-tuning (arXiv 2310.05914, algorithm 1). B batch, S sequence, H hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.sparse import Randomness

EMBEDDINGS = -1  # as a layer's number, for `Randomness.fork`


def noisy(x_BSH: Tensor, document_ids_BS: Tensor | None, alpha: float, randomness: Randomness) -> Tensor:
    """x plus uniform noise in ±α / √(L·H), with L the length of a token's own document: packing rows into a sequence
    leaves the size of their noise as it is."""
    _, length, hidden = x_BSH.shape
    noise_BSH = 2 * randomness.fork(EMBEDDINGS).uniform(length, hidden) - 1
    if document_ids_BS is None:
        size: Tensor | float = alpha / math.sqrt(length * hidden)
    else:
        size = (alpha / (_lengths(document_ids_BS) * hidden).sqrt())[..., None]
    return x_BSH + (noise_BSH * size).to(x_BSH.dtype)


def _lengths(document_ids_BS: Tensor) -> Tensor:
    """[B, S]: how many tokens the document of each token has in its sequence."""
    begins_BS = F.pad(document_ids_BS[:, 1:] != document_ids_BS[:, :-1], (1, 0)).long()
    numbers_BS = begins_BS.cumsum(1)
    counts_BS = torch.zeros_like(numbers_BS).scatter_add_(1, numbers_BS, torch.ones_like(numbers_BS))
    return counts_BS.gather(1, numbers_BS)
