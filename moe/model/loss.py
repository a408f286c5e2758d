"""The language-model loss from the head's input, without storing the whole batch's logits. T tokens, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy, slice_rows
from moe.kernels.policy import recomputed
from moe.model.linear import plain_weight


def head_loss(head: nn.Module, x_TH: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
    """Σ over labels ≠ −100 of −log softmax(head(x))[label]; a scalar, float32 (float64 for float64 inputs).

    A head that isn't a plain linear layer runs on slices of tokens, which the backward pass recomputes.
    """
    weight = plain_weight(head)
    if weight is not None:
        return linear_cross_entropy(x_TH, weight, labels_T)
    rows = slice_rows(x_TH.device.type, vocab_size)
    slices = zip(x_TH.split(rows), labels_T.split(rows), strict=True)
    return torch.stack([recomputed(_slice_loss, head, x, labels) for x, labels in slices]).sum()


def _slice_loss(head: nn.Module, x_TH: Tensor, labels_T: Tensor) -> Tensor:
    return cross_entropy_reference(head(x_TH), labels_T)
