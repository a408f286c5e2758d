"""Causal attention over packed documents, with grouped queries and a sliding window: one function, four back-ends.

Query i sees key j when both are in one document and 0 ≤ i − j < W: the window counts the query's own key. (The
published reference code let it see one key more.) `W = None` is full causal attention.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension, W window, C queries of a block, K keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import AttentionBackend
from moe.errors import UserError
from moe.model.norm import widen

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, N, D], k and v [B, S, G, D] → [B, S, N·D]

# Queries per block on a CPU. Its SDPA skips only whole spans of 512 keys: up to there, cutting the queries saves work.
CAUSAL_BLOCK, CAUSAL_SPAN = 128, 512
BAND_BLOCKS = 4  # a window's queries are cut in so many blocks: each then sees W + C keys for the W it needs
MIN_BAND_BLOCK, MAX_BAND_BLOCK = 32, 256


def resolve_attention(
    wanted: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionBackend, str]:
    """The back-end that will run, and why. Raises UserError when an explicit one can't run on the device and dtype."""
    if wanted in (AttentionBackend.naive, AttentionBackend.block):
        return wanted, "chosen"
    obstacles = {
        AttentionBackend.varlen: _varlen_obstacle(device, dtype, head_dim),
        AttentionBackend.flex: _flex_obstacle(device),
    }
    if wanted is not AttentionBackend.auto:
        if obstacles[wanted]:
            raise UserError(f"model.attention={wanted.value} can't run here: {obstacles[wanted]}; use auto")
        return wanted, "chosen"
    for backend, obstacle in obstacles.items():
        if not obstacle:
            return backend, "the fastest that runs here"
    if device.type == "cpu":
        return AttentionBackend.block, "CPU: banded blocks, linear in sequence length"
    reasons = "; ".join(f"{backend.value}: {obstacle}" for backend, obstacle in obstacles.items())
    return AttentionBackend.block, reasons


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16, this is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"model.head_dim={head_dim} must be a multiple of 8 and ≤ 256"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return f"varlen_attn of torch {torch.__version__} has no window"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention needs compute capability ≥ 8.0"
    return ""


def _flex_obstacle(device: torch.device) -> str:
    if device.type != "cuda":
        return f"flex_attention has a backward pass on CUDA only, this is {device.type}"
    from torch.utils._triton import has_triton

    return "" if has_triton() else "it needs triton"


def make_attend(
    backend: AttentionBackend, shape: tuple[int, int], window: int | None, document_ids_BS: Tensor | None, device: Any
) -> Attend:
    """What every layer of one forward pass calls: the pattern of documents and window is worked out once, here."""
    batch, length = shape
    if window is not None and window >= length:
        window = None
    if backend is AttentionBackend.naive:
        return partial(_naive, mask=pattern_mask(length, window, document_ids_BS, device))
    if backend is AttentionBackend.block:
        return partial(_block, lengths=_cuts(document_ids_BS), window=window)
    if backend is AttentionBackend.varlen:
        bounds = document_bounds(document_ids_BS, batch, length, device)
        return partial(_varlen, bounds=bounds, longest=length, window=window)
    assert backend is AttentionBackend.flex, backend
    return partial(_flex, block_mask=_flex_mask(batch, length, window, document_ids_BS, device))


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


def sdpa(q_BCND: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C, N, D]; without a mask plain causal attention of as many keys as queries."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BCND, k_BKGD, v_BKGD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def _naive(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, mask: Tensor) -> Tensor:
    """The reference: softmax(q kᵀ / √D) v with every score written out, float32 or float64."""
    groups = q_BSND.shape[2] // k_BSGD.shape[2]
    q, k, v = (widen(tensor).transpose(1, 2) for tensor in (q_BSND, k_BSGD, v_BSGD))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores_BNSS = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    probs_BNSS = scores_BNSS.masked_fill(~mask, float("-inf")).softmax(-1)
    return (probs_BNSS @ v).transpose(1, 2).flatten(2).to(q_BSND.dtype)


# --- block: documents one by one, each in blocks of queries that see the keys they need and no others -----------------


def _cuts(document_ids_BS: Tensor | None) -> list[int] | None:
    """Lengths of all documents of the batch in order, rows one after another; None when every row is one document."""
    if document_ids_BS is None or bool((document_ids_BS[:, 0] == document_ids_BS[:, -1]).all()):
        return None
    batch, length = document_ids_BS.shape
    return document_bounds(document_ids_BS, batch, length, document_ids_BS.device).diff().tolist()


def _block(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, lengths: list[int] | None, window: int | None) -> Tensor:
    if lengths is None:
        return _one_document(q_BSND, k_BSGD, v_BSGD, window).flatten(2)
    # split, not slices: the gradient of n slices is n full-size sums, that of a split is one concatenation.
    pieces = zip(*(tensor.flatten(0, 1)[None].split(lengths, 1) for tensor in (q_BSND, k_BSGD, v_BSGD)), strict=True)
    outs = [_one_document(q, k, v, window) for q, k, v in pieces]
    return torch.cat(outs, 1).view(*q_BSND.shape[:2], -1)


