"""`block`: one document at a time, or short ones together, in blocks of queries, each with only the keys that it can
see. Any device.

With a window the cost is linear in the sequence length; on CUDA it is the last resort.
Legend: B batch, S sequence, N query heads, G key/value heads, R = N / G heads that share keys, D head dimension,
W window, C queries of a block, K keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.attention.naive import sdpa
from moe.kernels.attention.pattern import Attend, document_bounds, visible
from moe.kernels.attention.together import Together
from moe.kernels.policy import widen

# Without a window a CPU takes blocks up to this length: its SDPA skips masked keys only in spans of 512. In longer
# documents that wastes a smaller share of the work.
LONGEST_IN_BLOCKS = 1024
BAND_BLOCKS = 4  # a window is C = W / 4 queries a block; a query computes W + C scores, of which it needs W
MIN_BAND_BLOCK, MAX_BAND_BLOCK = 32, 256


def block_attend(
    window: int | None, document_ids_BS: Tensor | None, document_lengths: list[int] | None = None
) -> Attend:
    lengths, masks = _cuts(document_ids_BS, document_lengths), CausalMasks()
    attend: Attend = partial(_block, lengths=lengths, window=window, masks=masks)
    if lengths is not None and document_ids_BS is not None:
        together = Together.of(lengths, document_ids_BS.device)
        if together is not None:
            attend = partial(_grouped, together=together, window=window, masks=masks)
    return partial(_widened, attend=attend)


def _cuts(document_ids_BS: Tensor | None, document_lengths: list[int] | None) -> list[int] | None:
    """Lengths of all documents of the batch, row by row; None when every row is one document."""
    if document_ids_BS is None:
        return None
    if document_lengths is None:
        batch, length = document_ids_BS.shape
        document_lengths = document_bounds(document_ids_BS, batch, length, document_ids_BS.device).diff().tolist()
    return document_lengths if len(document_lengths) > len(document_ids_BS) else None


def _widened(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, attend: Attend) -> Tensor:
    """On a CPU narrower dtypes are computed in float32: the backward pass of torch's SDPA takes 3 times as long in
    bfloat16."""
    dtype = q_BSND.dtype
    if q_BSND.device.type == "cpu":
        q_BSND, k_BSGD, v_BSGD = widen(q_BSND), widen(k_BSGD), widen(v_BSGD)
    return attend(q_BSND, k_BSGD, v_BSGD).to(dtype)


class CausalMasks:
    """The mask of which every block of a forward pass takes a slice, in all layers and documents. The backward pass
    needs the slices, so one mask takes less memory than many."""

    def __init__(self) -> None:
        self._mask, self._longest = torch.empty(0), 0

    def __call__(self, length: int, shared: int, like: Tensor) -> tuple[Tensor, int]:
        """(mask [C·R, longest + C], longest ≥ length): its column `longest` is the key at a block's first query."""
        if self._longest < length:
            block = causal_block(shared)
            mask_CK = _band(block, length + block, length, None, like)
            self._mask, self._longest = mask_CK.repeat_interleave(shared, 0), length
        return self._mask, self._longest


def _block(
    q_BSND: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    lengths: list[int] | None,
    window: int | None,
    masks: CausalMasks,
) -> Tensor:
    if lengths is None:
        return _documents([(q_BSND, k_BSGD, v_BSGD)], window, masks)[0].flatten(2)
    # split, not slices: the backward pass of a split is one concatenation, that of n slices n full-size additions.
    pieces = zip(*(tensor.flatten(0, 1)[None].split(lengths, 1) for tensor in (q_BSND, k_BSGD, v_BSGD)), strict=True)
    return torch.cat(_documents(pieces, window, masks), 1).view(*q_BSND.shape[:2], -1)


def _grouped(
    q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, together: Together, window: int | None, masks: CausalMasks
) -> Tensor:
    groups = zip(*(together.pad(tensor.flatten(0, 1)) for tensor in (q_BSND, k_BSGD, v_BSGD)), strict=True)
    return together.unpad(_documents(groups, window, masks)).view(*q_BSND.shape[:2], -1)


def _documents(pieces: Iterable[tuple[Tensor, Tensor, Tensor]], window: int | None, masks: CausalMasks) -> list[Tensor]:
    """The output of each (q, k, v) of a document, or of documents of one length."""
    pieces = list(pieces)
    shared = pieces[0][0].shape[2] // pieces[0][1].shape[2]
    in_blocks = [
        q.device.type == "cpu"
        and (window is None or window >= q.shape[1])
        and causal_block(shared) < q.shape[1] <= LONGEST_IN_BLOCKS
        for q, _, _ in pieces
    ]
    longest = max((q.shape[1] for (q, _, _), blocks in zip(pieces, in_blocks, strict=True) if blocks), default=0)
    outs = []
    for (q, k, v), blocks in zip(pieces, in_blocks, strict=True):
        if blocks:
            outs.append(_causal_blocks(q, k, v, shared, *masks(longest, shared, q)))
            continue
        if shared > 1 and longest:  # as blocks do: a view would keep all documents' q and k beside their copies
            q, k = q.clone(), k.clone()
        if window is not None and window < q.shape[1]:
            outs.append(_banded(q, k, v, window))
        else:
            outs.append(sdpa(q, k, v, None))
    return outs


def causal_block(shared: int) -> int:
    """C without a window, where `shared` heads share keys: the fastest of 64, 128, 192 and 256."""
    return 64 if shared > 1 else 128


def _causal_blocks(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, shared: int, mask: Tensor, longest: int) -> Tensor:
    """Blocks of C queries, each with the keys up to its last query. `mask` and `longest`: `CausalMasks`.

    Heads that share keys are rows of one product, C·R of them: SDPA splits a head's queries into pieces of 32, whose
    products are too small to use several threads well, and more rows into larger pieces.
    """
    length, block = q_BSND.shape[1], causal_block(shared)
    q, k = q_BSND.unflatten(2, (-1, shared)).transpose(2, 3).flatten(1, 2), k_BSGD  # q [B, S·R, G, D]
    if shared > 1:  # then q is a copy, and k may be a view of a tensor that holds the first q too
        k = k.clone(memory_format=torch.contiguous_format)
    outs, start = [], 0
    for rows in q.split(block * shared, 1):
        end = start + rows.shape[1] // shared
        outs.append(sdpa(rows, k[:, :end], v_BSGD[:, :end], mask[: rows.shape[1], longest - start :][:, :end]))
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
