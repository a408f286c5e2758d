"""The MegaBlocks adapter on a CPU, with stand-ins for the packages that enforce their published interface.

The stand-ins check what the CUDA kernels require (dtypes, host or device, contiguity) and leave the same memory
unwritten. Whether the real kernels compute correctly must be tested on a GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moe.config import ExpertBackend, ExpertsConfig, TopKRouterConfig
from moe.kernels import megablocks, permute
from moe.kernels.expert_backends import resolve_backend
from moe.kernels.expert_swiglu import GroupedSwiGLU
from moe.kernels.grouped_swiglu import loop_ffn
from moe.sparse.dispatch import sort_by_expert
from moe.sparse.layer import build_sparse_mlp
from moe.sparse.routers import Choices


def _gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert a.is_contiguous()
    assert b.is_contiguous()
    groups = a.split(batch_sizes.tolist())
    if trans_a:
        result = torch.full((len(groups), a.shape[1], b.shape[1]), torch.nan, dtype=a.dtype)
        for expert, (left, right) in enumerate(zip(groups, b.split(batch_sizes.tolist()), strict=True)):
            if len(left):  # the real kernel leaves the result of an empty group unwritten
                result[expert] = left.t() @ right
        return result
    return torch.cat([rows @ (weight.t() if trans_b else weight) for rows, weight in zip(groups, b, strict=True)])


def _check_bins(indices: Tensor, bin_ids: Tensor, bins: Tensor) -> None:
    assert indices.dtype == bin_ids.dtype == bins.dtype == torch.int32
    assert indices.ndim == bin_ids.ndim == bins.ndim == 1
    assert torch.equal(torch.bincount(bin_ids, minlength=len(bins)).cumsum(0), bins)


def _gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    _check_bins(indices, bin_ids, bins)
    assert len(indices) == len(x) * top_k
    return x[indices.long() // top_k]


def _scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    _check_bins(indices, bin_ids, bins)
    assert weights is None
    slots = torch.zeros(len(indices), x.shape[1], dtype=x.dtype).index_copy(0, indices.long(), x)
    return slots.view(-1, top_k, x.shape[1]).sum(1)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("megablocks", "megablocks.ops", "grouped_gemm", "grouped_gemm.backend")
    modules = {name: ModuleType(name) for name in names}
    modules["megablocks.ops"].__dict__.update(
        gather=_gather, scatter=_scatter, inclusive_cumsum=lambda x, dim: x.cumsum(dim, dtype=x.dtype)
    )
    modules["grouped_gemm.backend"].__dict__.update(gmm=_gmm)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    megablocks._packages.cache_clear()
    yield
    megablocks._packages.cache_clear()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("counts", [[3, 4, 5], [0, 7, 0, 2], [6]])
def test_products_give_the_oracles_results(counts: list[int]) -> None:
    shapes = (sum(counts), 8), (len(counts), 12, 8), (len(counts), 8, 6)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad = torch.randn(sum(counts), 8, dtype=torch.float64)
    y = GroupedSwiGLU.apply(*tensors, lambda: counts, megablocks.products(counts))
    x, gate_up, down = tensors
    expected = loop_ffn(x, counts, gate_up, down)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (1, 1)])
def test_permutation_equals_ours(experts: int, top_k: int) -> None:
    ids_TK = torch.rand(9, experts).argsort(1)[:, :top_k]
    counts_E = torch.bincount(ids_TK.flatten(), minlength=experts)
    x_TH = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(9, top_k, dtype=torch.float64, requires_grad=True)
    order, _ = sort_by_expert(Choices.top_k(ids_TK, weights_TK), counts_E)
    results = []
    for rows in (permute, megablocks):
        x_NH = rows.gather_rows(x_TH, order)
        y_TH = rows.combine_rows(x_NH.tanh(), weights_TK, order)
        results.append((x_NH, y_TH, *torch.autograd.grad(y_TH.square().sum(), (x_TH, weights_TK))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_layer_computes_the_loops_results(capacity: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a capacity tokens have fewer choices than K, which MegaBlocks' row kernels can't move: ours do."""
    monkeypatch.setattr(megablocks, "require", lambda device, dtype: None)  # that it must be bfloat16 on CUDA
    moved: list[str] = []
    gather = megablocks.gather_rows
    monkeypatch.setattr(megablocks, "gather_rows", lambda *args: moved.append("by megablocks") or gather(*args))
    router = TopKRouterConfig(num_experts=4, capacity_factor=capacity)
    layers = [
        build_sparse_mlp(8, 6, router, ExpertsConfig(backend=backend)).double()
        for backend in (ExpertBackend.loop, ExpertBackend.megablocks)
    ]
    generator = torch.Generator().manual_seed(0)
    for parameter in layers[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    layers[1].load_state_dict(layers[0].state_dict())
    x_BSH = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    results = []
    for layer in layers:
        y_BSH, _ = layer(x_BSH)
        results.append((y_BSH, *torch.autograd.grad(y_BSH.square().sum(), (x_BSH, *layer.parameters()))))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)
    assert bool(moved) is (capacity is None)


@pytest.mark.usefixtures("stand_ins")
def test_needs_bfloat16_on_cuda() -> None:
    config = ExpertsConfig(backend=ExpertBackend.megablocks)
    with pytest.raises(ValueError, match=r"must have bfloat16 on CUDA .*, not float32 on cpu"):
        resolve_backend(config, torch.device("cpu"), torch.float32, (256, 896))
    backend, _ = resolve_backend(config, torch.device("cuda"), torch.bfloat16, (256, 896))
    assert backend is ExpertBackend.megablocks


def test_without_the_packages_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megablocks", None)  # makes importing it fail even if it is installed
    monkeypatch.setitem(sys.modules, "megablocks.ops", None)
    megablocks._packages.cache_clear()
    with pytest.raises(
        ValueError, match=r"experts.backend=megablocks must have its packages .*launch/install_megablocks.sh"
    ) as error:
        megablocks.require(torch.device("cuda"), torch.bfloat16)
    assert "\n" not in str(error.value)
