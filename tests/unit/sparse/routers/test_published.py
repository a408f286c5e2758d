"""Presets against transformers' implementations: choice, weights, layer output and auxiliary loss of the same weights.

Its auxiliary loss pools the tokens of all layers and adds up the k choices of a token: in one layer it is k times ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import ExpertsConfig
from moe.config.compose import load_config
from moe.model.mlp import DenseMLP
from moe.sparse import SparseMLP, build_sparse_mlp
from tests.unit.sparse.routers.helpers import ids_of, weights_of

transformers = pytest.importorskip("transformers")
HIDDEN, INNER, EXPERTS, TOP_K = 16, 24, 16, 4


def _layer(preset: str, *overrides: str, shared: bool = False) -> SparseMLP:
    router = load_config([f"router={preset}", f"router.num_experts={EXPERTS}", *overrides]).router
    layer = build_sparse_mlp(
        HIDDEN, INNER, router, ExpertsConfig(), shared_experts=DenseMLP(HIDDEN, 2 * INNER) if shared else None
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer


def _compare(layer: SparseMLP, block: nn.Module, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Their router's logits and chosen experts [T, K], after everything was found equal."""
    block.load_state_dict(layer.state_dict())  # the same names and layout, biases too
    y_BSH, routed = layer(x_BSH)
    torch.testing.assert_close(y_BSH, block(x_BSH), rtol=0, atol=1e-5)
    router: Any = block.gate
    logits_TE, weights_TK, ids_TK = router(x_BSH.flatten(0, 1))
    theirs, ours = (
        torch.zeros(len(ids), EXPERTS).scatter(1, ids, weights)
        for ids, weights in ((ids_TK, weights_TK), (ids_of(routed), weights_of(routed)))
    )
    assert torch.equal(theirs > 0, ours > 0), "the choice"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(routed.logits_TE, logits_TE, rtol=0, atol=1e-5)
    return logits_TE, ids_TK


def _x() -> Tensor:
    return torch.randn(2, 32, HIDDEN, generator=torch.Generator().manual_seed(0))


def test_deepseek_v3() -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K,
        n_group=8, topk_group=4, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    layer = _layer("deepseek_v3", f"router.top_k={TOP_K}", shared=True)
    bias_E: Any = layer.gate.e_score_correction_bias
    bias_E.copy_(torch.linspace(-0.4, 0.4, EXPERTS).roll(5))
    _, routed = layer(_x())
    with_bias, without = ids_of(routed), layer.gate.scores(routed.logits_TE)[0].topk(TOP_K).indices  # type: ignore[operator]
    assert not torch.equal(with_bias.sort().values, without.sort().values), "bias and groups must matter here"
    _compare(layer, theirs.DeepseekV3MoE(config), _x())


CASES = [
    ("olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", {"intermediate_size": INNER, "norm_topk_prob": False}),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", {"moe_intermediate_size": INNER, "norm_topk_prob": True}),
    ("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", {"intermediate_size": INNER}),
]


@pytest.mark.parametrize(("preset", "config_name", "block_name", "options"), CASES, ids=[case[0] for case in CASES])
def test_softmax_routers(preset: str, config_name: str, block_name: str, options: dict[str, Any]) -> None:
    experts = "num_local_experts" if preset == "mixtral" else "num_experts"
    config = getattr(transformers, config_name)(
        hidden_size=HIDDEN, num_experts_per_tok=TOP_K, **{experts: EXPERTS}, **options
    )
    module = pytest.importorskip(f"transformers.models.{preset}.modeling_{preset}")
    layer = _layer(preset, f"router.top_k={TOP_K}")
    logits_TE, _ = _compare(layer, getattr(module, block_name)(config), _x())
    _, routed = layer(_x())
    expected = module.load_balancing_loss_func((logits_TE,), EXPERTS, TOP_K)
    ours = routed.losses["load_balancing_loss"].value
    torch.testing.assert_close(TOP_K * ours, expected, rtol=1e-5, atol=0)


def test_their_auxiliary_loss_pools_layers() -> None:
    """Two layers collapsed onto different experts: ours is E in each, theirs that of a balanced half."""
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = [torch.full((8, 2), -30.0).index_fill(1, torch.tensor([expert]), 30.0) for expert in (0, 1)]
    assert module.load_balancing_loss_func(tuple(layers), 2, 1).item() == pytest.approx(1.0)
    assert module.load_balancing_loss_func((layers[0],), 2, 1).item() == pytest.approx(2.0)
