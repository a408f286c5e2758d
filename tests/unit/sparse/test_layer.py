"""The sparse layer against a dense float64 oracle and transformers' Mixtral block, dropless and with capacity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.config import DropPolicy, ExpertBackend, ExpertChoiceRouterConfig, ExpertsConfig, TopKRouterConfig
from moe.sparse import Experts, RouterOutput, SparseMLP, balance_loss, build_sparse_mlp
from moe.sparse.routers.expert_choice import ExpertChoiceRouter

HIDDEN, INNER = 16, 24


def _layer(backend: ExpertBackend = ExpertBackend.auto, **router: object) -> SparseMLP:
    layer = build_sparse_mlp(HIDDEN, INNER, TopKRouterConfig(**router), ExpertsConfig(backend=backend))
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer


def _oracle(layer: SparseMLP, x_BSH: Tensor, routed: RouterOutput) -> Tensor:
    """Every expert on every token, as a dense sum Σₑ weight · expert(x); a dropped or unchosen expert has weight 0."""
    x_TH = x_BSH.flatten(0, 1)
    logits_TE = x_TH @ layer.gate.weight.t()
    ids_TK = routed.logits_TE.topk(layer.gate.config.top_k, dim=1).indices
    if layer.gate.config.norm_topk_prob:
        weights_TK = logits_TE.gather(1, ids_TK).softmax(1)
    else:
        weights_TK = logits_TE.softmax(1).gather(1, ids_TK)
    weights_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, weights_TK)
    kept_TE = torch.zeros_like(logits_TE)
    kept_TE[routed.choices.tokens_N, routed.choices.experts_N] = 1
    return _dense_sum(layer, x_BSH, weights_TE * kept_TE)


def _dense_sum(layer: SparseMLP, x_BSH: Tensor, weights_TE: Tensor) -> Tensor:
    x_TH = x_BSH.flatten(0, 1)
    gate_TEF, up_TEF = torch.einsum("th,egh->teg", x_TH, layer.experts.gate_up_proj).chunk(2, dim=2)
    y_TEH = torch.einsum("tef,ehf->teh", gate_TEF * gate_TEF.sigmoid() * up_TEF, layer.experts.down_proj)
    return (weights_TE.unsqueeze(2) * y_TEH).sum(1).view_as(x_BSH)


def _gradients(layer: SparseMLP, x_BSH: Tensor, y_BSH: Tensor, grad_BSH: Tensor) -> dict[str, Tensor]:
    named = {"x": x_BSH, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(y_BSH, list(named.values()), grad_BSH), strict=True))


CASES = {
    "mixtral": {},
    "top 1": {"top_k": 1, "norm_topk_prob": False},
    "all experts": {"num_experts": 5, "top_k": 5},
    "one expert": {"num_experts": 1, "top_k": 1},
    "13 experts top 3": {"num_experts": 13, "top_k": 3},
    "capacity by position": {"num_experts": 4, "capacity_factor": 0.8},
    "capacity by probability": {"num_experts": 4, "capacity_factor": 0.8, "drop_policy": DropPolicy.probability},
    "capacity of one": {"num_experts": 3, "top_k": 2, "capacity_factor": 0.01},
}


@pytest.mark.parametrize("backend", [ExpertBackend.loop, ExpertBackend.grouped_mm])
@pytest.mark.parametrize("router", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_dense_oracle(router: dict[str, object], backend: ExpertBackend) -> None:
    layer = _layer(backend, **router).double()
    x_BSH = torch.randn(3, 11, HIDDEN, dtype=torch.float64, requires_grad=True)
    grad_BSH = torch.randn_like(x_BSH)
    y_BSH, routed = layer(x_BSH)
    assert (routed.dropped.item() > 0) == ("capacity_factor" in router)
    expected_BSH = _oracle(layer, x_BSH, routed)
    torch.testing.assert_close(y_BSH, expected_BSH)
    ours, theirs = (_gradients(layer, x_BSH, y, grad_BSH) for y in (y_BSH, expected_BSH))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_token_whose_choices_are_all_dropped_passes_nothing() -> None:
    layer = _layer(num_experts=4, top_k=2, capacity_factor=0.01)
    with torch.no_grad():
        layer.gate.weight.zero_()  # ties: every token chooses the same experts
    x_BSH = torch.randn(2, 6, HIDDEN)
    y_BSH, routed = layer(x_BSH)
    assert routed.dropped.item() == 2 * 5 * 2
    assert y_BSH[:, 1:].count_nonzero() == 0
    assert y_BSH[:, 0].count_nonzero() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("router", [{}, {"capacity_factor": 0.8}], ids=["dropless", "capacity"])
def test_float32_and_bfloat16_stay_near_float64(
    router: dict[str, object], dtype: torch.dtype, tolerance: float
) -> None:
    layer = _layer(**router).to(dtype)
    x_BSH = torch.randn(2, 32, HIDDEN).to(dtype).requires_grad_()
    grad_BSH = torch.randn(2, 32, HIDDEN).to(dtype)
    y_BSH, routed = layer(x_BSH)
    assert y_BSH.dtype == dtype
    exact = _layer(**router).double()
    exact.load_state_dict(layer.state_dict())
    x64_BSH = x_BSH.detach().double().requires_grad_()
    y64_BSH = _oracle(exact, x64_BSH, routed)  # with the same choices: rounding may pick others
    ours, theirs = _gradients(layer, x_BSH, y_BSH, grad_BSH), _gradients(exact, x64_BSH, y64_BSH, grad_BSH.double())
    ours["y"], theirs["y"] = y_BSH.detach(), y64_BSH.detach()
    for name, tensor in ours.items():
        error = ((tensor.double() - theirs[name]).norm() / theirs[name].norm()).item()
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_equals_transformers_mixtral_block(implementation: str) -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=8, num_experts_per_tok=2
    )  # fmt: skip
    config._experts_implementation = implementation
    block = modeling.MixtralSparseMoeBlock(config)
    layer = _layer()
    block.load_state_dict(layer.state_dict())  # the same names and layout
    x_BSH, grad_BSH = torch.randn(2, 32, HIDDEN, requires_grad=True), torch.randn(2, 32, HIDDEN)
    y_BSH, _ = layer(x_BSH)
    expected_BSH = block(x_BSH)
    torch.testing.assert_close(y_BSH, expected_BSH, rtol=1e-5, atol=1e-6)
    expected_BSH.backward(grad_BSH)
    theirs = {"x": x_BSH.grad, **{name: p.grad for name, p in block.named_parameters()}}
    for name, gradient in _gradients(layer, x_BSH, y_BSH, grad_BSH).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


def test_two_runs_are_bitwise_equal() -> None:
    layer, x_BSH = _layer(), torch.randn(2, 64, HIDDEN, requires_grad=True)
    runs = []
    for _ in range(2):
        y_BSH, _ = layer(x_BSH)
        runs.append({"y": y_BSH.detach(), **_gradients(layer, x_BSH, y_BSH, torch.ones_like(y_BSH))})
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def test_recomputation_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x_BSH = _layer(capacity_factor=0.9), torch.randn(2, 16, HIDDEN, requires_grad=True)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        y_BSH, routed = run(x_BSH)
        loss = y_BSH.square().sum() + balance_loss([routed])
        results.append(torch.autograd.grad(loss, [x_BSH, *layer.parameters()]))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_parameters_are_named_as_transformers_names_them() -> None:
    with torch.device("meta"):
        layer = build_sparse_mlp(4096, 14336, TopKRouterConfig(), ExpertsConfig())
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "gate.weight": (8, 4096),
        "experts.gate_up_proj": (8, 28672, 4096),
        "experts.down_proj": (8, 4096, 14336),
    }


def test_megablocks_without_its_packages_is_one_line() -> None:
    layer = _layer(ExpertBackend.megablocks)
    with pytest.raises(ValueError, match=r"experts.backend=megablocks must have") as error:
        layer(torch.randn(1, 4, HIDDEN))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("per_token", [1, 2, 5])
def test_a_token_may_have_any_number_of_experts(per_token: int) -> None:
    router = ExpertChoiceRouter(HIDDEN, ExpertChoiceRouterConfig(num_experts=5, capacity_factor=per_token))
    layer = SparseMLP(router, Experts(HIDDEN, INNER, 5, ExpertsConfig())).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x_BSH = torch.randn(3, 11, HIDDEN, dtype=torch.float64, requires_grad=True)
    grad_BSH = torch.randn_like(x_BSH)
    y_BSH, routed = layer(x_BSH)
    per_token_T = torch.bincount(routed.choices.tokens_N, minlength=33)
    assert len(per_token_T.unique()) > 1 or per_token == 5
    assert y_BSH.flatten(0, 1)[per_token_T == 0].count_nonzero() == 0
    taken_TE = torch.zeros(33, 5, dtype=torch.float64)
    taken_TE[routed.choices.tokens_N, routed.choices.experts_N] = 1
    probs_TE = (x_BSH.flatten(0, 1) @ router.weight.t()).softmax(1)
    expected_BSH = _dense_sum(layer, x_BSH, probs_TE * taken_TE)
    torch.testing.assert_close(y_BSH, expected_BSH)
    ours, theirs = (_gradients(layer, x_BSH, y, grad_BSH) for y in (y_BSH, expected_BSH))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=lambda text, name=name: f"{name}: {text}")
