"""The rotation kernel, interpreted, against the definition in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe.kernels.rotary import RotaryTable, rotary_table, rotated_reference

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
CPU = torch.device("cpu")


def inputs(batch: int, sequence: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, RotaryTable]:
    x_BSND = torch.randn(batch, sequence, heads, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x_BSND, rotary_table(3, sequence, head_dim, 1e4, CPU, dtype)


def expected(x_BSND: Tensor, table: RotaryTable, *, back: bool = False) -> Tensor:
    sign = -1.0 if back else 1.0
    return rotated_reference(x_BSND.double(), RotaryTable(table.cos_S1D.double(), table.sin_S1D.double() * sign))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 8), (1, 2, 40, 128), (1, 3, 17, 20), (2, 1, 1, 2), (0, 4, 2, 8), (1, 2, 0, 8)], ids=str
)
@pytest.mark.parametrize("back", [False, True])
def test_equals_the_definition(
    fused: SimpleNamespace, dtype: torch.dtype, shape: tuple[int, int, int, int], back: bool
) -> None:
    x_BSND, table = inputs(*shape, dtype)
    out_BSND = torch.full_like(x_BSND, float("nan"))
    assert fused.rotary.rotate(x_BSND, table.cos_S1D, table.sin_S1D, out_BSND, back=back) is out_BSND
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        out_BSND.double(), expected(x_BSND, table, back=back), rtol=tolerance, atol=4 * tolerance
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_parts_of_wider_tensors(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    """Some heads of a joint projection, sequence and heads exchanged, a slice of a table, a gradient of ones."""
    x_BSND, table = inputs(2, 5, 6, 16, dtype)
    wider = torch.full((2, 5, 9, 16), float("nan"), dtype=dtype)
    whole = rotary_table(0, 8, 16, 1e4, CPU, dtype)
    cos_S1D, sin_S1D = whole.cos_S1D[3:], whole.sin_S1D[3:]
    turned = x_BSND.transpose(1, 2).contiguous().transpose(1, 2)
    fused.rotary.rotate(turned, cos_S1D, sin_S1D, wider[:, :, 1:7], back=False)
    torch.testing.assert_close(
        wider[:, :, 1:7].double(), expected(x_BSND, table), rtol=TOLERANCES[dtype], atol=4 * TOLERANCES[dtype]
    )
    assert wider[:, :, 0].isnan().all()
    assert wider[:, :, 7:].isnan().all()
    ones = torch.ones((), dtype=dtype).expand(2, 5, 6, 16)
    out = fused.rotary.rotate(ones, cos_S1D, sin_S1D, torch.empty(ones.shape, dtype=dtype), back=True)
    torch.testing.assert_close(
        out.double(), expected(ones, table, back=True), rtol=TOLERANCES[dtype], atol=4 * TOLERANCES[dtype]
    )


def test_back_undoes_it(fused: SimpleNamespace) -> None:
    x_BSND, table = inputs(1, 4, 3, 24, torch.float32)
    there = fused.rotary.rotate(x_BSND, table.cos_S1D, table.sin_S1D, torch.empty_like(x_BSND), back=False)
    back = fused.rotary.rotate(there, table.cos_S1D, table.sin_S1D, torch.empty_like(x_BSND), back=True)
    torch.testing.assert_close(back, x_BSND)
