"""`block`: one document at a time, or short ones together, in blocks of queries, each with only the keys that it can
see. Any device.

With a window the cost is linear in the sequence length; on CUDA it is the last resort.
Legend: B batch, S sequence, N query heads, G key/value heads, R = N / G heads that share keys, D head dimension,
W window, C queries of a block, K keys.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.attention.naive import sdpa
from moe.kernels.attention.pattern import Attend, document_bounds, visible
from moe.kernels.attention.together import Together
from moe.kernels.policy import widen

# Without a window a CPU takes blocks too: its SDPA skips masked keys only in spans of 512. In longer documents less of
# the work is masked, and blocks don't pay.
LONGEST_IN_BLOCKS = 1024
BAND_BLOCKS = 4  # a window is C = W / 4 queries a block; a query computes W + C scores, of which it needs W
MIN_BAND_BLOCK, MAX_BAND_BLOCK = 32, 256


def block_attend(window: int | None, document_ids_BS: Tensor | None) -> Attend:
    lengths = _cuts(document_ids_BS)
    attend: Attend = partial(_block, lengths=lengths, window=window)
    if lengths is not None and document_ids_BS is not None:
        together = Together.of(lengths, document_ids_BS.device)
        if together is not None:
            attend = partial(_grouped, together=together, window=window)
    return partial(_widened, attend=attend)


def _cuts(document_ids_BS: Tensor | None) -> list[int] | None:
    """Lengths of all documents of the batch, row by row; None when every row is one document."""
    if document_ids_BS is None or bool((document_ids_BS[:, 0] == document_ids_BS[:, -1]).all()):
        return None
    batch, length = document_ids_BS.shape
    return document_bounds(document_ids_BS, batch, length, document_ids_BS.device).diff().tolist()


def _widened(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, attend: Attend) -> Tensor:
    """On a CPU narrower dtypes are computed in float32: the backward pass of torch's SDPA takes 3 times as long in
    bfloat16."""
    dtype = q_BSND.dtype
    if q_BSND.device.type == "cpu":
        q_BSND, k_BSGD, v_BSGD = widen(q_BSND), widen(k_BSGD), widen(v_BSGD)
    return attend(q_BSND, k_BSGD, v_BSGD).to(dtype)


def _block(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, lengths: list[int] | None, window: int | None) -> Tensor:
    if lengths is None:
        return _one_document(q_BSND, k_BSGD, v_BSGD, window).flatten(2)
    # split, not slices: the backward pass of a split is one concatenation, that of n slices n full-size additions.
    pieces = zip(*(tensor.flatten(0, 1)[None].split(lengths, 1) for tensor in (q_BSND, k_BSGD, v_BSGD)), strict=True)
    outs = [_one_document(q, k, v, window) for q, k, v in pieces]
    return torch.cat(outs, 1).view(*q_BSND.shape[:2], -1)


def _grouped(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, together: Together, window: int | None) -> Tensor:
    groups = zip(*(together.pad(tensor.flatten(0, 1)) for tensor in (q_BSND, k_BSGD, v_BSGD)), strict=True)
    y_TND = together.unpad([_one_document(q, k, v, window) for q, k, v in groups])
    return y_TND.view(*q_BSND.shape[:2], -1)


def _one_document(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int | None) -> Tensor:
    length, shared = q_BSND.shape[1], q_BSND.shape[2] // k_BSGD.shape[2]
    if window is not None and window < length:
        return _banded(q_BSND, k_BSGD, v_BSGD, window)
    if q_BSND.device.type == "cpu" and causal_block(shared) < length <= LONGEST_IN_BLOCKS:
        return _causal_blocks(q_BSND, k_BSGD, v_BSGD, shared)
    return sdpa(q_BSND, k_BSGD, v_BSGD, None)


def causal_block(shared: int) -> int:
    """C without a window, where `shared` heads share keys: the fastest of 64, 128, 192 and 256."""
    return 64 if shared > 1 else 128


def _causal_blocks(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, shared: int) -> Tensor:
    """Blocks of C queries, each with the keys up to its last query.

    Heads that share keys are rows of one product, C·R of them: SDPA makes a few products per head and 32 queries, which
    are too small for several threads.
    """
    length, block = q_BSND.shape[1], causal_block(shared)
    q = q_BSND.unflatten(2, (-1, shared)).transpose(2, 3).flatten(1, 2)  # [B, S·R, G, D]
    k, v = k_BSGD, v_BSGD
    if shared > 1:  # q is a copy: so are these, or they would keep the projections' one output beside it
        k, v = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (k, v))
    # Any block's mask is a slice of this one.
    mask = _band(block, length + block, length, None, q).repeat_interleave(shared, 0)
    outs, start = [], 0
    for rows in q.split(block * shared, 1):
        end = start + rows.shape[1] // shared
        outs.append(sdpa(rows, k[:, :end], v[:, :end], mask[: rows.shape[1], length - start :][:, :end]))
        start = end
    return torch.cat(outs, 1).unflatten(1, (length, shared)).transpose(2, 3).flatten(2, 3)


def _band(queries: int, keys: int, first_query: int, window: int | None, like: Tensor) -> Tensor:
    """[C, K] to add to scores: 0 where query first_query + c sees key k, −∞ elsewhere."""
    positions = torch.arange(first_query, first_query + queries, device=like.device)
    seen_CK = visible(positions, torch.arange(keys, device=like.device), window)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(~seen_CK, float("-inf"))


def _banded(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int) -> Tensor:
    """Blocks of C queries; block b sees its own keys and those of the `back` blocks before it, which cover its window.

    All blocks that have `back` blocks before them form the batch of one SDPA call with one [C, K] mask; the first few,
    which have fewer, take one call each.
    """
    batch, length, _, head_dim = q_BSND.shape
    block = min(max(-(-window // BAND_BLOCKS // 8) * 8, MIN_BAND_BLOCK), MAX_BAND_BLOCK)
    back = -(-(window - 1) // block)
    padding = -length % block  # outputs of the padding are computed, then cut off
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
