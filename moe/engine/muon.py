"""Muon: momentum, orthogonalised (Keller Jordan, 2024: kellerjordan.github.io/posts/muon; arXiv 2502.16982).

For each matrix W [O, I] with gradient G, momentum μ, learning rate η and weight decay λ:

    M ← μ M + (1 − μ) G
    U = μ M + (1 − μ) G                                    Nesterov's momentum
    W ← (1 − η λ) W − η · 0.2 √max(O, I) · orthogonalized(U)

`orthogonalized` gives all singular values of U a size near 1. The factor makes the update's root mean square that of a
typical AdamW update, 0.2, so that AdamW's learning rate and weight decay fit (arXiv 2502.16982, equation 4).

Legend: N matrices, O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.config.optim import ITERATIONS, MOST_ELEMENTS
from moe.engine.adamw import AdamW
from moe.engine.base import MOMENTUM

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; Keller Jordan, 2024
SMALLEST_NORM = 1e-7  # a matrix with a smaller norm, as that of an expert without tokens, isn't scaled up to 1
UPDATE_RMS = 0.2


def orthogonalized(u_NOI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each matrix U S Vᵀ becomes about U Vᵀ: five Newton–Schulz steps in `dtype` bring singular values that are at
    least 1/500 of the matrix's norm to between 0.68 and 1.21. Float32 [N, O, I]."""
    a, b, c = COEFFICIENTS
    tall = u_NOI.shape[-2] > u_NOI.shape[-1]
    x = u_NOI.mT if tall else u_NOI
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)).to(dtype)
    for _ in range(ITERATIONS):  # x ← a·x + (b·x xᵀ + c·(x xᵀ)²) x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + size) of one of the optimizer's tensors: whole matrices of `shape`, or, if other ranks
    hold the rest of it, one matrix's elements from `skip` on."""

    start: int
    size: int
    shape: tuple[int, int]
    skip: int = 0

    @property
    def is_whole(self) -> bool:
        return self.size % math.prod(self.shape) == 0


class Matrices(Protocol):
    """Where the matrices of one of the optimizer's tensors are."""

    pieces: list[Piece]

    def completed(self, flat: Tensor) -> list[Tensor]:
        """For each piece of the tensor `flat` [elements] all elements of its matrices, [N, O, I]. A collective if other
        ranks have a part of them."""
        ...


class OwnMatrices:
    """A tensor that is nothing but whole matrices."""

    def __init__(self, tensor: Tensor, shape: tuple[int, int]) -> None:
        self.pieces = [Piece(0, tensor.numel(), shape)]

    def completed(self, flat: Tensor) -> list[Tensor]:
        return [flat.view(-1, *piece.shape) for piece in self.pieces]


class Muon(AdamW):
    """Muon for parameter groups with `muon=True`, AdamW for the others.

    `matrices` has to have an entry for every tensor of the former before the first step. `dtype` is that of the
    Newton–Schulz steps. NOTE: a step overwrites the gradients of these tensors.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.matrices: dict[Tensor, Matrices] = {}
        self._momentum, self._dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for tensor in group["params"]:
                    self._update(tensor, group["lr"], group["weight_decay"])

    def _update(self, tensor: Tensor, lr: float, weight_decay: float) -> None:
        assert tensor.grad is not None
        state, gradient = self.state[tensor], tensor.grad
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(tensor)
        state[MOMENTUM].lerp_(gradient, 1 - self._momentum)
        flat = gradient.lerp_(state[MOMENTUM], self._momentum).view(-1)
        matrices, weights = self.matrices[tensor], tensor.view(-1)
        weights.mul_(1 - lr * weight_decay)
        for piece, u_NOI in zip(matrices.pieces, matrices.completed(flat), strict=True):
            size, start, skip = math.prod(piece.shape), piece.start, piece.skip
            scale = UPDATE_RMS * math.sqrt(max(piece.shape))
            for some_NOI in u_NOI.split(max(1, MOST_ELEMENTS // size)):
                update = orthogonalized(some_NOI, self._dtype).reshape(-1)[skip : skip + piece.size]
                weights[start : start + update.numel()].add_(update, alpha=-lr * scale)
                start += update.numel()
