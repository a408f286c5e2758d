"""What layers share: the halves of a batch see the documents of their own sequences."""

from __future__ import annotations

import torch

from moe.config import AttentionBackend
from moe.kernels.rotary import rotary_table
from moe.model.context import Context


def test_halves_attend_as_the_whole() -> None:
    lengths = [[3, 5, 2], [10], [1, 9]]
    ids_BS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 10, heads, 8, generator=generator) for heads in (4, 2, 2))
    table = rotary_table(0, 10, 8, 1e4, cpu, torch.float32)
    flat = [length for row in lengths for length in row]
    whole = Context(table, AttentionBackend.block, (3, 10), cpu, ids_BS, None, None, None, flat)
    halves = whole.halves()
    assert [half.document_lengths for half in halves] == [[3, 5, 2, 10], [1, 9]]
    outs = [
        half.attend(0, 4, *(x[part] for x in (q, k, v)))
        for half, part in zip(halves, (slice(2), slice(2, 3)), strict=True)
    ]
    torch.testing.assert_close(torch.cat(outs), whole.attend(0, 4, q, k, v))
