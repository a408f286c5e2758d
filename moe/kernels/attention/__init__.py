"""Causal attention over packed documents, with grouped queries and a sliding window: five back-ends, chosen here.

Query i sees key j when both are in one document and 0 ≤ i − j < W: the window counts the query's own key. (The
published reference code let it see one key more.) `W = None` is full causal attention. `naive` is the plain reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moe.config import AttentionBackend
from moe.errors import UserError
from moe.kernels.attention.block import block_attend
from moe.kernels.attention.flash3 import flash3_attend, flash3_obstacle
from moe.kernels.attention.flex import flex_attend, flex_obstacle
from moe.kernels.attention.naive import naive_attend
from moe.kernels.attention.pattern import Attend
from moe.kernels.attention.varlen import varlen_attend, varlen_obstacle


def resolve_attention(
    wanted: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionBackend, str]:
    """The back-end that will run, and why. Raises UserError when an explicit one can't run on the device and dtype."""
    if wanted in (AttentionBackend.naive, AttentionBackend.block):
        return wanted, "chosen"
    obstacles: dict[AttentionBackend, Callable[[], str]] = {  # the fastest first
        AttentionBackend.flash3: partial(flash3_obstacle, device, dtype, head_dim),
        AttentionBackend.varlen: partial(varlen_obstacle, device, dtype, head_dim),
        AttentionBackend.flex: partial(flex_obstacle, device),
    }
    if wanted is not AttentionBackend.auto:
        obstacle = obstacles[wanted]()
        if obstacle:
            raise UserError(f"model.attention={wanted.value} can't run here: {obstacle}; use auto")
        return wanted, "chosen"
    if device.type == "cpu":
        return AttentionBackend.block, "CPU: banded blocks, linear in sequence length"
    reasons: list[str] = []
    for backend, find in obstacles.items():
        obstacle = find()
        if not obstacle:
            return backend, "; ".join(["the fastest that runs here", *reasons])
        reasons.append(f"{backend.value}: {obstacle}")
    return AttentionBackend.block, "; ".join(reasons)


def make_attend(
    backend: AttentionBackend,
    shape: tuple[int, int],
    window: int | None,
    document_ids_BS: Tensor | None,
    device: torch.device,
    document_lengths: list[int] | None = None,
) -> Attend:
    """The attention function of all layers with this window for one forward pass over [B, S] tokens. The pattern of
    documents and window is computed here, once. `document_lengths`, row by row, are those of `document_ids_BS`; None:
    they are counted where they are needed. Raises ValueError when their sum isn't B·S."""
    if document_lengths is not None and sum(document_lengths) != shape[0] * shape[1]:
        raise ValueError(f"document_lengths: their sum is {sum(document_lengths)}, not B·S = {shape[0] * shape[1]}")
    if window is not None and window >= shape[1]:
        window = None
    match backend:
        case AttentionBackend.naive:
            return naive_attend(shape[1], window, document_ids_BS, device)
        case AttentionBackend.block:
            return block_attend(window, document_ids_BS, document_lengths)
        case AttentionBackend.varlen:
            return varlen_attend(shape, window, document_ids_BS, device, document_lengths)
        case AttentionBackend.flash3:
            return flash3_attend(shape, window, document_ids_BS, device, document_lengths)
        case AttentionBackend.flex:
            return flex_attend(shape, window, document_ids_BS, device)
        case AttentionBackend.auto:
            raise AssertionError("auto is resolved first")
