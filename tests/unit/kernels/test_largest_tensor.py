"""What attention and the loss never allocate, not even for a moment: [S, S] scores, [T, V] logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import AttentionBackend
from moe.kernels import bfloat16_products
from moe.kernels.attention import make_attend
from moe.kernels.bfloat16_products import NarrowRoute
from moe.kernels.cross_entropy import SLICE_ELEMENTS, cross_entropy_reference, linear_cross_entropy

CPU = torch.device("cpu")
T, V, S = 3072, 4096, 2048
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 16


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def largest(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Over a forward and a backward pass."""
    with LargestTensor() as mode:
        function(*inputs).sum().backward()
    return mode.elements


@pytest.fixture(params=[torch.float32, torch.bfloat16, "widened"], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    widened = request.param == "widened"
    monkeypatch.setattr(bfloat16_products, "_route", NarrowRoute(widened, "test"))
    return torch.bfloat16 if widened else request.param


def test_the_loss_never_has_all_logits(dtype: torch.dtype) -> None:
    def inputs() -> list[Tensor]:
        return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((T, 16), (V, 16))]

    labels_T = torch.randint(V, (T,))
    assert largest(lambda x, w: linear_cross_entropy(x, w, labels_T), *inputs()) <= SLICE_ELEMENTS["cpu"] < T * V
    assert largest(lambda x, w: cross_entropy_reference(x @ w.t(), labels_T), *inputs()) == T * V, "the count sees them"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 512])
def test_attention_never_has_all_scores(window: int | None, documents: bool) -> None:
    ids_BS = (torch.arange(S) // 700)[None] if documents else None

    def run(backend: AttentionBackend) -> int:
        shapes = [(1, S, heads, HEAD_DIM) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)]
        inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
        return largest(make_attend(backend, (1, S), window, ids_BS, CPU), *inputs)

    assert run(AttentionBackend.block) <= S * S / 2
    assert run(AttentionBackend.naive) >= S * S, "the count sees them"
