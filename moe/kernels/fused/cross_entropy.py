"""Cross-entropy of rows of logits, which their gradient overwrites: two reads and one write.

The plain reference is in `moe.kernels.cross_entropy`.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.fused.launch import BLOCKS, launch


def to_gradient(logits_TV: Tensor, labels_T: Tensor, ignored: int, needs_gradient: bool) -> Tensor:
    """−log softmax(logits)[label] of each row, float32 [T], 0 for a label of `ignored`. With `needs_gradient`
    softmax − one-hot, 0 in ignored rows, overwrites the logits (contiguous)."""
    assert logits_TV.is_contiguous()
    losses_T = torch.empty(logits_TV.shape[0], dtype=torch.float32, device=logits_TV.device)
    if losses_T.numel():
        blocks = BLOCKS["cross_entropy"]
        constants = {"IGNORED": ignored, "GRADIENT": needs_gradient, "BLOCK": blocks.elements}
        launch(
            _to_gradient, (len(losses_T),), blocks, logits_TV, labels_T.contiguous(), losses_T, logits_TV.shape[1],
            **constants,
        )  # fmt: skip
    return losses_T


@triton.jit
def _to_gradient(
    logits_ptr, labels_ptr, losses_ptr, vocab, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    label = tl.load(labels_ptr + row)
    valid = label != IGNORED
    label = tl.where(valid, label, 0)
    scale = valid.to(tl.float32)
    at_label = tl.load(logits_ptr + label).to(tl.float32)
    # Each column of the block has a maximum of its own and the sum relative to it. They are joined at the end.
    tops = tl.full((BLOCK,), -3e38, tl.float32)
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        before = tops
        tops = tl.maximum(tops, logits)
        sums = sums * tl.exp(before - tops) + tl.exp(logits - tops)
    top = tl.reduce(tops, 0, tl.standard._elementwise_max)
    total = tl.reduce(sums * tl.exp(tops - top), 0, tl.standard._sum_combine)
    tl.store(losses_ptr + row, (tl.log(total) + top - at_label) * scale)
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)
            grad = tl.exp(logits - top) * (scale / total) - tl.where(column == label, scale, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < vocab)
