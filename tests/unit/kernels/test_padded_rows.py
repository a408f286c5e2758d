"""Padding of experts' rows: sizes, both directions, and a SwiGLU that doesn't see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels import bfloat16_products, padded_rows
from moe.kernels.bfloat16_products import NarrowRoute
from moe.kernels.expert_swiglu import PerExpertSwiGLU
from moe.kernels.grouped_swiglu import loop_ffn
from moe.kernels.padded_rows import PaddedRows, RowReader, padded_size, pads

CPU = torch.device("cpu")
COUNTS = [70, 0, 3, 64, 129, 0]


def test_sizes_are_few_and_little_larger() -> None:
    sizes = [padded_size(count) for count in range(4097)]
    assert sizes[0] == 0
    assert all(0 <= size - count <= max(64, count / 8) for count, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    for low in (512, 1024, 2048):
        assert len(set(sizes[low + 1 : 2 * low + 1])) == 8
    assert len(set(sizes[1:513])) <= 7 + 7


@pytest.fixture(autouse=True)
def bfloat16_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_products, "_route", NarrowRoute(False, "test"))


def test_only_bfloat16_on_a_cpu_is_padded() -> None:
    assert pads(CPU, torch.bfloat16)
    assert not pads(CPU, torch.float32)
    assert not pads(torch.device("cuda"), torch.bfloat16)
    rows_NH = torch.randn(sum(COUNTS), 4)
    plain = PaddedRows.of(COUNTS, CPU, torch.float32)
    assert not plain.pads
    read = RowReader(rows_NH, plain)
    for group in plain.groups():
        assert read(group).data_ptr() == rows_NH[group.rows].data_ptr()  # not copied
        with plain.written(rows_NH, rows_NH[:0], group) as result:
            assert result.data_ptr() == rows_NH[group.rows].data_ptr()


@pytest.mark.parametrize("of_tokens", [False, True])
def test_rows_are_read_with_zeros_and_written_without(of_tokens: bool) -> None:
    rows = sum(COUNTS)
    x = torch.randn(rows, 4).bfloat16()
    tokens_N = torch.randint(rows, (rows,)) if of_tokens else None
    rows_NH = x if tokens_N is None else x[tokens_N]
    padding = PaddedRows.of(COUNTS, CPU, torch.bfloat16)
    read, found_NH = RowReader(x, padding, tokens_N), torch.full_like(rows_NH, float("nan"))
    buffer_MH, experts = x.new_empty(padding.largest, 4), []
    for group in padding.groups():
        read_rows = read(group)
        assert torch.equal(read_rows[: group.count], rows_NH[group.rows])
        assert (read_rows[group.count :] == 0).all()
        assert len(read_rows) == group.size == padded_size(COUNTS[group.expert])
        with padding.written(found_NH, buffer_MH, group) as result:
            result.copy_(read_rows)
        experts.append(group.expert)
    assert torch.equal(found_NH, rows_NH)
    assert experts == [expert for expert, count in enumerate(COUNTS) if count]


def _run(function: object, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*inputs)  # type: ignore[operator]
    y.backward(grad)
    return [y.detach(), *[one.grad for one in inputs if one.grad is not None]]


@pytest.mark.parametrize("counts", [COUNTS, [0, 0], [300], [1, 513]], ids=str)
def test_padding_changes_no_row_and_no_gradient(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where the padding is all that may differ from the loop. Memory that isn't written is NaN."""
    monkeypatch.setattr(padded_rows, "pads", lambda device, dtype: True)
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(counts), 8), (len(counts), 24, 8), (len(counts), 8, 12), (sum(counts), 8)
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        ours = _run(lambda x, gate_up, down: PerExpertSwiGLU.apply(x, gate_up, down, counts), tensors, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    theirs = _run(lambda x, gate_up, down: loop_ffn(x, counts, gate_up, down), tensors, grad)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
