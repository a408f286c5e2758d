"""The whole sparse layer's cases: tokens that are routed evenly, and sides that compute the same in both dtypes."""

from __future__ import annotations

import pytest
import torch

from moe.bench import kernels
from moe.bench.kernel_cases_layer import DEEPSPEED, evenly_routed, layer_cases
from moe.config import ExpertsConfig, TopKRouterConfig
from moe.sparse.layer import build_sparse_mlp

HIDDEN = 32


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_evenly_routed_tokens_choose_each_expert_equally_often(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_EH = torch.randn(8, HIDDEN, generator=generator)
    x_BSH = torch.randn(2, 12, HIDDEN, generator=generator)
    moved_BSH = evenly_routed(x_BSH, weight_EH, top_k)
    logits_TE = moved_BSH.flatten(0, 1) @ weight_EH.T
    assert set(torch.bincount(logits_TE.topk(top_k).indices.flatten(), minlength=8).tolist()) == {24 * top_k // 8}
    # What the router doesn't see is left as it was.
    seen_BSH = (moved_BSH - x_BSH) @ torch.linalg.pinv(weight_EH) @ weight_EH
    torch.testing.assert_close(moved_BSH - x_BSH, seen_BSH, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_routings_are_measured_and_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = build_sparse_mlp(HIDDEN, 48, TopKRouterConfig(), ExpertsConfig()).to(dtype)
    x_BSH = torch.randn(2, 16, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    own, uniform = layer_cases(layer, {}, x_BSH)
    assert list(own.sides) == list(uniform.sides) == ["ours", DEEPSPEED]
    assert own.max_violation
    assert not uniform.max_violation
    for case in (own, uniform):
        kernels.measure(case, 1, kernels.Limits(flops=1e9, bytes=1e9), kernels.DIFFERENCE[dtype])


def test_a_layer_with_other_weights_is_not_timed() -> None:
    torch.manual_seed(0)
    layer = build_sparse_mlp(HIDDEN, 48, TopKRouterConfig(), ExpertsConfig())
    case = next(layer_cases(layer, {}, torch.randn(2, 16, HIDDEN)))
    with torch.no_grad():
        layer.experts.down_proj[3].mul_(1.1)  # DeepSpeed's layer has a copy from before
    with pytest.raises(RuntimeError, match=f"ours differs from {DEEPSPEED} by "):
        kernels.measure(case, 1, kernels.Limits(flops=1e9, bytes=1e9), 1e-4)