def _one_document(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int | None) -> Tensor:
    length = q_BSND.shape[1]
    if window is not None and window < length:
        return _banded(q_BSND, k_BSGD, v_BSGD, window)
    on_cpu = q_BSND.device.type == "cpu"
    if not on_cpu or not CAUSAL_BLOCK < length <= CAUSAL_SPAN:
        return sdpa(q_BSND, k_BSGD, v_BSGD, None)
    mask_CK = _band(CAUSAL_BLOCK, length + CAUSAL_BLOCK, length, None, q_BSND)  # any block's mask is a slice of it
    outs, start = [], 0
    for q in q_BSND.split(CAUSAL_BLOCK, 1):
        end = start + q.shape[1]
        mask = mask_CK[: q.shape[1], length - start :][:, :end] if start else None
        outs.append(sdpa(q, k_BSGD[:, :end], v_BSGD[:, :end], mask))
        start = end
    return torch.cat(outs, 1)


def _band(queries: int, keys: int, first_query: int, window: int | None, like: Tensor) -> Tensor:
    """[C, K] to add to scores: 0 where query first_query + c sees key k, −∞ elsewhere."""
    positions = torch.arange(first_query, first_query + queries, device=like.device)
    seen_CK = visible(positions, torch.arange(keys, device=like.device), window)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(~seen_CK, float("-inf"))


def _banded(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int) -> Tensor:
    """Blocks of C queries; block b sees its own keys and those of the `back` blocks before it, which hold its window.

    All blocks that have `back` blocks before them are one SDPA call over a batch of blocks with one [C, K] mask; the
    few at the start, which have fewer, are a call each.
    """
    batch, length, _, head_dim = q_BSND.shape
    block = min(max(-(-window // BAND_BLOCKS // 8) * 8, MIN_BAND_BLOCK), MAX_BAND_BLOCK)
    back = -(-(window - 1) // block)
    padding = -length % block  # queries after the end see the keys before them and are cut off again
    blocks = (length + padding) // block
    q, k, v = (
        F.pad(tensor, (0, 0, 0, 0, 0, padding)).unflatten(1, (blocks, block)) for tensor in (q_BSND, k_BSGD, v_BSGD)
    )
    mask_CK = _band(block, (back + 1) * block, back * block, window, q_BSND)
    outs = []
    for index in range(min(back, blocks)):
        keys, values = (tensor[:, : index + 1].flatten(1, 2) for tensor in (k, v))
        outs.append(sdpa(q[:, index], keys, values, mask_CK[:, (back - index) * block :]))
    full = blocks - back
    if full > 0:
        keys, values = (
            torch.cat([tensor[:, shift : shift + full] for shift in range(back + 1)], dim=2).flatten(0, 1)
            for tensor in (k, v)
        )
        out = sdpa(q[:, back:].flatten(0, 1), keys, values, mask_CK)
        outs.append(out.reshape(batch, full * block, -1, head_dim))
    return torch.cat(outs, 1)[:, :length]


# --- varlen and flex: CUDA --------------------------------------------------------------------------------------------


def document_bounds(document_ids_BS: Tensor | None, batch: int, length: int, device: Any) -> Tensor:
    """int32 [documents + 1]: where each document of the flattened batch begins, and the end; rows never join."""
    starts_BS = torch.zeros(batch, length, dtype=torch.bool, device=device)
    starts_BS[:, 0] = True
    if document_ids_BS is not None:
        starts_BS[:, 1:] |= document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([batch * length]))).int()


def _varlen(
    q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, bounds: Tensor, longest: int, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sizes = (-1 if window is None else window - 1, 0)  # keys left of the query's own, keys right of it
    q, k, v = (tensor.flatten(0, 1).contiguous() for tensor in (q_BSND, k_BSGD, v_BSGD))
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=sizes, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.view(*q_BSND.shape[:2], -1)


def _flex_mask(batch: int, length: int, window: int | None, document_ids_BS: Tensor | None, device: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    documents = torch.zeros(batch, length, dtype=torch.int32, device=device)
    if document_ids_BS is not None:
        documents = document_ids_BS
    reach = length if window is None else window

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < reach) & (documents[b, i] == documents[b, j])

    return create_block_mask(seen, batch, None, length, length, device=device)


_compiled_flex: list[Any] = []  # compiled on first use: importing this module must not start a compiler


def _flex(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, block_mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if q_BSND.is_cuda and not _compiled_flex:
        _compiled_flex.append(torch.compile(flex_attention))
    function = _compiled_flex[0] if q_BSND.is_cuda else flex_attention
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BSND, k_BSGD, v_BSGD))
    return function(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2).flatten(2)
