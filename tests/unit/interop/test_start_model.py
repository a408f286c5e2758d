"""Rows of added tokens are the mean of the others, whatever rows the source has behind its tokenizer's."""

from __future__ import annotations

import pytest
import torch

from moe.interop.start_model import WithAddedRows
from moe.interop.tensor_files import TensorInfo


class Source:
    """Tensors in memory."""

    def __init__(self, tensors):
        self.tensors = tensors

    def infos(self):
        return {name: TensorInfo(one.dtype, tuple(one.shape)) for name, one in self.tensors.items()}

    def read(self, name, expert=None):
        return self.tensors[name] if expert is None else self.tensors[name][expert]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("there", "rows"), [(10, 12), (10, 16), (11, 12), (16, 16), (12, 12)])
def test_rows(dtype, there, rows):
    generator = torch.Generator().manual_seed(0)
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.experts.down_proj")
    shapes = ((there, 8), (there, 8), (4, 8, 8))
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in zip(names, shapes, strict=True)
    }
    changed = WithAddedRows(Source(tensors), 10, 12, rows)
    for name, info in changed.infos().items():
        assert info.dtype == dtype
        assert info.shape == (tensors[name].shape if name == names[2] else (rows, 8))
    for name in names[:2]:
        before, after = tensors[name], changed.read(name)
        mean = before[:10].double().mean(0).to(dtype)
        assert torch.equal(after[:10], before[:10])
        assert torch.equal(after[10:12], mean.expand(2, -1))
        assert torch.equal(after[12:there], before[12:])  # rows that no token had, also of the new ones
        assert torch.equal(after[max(12, there) :], mean.expand(rows - max(12, there), -1))
    assert torch.equal(changed.read(names[2], 3), tensors[names[2]][3])
