"""The language-model head fused with its cross-entropy, one slice of tokens at a time.

The logits of a whole batch are the largest tensor of a small model ([T, V] float32), and plain cross-entropy makes six
passes over them. Here each slice's logits are overwritten by their gradient, used, and freed.
Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.bfloat16_products import mm, widens
from moe.kernels.float32_products import float32_products
from moe.kernels.policy import runs_fused, wide_dtype, widen

IGNORED = -100
SLICE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}  # logits per slice: fits a core's cache, or keeps a GPU busy

BLOCK_ELEMENTS = 1 << 18  # of a slice that a CPU widens to float32 at a time


def slice_rows(device: str, vocab: int) -> int:
    """Tokens per slice."""
    return max(64, SLICE_ELEMENTS.get(device, SLICE_ELEMENTS["cpu"]) // vocab)


def linear_cross_entropy(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """Σ over labels ≠ −100 of −log softmax(x Wᵀ)[label]; a scalar, float32 (float64 for float64 inputs)."""
    return HandWrittenLinearCrossEntropy.apply(x_TH, weight_VH, labels_T, torch.is_grad_enabled())  # type: ignore[return-value]


def cross_entropy_reference(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Σ over labels ≠ −100 of −log softmax(logits)[label], with autograd's own backward pass."""
    return F.cross_entropy(widen(logits_TV), labels_T, ignore_index=IGNORED, reduction="sum")


class HandWrittenLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    @float32_products
    def forward(ctx: Any, x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, need_grad: bool) -> Tensor:
        tokens, vocab = x_TH.shape[0], weight_VH.shape[0]
        rows, wide = slice_rows(x_TH.device.type, vocab), wide_dtype(x_TH.dtype)
        total = torch.zeros((), dtype=wide, device=x_TH.device)
        grad_x = torch.empty_like(x_TH) if need_grad and ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight_VH, dtype=wide) if need_grad and ctx.needs_input_grad[1] else None
        needs = grad_x is not None or grad_w is not None
        ctx.weight_dtype, widened = weight_VH.dtype, widens(x_TH.device, x_TH.dtype)
        if widened:  # once for all slices, whose logits then stay float32
            weight_VH = weight_VH.float()
        for start in range(0, tokens, rows):
            x, labels = x_TH[start : start + rows], labels_T[start : start + rows]
            if widened:
                x = x.float()
            grad = mm(x, weight_VH.t())
            total += to_gradient(grad, labels, needs).sum()
            if grad_x is not None and grad_x.dtype == grad.dtype:
                mm(grad, weight_VH, out=grad_x[start : start + rows])
            elif grad_x is not None:
                grad_x[start : start + rows] = mm(grad, weight_VH)
            if grad_w is not None and grad_w.dtype == grad.dtype:
                grad_w.addmm_(grad.T, x)
            elif grad_w is not None:
                grad_w += mm(grad.t(), x)
        ctx.save_for_backward(*(g for g in (grad_x, grad_w) if g is not None))
        ctx.has = grad_x is not None, grad_w is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved, (scale,) = list(ctx.saved_tensors), grads
        grad_x = saved.pop(0) * scale if ctx.has[0] else None
        grad_w = (saved.pop(0) * scale).to(ctx.weight_dtype) if ctx.has[1] else None
        return grad_x, grad_w, None, None


def to_gradient(logits_TV: Tensor, labels_T: Tensor, needs_gradient: bool) -> Tensor:
    """−log softmax(logits)[label] of each row [T], 0 for a label of −100. With `needs_gradient` the logits are
    overwritten by their gradient, softmax − one-hot.

    A CPU takes few rows at a time through the element-wise passes, so that they stay in a core's cache.
    """
    if runs_fused(logits_TV):
        from moe.kernels.fused import cross_entropy

        return cross_entropy.to_gradient(logits_TV, labels_T, IGNORED, needs_gradient)
    rows, vocab = logits_TV.shape
    block = max(1, BLOCK_ELEMENTS // vocab) if logits_TV.device.type == "cpu" else max(1, rows)
    losses = []
    for logits, labels in zip(logits_TV.split(block), labels_T.unsqueeze(1).split(block), strict=True):
        wide = widen(logits)
        target, valid = labels.clamp(min=0), (labels != IGNORED).to(wide.dtype)
        top = wide.amax(-1, keepdim=True)
        at_target = wide.gather(1, target)
        exps = wide.sub_(top).exp_()
        sums = exps.sum(-1, keepdim=True)
        losses.append((sums.log().add_(top).sub_(at_target) * valid).squeeze(1))
        if needs_gradient:
            exps.mul_(valid / sums).scatter_add_(1, target, -valid)
            if exps.dtype != logits.dtype:
                logits.copy_(exps)
    return torch.cat(losses)
